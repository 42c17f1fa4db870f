"""Sampling of FlowAR: one program for all scales, flow steps scanned, earlier scales cached.

Shapes: B samples, K scales of sides i, C latent channels, S side of the latent, W width; R = B
rows, or 2B under guidance (of each sample the conditional row, then the null row).
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Key

from detailflow_jax.models.flowar import FlowAR, FlowARConfig, extend_cache
from detailflow_jax.ops import Array, flow
from detailflow_jax.ops import logits as filters
from detailflow_jax.ops import scales as grids
from detailflow_jax.ops.objectives import OBJECTIVES, STOCHASTIC


@dataclasses.dataclass(frozen=True)
class FlowSamplingOptions:
    """The static settings; guidance scales are an argument and cost no new compilation.

    Attributes:
      times: of every scale, from 1 to 0, float64 values (`flow_times`).
      guided: compute the null half. Without guidance (scale 1) it is not computed.
      guidance_low, guidance_high: guidance applies at steps that begin at a time within them.
      solver: one of those of the model's objective (`ops.objectives`).
    """

    times: tuple[tuple[float, ...], ...]
    guided: bool = True
    guidance_low: float = 0.0
    guidance_high: float = 1.0
    solver: str = "euler"

    def guides(self, scale: int, time: float) -> bool:
        """Whether a step is guided; compared in float64, and the bounds included.

        The first of several scales has the factor 1, which is no guidance.
        """
        first = scale == 0 and len(self.times) > 1
        return self.guided and not first and self.guidance_low <= time <= self.guidance_high


def flow_times(
    num_scales: int, num_steps: int | Sequence[int], grid: str = "published"
) -> tuple[tuple[float, ...], ...]:
    """The times of every scale.

    Args:
      num_scales: K.
      num_steps: flow steps, one number for all scales or one per scale (annealing).
      grid: "published", "uniform" or "sde" (`ops.flow.GRIDS`).

    Raises:
      ValueError: an unknown grid, a count that it does not take, or not K counts.
    """
    if grid not in flow.GRIDS:
        raise ValueError(f"grid={grid!r} is not one of {', '.join(flow.GRIDS)}")
    steps = [num_steps] * num_scales if isinstance(num_steps, int | np.integer) else list(num_steps)
    if len(steps) != num_scales:
        raise ValueError(
            f"num_steps={steps} has {len(steps)} counts, expected {num_scales}, one per scale"
        )
    return tuple(tuple(flow.GRIDS[grid](int(n)).tolist()) for n in steps)


def guidance_factors(scale: float, num_scales: int) -> Float32[np.ndarray, " K"]:
    """Guidance at every scale, 1 + (s - 1) k / (K - 1)."""
    if num_scales == 1:
        return np.array([scale], np.float32)
    return (1.0 + (scale - 1.0) * np.arange(num_scales) / (num_scales - 1)).astype(np.float32)


def draw_noise(config: FlowARConfig, keys: Key[Array, " B"]) -> list[Array]:
    """Noise of every scale from one PRNG key per sample: K arrays float32 [B, i^2, C]."""

    def one(scale: int, side: int) -> Array:
        draw = lambda key: jax.random.normal(  # noqa: E731
            jax.random.fold_in(key, scale), (side * side, config.channels)
        )
        return jax.vmap(draw)(keys)

    return [one(scale, side) for scale, side in enumerate(config.scales)]


class Known(NamedTuple):
    """Latents of which a part is kept.

    Attributes:
      latents: [B, S, S, C].
      mask: [B, S, S], true where latents are sampled anew.
    """

    latents: Float[Array, "B S S C"]
    mask: Bool[Array, "B S S"]

    def at(self, side: int) -> tuple[Float[Array, "B P C"], Bool[Array, "B P 1"]]:
        """Both at one scale of P positions; what holds any masked part is sampled anew."""
        return grids.reduce_to(self.latents, side), grids.reduce_mask(self.mask, side)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The two parts of sampling: the model, its parameters and the settings of a run, together."""

    model: FlowAR
    params: Any
    options: FlowSamplingOptions
    keys: Any
    factors: Any

    def apply(self, method: str, *args, **static):
        return self.model.apply({"params": self.params}, *args, method=method, **static)

    def rows(self, labels: Int[Array, " B"]) -> Int[Array, " R"]:
        """Labels as the classes of all rows."""
        if not self.options.guided:
            return labels
        return filters.pair(labels, jnp.full_like(labels, self.model.config.num_classes))

    def semantics(self, scale: int, classes: Array, latent: Array | None, cache: Any):
        """Semantics [R, i^2, W] of one scale, and the cache with its keys and values.

        `latent` [B, i'^2, C] is that of the scale before, which both halves read.
        """
        c = self.model.config
        if latent is None:
            nothing = jnp.zeros((len(classes), 0, c.channels))
            x, start = self.apply("embed", classes, nothing), 0
        else:
            side, after = c.scales[scale - 1 : scale + 1]
            inputs = grids.next_input(latent, side, after, c.latent_side)
            inputs = filters.pair(inputs, inputs) if self.options.guided else inputs
            x = self.apply("embed_inputs", inputs)
            start = c.buffer_size + c.offsets[scale]
        semantics, own = self.apply("run", x, classes, start=start, cache=cache)
        return semantics[:, -(c.scales[scale] ** 2) :], extend_cache(cache, own, c.scan)

    def velocity(self, scale: int, semantics: Array, guided: bool) -> flow.Velocity:
        """The velocity field [B, i^2, C] of one scale."""

        def head(x: Array, time: Array, semantics: Array) -> Array:
            times = jnp.broadcast_to(time, (len(x),))
            return self.apply("velocity", x, times, semantics, scale=scale)

        def both(x: Array, time: Array) -> Array:
            # Both rows of a sample share x: the null row never moves on its own.
            velocities = filters.unpair(head(filters.pair(x, x), time, semantics))
            return filters.guide(*velocities, self.factors[scale])

        if guided:
            return both
        own = filters.unpair(semantics)[0] if self.options.guided else semantics
        return lambda x, time: head(x, time, own)

    def solve(
        self,
        scale: int,
        semantics: Float[Array, "R P W"],
        noise: Float[Array, "B P C"],
        known: Known | None = None,
    ) -> Float[Array, "B P C"]:
        """Noise -> latent of one scale of P positions, a scan for each run of equal guidance.

        What is known stays on its path to the data: at every time it is the interpolant of the
        known latent and its noise.
        """
        times = self.options.times[scale]
        x, kept = noise, None if known is None else known.at(self.model.config.scales[scale])
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, len(self.options.times) + scale)
        objective = OBJECTIVES[self.model.config.objective]
        solver = objective.solvers[self.options.solver]
        for guided, first, last in _runs(self.options, scale):
            velocity = self.velocity(scale, semantics, guided)

            def advance(x, step, velocity=velocity):
                drawn = None
                if self.options.solver in STOCHASTIC:
                    drawn = _step_noise(keys, step.index, x.shape[1:])
                x = solver(velocity, x, step, drawn)
                if kept is not None:
                    latent, anew = kept
                    x = jnp.where(anew, x, objective.interpolate(latent, noise, step.next_time))
                return x, None

            x, _ = jax.lax.scan(advance, x, flow.steps(times, first, last))
        return x


