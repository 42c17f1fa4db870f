"""FlowAR: a transformer that is causal by scale, and a flow head for each scale's latent.

The transformer reads the class and earlier scales and gives one vector a position, the semantics;
the head, conditioned on them, carries noise to the latent of a scale.

Shapes: B batch, S side of the latent, K scales, T positions of all scales, n buffer tokens,
P = n + T sequence positions, C latent channels, W width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from detailflow_jax.models import layers
from detailflow_jax.models.flow_head import FlowHead, FlowHeadConfig
from detailflow_jax.ops import scales as grids


@dataclasses.dataclass(frozen=True)
class FlowARConfig:
    """Everything that shapes the network. The defaults are FlowAR-S on KL-16 latents of 256 px.

    Attributes:
      width: W.
      first_depth, second_depth: blocks of the transformer's two halves.
      num_heads: attention heads of the transformer.
      scales: sides of the scales, increasing; the last one is S.
      channels: C.
      num_classes: classes; the null class is one more row of the table.
      buffer_size: n, class tokens in front of the sequence.
      head_width, head_depth, injection: of the flow head (`FlowHeadConfig`).
      head_dim: width of an attention head of the flow head.
      class_dropout: share of labels that are replaced by the null class in training.
      attention_dropout, projection_dropout: rates in the transformer, in training.
      dtype, scan, remat: as everywhere.
    """

    width: int = 768
    first_depth: int = 6
    second_depth: int = 6
    num_heads: int = 12
    scales: tuple[int, ...] = (1, 2, 4, 8, 16)
    channels: int = 16
    num_classes: int = 1000
    buffer_size: int = 0
    head_width: int = 1024
    head_depth: int = 2
    injection: str = "spatial"
    head_dim: int = 64
    class_dropout: float = 0.1
    attention_dropout: float = 0.1
    projection_dropout: float = 0.1
    dtype: str = "float32"
    scan: bool = True
    remat: str = "none"

    def __post_init__(self):
        grids.check_scales(self.scales)
        object.__setattr__(self, "scales", tuple(int(side) for side in self.scales))
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"width={self.width} is no multiple of 4 x num_heads={self.num_heads}, which "
                "2-D rotary positions need"
            )
        self.head  # noqa: B018  Refuses what the head refuses.

    @property
    def head(self) -> FlowHeadConfig:
        """The flow head's configuration."""
        return FlowHeadConfig(
            width=self.head_width,
            depth=self.head_depth,
            channels=self.channels,
            injection=self.injection,
            head_dim=self.head_dim,
            dtype=self.dtype,
            scan=self.scan,
            remat=self.remat,
        )

    @property
    def latent_side(self) -> int:
        """S."""
        return self.scales[-1]

    @property
    def offsets(self) -> tuple[int, ...]:
        """First position of every scale, and T."""
        return grids.offsets(self.scales)

    @property
    def num_positions(self) -> int:
        """T."""
        return self.offsets[-1]

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the transformer's gated MLP: int(8W/3)."""
        return int(8 * self.width / 3)

    def mask(self) -> np.ndarray:
        """Who sees whom, bool [P, P]; the buffer belongs to the first scale."""
        mask = grids.scale_mask(self.scales)
        return np.pad(mask, (self.buffer_size, 0), mode="edge")

    def rope(self) -> np.ndarray:
        """Rotary table of the transformer, float32 [P, head_dim/2, 2]; none for the buffer."""
        table = grids.rotary_table(self.scales, self.width // self.num_heads)
        still = np.zeros((self.buffer_size, *table.shape[1:]), np.float32)
        still[..., 0] = 1.0
        return np.concatenate([still, table])

    def head_rope(self) -> np.ndarray:
        """Rotary table of the head, float32 [T, head_dim/2, 2]."""
        return grids.rotary_table(self.scales, self.head_dim)


SIZES = {
    name: {
        "first_depth": depth // 2,
        "second_depth": depth // 2,
        "width": width,
        "num_heads": heads,
        "head_depth": head_depth,
        "head_width": head_width,
        "injection": injection,
    }
    for name, (depth, width, heads, head_depth, head_width, injection) in {
        "FlowAR-S": (12, 768, 12, 2, 1024, "spatial"),
        "FlowAR-B": (16, 768, 12, 6, 1024, "spatial"),
        "FlowAR-L": (16, 1024, 16, 12, 1024, "spatial_cross"),
        "FlowAR-H": (30, 1536, 16, 12, 1536, "spatial_cross"),
    }.items()
}
"""Published sizes by name; B is the paper's alone, and there the head of H has 18 blocks."""


class Block(nn.Module):
    """Attention and gated MLP, modulated and gated by the class."""

    config: FlowARConfig

    @nn.compact
    def __call__(self, x, prefix, mask, rope, condition):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        drop = nn.Dropout(c.projection_dropout, deterministic=not self.has_rng("dropout"))
        six = layers.dense(6 * c.width, ("embed", "mlp"), dtype=dtype, name="modulation")(condition)
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.split(six, 6, axis=-1)
        attention = layers.Attention(
            c.num_heads,
            c.num_heads,
            use_bias=True,
            dtype=dtype,
            dropout=c.attention_dropout,
            name="attention",
        )
        y = layers.modulate(x, scale1, shift1).astype(dtype)
        y, own = attention(y, prefix=prefix, mask=mask, rope=rope)
        x = x + drop(y) * gate1
        y = layers.modulate(x, scale2, shift2).astype(dtype)
        x = x + drop(layers.GatedMLP(c.mlp_dim, dtype, name="mlp")(y)) * gate2
        return nn.with_logical_constraint(x, ("batch", "length", "embed_act")), own


class FlowAR(nn.Module):
    """Latents and labels to semantics, and semantics to velocities."""

    config: FlowARConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        init = nn.initializers.normal(0.02)
        embedding_init = nn.with_logical_partitioning(init, ("positions", "embed"))
        self.class_embedding = nn.Embed(c.num_classes + 1, c.width, embedding_init=embedding_init)
        self.latent_in = layers.dense(c.width, ("code", "embed"), dtype=dtype)
        self.first_norm = layers.rms_norm(epsilon=1e-6)
        self.first_half = self._half(c.first_depth)
        self.middle_norm = layers.rms_norm(epsilon=1e-6)
        self.middle_in = layers.dense(c.width, ("embed", "mlp"), dtype=dtype)
        self.second_half = self._half(c.second_depth)
        self.last_norm = layers.rms_norm(epsilon=1e-6)
        table = (c.buffer_size + c.num_positions, c.width)
        self.first_positions = self.param("first_positions", embedding_init, table)
        self.second_positions = self.param("second_positions", embedding_init, table)
        self.last_positions = self.param("last_positions", embedding_init, table)
        self.head = FlowHead(c.head)

    def _half(self, depth: int) -> layers.Stack:
        c = self.config
        return layers.Stack(Block, {"config": c}, depth, scan=c.scan, remat=c.remat)

    def embed(self, labels: jax.Array, inputs: jax.Array) -> jax.Array:
        """The sequence that the transformer reads.

        Args:
          labels: int32 [B]; num_classes is the null class.
          inputs: float32 [B, m, C], inputs of scales 1 .. k (`ops.scales.pyramid`); m may be 0.

        Returns:
          [B, n + i_0^2 + m, W]: the class at the buffer and the first scale, then the inputs.
        """
        c = self.config
        first = c.buffer_size + c.offsets[1]
        classes = jnp.broadcast_to(
            self.class_embedding(labels)[:, None], (len(labels), first, c.width)
        ).astype(c.dtype)
        return jnp.concatenate([classes, self.embed_inputs(inputs)], axis=1)

    def embed_inputs(self, inputs: jax.Array) -> jax.Array:
        """Inputs [B, m, C] -> [B, m, W]."""
        return self.latent_in(inputs.astype(self.config.dtype))

    def run(self, x, labels, *, start: int = 0, cache=None, mask=None):
        """Both halves over positions start .. start + t - 1.

        Args:
          x: [B, t, W] from `embed`.
          labels: int32 [B].
          start: static, the first position, counted with the buffer.
          cache: keys and values of the earlier positions, a pair for the two halves, or None.
          mask: bool [t, t], or None where all may be seen.

        Returns:
          semantics [B, t, W]; the keys and values of these positions, a pair.
        """
        c = self.config
        here = slice(start, start + x.shape[1])
        rope = c.rope()[here]
        condition = (nn.silu(self.class_embedding(labels)[:, None]).astype(c.dtype),)
        first, second = (None, None) if cache is None else cache
        x = self.first_norm((x + self.first_positions[here]).astype(c.dtype)).astype(c.dtype)
        x, own = self.first_half(x, prefix=first, mask=mask, rope=rope, context=condition)
        x = self.middle_in(self.middle_norm(x).astype(c.dtype)) + self.second_positions[here]
        x = x.astype(c.dtype)
        x, own2 = self.second_half(x, prefix=second, mask=mask, rope=rope, context=condition)
        return self.last_norm(x) + self.last_positions[here], (own, own2)

    def semantics(self, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        """All scales in one masked pass (training): float32 [B, T, W].

        Args:
          inputs: float32 [B, T - i_0^2, C].
          labels: int32 [B].
        """
        c = self.config
        x, _ = self.run(self.embed(labels, inputs), labels, mask=c.mask())
        return x[:, c.buffer_size :]

    def velocity(self, x, time, semantics, *, scale: int | None = None) -> jax.Array:
        """The head at one scale (static index), or at all of them at once (None).

        Args:
          x: [B, t, C].
          time: float [B], or [B, t].
          semantics: [B, t, W].
        """
        c = self.config
        start, stop = (0, c.num_positions) if scale is None else c.offsets[scale : scale + 2]
        segments = grids.scale_index(c.scales)[start:stop]
        rope = c.head_rope()[start:stop]
        return self.head(x, time, semantics, rope=rope, segments=segments)

    def __call__(self, inputs, labels, x, time):
        """Semantics float32 [B, T, W] and velocities [B, T, C] of all scales (training)."""
        semantics = self.semantics(inputs, labels)
        return semantics, self.velocity(x, time, semantics)


def extend_cache(cache: Any, own: Any, scan: bool) -> Any:
    """The cache with the keys and values of one more scale; None is the empty one."""
    if cache is None:
        return own
    axis = 2 if scan else 1  # stacked layers come first
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=axis), cache, own)


def check_vae(config: FlowARConfig, latent_channels: int, what: str = "the autoencoder") -> None:
    """Raises ValueError unless its latents are those that the network makes."""
    if latent_channels != config.channels:
        raise ValueError(
            f"{what} has latents of {latent_channels} channels, this FlowAR of "
            f"{config.channels}: they do not belong together"
        )


def example(config: FlowARConfig) -> Sequence[jax.Array]:
    """Arguments that the network is initialised with."""
    rest = config.num_positions - config.offsets[1]
    return (
        jnp.zeros((1, rest, config.channels)),
        jnp.zeros((1,), jnp.int32),
        jnp.zeros((1, config.num_positions, config.channels)),
        jnp.zeros((1, config.num_positions)),
    )
