"""DC-AE, the deep compression autoencoder: strides of 32 and more, without a Gaussian.

Shapes: B batch, H x W pixels, D width, d dimension of an attention head, C latent channels,
S = 2^(levels - 1) stride.

Halving and doubling have shortcuts that move pixels into channels and back, so that a level learns
only what that leaves out; so have the ends of encoder and decoder. Deep levels attend linearly:
relu(q) relu(k) in place of the exponential of a product.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from detailflow_jax.models import layers
from detailflow_jax.models.autoencoder import (
    LOGVAR_RANGE,
    Autoencoder,
    AutoencoderConfig,
    Posterior,
)
from detailflow_jax.ops import Array

EPSILON = 1e-5  # of norms
_SMALLEST = 1e-15  # what the sum of attention weights is kept from being divided by
EXPANSION = 4  # width inside of the convolutions that follow an attention

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": jax.nn.relu, "silu": jax.nn.silu}
NORMS = ("rms_norm", "batch_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DCAEConfig(AutoencoderConfig):
    """Everything that shapes the network. The defaults are f32c32 of SANA.

    Attributes, besides those of every autoencoder; a tuple has one value per level, of which each
    but the last halves the sides:
      architecture: what tells this configuration from that of a KL autoencoder.
      head_dim: d.
      encoder_widths, decoder_widths: D.
      encoder_blocks, decoder_blocks: blocks of a level. The first one may have none: then the
        first and last convolution of the network change the resolution.
      encoder_attention, decoder_attention: levels whose blocks attend; the others are residual.
      encoder_kernels, decoder_kernels: side of the convolution that gives a second set of queries,
        keys and values; 0 for none.
      decoder_norms: "rms_norm" or "batch_norm", of residual blocks and after attention.
      decoder_activations: "silu" or "relu", of residual blocks.
      unshuffle: whether pixels become channels where sides are halved; else a convolution strides.
      shuffle: whether channels become pixels where they are doubled; else pixels are repeated.
      encoder_shortcut, decoder_shortcut: around the last and the first convolution.
      output_activation: before the last convolution.
    """

    latent_channels: int = 32
    scale_factor: float | tuple[float, ...] = 0.41407
    architecture: str = "dc_ae"
    head_dim: int = 32
    encoder_widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_blocks: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_attention: tuple[int, ...] = (3, 4, 5)
    decoder_attention: tuple[int, ...] = (3, 4, 5)
    encoder_kernels: tuple[int, ...] = (0, 0, 0, 5, 5, 5)
    decoder_kernels: tuple[int, ...] = (0, 0, 0, 5, 5, 5)
    decoder_norms: tuple[str, ...] = ("rms_norm",) * 6
    decoder_activations: tuple[str, ...] = ("silu",) * 6
    unshuffle: bool = False
    shuffle: bool = False
    encoder_shortcut: bool = True
    decoder_shortcut: bool = True
    output_activation: str = "relu"

    def __post_init__(self):
        super().__post_init__()
        for field in dataclasses.fields(self):
            if isinstance(value := getattr(self, field.name), list):
                object.__setattr__(self, field.name, tuple(value))
        for name in ("widths", "blocks", "kernels"):
            for part in ("encoder", "decoder"):
                self._check_count(f"{part}_{name}")
        self._check_count("decoder_norms")
        self._check_count("decoder_activations")
        for name, known in (("norms", NORMS), ("activations", tuple(ACTIVATIONS))):
            if unknown := {*getattr(self, f"decoder_{name}")} - {*known}:
                raise ValueError(f"decoder_{name}: {unknown}; expected {' or '.join(known)}")
        if self.output_activation not in ACTIVATIONS:
            raise ValueError(
                f"output_activation={self.output_activation!r}; expected {' or '.join(ACTIVATIONS)}"
            )
        for part in ("encoder", "decoder"):
            self._check_part(part)

    def _check_count(self, name: str) -> None:
        if len(getattr(self, name)) != self.levels or self.levels < 2:
            raise ValueError(
                f"{name}={getattr(self, name)}; expected one value for each of the levels, of "
                f"which encoder_widths={self.encoder_widths} has {self.levels}, at least 2"
            )

    def _check_part(self, part: str) -> None:
        widths, blocks = getattr(self, f"{part}_widths"), getattr(self, f"{part}_blocks")
        if min(blocks[1:]) < 1 or blocks[0] < 0 or min(widths) < 1:
            raise ValueError(
                f"{part}_blocks={blocks}, {part}_widths={widths}; expected at least 1 of each, "
                "but for 0 blocks in the first level"
            )
        if (self.encoder_blocks[0] == 0) != (self.decoder_blocks[0] == 0):
            raise ValueError(
                "only one half has no blocks in its first level; expected both or none"
            )
        if widths[-1] % self.latent_channels:
            raise ValueError(
                f"the last of {part}_widths={widths} is no multiple of latent_channels="
                f"{self.latent_channels}"
            )
        for near, far in itertools.pairwise(widths[int(blocks[0] == 0) :]):
            if 4 * near % far:
                raise ValueError(
                    f"{part}_widths={widths}: {far} follows {near}; expected a divisor of four "
                    "times the one before"
                )
        if self.unshuffle and any(width % 4 for width in self.encoder_widths[1:]):
            raise ValueError(
                f"encoder_widths={self.encoder_widths}; expected multiples of 4 with unshuffle=True"
            )
        for level in getattr(self, f"{part}_attention"):
            if not 0 <= level < self.levels or widths[level] % self.head_dim:
                raise ValueError(
                    f"{part}_attention={getattr(self, f'{part}_attention')}; expected levels in "
                    f"0..{self.levels - 1} whose width is a multiple of head_dim={self.head_dim}"
                )

    @property
    def levels(self) -> int:
        """Resolutions, that of the images among them."""
        return len(self.encoder_widths)

    @property
    def stride(self) -> int:
        """S, pixels a latent position covers along a side."""
        return 2 ** (self.levels - 1)

    def of(self, part: str, name: str, level: int) -> Any:
        """The value of a level of "encoder" or "decoder"."""
        return getattr(self, f"{part}_{name}")[level]


def _conv(
    features: int, size: int, dtype: Any, *, groups: int = 1, stride: int = 1, bias: bool = True,
    name: str,
) -> nn.Conv:  # fmt: skip
    options = {"feature_group_count": groups, "use_bias": bias, "name": name}
    return layers.conv(features, size, dtype, padding=size // 2, stride=stride, **options)


class RMSNorm(nn.Module):
    """RMSNorm with a bias, computed and returned in float32."""

    @nn.compact
    def __call__(self, x):
        bias = layers.param(self, "bias", nn.initializers.zeros, ("norm",), x.shape[-1:])
        return layers.rms_norm("rms", EPSILON)(x) + bias


class BatchNorm(nn.Module):
    """Batch norm with the statistics that it was trained with, in float32."""

    @nn.compact
    def __call__(self, x):
        names = {"scale": nn.initializers.ones, "bias": nn.initializers.zeros}
        names |= {"mean": nn.initializers.zeros, "var": nn.initializers.ones}
        p = {n: layers.param(self, n, init, ("norm",), x.shape[-1:]) for n, init in names.items()}
        x = x.astype(jnp.float32)
        return (x - p["mean"]) * jax.lax.rsqrt(p["var"] + EPSILON) * p["scale"] + p["bias"]


def _norm(kind: str, name: str) -> nn.Module:
    return {"rms_norm": RMSNorm, "batch_norm": BatchNorm}[kind](name=name)


class ResBlock(nn.Module):
    """Convolution, activation, convolution, norm; residual."""

    config: DCAEConfig
    norm: str
    activation: str

    @nn.compact
    def __call__(self, x):
        dtype, width = jnp.dtype(self.config.dtype), x.shape[-1]
        y = ACTIVATIONS[self.activation](_conv(width, 3, dtype, name="conv1")(x))
        y = _conv(width, 3, dtype, bias=False, name="conv2")(y)
        return x + _norm(self.norm, "norm")(y).astype(dtype)


class LinearAttention(nn.Module):
    """Attention without a softmax, over all positions, residual; scores are float32.

    Queries, keys and values are concatenated along the channels, followed by those of the second
    set, and only then cut into heads of 3d channels. As published: a head's queries, keys and
    values are neighbours in this row, whatever they were computed as.
    """

    config: DCAEConfig
    norm: str
    kernel: int

    @nn.compact
    def __call__(self, x):
        dtype, width, dim = jnp.dtype(self.config.dtype), x.shape[-1], self.config.head_dim
        heads = width // dim
        row = jnp.concatenate(
            [
                layers.dense(width, ("embed", "heads"), dtype=dtype, use_bias=False, name=name)(x)
                for name in ("query", "key", "value")
            ],
            axis=-1,
        )
        if self.kernel:
            groups = 3 * width
            y = _conv(groups, self.kernel, dtype, groups=groups, bias=False, name="scale_in")(row)
            y = _conv(groups, 1, dtype, groups=3 * heads, bias=False, name="scale_out")(y)
            row = jnp.concatenate([row, y], axis=-1)
        row = einops.rearrange(row, "b h w (n p d) -> p b (h w) n d", p=3, d=dim)
        query, key, value = row.astype(jnp.float32)
        query, key = jax.nn.relu(query), jax.nn.relu(key)
        weighted = jnp.einsum("bsnd,bsne->bnde", key, value)
        total = jnp.einsum("btnd,bnd->btn", query, jnp.sum(key, axis=1))
        y = jnp.einsum("btnd,bnde->btne", query, weighted) / (total[..., None] + _SMALLEST)
        y = y.reshape(*x.shape[:3], -1).astype(dtype)
        y = layers.dense(width, ("heads", "embed"), dtype=dtype, use_bias=False, name="output")(y)
        return x + _norm(self.norm, "norm")(y).astype(dtype)


class GatedConv(nn.Module):
    """1x1 convolution, depthwise 3x3 with a gate, 1x1 convolution, norm; residual."""

    config: DCAEConfig

    @nn.compact
    def __call__(self, x):
        dtype, width = jnp.dtype(self.config.dtype), x.shape[-1]
        wide = 2 * EXPANSION * width
        y = jax.nn.silu(_conv(wide, 1, dtype, name="inverted")(x))
        y = _conv(wide, 3, dtype, groups=wide, name="depth")(y)
        y, gate = jnp.split(y, 2, axis=-1)
        y = _conv(width, 1, dtype, bias=False, name="point")(y * jax.nn.silu(gate))
        return x + _norm("rms_norm", "norm")(y).astype(dtype)


class AttentionBlock(nn.Module):
    """Linear attention, then a gated convolution."""

    config: DCAEConfig
    norm: str
    kernel: int

    @nn.compact
    def __call__(self, x):
        x = LinearAttention(self.config, self.norm, self.kernel, name="attention")(x)
        return GatedConv(self.config, name="gated")(x)


def _to_channels(x: Array) -> Array:
    """Squares of 2 x 2 pixels as channels, the pixels of one channel beside each other."""
    return einops.rearrange(x, "b (h i) (w j) c -> b h w (c i j)", i=2, j=2)


def _to_pixels(x: Array) -> Array:
    """The inverse of `_to_channels`."""
    return einops.rearrange(x, "b h w (c i j) -> b (h i) (w j) c", i=2, j=2)


def _average(x: Array, features: int) -> Array:
    """Groups of neighbouring channels averaged, so that `features` are left."""
    return jnp.mean(x.reshape(*x.shape[:-1], features, -1), axis=-1)


class Down(nn.Module):
    """Halves the sides."""

    config: DCAEConfig
    features: int
    shortcut: bool = True

    @nn.compact
    def __call__(self, x):
        dtype = jnp.dtype(self.config.dtype)
        if self.config.unshuffle:
            y = _to_channels(_conv(self.features // 4, 3, dtype, name="conv")(x))
        else:
            y = _conv(self.features, 3, dtype, stride=2, name="conv")(x)
        return y + _average(_to_channels(x), self.features) if self.shortcut else y


class Up(nn.Module):
    """Doubles the sides."""

    config: DCAEConfig
    features: int
    shortcut: bool = True

    @nn.compact
    def __call__(self, x):
        dtype = jnp.dtype(self.config.dtype)
        if self.config.shuffle:
            y = _to_pixels(_conv(4 * self.features, 3, dtype, name="conv")(x))
        else:
            y = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            y = _conv(self.features, 3, dtype, name="conv")(y)
        if self.shortcut:
            y += _to_pixels(jnp.repeat(x, 4 * self.features // x.shape[-1], axis=-1))
        return y


class Level(nn.Module):
    """The blocks of one resolution."""

    config: DCAEConfig
    part: str
    level: int

    @nn.compact
    def __call__(self, x):
        c, decoder = self.config, self.part == "decoder"
        norm = c.decoder_norms[self.level] if decoder else "rms_norm"
        activation = c.decoder_activations[self.level] if decoder else "silu"
        kernel = c.of(self.part, "kernels", self.level)
        for i in range(c.of(self.part, "blocks", self.level)):
            if self.level in getattr(c, f"{self.part}_attention"):
                x = AttentionBlock(c, norm, kernel, name=f"block_{i}")(x)
            else:
                x = ResBlock(c, norm, activation, name=f"block_{i}")(x)
        return nn.with_logical_constraint(x, ("batch", None, None, "embed_act"))


class Encoder(nn.Module):
    """Images [B, H, W, 3] -> latents [B, h, w, C], unscaled."""

    config: DCAEConfig

    @nn.compact
    def __call__(self, x):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        x = x.astype(dtype)
        first = int(c.encoder_blocks[0] == 0)  # the first level that has blocks
        if first:
            x = Down(c, c.encoder_widths[1], shortcut=False, name="conv_in")(x)
        else:
            x = _conv(c.encoder_widths[0], 3, dtype, name="conv_in")(x)
        for i in range(first, c.levels):
            x = Level(c, "encoder", i, name=f"level_{i}")(x)
            if i < c.levels - 1:
                x = Down(c, c.encoder_widths[i + 1], name=f"down_{i}")(x)
        y = _conv(c.latent_channels, 3, dtype, name="conv_out")(x)
        return y + _average(x, c.latent_channels) if c.encoder_shortcut else y


class Decoder(nn.Module):
    """Latents [B, h, w, C] -> images [B, H, W, 3], float32."""

    config: DCAEConfig

    @nn.compact
    def __call__(self, z):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        width, z = c.decoder_widths[-1], z.astype(dtype)
        x = _conv(width, 3, dtype, name="conv_in")(z)
        if c.decoder_shortcut:
            x += jnp.repeat(z, width // c.latent_channels, axis=-1)
        first = int(c.decoder_blocks[0] == 0)
        for i in reversed(range(first, c.levels)):
            if i < c.levels - 1:
                x = Up(c, c.decoder_widths[i], name=f"up_{i}")(x)
            x = Level(c, "decoder", i, name=f"level_{i}")(x)
        x = ACTIVATIONS[c.output_activation](_norm("rms_norm", "norm_out")(x)).astype(dtype)
        if first:
            x = Up(c, c.image_channels, shortcut=False, name="conv_out")(x)
        else:
            x = _conv(c.image_channels, 3, dtype, name="conv_out")(x)
        return x.astype(jnp.float32)


class DCAE(Autoencoder):
    """See `Autoencoder`. Its posterior is a point: the log-variance is the least there is."""

    config: DCAEConfig

    def setup(self):
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)

    def _posterior(self, images: Array) -> Posterior:
        mean = self.encoder(images).astype(jnp.float32)
        return Posterior(mean, jnp.full_like(mean, LOGVAR_RANGE[0]))

    def _images(self, z: Array) -> Array:
        return self.decoder(z)
