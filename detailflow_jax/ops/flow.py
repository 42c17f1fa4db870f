"""Flow matching: the straight path from data to noise, time grids, and ODE and SDE solvers.

Time runs from 1 (noise) to 0 (data), as in the published code of FlowAR (its paper writes it the
other way round). Grids are computed in float64 on the host: a float32 grid would fall on the wrong
side of some of the 1000 levels that the time embedding distinguishes.

Shapes: *shape of the data, M steps of a grid.
"""

import math
import typing
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from detailflow_jax.ops import Array

Data = Float[Array, "*shape"]
Times = Float[np.ndarray, " M"]

Velocity = Callable[..., Array]
"""(x, time as a float32 scalar) -> velocity, of the shape of x."""


def interpolate(data: Data, noise: Data, time: Float[Array, "..."] | float) -> Data:
    """Noisy data x_t = (1 - t) data + t noise; `time` broadcasts (the paper's flow matching)."""
    return (1.0 - time) * data + time * noise


def target_velocity(data: Data, noise: Data) -> Data:
    """dx_t/dt = noise - data."""
    return noise - data


def time_features(time: Float[Array, "*batch"], size: int = 256) -> Float[Array, "*batch {size}"]:
    """Sinusoidal features of floor(1000 t), cosines first; float32.

    The product 1000 t is float32, as published: in float64 its floor would differ at some times.
    """
    level = jnp.floor(jnp.float32(1000.0) * jnp.asarray(time, jnp.float32))
    half = size // 2
    # Exponents are float32, as published. An error of one bit in a frequency is visible at level
    # 1000, so the exponential is computed in float64 and then rounded.
    exponent = np.float32(-math.log(10_000.0)) * np.arange(half, dtype=np.float32) / half
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = level[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


# ----------------------------------------------------------------------------------------- grids


def published_times(num_steps: int) -> Times:
    """The published grid, float64: finer near the noise, but uniform for exactly 50 steps.

    `num_steps` is rounded down to an even number (25 means 24).

    Raises:
      ValueError: if `num_steps` is less than 2.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps}; the published grid needs at least 2")
    if num_steps == 50:
        return uniform_times(50)
    half = num_steps // 2
    return np.concatenate([np.linspace(1.0, 0.3, half), np.linspace(0.25, 0.0, half + 1)])


def uniform_times(num_steps: int) -> Times:
    """`num_steps` equal steps from 1 to 0: float64 [num_steps + 1].

    Raises:
      ValueError: if `num_steps` is less than 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}; expected at least 1")
    return np.linspace(1.0, 0.0, num_steps + 1)


def sde_times(num_steps: int) -> Times:
    """The published grid of the Euler-Maruyama sampler, float64: from 1 to 0.04, then 0.

    Raises:
      ValueError: if `num_steps` is less than 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps}; expected at least 1")
    return np.append(np.linspace(1.0, 0.04, num_steps), 0.0)


GRIDS = {"published": published_times, "uniform": uniform_times, "sde": sde_times}
"""Time grids by name."""


def annealed_steps(first: int, last: int, num_scales: int) -> tuple[int, ...]:
    """Flow steps per scale, falling evenly from `first` to `last`: later scales need fewer."""
    return tuple(int(n) for n in np.linspace(first, last, num_scales).round())


# --------------------------------------------------------------------------------------- solvers


class Step(typing.NamedTuple):
    """One step of a grid: an int32 and three float32 scalars, or arrays [M] to scan over.

    `length` is the difference of the float64 times; the rounded ones would lose digits.
    """

    index: Array
    time: Array
    next_time: Array
    length: Array


def steps(times: Sequence[float] | Times, first: int, last: int) -> Step:
    """Steps first .. last - 1 of a grid of float64 times."""
    chosen = np.asarray(times, np.float64)[first : last + 1]
    return Step(
        index=np.arange(first, last, dtype=np.int32),
        time=chosen[:-1].astype(np.float32),
        next_time=chosen[1:].astype(np.float32),
        length=np.diff(chosen).astype(np.float32),
    )


def euler_step(velocity: Velocity, x: Data, step: Step, noise: Data | None = None) -> Data:
    """x after one step along the velocity at the step's start."""
    del noise
    return x + velocity(x, step.time) * step.length


def heun_step(velocity: Velocity, x: Data, step: Step, noise: Data | None = None) -> Data:
    """x after one step along the mean of the velocities at both ends; two evaluations."""
    del noise
    first = velocity(x, step.time)
    second = velocity(x + first * step.length, step.next_time)
    return x + 0.5 * (first + second) * step.length


def euler_maruyama_step(velocity: Velocity, x: Data, step: Step, noise: Data) -> Data:
    """x after one step of the SDE with the same marginals; the last step adds no noise.

    With diffusion w = 2t, score = -(x + (1 - t) v) / t and drift = v - w/2 score, as in the
    published sampler.
    """
    v = velocity(x, step.time)
    score = -(x + (1.0 - step.time) * v) / step.time
    diffusion = 2.0 * step.time
    moved = x + (v - 0.5 * diffusion * score) * step.length
    noisy = moved + jnp.sqrt(diffusion * jnp.abs(step.length)) * noise
    return jnp.where(step.next_time > 0, noisy, moved)


SOLVERS: dict[str, Callable[..., Array]] = {
    "euler": euler_step,
    "heun": heun_step,
    "euler_maruyama": euler_maruyama_step,
}
"""(velocity, x, step, noise) -> x at the next time, by name."""
