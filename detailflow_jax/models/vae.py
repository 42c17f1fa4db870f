"""The KL autoencoder (LDM family): images to a Gaussian over latents, and latents to images.

Shapes: B batch, H x W pixels, C latent channels, S = 2^(levels - 1) stride, h = H/S, w = W/S.
The defaults are KL-16, the autoencoder that MAR and FlowAR use; other members of the family differ
in `VAEConfig` only.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from detailflow_jax.models import layers
from detailflow_jax.models.autoencoder import (
    LOGVAR_RANGE,
    Autoencoder,
    AutoencoderConfig,
    Posterior,
)
from detailflow_jax.ops import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig(AutoencoderConfig):
    """Everything that shapes the network. The defaults are KL-16 (66.5M parameters).

    Attributes, besides those of every autoencoder:
      channels: width of the first level.
      multipliers: width of every level as a multiple; each level but the last halves the sides.
      res_blocks: residual blocks per level of the encoder; the decoder has one more.
      quant_conv: 1x1 convolution after the encoder.
      post_quant_conv: the same before the decoder; None: as `quant_conv`.
      middle_attention: attention between the two residual blocks in the middle of either half.
      encoder_attention: levels of the encoder with attention after each residual block; None: the
        last one.
      decoder_attention: the same for the decoder; None: no level.
      norm_groups: groups of every group norm; divides every level's width.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    res_blocks: int = 2
    latent_channels: int = 16
    scale_factor: float | tuple[float, ...] = 0.2325
    quant_conv: bool = True
    post_quant_conv: bool | None = None
    middle_attention: bool = True
    encoder_attention: tuple[int, ...] | None = None
    decoder_attention: tuple[int, ...] | None = None
    norm_groups: int = 32

    def __post_init__(self):
        super().__post_init__()
        for name in ("channels", "res_blocks", "norm_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                f"multipliers={self.multipliers}; expected one per level, each at least 1"
            )
        # A config file holds lists; a static argument must hash.
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        if self.post_quant_conv is None:
            object.__setattr__(self, "post_quant_conv", self.quant_conv)
        usual = {"encoder_attention": (self.stride_power,), "decoder_attention": ()}
        for name, levels in usual.items():
            given = getattr(self, name)
            object.__setattr__(self, name, levels if given is None else tuple(given))
        self._check_levels()

    def _check_levels(self) -> None:
        for width in (self.channels * m for m in self.multipliers):
            if width % self.norm_groups:
                raise ValueError(
                    f"a level is {width} channels wide, not a multiple of norm_groups="
                    f"{self.norm_groups}; change channels, multipliers or norm_groups"
                )
        levels = {*(self.encoder_attention or ()), *(self.decoder_attention or ())}
        if unknown := levels - set(range(len(self.multipliers))):
            raise ValueError(
                f"attention at levels {sorted(unknown)}, but levels are 0..{self.stride_power}"
            )

    @property
    def stride_power(self) -> int:
        """How often the sides are halved."""
        return len(self.multipliers) - 1

    @property
    def stride(self) -> int:
        """S, pixels a latent position covers along a side."""
        return 2**self.stride_power

    def attends(self, part: str, level: int) -> bool:
        """Whether a level of "encoder" or "decoder" has attention."""
        return level in getattr(self, f"{part}_attention")


def _conv(features: int, size: int, dtype: Any, *, stride: int = 1, name: str) -> nn.Conv:
    # A stride-2 convolution pads right and bottom alone, as published.
    padding = ((0, 1), (0, 1)) if stride == 2 else "SAME"
    return layers.conv(features, size, dtype, padding=padding, stride=stride, name=name)


def _norm(config: VAEConfig, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(
        config.norm_groups,
        epsilon=1e-6,
        dtype=jnp.float32,
        use_fast_variance=False,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("norm",)),
        name=name,
    )


