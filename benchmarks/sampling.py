"""How long generation takes at random weights: the cached sampler and recomputing the prefix.

    python benchmarks/sampling.py --size GPT-L --batch 4 --tokens 128

Cached is `models.sampler.sample` in the layout that `api` chooses for the backend. Recomputed is
the published way: each step runs the network over the whole prefix seen so far, keeps nothing, and
reads the logits of the new positions only. It has one program a step, each compiled for its prefix
length, so no padding is computed. Both draw with the same keys, so both must give the same codes;
the share of equal ones is printed. Every figure is the least of `--repeats` runs, which alternate.

Two bounds are printed beside the measured ratio. Arithmetic: positions run through the network,
recomputed over cached (1116/128 = 8.7 for 128 tokens in groups of 8). Reading weights: every step
of the cached sampler reads all weights once, at the memory bandwidth measured here.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from detailflow_jax import api
from detailflow_jax.config import load_config
from detailflow_jax.models import generator, sampler, tokenizer
from detailflow_jax.ops import logits as filters
from detailflow_jax.ops import masks
from detailflow_jax.tasks import tokenizer as tokenizer_task

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
NUM_CLASSES = 1000

# ------------------------------------------------------------------------------------ networks


def random_params(init: Callable, *args: Any) -> Any:
    """Weights of std 0.02 (norms: 1), made on the host: no initialisation is compiled."""
    abstract = nn.unbox(jax.eval_shape(init, jax.random.key(0), *args))["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        weights = rng.standard_normal(leaf.shape, np.float32)
        weights *= 0.02
        return weights

    return jax.tree_util.tree_map_with_path(draw, abstract)


def make_generator(size: str, num_tokens: int, dtype: str) -> api.Generator:
    """A random generator of a published size."""
    config = generator.GeneratorConfig(
        **generator.SIZES[size], num_tokens=num_tokens, num_classes=NUM_CLASSES, dtype=dtype
    )
    codes = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    params = random_params(generator.Generator(config).init, codes, labels)
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
    return api.Tokenizer(config, random_params(init, codes), "random weights")


# ---------------------------------------------------------------------------- the two samplers


def cached(gen: api.Generator, batch: int, cfg_scale: float):
    """(compiled program, its arguments) of the sampler."""
    c = gen.config
    options = sampler.SamplingOptions(c.num_tokens, guided=cfg_scale != 1.0)
    scales = filters.guidance_scales(cfg_scale, c.num_tokens, c.group_size, c.causal)
    labels = jnp.arange(batch, dtype=jnp.int32) % NUM_CLASSES
    keys = sampler.sample_keys(0, jnp.arange(batch))
    arguments = gen.params, labels, keys, jnp.asarray(scales), jnp.float32(1), jnp.float32(1)
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
    return model.to_logits(x[:, start:])


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
    """A function that samples with one compiled program a step; compiles them now."""
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


def seconds_of(function: Callable, *args: Any) -> tuple[float, Any]:
    """Wall-clock seconds of one call, waited for, and what it returned."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def memory_bandwidth() -> float:
    """Bytes a second that this machine (CPU) or device reads from memory; the best of 5."""
    if jax.default_backend() != "cpu":
        data = jnp.ones((2**28,), jnp.float32)
        read = jax.jit(jnp.sum)
        read(data).block_until_ready()
        return data.nbytes / min(seconds_of(read, data)[0] for _ in range(5))
    # XLA sums on one core; one BLAS dot product a core reads as fast as the memory allows.
    parts = np.ones((len(os.sched_getaffinity(0)), 2**26), np.float32)
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        read = lambda: list(pool.map(lambda part: part @ part, parts))  # noqa: E731
        return parts.nbytes / min(seconds_of(read)[0] for _ in range(5))


def peak_memory() -> int:
    """Most bytes held so far: by the device, or by this process on a CPU."""
    statistics = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if statistics:
        return statistics["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything the table shows, by name."""
    gen = make_generator(args.size, args.tokens, args.dtype)
    compile_cached, (program, arguments) = seconds_of(
        lambda: cached(gen, args.batch, args.cfg_scale)
    )
    found: dict[str, Any] = {"compile cached": compile_cached}
    runs = {"cached": lambda: program(*arguments)}
    if args.tokenizer:
        runs["decoder"] = _decoder(args, jax.block_until_ready(runs["cached"]()))
    for run in runs.values():  # the first run touches memory for the first time
        run()
    found["peak memory"] = peak_memory()
    if not args.no_recompute:
        found["compile recomputed"], runs["recomputed"] = seconds_of(
            lambda: recomputed(gen, args.batch, args.cfg_scale)
        )
    best, results = {}, {}
    for _ in range(args.repeats):
        for name, run in runs.items():
            seconds, results[name] = seconds_of(run)
            best[name] = min(seconds, best.get(name, seconds))
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
    bandwidth = memory_bandwidth()
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
        ("cached sampler", f"{found['cached']:.2f} s a batch"),
    ]
    if "decoder" in found:
        both = found["cached"] + found["decoder"]
        rows.append(("tokenizer's decoder", f"{found['decoder']:.2f} s a batch"))
        rows.append(("cached sampler and decoder", f"{both:.2f} s a batch"))
    rows.append(
        ("reading weights bound", f"{found['weight reading']:.2f} s ({share:.0%} of it reached)")
    )
    if "ratio" in found:
        limit, least = found["arithmetic ratio"], found["weight reading"]
        rows += [
            ("compile, recomputed", f"{found['compile recomputed']:.1f} s"),
            ("recomputed prefix", f"{found['recomputed']:.2f} s a batch"),
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
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"{name:{width}}  {value}" for name, value in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=generator.SIZES, default="GPT-L")
    parser.add_argument("--batch", type=int, default=4, help="images a batch (default 4)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens an image (default 128)")
    parser.add_argument("--cfg_scale", type=float, default=1.5, help="1 computes no null half")
    parser.add_argument("--repeats", type=int, default=3, help="runs; the least time counts")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--tokenizer",
        choices=["", "detailflow_16", "detailflow_32", "detailflow_64"],
        default="detailflow_16",
        help="whose decoder to time as well, from random weights; empty: none",
    )
    parser.add_argument(
        "--no_recompute", action="store_true", help="leave out the slow way and the ratio"
    )
    parser.add_argument("--json", action="store_true", help="print JSON (seconds, bytes)")
    args = parser.parse_args()
    found = measure(args)
    print(json.dumps(vars(args) | found) if args.json else table(args, found))


if __name__ == "__main__":
    main()
