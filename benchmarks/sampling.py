"""How long sampling takes at random weights, with a cache and without one.

    python benchmarks/sampling.py --size GPT-L --batch 4 --tokens 128
    python benchmarks/sampling.py --system flowar --size S --batch 4

Both ways draw with the same keys, so both must give the same result; what differs is printed.
Every figure is the least of `--repeats` runs, which alternate.

DetailFlow: cached is `models.sampler.sample` in the layout that `api` chooses for the backend.
Recomputed is the published way: each step runs the network over the whole prefix seen so far,
keeps nothing, and reads the logits of the new positions only. It has one program per step, each
compiled for its prefix length, so no padding is computed. Two bounds are printed beside the
measured ratio. Arithmetic: positions run through the network, recomputed over cached
(1116/128 = 8.7 for 128 tokens in groups of 8). Reading weights: every step of the cached sampler
reads all weights once, at the memory bandwidth measured here.

FlowAR: cached is `models.flow_sampler.sample`; without a cache the transformer runs all earlier
scales again at every scale, under the scale mask (453 positions for 341). Transformer and head are
timed on their own as well, one program per scale; the rest is what the sampler takes beyond both.
The second row has fewer flow steps at later scales. The bounds count the FLOPs of matrix products;
the null half of guidance is computed at guided steps only. The published grid rounds an odd number
of flow steps down.
"""

import argparse
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flowar_sampling
import jax
import jax.numpy as jnp
import measuring
import numpy as np

from detailflow_jax.inference import api
from detailflow_jax.models import flowar, generator, sampler, tokenizer
from detailflow_jax.ops import logits as filters
from detailflow_jax.ops import masks
from detailflow_jax.runtime.config import load_config
from detailflow_jax.tasks import tokenizer as tokenizer_task

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
NUM_CLASSES = 1000

# ------------------------------------------------------------------------------------ networks


def make_generator(size: str, num_tokens: int, dtype: str) -> api.Generator:
    """A random generator of a published size."""
    config = generator.GeneratorConfig(
        **generator.SIZES[size], num_tokens=num_tokens, num_classes=NUM_CLASSES, dtype=dtype
    )
    codes = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    params = measuring.random_params(generator.Generator(config).init, codes, labels)
    return api.Generator(config, params, "random weights")


def make_decoder(name: str, dtype: str) -> api.Tokenizer:
    """A random tokenizer of `configs/tokenizer.py`, with the parameters that decoding needs."""
    model = load_config(f"{CONFIGS / 'tokenizer.py'}:{name}").model
    model.dtype = dtype
    config = tokenizer_task.model_config(model)
    init = functools.partial(
        tokenizer.Tokenizer(config).init, method="decode_codes", size=config.image_size
    )
    codes = jax.ShapeDtypeStruct((1, config.num_tokens), jnp.int32)
    return api.Tokenizer(config, measuring.random_params(init, codes), "random weights")


# ---------------------------------------------------------------------------- the two samplers


def cached(gen: api.Generator, batch: int, cfg_scale: float):
    """(compiled program, its arguments) of the sampler."""
    c = gen.config
    options = sampler.SamplingOptions(c.num_tokens, guided=cfg_scale != 1.0)
    scales = filters.guidance_scales(cfg_scale, c.num_tokens, c.group_size, c.causal)
    labels = jnp.arange(batch, dtype=jnp.int32) % NUM_CLASSES
    keys = sampler.sample_keys(0, jnp.arange(batch))
    arguments = gen.params, labels, keys, jnp.asarray(scales)
    program = sampler.sample.lower(gen.network, *arguments, options=options).compile()
    return program, arguments


def steps_of(config: generator.GeneratorConfig) -> list[tuple[int, int]]:
    """(first token, tokens) of every sampling step: c single ones, then whole groups."""
    single = [(start, 1) for start in range(config.causal)]
    later = range(config.causal, config.num_tokens, config.group_size)
    return single + [(start, config.group_size) for start in later]


def _prefix_logits(model: generator.Generator, codes, labels, start: int):
    """Logits of the positions from `start` on, from the whole prefix: codes [R, start]."""
    c = model.config
    parts = [model.embed_class(labels), model.embed_codes(codes[:, : c.causal])]
    if start >= c.causal:
        parts += [model.embed_special(len(labels)), model.embed_codes(codes[:, c.causal :])]
    x = jnp.concatenate(parts, axis=1)
    length = x.shape[1]
    mask = masks.group_mask(c.num_tokens, c.group_size, c.causal)[:length, :length]
    x, _ = model.blocks(x, mask=mask[None, None], rope=c.rope()[:length])
    return model.read_out(x[:, start:])


