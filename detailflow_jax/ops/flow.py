"""Flow matching: the straight path from data to noise, time grids, and ODE and SDE solvers.

Time runs from 1 (noise) to 0 (data), as in the published code of FlowAR (its paper writes it the
other way round). Grids are made in float64 on the host: a float32 one lands on the wrong side of
some of the 1000 levels that the time embedding has.
"""

import math
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
"""(x, time as a float32 scalar) -> velocity, of the shape of x."""


def interpolate(data: jax.Array, noise: jax.Array, time: jax.Array) -> jax.Array:
    """x_t = (1 - t) data + t noise, `time` broadcastable (the paper's flow matching)."""
    return (1.0 - time) * data + time * noise


def target_velocity(data: jax.Array, noise: jax.Array) -> jax.Array:
    """dx_t/dt = noise - data."""
    return noise - data


def time_features(time: jax.Array, size: int = 256) -> jax.Array:
    """Sinusoidal features of floor(1000 t): float32 [..., size], cosines first.

    The product is float32, as published: in float64 it would fall below a whole number elsewhere.
    """
    level = jnp.floor(jnp.float32(1000.0) * jnp.asarray(time, jnp.float32))
    half = size // 2
    # Exponents are float32 as published. At level 1000 an error of one bit in a frequency is seen,
    # so the exponential itself is taken in float64 and rounded.
    exponent = np.float32(-math.log(10_000.0)) * np.arange(half, dtype=np.float32) / half
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = level[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


# ----------------------------------------------------------------------------------------- grids


def published_times(num_steps: int) -> np.ndarray:
    """The published grid, float64: finer near the noise, but for exactly 50 steps uniform.

    The number of steps is `num_steps` rounded down to an even number (25 means 24).
    """
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps}; the published grid needs at least 2")
    if num_steps == 50:
        return uniform_times(50)
    half = num_steps // 2
    return np.concatenate([np.linspace(1.0, 0.3, half), np.linspace(0.25, 0.0, half + 1)])


def uniform_times(num_steps: int) -> np.ndarray:
    """num_steps equal steps from 1 to 0: float64 [num_steps + 1]."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}; expected at least 1")
    return np.linspace(1.0, 0.0, num_steps + 1)


def sde_times(num_steps: int) -> np.ndarray:
    """The published grid of the Euler-Maruyama sampler: from 1 to 0.04, then 0."""
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}; expected at least 1")
    return np.append(np.linspace(1.0, 0.04, num_steps), 0.0)


GRIDS = {"published": published_times, "uniform": uniform_times, "sde": sde_times}
"""Time grids by name."""


def annealed_steps(first: int, last: int, num_scales: int) -> tuple[int, ...]:
    """Flow steps a scale, falling evenly from `first` to `last`: later scales need fewer."""
    return tuple(int(n) for n in np.linspace(first, last, num_scales).round())


# --------------------------------------------------------------------------------------- solvers


@flax.struct.dataclass
class Step:
    """One step of a grid: float32 scalars (or arrays of steps, to scan over).

    `length` is the difference of the float64 times: that of the rounded ones would lose digits.
    """

    index: jax.Array
    time: jax.Array
    next_time: jax.Array
    length: jax.Array


def steps(times: Sequence[float], first: int, last: int) -> Step:
    """Steps first .. last - 1 of a grid of float64 times."""
    times = np.asarray(times, np.float64)[first : last + 1]
    return Step(
        index=np.arange(first, last, dtype=np.int32),
        time=times[:-1].astype(np.float32),
        next_time=times[1:].astype(np.float32),
        length=np.diff(times).astype(np.float32),
    )


def euler_step(velocity: Velocity, x: jax.Array, step: Step, noise=None) -> jax.Array:
    """One step along the velocity at its start."""
    del noise
    return x + velocity(x, step.time) * step.length


def heun_step(velocity: Velocity, x: jax.Array, step: Step, noise=None) -> jax.Array:
    """One step along the mean of the velocities at both ends; two evaluations."""
    del noise
    first = velocity(x, step.time)
    second = velocity(x + first * step.length, step.next_time)
    return x + 0.5 * (first + second) * step.length


def euler_maruyama_step(velocity: Velocity, x: jax.Array, step: Step, noise) -> jax.Array:
    """One step of the SDE with the same marginals, diffusion w = 2t; no noise in the last one.

    score = -(x + (1 - t) v) / t and drift = v - w/2 score (behaviour of the published sampler).
    """
    v = velocity(x, step.time)
    score = -(x + (1.0 - step.time) * v) / step.time
    diffusion = 2.0 * step.time
    moved = x + (v - 0.5 * diffusion * score) * step.length
    noisy = moved + jnp.sqrt(diffusion * jnp.abs(step.length)) * noise
    return jnp.where(step.next_time > 0, noisy, moved)


SOLVERS = {"euler": euler_step, "heun": heun_step, "euler_maruyama": euler_maruyama_step}
"""(velocity, x, step, noise) -> x at the next time, by name."""
