"""FlowAR: seconds of the sampler, of its transformer and its head, and of doing without a cache.

`sampling.py --system flowar` is the door. Shapes: B samples, K scales of sides i, C latent
channels, W width; R = B rows, or 2B under guidance.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import measuring
import numpy as np

from detailflow_jax.inference import api
from detailflow_jax.inference.checks import check_flow_settings, check_guidance
from detailflow_jax.models import flow_sampler, flowar, layers, sampler
from detailflow_jax.ops import flow
from detailflow_jax.ops import logits as filters
from detailflow_jax.ops import scales as grids
from detailflow_jax.runtime import flops

_SMALL = {"cfg_scale": 4.3, "guidance_high": 0.9, "num_steps": 25}
SETTINGS = {
    "FlowAR-S": _SMALL,
    "FlowAR-B": _SMALL,
    "FlowAR-L": {"cfg_scale": 2.4, "guidance_high": 0.9, "num_steps": 25},
    "FlowAR-H": {"cfg_scale": 2.4, "guidance_high": 0.7, "num_steps": 50},
}
"""Published settings of sampling by size; B has none, so it takes those of S."""


def schedules(args: argparse.Namespace, num_scales: int) -> dict[str, tuple[int, ...]]:
    """Flow steps per scale, by the name of the run."""
    found = {"sampler": (args.num_steps,) * num_scales}
    if args.annealed:
        found["annealed"] = flow.annealed_steps(args.num_steps, args.annealed, num_scales)
    return found


def check(args: argparse.Namespace) -> None:
    """Raises ValueError where a setting is out of range."""
    check_guidance(args.cfg_scale)
    check_flow_settings(0.0, args.guidance_high, "euler", "flow")
    for steps in schedules(args, len(flowar.FlowARConfig.scales)).values():
        flow_sampler.flow_times(len(steps), steps)
    if args.batch < 1 or args.repeats < 1:
        raise ValueError(f"--batch {args.batch} --repeats {args.repeats}: expected at least 1")


# ----------------------------------------------------------------------------------- the system


def make_network(size: str, dtype: str, scan: bool | None) -> tuple[flowar.FlowAR, Any]:
    """A random FlowAR and its parameters; `scan` None: in the layout that `api` chooses."""
    config = flowar.FlowARConfig(**flowar.SIZES[size], dtype=dtype)
    params = measuring.random_params(flowar.FlowAR(config).init, *flowar.example(config))
    model = api.FlowAR(config, params, "random weights")
    if scan is None or scan == model.config.scan:
        return model.network, model.params
    layout = layers.stack_layers if scan else layers.unstack_layers
    network = flowar.FlowAR(dataclasses.replace(config, scan=scan))
    return network, jax.device_put(layout(params))


class Recomputed(flow_sampler.Sampling):
    """Keeps no keys and values: every scale runs all earlier ones again, under the scale mask."""

    def semantics(self, scale: int, classes: jax.Array, latent: jax.Array | None, cache: Any):
        """As the sampler's; what is passed on as `cache` are the inputs [R, m, C] so far."""
        c = self.model.config
        inputs = jnp.zeros((len(classes), 0, c.channels))
        if scale:
            side, after = c.scales[scale - 1 : scale + 1]
            new = grids.next_input(latent, side, after, c.latent_side)
            new = filters.pair(new, new) if self.options.guided else new
            inputs = jnp.concatenate([cache, new], axis=1)
        x = self.apply("embed", classes, inputs)
        length = x.shape[1]
        semantics, _ = self.apply("run", x, classes, mask=c.mask()[:length, :length])
        return semantics[:, -(c.scales[scale] ** 2) :], inputs