@functools.partial(jax.jit, static_argnames="network")
def _recompute(network, params, codes, labels, keys, scale):
    """One step of the published sampler: the codes [B, start] and the new ones after them."""
    batch, start = codes.shape
    guided = len(labels) != batch
    rows = jnp.concatenate([codes, codes]) if guided else codes
    logits = network.apply({"params": params}, rows, labels, start, method=_prefix_logits)
    if guided:
        logits = filters.guide(*jnp.split(logits, 2), scale)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, start)
    return jnp.concatenate([codes, filters.sample_codes(keys, logits)], axis=1)


def recomputed(gen: api.Generator, batch: int, cfg_scale: float) -> Callable[[], jax.Array]:
    """A function that samples with one compiled program per step; compiles them now."""
    labels = jnp.arange(batch, dtype=jnp.int32) % NUM_CLASSES
    if cfg_scale != 1.0:
        labels = jnp.concatenate([labels, jnp.full_like(labels, NUM_CLASSES)])
    rest = labels, sampler.sample_keys(0, jnp.arange(batch)), jnp.float32(cfg_scale)
    programs = []
    for start, _ in steps_of(gen.config):
        codes = jax.ShapeDtypeStruct((batch, start), jnp.int32)
        programs.append(_recompute.lower(gen.network, gen.params, codes, *rest).compile())

    def run() -> jax.Array:
        codes = jnp.zeros((batch, 0), jnp.int32)
        for program in programs:
            codes = program(gen.params, codes, *rest)
        return codes

    return run


# ----------------------------------------------------------------------------------- measuring


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything the table shows, by name."""
    gen = make_generator(args.size, args.tokens, args.dtype)
    compile_cached, (program, arguments) = measuring.seconds_of(
        lambda: cached(gen, args.batch, args.cfg_scale)
    )
    found: dict[str, Any] = {"compile cached": compile_cached}
    runs = {"cached": lambda: program(*arguments)}
    if args.tokenizer:
        runs["decoder"] = _decoder(args, jax.block_until_ready(runs["cached"]()))
    for run in runs.values():  # the first run touches memory for the first time
        run()
    found["peak memory"] = measuring.peak_memory()
    if not args.no_recompute:
        found["compile recomputed"], runs["recomputed"] = measuring.seconds_of(
            lambda: recomputed(gen, args.batch, args.cfg_scale)
        )
    best, results = measuring.least_seconds(runs, args.repeats)
    found |= best
    if "recomputed" in results:
        same = np.asarray(results["recomputed"]) == np.asarray(results["cached"])
        found["equal codes"] = float(np.mean(same))
    return found | _bounds(gen, found)


def _decoder(args: argparse.Namespace, codes: jax.Array) -> Callable[[], jax.Array]:
    tok = make_decoder(args.tokenizer, args.dtype)
    if tok.config.num_tokens != args.tokens:
        raise SystemExit(
            f"--tokenizer {args.tokenizer} decodes {tok.config.num_tokens} tokens, "
            f"but --tokens is {args.tokens}"
        )
    return lambda: tok.decode(codes)


def _bounds(gen: api.Generator, found: dict[str, Any]) -> dict[str, Any]:
    """The two bounds, and how much of each the measured times reach."""
    steps = steps_of(gen.config)
    embeddings = ("class_embedding", "token_embedding", "special_embedding")  # read by the row
    read = {name: part for name, part in gen.params.items() if name not in embeddings}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(read))
    bandwidth = measuring.memory_bandwidth()
    out = {
        "steps": len(steps),
        "weights": size,
        "bandwidth": bandwidth,
        "weight reading": len(steps) * size / bandwidth,
        "arithmetic ratio": sum(sum(step) for step in steps) / gen.config.num_tokens,
    }
    if "recomputed" in found:
        out["ratio"] = found["recomputed"] / found["cached"]
    return out


# ------------------------------------------------------------------------------------- the door


def table(args: argparse.Namespace, found: dict[str, Any]) -> str:
    """The figures as text."""
    share = found["weight reading"] / found["cached"]
    rows = [
        ("compile, cached sampler", f"{found['compile cached']:.1f} s"),
        ("cached sampler", f"{found['cached']:.2f} s per batch"),
    ]
    if "decoder" in found:
        both = found["cached"] + found["decoder"]
        rows.append(("tokenizer's decoder", f"{found['decoder']:.2f} s per batch"))
        rows.append(("cached sampler and decoder", f"{both:.2f} s per batch"))
    rows.append(
        ("reading weights bound", f"{found['weight reading']:.2f} s ({share:.0%} of it reached)")
    )
    if "ratio" in found:
        limit, least = found["arithmetic ratio"], found["weight reading"]
        rows += [
            ("compile, recomputed", f"{found['compile recomputed']:.1f} s"),
            ("recomputed prefix", f"{found['recomputed']:.2f} s per batch"),
            ("ratio", f"{found['ratio']:.2f}"),
            ("  arithmetic bound", f"{limit:.2f} ({found['ratio'] / limit:.0%} reached)"),
            ("  reading weights bound", f"{found['recomputed'] / least:.2f} ({share:.0%} reached)"),
            ("equal codes", f"{found['equal codes']:.1%}"),
        ]
    rows.append(("peak memory", f"{found['peak memory'] / 1e9:.2f} GB"))
    title = (
        f"{args.size}, {args.tokens} tokens, batch {args.batch}, cfg_scale {args.cfg_scale:g}, "
        f"{args.dtype}, {jax.devices()[0].device_kind}; {found['steps']} steps over "
        f"{found['weights'] / 1e9:.2f} GB of weights, memory {found['bandwidth'] / 1e9:.1f} GB/s"
    )
    return f"{title}\n{measuring.columns(rows)}"


DEFAULTS = {
    "detailflow": {"size": "GPT-L", "cfg_scale": 1.5, "tokens": 128, "tokenizer": "detailflow_16"},
    "flowar": {"size": "S", "annealed": 15},
}
"""What stands for an option that is not given; those of FlowAR's size come on top."""