def _runs(options: FlowSamplingOptions, scale: int) -> Iterator[tuple[bool, int, int]]:
    """(guided, first step, step after the last) of every run of equal guidance."""
    times = options.times[scale]
    guided = [options.guides(scale, time) for time in times[:-1]]
    for value, steps in itertools.groupby(range(len(guided)), key=guided.__getitem__):
        steps = list(steps)
        yield value, steps[0], steps[-1] + 1


def _step_noise(keys: Array, index: Array, shape: tuple[int, ...]) -> Array:
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, index), shape)  # noqa: E731
    return jax.vmap(draw)(keys)


def sample_scales(
    model: FlowAR,
    params: Any,
    labels: Int[Array, " B"],
    keys: Key[Array, " B"],
    factors: Float32[Array, " K"],
    noise: Sequence[Array] | None = None,
    known: Known | None = None,
    *,
    options: FlowSamplingOptions,
    kind: type[Sampling] = Sampling,
) -> Iterator[tuple[Array, Array]]:
    """The body of `sample`: for each scale its semantics [R, i^2, W] and latent [B, i^2, C]."""
    c = model.config
    program = kind(model, params, options, keys, factors)
    noise = draw_noise(c, keys) if noise is None else noise
    latent = cache = None
    for scale in range(len(c.scales)):
        semantics, cache = program.semantics(scale, program.rows(labels), latent, cache)
        start = jnp.asarray(noise[scale], jnp.float32)
        latent = program.solve(scale, semantics, start, known)
        yield semantics, latent


@functools.partial(jax.jit, static_argnames=("model", "options"))
def sample(
    model: FlowAR,
    params: Any,
    labels: Int[Array, " B"],
    keys: Key[Array, " B"],
    factors: Float32[Array, " K"],
    noise: Sequence[Array] | None = None,
    known: Known | None = None,
    *,
    options: FlowSamplingOptions,
) -> Float32[Array, "B S S C"]:
    """Latents for labels, in one program (the paper's inference, as the published code does it).

    Args:
      model: the network.
      params: its parameters, in the layout of `model.config.scan`.
      labels: class numbers.
      keys: one PRNG key per sample; a sample depends on its own key alone.
      factors: guidance at each scale (`guidance_factors`).
      noise: K arrays [B, i^2, C] in place of drawn ones.
      known: latents of which a part is kept; it goes into every later scale too.
      options: static settings.

    Returns:
      latents, scaled as in training.
    """
    scales = sample_scales(model, params, labels, keys, factors, noise, known, options=options)
    *_, (_, latent) = scales
    side = model.config.latent_side
    return latent.reshape(len(labels), side, side, -1)
