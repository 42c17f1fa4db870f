"""A flow-matching head: noise to data at T positions, each with a condition of its own.

It knows of no generator: any network that gives a vector a position can stand in front of it.

Shapes: B batch, T positions, C channels of the data, W width of the condition, w width of the head.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from detailflow_jax.models import layers
from detailflow_jax.ops import flow

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
"""How the condition enters (paper table 7, and the published large models)."""


@dataclasses.dataclass(frozen=True)
class FlowHeadConfig:
    """Everything that shapes the head. The defaults are those of FlowAR-S.

    Attributes:
      width: w, a multiple of `head_dim`.
      depth: blocks.
      channels: C.
      injection: one of `INJECTIONS`.
      head_dim: width of an attention head.
      dtype, scan, remat: as everywhere.
    """

    width: int = 1024
    depth: int = 2
    channels: int = 16
    injection: str = "spatial"
    head_dim: int = 64
    dtype: str = "float32"
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
        """Attention heads."""
        return self.width // self.head_dim

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the gated MLP: int(8w/3)."""
        return int(8 * self.width / 3)

    @property
    def crosses(self) -> bool:
        """Whether blocks have cross-attention."""
        return self.injection in ("spatial_cross", "cross")


def _dense(features: int, axes: tuple[str, str], config: FlowHeadConfig, name: str) -> nn.Dense:
    return layers.dense(features, axes, dtype=jnp.dtype(config.dtype), name=name)


def _attention(config: FlowHeadConfig, name: str) -> layers.Attention:
    return layers.Attention(
        config.num_heads,
        config.num_heads,
        use_bias=False,
        output_bias=True,
        dtype=jnp.dtype(config.dtype),
        name=name,
    )


class Block(nn.Module):
    """Attention and gated MLP, both modulated and gated by six vectors of one modulation."""

    config: FlowHeadConfig

    @nn.compact
    def __call__(self, x, prefix, mask, rope, modulation):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        six = _dense(6 * c.width, ("embed", "mlp"), c, "modulation")(nn.silu(modulation))
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.split(six, 6, axis=-1)
        y = layers.modulate(x, scale1, shift1).astype(dtype)
        y, own = _attention(c, "attention")(y, prefix=prefix, mask=mask, rope=rope)
        x = x + y * gate1
        y = layers.modulate(x, scale2, shift2).astype(dtype)
        x = x + layers.GatedMLP(c.mlp_dim, dtype, name="mlp")(y) * gate2
        return nn.with_logical_constraint(x, ("batch", "length", "embed_act")), own


class CrossBlock(nn.Module):
    """Attention, cross-attention to the raw condition, gated MLP.

    Attention is modulated by the time alone, cross-attention is a plain residual, and the MLP is
    modulated by `mlp_modulation`.
    """

    config: FlowHeadConfig

    @nn.compact
    def __call__(self, x, prefix, mask, rope, time, mlp_modulation, condition):
        c, dtype = self.config, jnp.dtype(self.config.dtype)

        def three(name: str, modulation):
            vectors = _dense(3 * c.width, ("embed", "mlp"), c, name)(nn.silu(modulation))
            return jnp.split(vectors, 3, axis=-1)

        gate, scale, shift = three("attention_modulation", time)
        y = layers.modulate(x, scale, shift).astype(dtype)
        y, own = _attention(c, "attention")(y, prefix=prefix, mask=mask, rope=rope)
        x = x + y * gate
        query = layers.rms_norm("query_norm", 1e-6)(x).astype(dtype)
        context = layers.rms_norm("context_norm", 1e-6)(condition).astype(dtype)
        cross = _attention(c, "cross_attention")
        x = x + cross(query, mask=mask, rope=rope, context=context)[0]
        gate, scale, shift = three("mlp_modulation", mlp_modulation)
        y = layers.modulate(x, scale, shift).astype(dtype)
        x = x + layers.GatedMLP(c.mlp_dim, dtype, name="mlp")(y) * gate
        return nn.with_logical_constraint(x, ("batch", "length", "embed_act")), own