OWN = {
    "detailflow": ("tokens", "tokenizer"),
    "flowar": ("num_steps", "guidance_high", "annealed", "scan"),
}
"""Options that one system alone has."""


def make_parser() -> argparse.ArgumentParser:
    """The command line; None is an option that was not given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--system", choices=DEFAULTS, default="detailflow")
    sizes = f"{', '.join(generator.SIZES)} (default GPT-L); of FlowAR S, B, L or H (default S)"
    add("--size", help=sizes)
    add("--batch", type=int, default=4, help="images per batch (default 4)")
    note = "1 computes no null half (default 1.5; of FlowAR as published for the size)"
    add("--cfg_scale", type=float, help=note)
    add("--repeats", type=int, default=3, help="runs; the least time counts (default 3)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--no_recompute", action="store_true", help="leave out the slow way and the ratio")
    add("--json", action="store_true", help="print JSON (seconds, bytes)")
    add = parser.add_argument_group("DetailFlow").add_argument
    add("--tokens", type=int, help="tokens per image (default 128)")
    note = "whose decoder to time as well, from random weights (default detailflow_16); empty: none"
    add("--tokenizer", choices=["", "detailflow_16", "detailflow_32", "detailflow_64"], help=note)
    add = parser.add_argument_group("FlowAR").add_argument
    add("--num_steps", type=int, help="flow steps per scale (default as published: 25, of H 50)")
    add("--guidance_high", type=float, help="guided from this time on (default 0.9, of H 0.7)")
    note = "flow steps of the last scale in the second row (default 15); 0: no second row"
    add("--annealed", type=int, help=note)
    note = "layers as a scan over stacked weights, or unrolled (default as `api` chooses)"
    add("--scan", action=argparse.BooleanOptionalAction, help=note)
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with the defaults of their system; one that does not fit ends the program."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for system, names in OWN.items():
        for name in names if system != args.system else ():
            if getattr(args, name) is not None:
                parser.error(f"--{name} belongs to --system {system}, not to {args.system}")
            delattr(args, name)
    defaults, sizes = dict(DEFAULTS[args.system]), generator.SIZES
    args.size = args.size or defaults["size"]
    if args.system == "flowar":
        args.size, sizes = f"FlowAR-{args.size.removeprefix('FlowAR-')}", flowar.SIZES
        defaults |= flowar_sampling.SETTINGS.get(args.size, {})
    if args.size not in sizes:
        parser.error(f"--size {args.size}: expected one of {', '.join(sizes)}")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    try:
        if args.system == "flowar":
            flowar_sampling.check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.system == "flowar":
        found, show = flowar_sampling.measure(args), flowar_sampling.table
    else:
        found, show = measure(args), table
    print(json.dumps(vars(args) | found) if args.json else show(args, found))


if __name__ == "__main__":
    main()