class ResBlock(nn.Module):
    """Twice (group norm, swish, 3x3 convolution), and a 1x1 shortcut where the width changes."""

    config: VAEConfig
    features: int

    @nn.compact
    def __call__(self, x):
        dtype = jnp.dtype(self.config.dtype)
        y = nn.silu(_norm(self.config, "norm1")(x)).astype(dtype)
        y = _conv(self.features, 3, dtype, name="conv1")(y)
        y = nn.silu(_norm(self.config, "norm2")(y)).astype(dtype)
        y = _conv(self.features, 3, dtype, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = _conv(self.features, 1, dtype, name="shortcut")(x)
        return nn.with_logical_constraint(x + y, ("batch", None, None, "embed_act"))


class AttentionBlock(nn.Module):
    """Single-head attention over all positions, residual."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x):
        dtype, width = jnp.dtype(self.config.dtype), x.shape[-1]
        y = _norm(self.config, "norm")(x).astype(dtype)
        query, key, value = (
            _conv(width, 1, dtype, name=name)(y).reshape(len(x), -1, 1, width)
            for name in ("query", "key", "value")
        )
        y = layers.attend(query, key, value).reshape(x.shape)
        return x + _conv(width, 1, dtype, name="output")(y)


class Middle(nn.Module):
    """Residual block, attention unless the configuration leaves it out, residual block."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x):
        x = ResBlock(self.config, x.shape[-1], name="block_0")(x)
        if self.config.middle_attention:
            x = AttentionBlock(self.config, name="attention")(x)
        return ResBlock(self.config, x.shape[-1], name="block_1")(x)


class Level(nn.Module):
    """The residual blocks of one resolution, and the change to the next one."""

    config: VAEConfig
    features: int
    blocks: int
    attention: bool
    resample: str | None = None  # "down" or "up", after the blocks

    @nn.compact
    def __call__(self, x):
        dtype = jnp.dtype(self.config.dtype)
        for i in range(self.blocks):
            x = ResBlock(self.config, self.features, name=f"block_{i}")(x)
            if self.attention:
                x = AttentionBlock(self.config, name=f"attention_{i}")(x)
        if self.resample == "down":
            x = _conv(self.features, 3, dtype, stride=2, name="downsample")(x)
        elif self.resample == "up":
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = _conv(self.features, 3, dtype, name="upsample")(x)
        return x


class Encoder(nn.Module):
    """Images [B, H, W, 3] -> [B, h, w, 2C], before the quantisation convolution."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x = _conv(c.channels, 3, dtype, name="conv_in")(x.astype(dtype))
        for i, multiplier in enumerate(c.multipliers):
            resample = "down" if i < c.stride_power else None
            attention = c.attends("encoder", i)
            width = c.channels * multiplier
            x = Level(c, width, c.res_blocks, attention, resample, name=f"level_{i}")(x)
        x = Middle(c, name="middle")(x)
        x = nn.silu(_norm(c, "norm_out")(x)).astype(dtype)
        return _conv(2 * c.latent_channels, 3, dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents [B, h, w, C] -> images [B, H, W, 3], float32."""

    config: VAEConfig

    @nn.compact
    def __call__(self, x):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x = _conv(c.channels * c.multipliers[-1], 3, dtype, name="conv_in")(x.astype(dtype))
        x = Middle(c, name="middle")(x)
        for i in reversed(range(len(c.multipliers))):
            resample = "up" if i > 0 else None
            attention = c.attends("decoder", i)
            width = c.channels * c.multipliers[i]
            x = Level(c, width, c.res_blocks + 1, attention, resample, name=f"level_{i}")(x)
        x = nn.silu(_norm(c, "norm_out")(x)).astype(dtype)
        return _conv(c.image_channels, 3, dtype, name="conv_out")(x).astype(jnp.float32)


class VAE(Autoencoder):
    """See `Autoencoder`."""

    config: VAEConfig

    def setup(self):
        c = self.config
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        dtype = jnp.dtype(c.dtype)
        if c.quant_conv:
            self.quant_conv = _conv(2 * c.latent_channels, 1, dtype, name="quant_conv")
        if c.post_quant_conv:
            self.post_quant_conv = _conv(c.latent_channels, 1, dtype, name="post_quant_conv")

    def _posterior(self, images: Array) -> Posterior:
        moments = self.encoder(images)
        if self.config.quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, *LOGVAR_RANGE))

    def _images(self, z: Array) -> Array:
        if self.config.post_quant_conv:
            z = self.post_quant_conv(z.astype(self.config.dtype))
        return self.decoder(z)