class EveryStepGuided(flow_sampler.FlowSamplingOptions):
    """Computes the null half at every step, as the published sampler does."""

    def guides(self, scale: int, time: float) -> bool:
        """Always, under guidance."""
        return self.guided


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and everything that one sampling takes."""

    network: flowar.FlowAR
    params: Any
    labels: jax.Array
    keys: jax.Array
    factors: jax.Array
    options: flow_sampler.FlowSamplingOptions

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What `flow_sampler.sample` and `sample_recomputed` take."""
        return self.network, self.params, self.labels, self.keys, self.factors

    @property
    def classes(self) -> jax.Array:
        """The classes of all rows, int32 [R]."""
        return flow_sampler.Sampling(*self.arguments[:2], self.options, None, None).rows(
            self.labels
        )

    def noise(self) -> list[jax.Array]:
        """The noise of every scale, the one that the sampler draws."""
        return flow_sampler.draw_noise(self.network.config, self.keys)


def make_case(network: flowar.FlowAR, params: Any, args: argparse.Namespace, steps) -> Case:
    """The case of `args`, with `steps` flow steps: one number, or one per scale."""
    c = network.config
    count = len(c.scales)
    options = flow_sampler.FlowSamplingOptions(
        flow_sampler.flow_times(count, steps),
        guided=args.cfg_scale != 1.0,
        guidance_high=args.guidance_high,
    )
    labels = jnp.arange(args.batch, dtype=jnp.int32) % c.num_classes
    keys = sampler.sample_keys(0, jnp.arange(args.batch))
    factors = jnp.asarray(flow_sampler.guidance_factors(args.cfg_scale, count))
    return Case(network, params, labels, keys, factors, options)


# ------------------------------------------------------------------ without a cache, and the parts


@functools.partial(jax.jit, static_argnames=("network", "options"))
def sample_recomputed(network, params, labels, keys, factors, *, options) -> jax.Array:
    """Latents [B, S, S, C] as `flow_sampler.sample` gives them, without a cache."""
    *_, (_, latent) = flow_sampler.sample_scales(
        network, params, labels, keys, factors, options=options, kind=Recomputed
    )
    side = network.config.latent_side
    return latent.reshape(len(labels), side, side, -1)


@functools.partial(jax.jit, static_argnames=("kind", "network", "options", "scale"))
def _semantics(kind, network, params, options, scale, classes, latent, state):
    program = kind(network, params, options, None, None)
    semantics, state = program.semantics(scale, classes, latent, state)
    last = scale == len(network.config.scales) - 1  # nothing reads what it would pass on
    return semantics, None if last else state


@functools.partial(jax.jit, static_argnames=("network", "options", "scale"))
def _solve(network, params, options, scale, semantics, noise, keys, factors):
    program = flow_sampler.Sampling(network, params, options, keys, factors)
    return program.solve(scale, semantics, noise)


def transformer(
    case: Case, latents: Sequence[jax.Array], kind: type = flow_sampler.Sampling
) -> Iterator[jax.Array]:
    """The transformer's part of sampling: semantics [R, i^2, W] of every scale.

    `latents` [B, i^2, C] are those of the scales, of which the last is not read.
    """
    state = None
    for scale in range(len(case.network.config.scales)):
        latent = latents[scale - 1] if scale else None
        semantics, state = _semantics(
            kind, case.network, case.params, case.options, scale, case.classes, latent, state
        )
        yield semantics


def head(
    case: Case, semantics: Sequence[jax.Array], noise: Sequence[jax.Array]
) -> Iterator[jax.Array]:
    """The head's part of sampling: latents [B, i^2, C] of every scale."""
    network, params, options = case.network, case.params, case.options
    for scale, (given, x) in enumerate(zip(semantics, noise, strict=True)):
        yield _solve(network, params, options, scale, given, x, case.keys, case.factors)


def waited(part: Callable[..., Iterator[jax.Array]], *args: Any) -> Callable[[], None]:
    """A run of a part, scale after scale: unlike in the sampler, nothing else would order them."""

    def run() -> None:
        for result in part(*args):
            jax.block_until_ready(result)

    return run


# -------------------------------------------------------------------------------- the arithmetic


def _written(part: Callable[..., Iterator[jax.Array]], case: Case, *args: Any) -> int:
    """FLOPs of the matrix products of a part."""

    def whole(params, *args):
        return list(part(dataclasses.replace(case, params=params), *args))

    return flops.written(jax.jit(whole).trace(case.params, *args))


