"""Seconds per image of DetailFlow, FlowAR and their predecessors, side by side at random weights.

    python benchmarks/baselines.py --batch 1,4
    python benchmarks/baselines.py --systems var,detailflow_16 --batch 1 --dtype bfloat16

From labels to images of 256 px, with guidance, one compiled program each, decoder included. VAR-d16
(680 tokens in 10 scales, cached, multi-scale quantizer), LlamaGen-L (256 tokens, row by row) and
TiTok-L-32 (32 tokens in 8 steps of unmasking) are written here with the sizes of their published
code (`rival_*.py`), so that no framework stands between the methods.

    tokens, steps     of the sequence, and passes of the generator for it
    parameters        of the generator, and of what makes images of its tokens (millions)
    TFLOP             of matrix products and convolutions for one image
    s/image           the least of --repeats runs, which alternate; by batch size
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flowar_sampling
import jax
import jax.numpy as jnp
import measuring
import rival_llamagen
import rival_titok
import rival_var
import sampling as detailflow

from detailflow_jax.models import flow_sampler, sampler
from detailflow_jax.models.layers import apply
from detailflow_jax.models.vae import VAE, VAEConfig
from detailflow_jax.ops import logits as filters
from detailflow_jax.runtime import flops


class System(NamedTuple):
    """One row.

    Attributes:
      title: as people call it.
      tokens: of one image.
      steps: passes of the generator.
      params: of every network by name; the first one generates.
      images: (params, labels, keys) -> images.
    """

    title: str
    tokens: int
    steps: int
    params: dict[str, Any]
    images: Callable[..., jax.Array]

    def parameters(self) -> tuple[int, int]:
        """Those of the generator, and of all other networks."""
        first, *others = (sum(x.size for x in jax.tree.leaves(p)) for p in self.params.values())
        return first, sum(others)


def rival(module: Any, title: str, tokens: int, steps: int, dtype: str) -> System:
    """One of the predecessors."""
    modules, params = {}, {}
    for name, network, arguments, method in module.networks(dtype):
        modules[name] = network
        params[name] = measuring.random_params(with_method(network, method), *arguments)
    return System(title, tokens, steps, params, lambda *given: module.sample(modules, *given))


def with_method(network: nn.Module, method: str) -> Callable:
    """The network's `init` by one of its methods."""
    return lambda key, *arguments: network.init(key, *arguments, method=method)


def detailflow_system(name: str, dtype: str) -> System:
    """GPT-L over the tokens of a published tokenizer, and its decoder."""
    decoder = detailflow.make_decoder(name, dtype)
    tokens, size = decoder.config.num_tokens, decoder.config.image_size
    gen = detailflow.make_generator("GPT-L", tokens, dtype)
    c = gen.config
    scales = jnp.asarray(filters.guidance_scales(1.45, tokens, c.group_size, c.causal))
    options = sampler.SamplingOptions(tokens)

    def images(params, labels, keys):
        codes = sampler.sample(
            gen.network, params["generator"], labels, keys, scales, options=options
        )
        return apply(decoder.network, params["decoder"], codes, size, method="decode_codes")

    params = {"generator": gen.params, "decoder": decoder.params}
    title = f"DetailFlow-{name.removeprefix('detailflow_')}, GPT-L"
    return System(title, tokens, len(detailflow.steps_of(c)), params, images)


def flowar_system(size: str, dtype: str) -> System:
    """A published FlowAR with its settings, and the decoder of KL-16."""
    network, own = flowar_sampling.make_network(f"FlowAR-{size}", dtype, None)
    settings = flowar_sampling.SETTINGS[f"FlowAR-{size}"]
    count = len(network.config.scales)
    factors = jnp.asarray(flow_sampler.guidance_factors(settings["cfg_scale"], count))
    options = flow_sampler.FlowSamplingOptions(
        flow_sampler.flow_times(count, settings["num_steps"]),
        guidance_high=settings["guidance_high"],
    )
    vae = VAE(VAEConfig(dtype=dtype))
    decoder = measuring.random_params(with_method(vae, "decode"), jnp.zeros((1, 16, 16, 16)))

    def images(params, labels, keys):
        latents = flow_sampler.sample(
            network, params["generator"], labels, keys, factors, options=options
        )
        return apply(vae, params["decoder"], latents, method="decode")

    params = {"generator": own, "decoder": decoder}
    return System(f"FlowAR-{size}", network.config.num_positions, count, params, images)


