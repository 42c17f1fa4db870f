"""A flow-matching head: noise to data at T positions, each with its own condition.

It does not depend on the generator: any network that gives one vector per position can use it.

Shapes: B batch, T positions, C channels of the data, W width of the condition, w width of the head.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from detailflow_jax.models import layers
from detailflow_jax.models.layers import Mask, Prefix, Rope
from detailflow_jax.ops import Array, flow, modulation

Hidden = Float[Array, "B T w"]
Modulation = Float[Array, "B #T w"]

INJECTIONS = {
    "spatial": "Spatial-adaLN: every position is modulated by its own condition and the time",
    "spatial_cross": "the block of the published large models: attention modulated by the time, "
    "cross-attention to the raw condition, MLP modulated as in `spatial`",
    "adaln": "one modulation for all positions, from the mean condition and the time",
    "add": "the condition is added to the input; modulation by the time",
    "channel": "the condition is concatenated to the input's channels; modulation by the time",
    "sequence": "the condition is put before the input as tokens; modulation by the time",
    "cross": "cross-attention to the raw condition in every block; modulation by the time",
}
"""How the condition enters (the paper's table 7, and the published large models)."""


@dataclasses.dataclass(frozen=True)
class FlowHeadConfig:
    """Sizes and options of the head. The defaults are those of FlowAR-S.

    Attributes:
      width: w, a multiple of `head_dim`.
      depth: number of blocks.
      channels: C.
      injection: one of `INJECTIONS`.
      head_dim: width of an attention head.
      dtype: of the computation.
      attention: one of `ops.attention.IMPLEMENTATIONS`.
      scan: whether the blocks are scanned (`layers.Stack`).
      remat: one of `layers.REMAT_POLICIES`.
    """

    width: int = 1024
    depth: int = 2
    channels: int = 16
    injection: str = "spatial"
    head_dim: int = 64
    dtype: str = "float32"
    attention: str = "auto"
    scan: bool = True
    remat: str = "none"

    def __post_init__(self):
        if self.injection not in INJECTIONS:
            raise ValueError(f"injection={self.injection!r} is not one of {', '.join(INJECTIONS)}")
        if self.width % self.head_dim:
            raise ValueError(
                f"width={self.width} of the flow head is no multiple of head_dim={self.head_dim}"
            )

    @property
    def num_heads(self) -> int:
        """Number of attention heads."""
        return self.width // self.head_dim

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the gated MLP: int(8w/3)."""
        return int(8 * self.width / 3)

    @property
    def crosses(self) -> bool:
        """Whether blocks have cross-attention."""
        return self.injection in ("spatial_cross", "cross")


def _attention(config: FlowHeadConfig, name: str) -> layers.Attention:
    return layers.Attention(
        config.num_heads,
        config.num_heads,
        use_bias=False,
        output_bias=True,
        dtype=jnp.dtype(config.dtype),
        implementation=config.attention,
        name=name,
    )


class Block(nn.Module):
    """Attention and gated MLP, both under Spatial-adaLN (`ops.modulation.spatial_adaln`)."""

    config: FlowHeadConfig

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        prefix: Prefix | None,
        mask: Mask | None,
        rope: Rope | None,
        condition: Modulation,
    ) -> tuple[Hidden, None]:
        """x after the block; `condition` is embedded time plus embedded condition."""
        c = self.config
        attention = _attention(c, "attention")
        mlp = layers.GatedMLP(c.mlp_dim, jnp.dtype(c.dtype), name="mlp")
        six = layers.Modulation(6, c.width, jnp.dtype(c.dtype), name="modulation")
        gate1, gate2, scale1, scale2, shift1, shift2 = six(nn.silu(condition))

        def attend(y: Array) -> Array:
            return attention(y, prefix=prefix, mask=mask, rope=rope)[0]

        x = modulation.spatial_adaln(attend, x, gate1, scale1, shift1)
        x = modulation.spatial_adaln(mlp, x, gate2, scale2, shift2)
        return layers.by_batch(x), None


class CrossBlock(nn.Module):
    """Attention, cross-attention to the raw condition, gated MLP.

    Attention is modulated by the time alone, cross-attention is a plain residual, and the MLP is
    modulated by `mlp_condition` (Spatial-adaLN if that holds the condition too).
    """

    config: FlowHeadConfig

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        prefix: Prefix | None,
        mask: Mask | None,
        rope: Rope | None,
        time: Modulation,
        mlp_condition: Modulation,
        condition: Float[Array, "B T W"],
    ) -> tuple[Hidden, None]:
        """x after the block, from the embedded time and the raw condition."""
        c, dtype = self.config, jnp.dtype(self.config.dtype)

        def three(name: str, by: Array) -> list[Array]:
            return layers.Modulation(3, c.width, dtype, name=name)(nn.silu(by))

        attention = _attention(c, "attention")

        def attend(y: Array) -> Array:
            return attention(y, prefix=prefix, mask=mask, rope=rope)[0]

        x = modulation.spatial_adaln(attend, x, *three("attention_modulation", time))
        query = layers.rms_norm("query_norm", 1e-6)(x).astype(dtype)
        context = layers.rms_norm("context_norm", 1e-6)(condition).astype(dtype)
        cross = _attention(c, "cross_attention")
        x = x + cross(query, mask=mask, rope=rope, context=context)[0]
        mlp = layers.GatedMLP(c.mlp_dim, dtype, name="mlp")
        x = modulation.spatial_adaln(mlp, x, *three("mlp_modulation", mlp_condition))
        return layers.by_batch(x), None


class FlowHead(nn.Module):
    """The velocity of noisy data, from the time and a condition per position."""

    config: FlowHeadConfig

    def setup(self):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        small = nn.initializers.normal(0.02)
        self.time_in = layers.dense(c.width, ("code", "embed"), dtype=dtype, kernel_init=small)
        self.time_out = layers.dense(c.width, ("embed", "mlp"), dtype=dtype, kernel_init=small)
        self.condition_in = layers.dense(c.width, ("embed", "mlp"), dtype=dtype)
        self.input = layers.dense(c.width, ("code", "embed"), dtype=dtype)
        block = CrossBlock if c.crosses else Block
        self.blocks = layers.Stack(block, {"config": c}, c.depth, scan=c.scan, remat=c.remat)
        # Zero, so that training starts from velocity 0, as the published code intends.
        zeros = nn.initializers.zeros
        self.final_modulation = layers.Modulation(2, c.width, dtype, kernel_init=zeros)
        self.output = layers.dense(c.channels, ("embed", "code"), dtype=dtype, kernel_init=zeros)

    def embed_time(self, time: Float[Array, "*batch"]) -> Float[Array, "*batch w"]:
        """Embedded times."""
        features = flow.time_features(time).astype(self.config.dtype)
        hidden = layers.by_batch(self.time_in(features))
        return layers.by_batch(self.time_out(nn.silu(hidden)))

    def __call__(
        self,
        x: Float[Array, "B T _C"],
        time: Float[Array, "..."],
        condition: Float[Array, "B _T W"],
        *,
        rope: Rope | None = None,
        segments: Int[np.ndarray, " T"] | None = None,
    ) -> Float[Array, "B T {self.config.channels}"]:
        """The velocity at x, float32.

        Args:
          x: noisy data [B, T, C].
          time: [B], or [B, T] if positions differ; 1 is noise, 0 is data.
          condition: [B, T, W], or [B, 1, W] for one vector at all positions.
          rope: rotary table (`ops.rotary.grid_rotary_table`), or None.
          segments: positions of different segments do not see each other, so that several grids,
            such as the scales of one latent, go through in one call. None: a single segment.

        Raises:
          ValueError: if the shapes do not fit together.
        """
        _check(self.config, x, time, condition)
        length = x.shape[1]
        if segments is None:
            segments = np.zeros(length, np.int32)
        time = self.embed_time(time if time.ndim == 2 else time[:, None])
        condition = jnp.broadcast_to(condition, (*x.shape[:2], condition.shape[-1]))
        condition = layers.by_batch(condition.astype(self.config.dtype))
        vectors, tokens, condition_tokens = self._inject(x, time, condition, segments)
        if condition_tokens is not None:
            segments = np.concatenate([segments, segments])
            tokens = jnp.concatenate([condition_tokens, tokens], axis=1)  # [B, 2T, w]
            time = jnp.concatenate([time, time], axis=1) if time.shape[1] > 1 else time
            vectors, rope = time, None if rope is None else jnp.concatenate([rope, rope])
        mask = None if segments.min() == segments.max() else segments[:, None] == segments[None]
        context = (time, vectors, condition) if self.config.crosses else (vectors,)
        tokens, _ = self.blocks(tokens, mask=mask, rope=rope, context=context)
        return self._read_out(tokens[:, -length:], vectors[:, -length:])

    def _inject(
        self, x: Array, time: Array, condition: Array, segments: np.ndarray
    ) -> tuple[Modulation, Hidden, Hidden | None]:
        """What modulates the blocks, the tokens, and tokens to put before them (or None)."""
        injection = self.config.injection
        embedded = layers.by_batch(self.condition_in(condition))
        if injection == "channel":
            both = jnp.concatenate([x.astype(embedded.dtype), embedded], axis=-1)
            return time, layers.by_batch(self.input(both)), None
        tokens = layers.by_batch(self.input(x.astype(self.config.dtype)))
        if injection == "add":
            return time, tokens + embedded, None
        if injection == "sequence":
            return time, tokens, embedded
        if injection == "adaln":
            return time + segment_mean(embedded, segments), tokens, None
        if injection == "cross":
            return time, tokens, None
        return time + embedded, tokens, None

    def _read_out(self, tokens: Hidden, vectors: Modulation) -> Float[Array, "B T C"]:
        shift, scale = self.final_modulation(nn.silu(vectors))
        y = modulation.modulate(tokens, scale, shift).astype(self.config.dtype)
        return layers.by_batch(self.output(y)).astype(jnp.float32)


def segment_mean(x: Hidden, segments: Int[np.ndarray, " T"]) -> Hidden:
    """The mean over each position's segment."""
    same = (segments[:, None] == segments[None]).astype(np.float32)
    return jnp.einsum("ts,bsw->btw", same / same.sum(axis=1, keepdims=True), x).astype(x.dtype)


def _check(config: FlowHeadConfig, x: Array, time: Array, condition: Array) -> None:
    if x.ndim != 3 or x.shape[-1] != config.channels:
        raise ValueError(f"x has shape {x.shape}, expected [B, T, {config.channels}]")
    if time.shape not in (x.shape[:1], x.shape[:2]):
        raise ValueError(f"time has shape {time.shape}, expected {x.shape[:1]} or {x.shape[:2]}")
    if condition.ndim != 3 or condition.shape[:2] not in (x.shape[:2], (len(x), 1)):
        raise ValueError(
            f"condition has shape {condition.shape}, expected [{len(x)}, {x.shape[1]} or 1, W]"
        )