def head_flops(case: Case, semantics: Any, noise: Any) -> tuple[int, int]:
    """FLOPs of the head: as sampled, and with the null half at every step."""
    options = EveryStepGuided(**vars(case.options))
    full = dataclasses.replace(case, options=options)
    return _written(head, case, semantics, noise), _written(head, full, semantics, noise)


def transformer_flops(case: Case, latents: Any) -> tuple[int, int]:
    """FLOPs of the transformer: with a cache, and without."""
    recomputed = functools.partial(transformer, kind=Recomputed)
    return _written(transformer, case, latents), _written(recomputed, case, latents)


def positions(config: flowar.FlowARConfig) -> tuple[int, int]:
    """Positions per row through the transformer: with a cache, and without."""
    ends = [config.buffer_size + end for end in config.offsets[1:]]
    return ends[-1], sum(ends)


# ----------------------------------------------------------------------------------- measuring


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything the table shows, by name; `rows` are those of the flow steps."""
    network, params = make_network(args.size, args.dtype, args.scan)
    steps = schedules(args, len(network.config.scales))
    cases = {name: make_case(network, params, args, counts) for name, counts in steps.items()}
    compiling, runs = {}, {}
    for name, case in cases.items():
        compiling[name], runs[name] = _compiled(flow_sampler.sample, case)
    runs["sampler"]()  # the first run touches memory for the first time
    found: dict[str, Any] = {
        "layers": "scanned" if network.config.scan else "unrolled",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "peak memory": measuring.peak_memory(),
    }
    if not args.no_recompute:
        compiling["recomputed"], runs["recomputed"] = _compiled(sample_recomputed, cases["sampler"])
    noise = cases["sampler"].noise()
    semantics = list(transformer(cases["sampler"], noise))
    runs |= _parts(args, cases, semantics, noise)
    for run in runs.values():
        jax.block_until_ready(run())
    best, results = measuring.least_seconds(runs, args.repeats)
    found |= _arithmetic(cases, semantics, noise)
    found["rows"] = [_row(steps[name], compiling[name], best, name, found) for name in steps]
    return found | _compared(compiling, best, results, found)


def _compiled(sample: Callable, case: Case) -> tuple[float, Callable[[], jax.Array]]:
    """(seconds of compiling, the run) of a sampler."""
    seconds, program = measuring.seconds_of(
        lambda: sample.lower(*case.arguments, options=case.options).compile()
    )
    return seconds, functools.partial(program, *case.arguments[1:])


def _parts(args, cases: dict[str, Case], semantics, noise) -> dict[str, Callable[[], None]]:
    """The runs of transformer and head; noise stands for latents, as values cost no time."""
    runs = {"transformer": waited(transformer, cases["sampler"], noise)}
    if not args.no_recompute:
        runs["transformer recomputed"] = waited(transformer, cases["sampler"], noise, Recomputed)
    for name, case in cases.items():
        runs[f"{name} head"] = waited(head, case, semantics, noise)
    return runs


def _arithmetic(cases: dict[str, Case], semantics, noise) -> dict[str, Any]:
    cached, recomputed = positions(cases["sampler"].network.config)
    found = {"positions cached": cached, "positions recomputed": recomputed}
    names = "transformer flops", "transformer flops recomputed"
    found |= zip(names, transformer_flops(cases["sampler"], noise), strict=True)
    for name, case in cases.items():
        names = f"{name} head flops", f"{name} head flops with every null half"
        found |= zip(names, head_flops(case, semantics, noise), strict=True)
    return found


def _row(steps: Sequence[int], compiling: float, best, name: str, found) -> dict[str, Any]:
    seconds, parts = best[name], (best["transformer"], best[f"{name} head"])
    return {
        "steps": list(steps),
        "compile": compiling,
        "seconds": seconds,
        "transformer": parts[0],
        "head": parts[1],
        "rest": seconds - sum(parts),
        "flops": found["transformer flops"] + found[f"{name} head flops"],
    }


def _compared(compiling, best, results, found) -> dict[str, Any]:
    """Measured and arithmetic ratios."""
    first, *others = found["rows"]
    out = {}
    for row in others:
        out["annealing ratio"] = first["seconds"] / row["seconds"]
        out["annealing arithmetic ratio"] = first["flops"] / row["flops"]
    if "recomputed" not in results:
        return out
    more = found["transformer flops recomputed"] - found["transformer flops"]
    latents, again = np.asarray(results["sampler"]), np.asarray(results["recomputed"])
    return out | {
        "compile recomputed": compiling["recomputed"],
        "recomputed": best["recomputed"],
        "transformer recomputed": best["transformer recomputed"],
        "ratio": best["recomputed"] / best["sampler"],
        "arithmetic ratio": 1 + more / first["flops"],
        "transformer ratio": best["transformer recomputed"] / best["transformer"],
        "transformer arithmetic ratio": 1 + more / found["transformer flops"],
        "largest difference": float(np.abs(latents - again).max()),
        "largest latent": float(np.abs(latents).max()),
    }


# ------------------------------------------------------------------------------------ the table


def table(args: argparse.Namespace, found: dict[str, Any]) -> str:
    """The figures as text."""
    title = (
        f"{args.size} ({found['parameters'] / 1e6:.1f}M), batch {args.batch}, cfg_scale "
        f"{args.cfg_scale:g}, guidance_high {args.guidance_high:g}, {args.dtype}, "
        f"{found['layers']} layers, {jax.devices()[0].device_kind}"
    )
    parts = [title, "", measuring.columns(_schedule_rows(found)), ""]
    return "\n".join([*parts, measuring.columns(_comparison_rows(found))])


def _schedule_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = [
        ("flow steps per scale", "compile", "per batch", "transformer", "head", "rest", "GFLOP/s")
    ]
    for row in found["rows"]:
        steps = row["steps"]
        label = f"{steps[0]}" if len(set(steps)) == 1 else ", ".join(map(str, steps))
        shares = [
            f"{row[part]:.2f} s ({row[part] / row['seconds']:.1%})"
            for part in ("transformer", "head", "rest")
        ]
        speed = f"{row['flops'] / row['seconds'] / 1e9:.1f}"
        rows.append((label, f"{row['compile']:.1f} s", f"{row['seconds']:.2f} s", *shares, speed))
    return rows


def _comparison_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if "annealing ratio" in found:
        rows.append(("annealing", _against(found, "annealing ratio", "annealing arithmetic ratio")))
    if "ratio" in found:
        rows += [
            ("without a cache", f"{found['recomputed']:.2f} s per batch"),
            ("  compile", f"{found['compile recomputed']:.1f} s"),
            ("  ratio", _against(found, "ratio", "arithmetic ratio")),
            ("  its transformer", f"{found['transformer recomputed']:.2f} s per batch"),
            ("  ratio", _against(found, "transformer ratio", "transformer arithmetic ratio")),
            (
                "  largest difference",
                f"{found['largest difference']:.2g} of {found['largest latent']:.3g}",
            ),
        ]
    cached, recomputed = found["positions cached"], found["positions recomputed"]
    skipping, full = found["sampler head flops"], found["sampler head flops with every null half"]
    transformer_cached = found["transformer flops"] / 1e9
    rows += [
        ("positions in the transformer", f"{cached} per row; without a cache {recomputed}"),
        ("transformer", f"{transformer_cached:.4g} GFLOP a batch"),
        ("head", f"{skipping / 1e9:.4g} GFLOP a batch"),
        ("  null half at every step", f"{full / 1e9:.4g} GFLOP, {full / skipping:.3f} times that"),
        ("peak memory", f"{found['peak memory'] / 1e9:.2f} GB"),
    ]
    return rows


def _against(found: dict[str, Any], ratio: str, limit: str) -> str:
    return f"{found[ratio]:.2f} times; arithmetic allows {found[limit]:.2f}"