class FlowHead(nn.Module):
    """(noisy data, time, condition) -> velocity, the paper's spatial adaptive layer norm."""

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
        # Zero, so that training starts from the velocity 0 (the published code means to).
        zeros = nn.initializers.zeros
        self.final_modulation = layers.dense(
            2 * c.width, ("embed", "mlp"), dtype=dtype, kernel_init=zeros
        )
        self.output = layers.dense(c.channels, ("embed", "code"), dtype=dtype, kernel_init=zeros)

    def embed_time(self, time: jax.Array) -> jax.Array:
        """Times [...] -> [..., w]."""
        features = flow.time_features(time).astype(self.config.dtype)
        return self.time_out(nn.silu(self.time_in(features)))

    def __call__(
        self,
        x: jax.Array,
        time: jax.Array,
        condition: jax.Array,
        *,
        rope: jax.Array | None = None,
        segments: np.ndarray | None = None,
    ) -> jax.Array:
        """The velocity at x.

        Args:
          x: [B, T, C], noisy data.
          time: float [B], or [B, T] where positions differ; 1 is noise, 0 data.
          condition: [B, T, W], or [B, 1, W] for one vector over all positions.
          rope: rotary table [T, head_dim/2, 2] (`ops.rotary.grid_rotary_table`), or None.
          segments: int [T]; positions of different segments do not see each other, so that
            several grids, such as the scales of one latent, go through in one call. None: one.

        Returns:
          float32 [B, T, C].

        Raises:
          ValueError: shapes that do not belong together.
        """
        _check(self.config, x, time, condition)
        length = x.shape[1]
        if segments is None:
            segments = np.zeros(length, np.int32)
        time = self.embed_time(time if time.ndim == 2 else time[:, None])
        condition = jnp.broadcast_to(condition, (*x.shape[:2], condition.shape[-1]))
        condition = condition.astype(self.config.dtype)
        modulation, tokens, condition_tokens = self._inject(x, time, condition, segments)
        if condition_tokens is not None:
            segments = np.concatenate([segments, segments])
            tokens = jnp.concatenate([condition_tokens, tokens], axis=1)
            time = jnp.concatenate([time, time], axis=1) if time.shape[1] > 1 else time
            modulation, rope = time, None if rope is None else jnp.concatenate([rope, rope])
        mask = None if segments.min() == segments.max() else segments[:, None] == segments[None]
        context = (time, modulation, condition) if self.config.crosses else (modulation,)
        tokens, _ = self.blocks(tokens, mask=mask, rope=rope, context=context)
        return self._read_out(tokens[:, -length:], modulation[:, -length:])

    def _inject(self, x, time, condition, segments):
        """(modulation [B, 1 or T, w], tokens [B, T, w], tokens to put before them or None)."""
        injection = self.config.injection
        embedded = self.condition_in(condition)
        if injection == "channel":
            return time, self.channel_input(x, embedded), None
        tokens = self.input(x.astype(self.config.dtype))
        if injection == "add":
            return time, tokens + embedded, None
        if injection == "sequence":
            return time, tokens, embedded
        if injection == "adaln":
            return time + segment_mean(embedded, segments), tokens, None
        if injection == "cross":
            return time, tokens, None
        return time + embedded, tokens, None

    def channel_input(self, x, embedded):
        """Input projection of data and embedded condition side by side."""
        return self.input(jnp.concatenate([x.astype(embedded.dtype), embedded], axis=-1))

    def _read_out(self, tokens, modulation):
        shift, scale = jnp.split(self.final_modulation(nn.silu(modulation)), 2, axis=-1)
        y = layers.modulate(tokens, scale, shift).astype(self.config.dtype)
        return self.output(y).astype(jnp.float32)


def segment_mean(x: jax.Array, segments: np.ndarray) -> jax.Array:
    """Each position's mean over its segment: [B, T, w] -> [B, T, w]."""
    same = (segments[:, None] == segments[None]).astype(np.float32)
    return jnp.einsum("ts,bsw->btw", same / same.sum(axis=1, keepdims=True), x).astype(x.dtype)


def _check(config: FlowHeadConfig, x, time, condition) -> None:
    if x.ndim != 3 or x.shape[-1] != config.channels:
        raise ValueError(f"x has shape {x.shape}, expected [B, T, {config.channels}]")
    if time.shape not in (x.shape[:1], x.shape[:2]):
        raise ValueError(f"time has shape {time.shape}, expected {x.shape[:1]} or {x.shape[:2]}")
    if condition.ndim != 3 or condition.shape[:2] not in (x.shape[:2], (len(x), 1)):
        raise ValueError(
            f"condition has shape {condition.shape}, expected [{len(x)}, {x.shape[1]} or 1, W]"
        )