SYSTEMS: dict[str, Callable[[str], System]] = {
    "llamagen": lambda dtype: rival(rival_llamagen, "LlamaGen-L", 256, 256, dtype),
    "var": lambda dtype: rival(rival_var, "VAR-d16", 680, 10, dtype),
    "titok": lambda dtype: rival(rival_titok, "TiTok-L-32", 32, rival_titok.STEPS, dtype),
    "detailflow_16": lambda dtype: detailflow_system("detailflow_16", dtype),
    "detailflow_32": lambda dtype: detailflow_system("detailflow_32", dtype),
    "detailflow_64": lambda dtype: detailflow_system("detailflow_64", dtype),
    "flowar_s": lambda dtype: flowar_system("S", dtype),
    "flowar_l": lambda dtype: flowar_system("L", dtype),
}


def given(batch: int) -> tuple[jax.Array, jax.Array]:
    """Labels and keys of a batch."""
    labels = jnp.arange(batch, dtype=jnp.int32)
    return labels, sampler.sample_keys(0, labels)


def measure(system: System, batches: Sequence[int], repeats: int) -> dict[str, Any]:
    """The figures of one row, by name."""
    program = jax.jit(system.images)
    generator, decoder = system.parameters()
    found: dict[str, Any] = {
        "title": system.title,
        "tokens": system.tokens,
        "steps": system.steps,
        "generator": generator,
        "decoder": decoder,
        "flops": flops.written(program.trace(system.params, *given(1))),
    }
    for batch in batches:
        compiled = program.lower(system.params, *given(batch)).compile()
        run = lambda compiled=compiled, batch=batch: compiled(system.params, *given(batch))  # noqa: E731
        run()
        best, _ = measuring.least_seconds({"": run}, repeats)
        found[f"s/image, batch {batch}"] = best[""] / batch
    return found


def rows(found: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The table, its heading first."""
    seconds = [name for name in found[0] if name.startswith("s/image")]
    yield "", "tokens", "steps", "parameters (M)", "TFLOP", *seconds
    for row in found:
        parameters = f"{row['generator'] / 1e6:.0f} + {row['decoder'] / 1e6:.0f}"
        figures = (f"{row[name]:.3g}" for name in seconds)
        steps = str(row["steps"])
        yield (
            row["title"],
            str(row["tokens"]),
            steps,
            parameters,
            f"{row['flops'] / 1e12:.2f}",
            *figures,
        )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--systems", default=",".join(SYSTEMS), help="(default: %(default)s)")
    add("--batch", default="1,4", help="images per batch (default: %(default)s)")
    add("--repeats", type=int, default=3, help="runs; the least time counts (default 3)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    add("--json", action="store_true", help="print JSON (seconds, FLOPs)")
    args = parser.parse_args(argv)
    args.systems = args.systems.split(",")
    if unknown := set(args.systems) - set(SYSTEMS):
        parser.error(f"--systems: {sorted(unknown)} are not among {', '.join(SYSTEMS)}")
    try:
        args.batch = [int(count) for count in args.batch.split(",")]
    except ValueError:
        parser.error(f"--batch {args.batch}: expected counts such as 1,4")
    if min(args.batch) < 1 or args.repeats < 1:
        parser.error("--batch and --repeats must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    found = []
    for name in args.systems:
        found.append(measure(SYSTEMS[name](args.dtype), args.batch, args.repeats))
        if args.json:
            print(json.dumps(found[-1]))
    if not args.json:
        print(f"{args.dtype}, {jax.devices()[0].device_kind}")
        print(measuring.columns(list(rows(found))))


if __name__ == "__main__":
    main()
