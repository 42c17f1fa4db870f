"""Adaptive norms: how FlowAR's blocks take in the time, the class and the semantics.

Shapes: B batch, T positions, D width. A modulation vector is [B, T, D], or [B, 1, D] if it is the
same at all positions.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from detailflow_jax.ops import Array

Positions = Float[Array, "B T D"]
Modulation = Float[Array, "B #T D"]


def normalize(x: Float[Array, "*batch D"], epsilon: float = 1e-6) -> Float[Array, "*batch D"]:
    """RMSNorm without a weight: x / rms(x), in float32."""
    x = jnp.asarray(x, jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)


def modulate(x: Positions, scale: Modulation, shift: Modulation) -> Positions:
    """The adaptive norm (1 + scale) * x / rms(x) + shift, in float32."""
    return normalize(x) * (1.0 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)


def spatial_adaln(
    layer: Callable[[Array], Array],
    x: Positions,
    gate: Modulation,
    scale: Modulation,
    shift: Modulation,
) -> Positions:
    """x after one residual layer under Spatial-adaLN (the paper's flow-matching head).

    With t the embedded time and c_p the embedded semantics of position p,

        gate_p, scale_p, shift_p = Linear(SiLU(t + c_p))
        out_p = x_p + gate_p * layer((1 + scale) * x / rms(x) + shift)_p

    Every position is modulated by its own semantics, so they keep their place in the image. Plain
    adaLN has one c for all positions. The layer computes in the dtype of `gate`.
    """
    return x + layer(modulate(x, scale, shift).astype(gate.dtype)) * gate
