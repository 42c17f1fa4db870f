"""Diffusion with noise prediction: what the paper's ablation puts in the place of flow matching.

Time runs from 1 (noise) to 0 (data), as in `ops.flow`. The signal's share of the variance follows
the cosine schedule (arXiv 2102.09672, equation 17), bounded below so that data can be had from
noise at every time.

Shapes: *shape of the data.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Float

from detailflow_jax.ops import Array
from detailflow_jax.ops.flow import Data, Step, Velocity

LEAST_SIGNAL = 1e-3
"""The signal's share at time 1. At 0 an error of the predicted noise would grow without bound."""

_OFFSET = 0.008  # of the published schedule: some noise at time 0 too


def signal(time: Float[Array, "..."] | float) -> Float[Array, "..."]:
    """The signal's share of the variance, a(t), in [LEAST_SIGNAL, 1]; float32."""
    angle = (jnp.asarray(time, jnp.float32) + _OFFSET) / (1 + _OFFSET) * (math.pi / 2)
    start = math.cos(_OFFSET / (1 + _OFFSET) * math.pi / 2)
    return jnp.clip(jnp.square(jnp.cos(angle) / start), LEAST_SIGNAL, 1.0)


def interpolate(data: Data, noise: Data, time: Float[Array, "..."] | float) -> Data:
    """Noisy data x_t = sqrt(a) data + sqrt(1 - a) noise; `time` broadcasts."""
    share = signal(time)
    return jnp.sqrt(share) * data + jnp.sqrt(1.0 - share) * noise


def target(data: Data, noise: Data) -> Data:
    """The noise."""
    del data
    return noise


def predicted_data(x: Data, noise: Data, time: Float[Array, "..."] | float) -> Data:
    """The data of which x is noisy with that noise."""
    share = signal(time)
    return (x - jnp.sqrt(1.0 - share) * noise) / jnp.sqrt(share)


def ddim_step(predict: Velocity, x: Data, step: Step, noise: Data | None = None) -> Data:
    """x at the next time with the same predicted noise (arXiv 2010.02502, equation 12, eta 0)."""
    del noise
    predicted = predict(x, step.time)
    return interpolate(predicted_data(x, predicted, step.time), predicted, step.next_time)


def ddpm_step(predict: Velocity, x: Data, step: Step, noise: Data) -> Data:
    """x at the next time, with as much fresh noise as the forward process has (eta 1).

    The last step adds none.
    """
    predicted = predict(x, step.time)
    data = predicted_data(x, predicted, step.time)
    now, then = signal(step.time), signal(step.next_time)
    variance = (1.0 - then) / (1.0 - now) * (1.0 - now / then)
    kept = jnp.sqrt(jnp.maximum(1.0 - then - variance, 0.0))
    moved = jnp.sqrt(then) * data + kept * predicted + jnp.sqrt(variance) * noise
    return jnp.where(step.next_time > 0, moved, data)


SOLVERS: dict[str, Callable[..., Array]] = {"ddim": ddim_step, "ddpm": ddpm_step}
"""(predict, x, step, noise) -> x at the next time, by name."""
