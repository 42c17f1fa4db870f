"""FlowAR: a transformer that is causal by scale, and a flow head for each scale's latent.

The transformer reads the class and the earlier scales and gives one vector per position, the
semantics. The head, conditioned on them, carries noise to the latent of a scale.

Shapes: B batch, S side of the latent, K scales of sides i_k, T positions of all scales, n buffer
tokens, N = n + T sequence positions, t positions of one call, m input positions, C latent channels,
W width.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from detailflow_jax.models import layers
from detailflow_jax.models.flow_head import FlowHead, FlowHeadConfig
from detailflow_jax.models.layers import KeysValues, LayerCache, Mask, Prefix, Rope
from detailflow_jax.ops import Array, modulation
from detailflow_jax.ops import scales as grids
from detailflow_jax.ops.objectives import OBJECTIVES

Labels = Int[Array, " B"]
Halves = tuple[LayerCache, LayerCache]
"""Keys and values of both halves of the transformer."""


@dataclasses.dataclass(frozen=True)
class FlowARConfig:
    """Sizes and options of the network. The defaults are FlowAR-S on KL-16 latents of 256 px.

    Attributes:
      width: W.
      first_depth, second_depth: blocks of the transformer's two halves.
      num_heads: attention heads of the transformer.
      scales: sides of the scales, increasing; the last one is S.
      channels: C.
      num_classes: number of classes; the null class is one more row of the table.
      buffer_size: n, class tokens in front of the sequence.
      head_width, head_depth, injection: of the flow head (`FlowHeadConfig`).
      head_dim: width of an attention head of the flow head.
      objective: what the head learns, one of `ops.objectives.OBJECTIVES`; published: "flow".
      class_dropout: share of the labels that training replaces by the null class.
      attention_dropout, projection_dropout: rates in the transformer, in training.
      dtype, attention, scan, remat: see `FlowHeadConfig`.
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
    objective: str = "flow"
    class_dropout: float = 0.1
    attention_dropout: float = 0.1
    projection_dropout: float = 0.1
    dtype: str = "float32"
    attention: str = "auto"
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
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} is not one of {', '.join(OBJECTIVES)}")
        self.head  # noqa: B018  (its own checks run too)

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
            attention=self.attention,
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

    def mask(self) -> Bool[np.ndarray, "N N"]:
        """The attention mask; the buffer belongs to the first scale."""
        mask = grids.scale_mask(self.scales)
        return np.pad(mask, (self.buffer_size, 0), mode="edge")

    def rope(self) -> Float[np.ndarray, "N half 2"]:
        """Rotary table of the transformer, float32; the buffer is not turned."""
        table = grids.rotary_table(self.scales, self.width // self.num_heads)
        identity = np.zeros((self.buffer_size, *table.shape[1:]), np.float32)
        identity[..., 0] = 1.0  # cos 0
        return np.concatenate([identity, table])

    def head_rope(self) -> Float[np.ndarray, "T half 2"]:
        """Rotary table of the head, float32."""
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
"""Published sizes by name. B appears in the paper only, where the head of H has 18 blocks."""


class Block(nn.Module):
    """Attention and gated MLP, modulated and gated by the class."""

    config: FlowARConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B t W"],
        prefix: Prefix | None,
        mask: Mask | None,
        rope: Rope | None,
        condition: Float[Array, "B 1 W"],
    ) -> tuple[Float[Array, "B t W"], KeysValues]:
        """x after the block, and its own keys and values."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        drop = nn.Dropout(c.projection_dropout, deterministic=not self.has_rng("dropout"))
        six = layers.Modulation(6, c.width, dtype, name="modulation")
        gate1, gate2, scale1, scale2, shift1, shift2 = six(condition)
        attention = layers.Attention(
            c.num_heads,
            c.num_heads,
            use_bias=True,
            dtype=dtype,
            dropout=c.attention_dropout,
            implementation=c.attention,
            name="attention",
        )
        y = modulation.modulate(x, scale1, shift1).astype(dtype)
        y, own = attention(y, prefix=prefix, mask=mask, rope=rope)
        x = x + drop(y) * gate1
        y = modulation.modulate(x, scale2, shift2).astype(dtype)
        x = x + drop(layers.GatedMLP(c.mlp_dim, dtype, name="mlp")(y)) * gate2
        return layers.by_batch(x), own


class FlowAR(nn.Module):
    """Semantics from latents and labels, and velocities from semantics."""

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
        length = c.buffer_size + c.num_positions
        self.first_positions = layers.table(self, "first_positions", length, c.width)
        self.second_positions = layers.table(self, "second_positions", length, c.width)
        self.last_positions = layers.table(self, "last_positions", length, c.width)
        self.head = FlowHead(c.head)

    def _half(self, depth: int) -> layers.Stack:
        c = self.config
        return layers.Stack(Block, {"config": c}, depth, scan=c.scan, remat=c.remat)

    def embed(self, labels: Labels, inputs: Float[Array, "B m C"]) -> Float[Array, "B t W"]:
        """The sequence that the transformer reads.

        Args:
          labels: class of each sample; `num_classes` is the null class.
          inputs: of scales 1 .. k (`ops.scales.pyramid`); m may be 0.

        Returns:
          [B, n + i_0^2 + m, W]: the class at the buffer and the first scale, then the inputs.
        """
        c = self.config
        first = c.buffer_size + c.offsets[1]
        classes = jnp.broadcast_to(
            self._embed_labels(labels), (len(labels), first, c.width)
        ).astype(c.dtype)
        return jnp.concatenate([classes, self.embed_inputs(inputs)], axis=1)

    def _embed_labels(self, labels: Labels) -> Float[Array, "B 1 W"]:
        return layers.by_batch(self.class_embedding(labels)[:, None])

    def embed_inputs(self, inputs: Float[Array, "B m C"]) -> Float[Array, "B m W"]:
        """Inputs at the transformer's width."""
        return layers.by_batch(self.latent_in(inputs.astype(self.config.dtype)))

    def run(
        self,
        x: Float[Array, "B t W"],
        labels: Labels,
        *,
        start: int = 0,
        cache: Halves | None = None,
        mask: Bool[Array, "t t"] | None = None,
    ) -> tuple[Float[Array, "B t W"], Halves]:
        """Both halves over the positions start .. start + t - 1.

        Args:
          x: from `embed`.
          labels: class of each sample.
          start: the first position, counted with the buffer (static).
          cache: keys and values of the earlier positions.
          mask: None if every position sees all.

        Returns:
          The semantics, and the keys and values of these positions.
        """
        c = self.config
        here = slice(start, start + x.shape[1])
        rope = c.rope()[here]
        condition = (nn.silu(self._embed_labels(labels)).astype(c.dtype),)
        first, second = (None, None) if cache is None else cache
        x = self.first_norm((x + self.first_positions[here]).astype(c.dtype)).astype(c.dtype)
        x, own = self.first_half(x, prefix=first, mask=mask, rope=rope, context=condition)
        x = layers.by_batch(self.middle_in(self.middle_norm(x).astype(c.dtype)))
        x = (x + self.second_positions[here]).astype(c.dtype)
        x, own2 = self.second_half(x, prefix=second, mask=mask, rope=rope, context=condition)
        return self.last_norm(x) + self.last_positions[here], (own, own2)

    def semantics(self, inputs: Float[Array, "B m C"], labels: Labels) -> Float[Array, "B T W"]:
        """Semantics of all scales, float32, in one masked pass (training); m = T - i_0^2."""
        c = self.config
        x, _ = self.run(self.embed(labels, inputs), labels, mask=c.mask())
        return x[:, c.buffer_size :]

    def velocity(
        self,
        x: Float[Array, "B t C"],
        time: Float[Array, " B"] | Float[Array, "B t"],
        semantics: Float[Array, "B t W"],
        *,
        scale: int | None = None,
    ) -> Float[Array, "B t C"]:
        """The head's velocity at one scale (static index), or at all of them together (None)."""
        c = self.config
        start, stop = (0, c.num_positions) if scale is None else c.offsets[scale : scale + 2]
        segments = grids.scale_index(c.scales)[start:stop]
        rope = c.head_rope()[start:stop]
        return self.head(x, time, semantics, rope=rope, segments=segments)

    def __call__(
        self,
        inputs: Float[Array, "B m C"],
        labels: Labels,
        x: Float[Array, "B T C"],
        time: Float[Array, "B T"],
    ) -> tuple[Float[Array, "B T W"], Float[Array, "B T C"]]:
        """Semantics and velocities of all scales (training), float32."""
        semantics = self.semantics(inputs, labels)
        return semantics, self.velocity(x, time, semantics)


def extend_cache(cache: Halves | None, own: Halves, scan: bool) -> Halves:
    """The cache with the keys and values of one more scale; None is the empty cache."""
    if cache is None:
        return own
    axis = 2 if scan else 1  # stacked layers come first
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=axis), cache, own)


def check_vae(config: FlowARConfig, latent_channels: int, what: str = "the autoencoder") -> None:
    """Raises ValueError unless the autoencoder's latents have the network's channels."""
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
