"""Compiles every published configuration for TPU slices and writes docs/tpu_pods.md.

    python benchmarks/tpu_pods.py                      # all that is not in docs/tpu_pods.json yet
    python benchmarks/tpu_pods.py --only GPT-3B --again

Each program is compiled by `detailflow compile-pod` in a process of its own, with its published
batch. If it does not fit, the settings of `TRIES` are tried one after the other; the table shows
the first that fits. Results are kept in docs/tpu_pods.json after every compile, so the command can
be stopped and run again.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from tqdm import tqdm

from detailflow_jax.pod import report
from detailflow_jax.runtime.files import write_atomically

ROOT = pathlib.Path(__file__).resolve().parents[1]
TABLE, RESULTS = ROOT / "docs" / "tpu_pods.md", ROOT / "docs" / "tpu_pods.json"
SLICES = ("v5e-16", "v5e-256", "v6e-256", "v5p-128")
# Cheapest first; each keeps less from the forward to the backward pass.
TRIES = {
    "none": ("--mesh=best",),
    "dots": ("--mesh=best", "--config.model.remat=dots"),
    "full": ("--mesh=best", "--config.model.remat=full"),
}
SIZES = ("GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-1B", "GPT-3B", "GPT-7B")


def programs() -> dict[str, tuple[str, ...]]:
    """Arguments of `compile_pod` by the name that the table shows."""
    found = {}
    for name in ("detailflow_16", "detailflow_32", "detailflow_64"):
        found[f"tokenizer {name}"] = (f"--config=configs/tokenizer.py:{name}",)
    for size in SIZES:
        found[f"generator {size}, 128 tokens"] = _generator("detailflow_16", size)
    found["generator GPT-L, 256 tokens"] = _generator("detailflow_32", "GPT-L")
    found["generator GPT-L, 512 tokens"] = _generator("detailflow_64", "GPT-L")
    found["GPT-L sampler, 128 tokens"] = (*_generator("detailflow_16", "GPT-L"), "--what=sampler")
    if (ROOT / "configs" / "flowar.py").exists():
        for name in ("flowar_s", "flowar_l", "flowar_h"):
            found[name] = (f"--config=configs/flowar.py:{name}",)
        found["flowar_l sampler"] = ("--config=configs/flowar.py:flowar_l", "--what=sampler")
    return found


def _generator(variant: str, size: str) -> tuple[str, ...]:
    return (f"--config=configs/generator.py:{variant}:size={size}",)


# ------------------------------------------------------------------------------------ compiling


def compile_first_that_fits(
    arguments: tuple[str, ...], topology: str, first: str = "none"
) -> dict[str, Any]:
    """The result of `compile_pod --json` for the first of `TRIES` that fits, else of the last.

    `first` leaves those before it out, where they are known not to fit.
    """
    for settings in itertools.islice(TRIES.values(), list(TRIES).index(first), None):
        found = _compile(*arguments, f"--topology={topology}", *settings)
        found["settings"] = settings
        if found.get("fits") or "error" in found:
            break
        if "--what=sampler" in arguments:  # nothing to keep for a backward pass
            break
    return found


def _compile(*arguments: str) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-m", "detailflow_jax.compile_pod", "--json", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    if child.stdout.strip():
        return json.loads(child.stdout.splitlines()[-1])
    return {"fits": False, "error": child.stderr.strip().splitlines()[-1]}


# ------------------------------------------------------------------------------------ the table

HEADER = """# The published configurations on TPU pods

Made by `python benchmarks/tpu_pods.py` with the TPU's own compiler on a CPU; no TPU was at hand, so
**times are lower bounds, not measurements**: no latency, no input. `detailflow compile-pod` gives
the same, and more, for any configuration, mesh and slice.

Mesh: data x fsdp x tensor, the faster of the two that should be fastest, and the other one with its
least step. HBM: the most memory in use at once, and its share of the chip's. FLOPs, memory traffic
and bytes sent are per chip and step. The least step is what the core needs (the longest of
arithmetic at peak, memory traffic at the vendor's bandwidth, and its cycles by the compiler's
estimate) and the time it waits for synchronous collectives; or all collectives, if they take
longer. The bound is the longest of these times; "of peak" is the share of the peak FLOP/s that the
least step allows. Recipe: all steps of the configuration (for samplers: 50,000 images). Compile:
seconds (of CPU) and host memory, on a two-core machine that was busy with other work.

Rows with a star are older: they were compiled before cycles and waiting were counted, on the mesh
that leaves the least state on each chip. Their least step is the longest of arithmetic, memory
traffic and collectives.

**Before and after: FlowAR-S, batch 2,048, v5e-16, 1x16x1, remat full, float32.** Activations
are kept split by batch, and products are not cut into loops over weight shards (docs/launch.md,
Options of the compiler):

| |traffic|sent|arithmetic|traffic|cycles|links|HBM peak|
|-|-|-|-|-|-|-|-|
|before|930 GB|10.7 GB|238 ms|1,136 ms|2,084 ms|116 ms|11.1 GiB|
|after|435 GB|2.1 GB|238 ms|531 ms|1,199 ms|21 ms|8.0 GiB|

Of what is left, 518 ms and 160 GB are attention with its scores in memory.

**Attention, one layer with its projections, forward and backward, bfloat16, on a chip of v5e.**
Fused attention keeps the scores on the chip; half of the matrix unit idles at head dimension 64, in
either. `auto` takes it from 320 tokens on, in half precision, where there is neither dropout nor a
prefix:

| |images|traffic, plain|traffic, splash|core, plain|core, splash|
|-|-|-|-|-|-|
|FlowAR's head, 341 tokens, 16 heads|128|10.9 GB|6.0 GB|38.5 ms|34.7 ms|
|decoder of detailflow_16, 384 tokens, 12 heads|16|0.83 GB|0.11 GB|2.4 ms|1.1 ms|
|decoder of detailflow_64, 768 tokens, 12 heads|32|8.3 GB|1.6 GB|18.9 ms|10.1 ms|
|patches of an encoder, 256 tokens, 12 heads|16|0.03 GB|0.03 GB|0.8 ms|0.7 ms|

**Rotary turns without arrays of pairs, and one look-up of the codes: GPT-L, batch 512.** On
v5p-128, 2x32x1: cycles 18.4 -> 17.2 ms, least step 22.5 -> 21.1 ms. On v5e-256, 2x128x1, together
with `xla_tpu_prefer_async_allgather_to_allreduce` (docs/launch.md): cycles 13.5 -> 11.2 ms, least
step 21.6 -> 19.2 ms. All rows of the tables below are from before it.

**ZeRO-1: GPT-L, batch 512.** The kernels of the blocks are gathered once per step in bfloat16 and
their gradients scattered; otherwise each layer's are gathered forward and backward. It sends less,
but its arrays are whole on each chip and nothing runs beside its gathers: 1% faster on one slice,
26% slower on the other. So there is no such option.

|slice, mesh|kernels gathered|sent|cycles|waiting|least step|HBM peak|
|-|-|-|-|-|-|-|
|v5p-128, 2x32x1|per layer|1.92 GB|17.2 ms|3.97 ms|21.1 ms|2.2 GiB|
|v5p-128, 2x32x1|once|1.32 GB|18.2 ms|2.78 ms|20.9 ms|2.7 GiB|
|v5e-256, 2x128x1|per layer|1.94 GB|11.2 ms|7.91 ms|19.2 ms|0.5 GiB|
|v5e-256, 2x128x1|once|1.33 GB|15.4 ms|8.72 ms|24.1 ms|1.1 GiB|

**Float32 arrays in memory, GPT-L, v5e-256, 2x128x1.** Cross entropy, the average and the optimizer
write no copies of 4 MB or more. What is left: six arrays [24, 2, 128, 1024] that the blocks keep
for the backward pass (25 MB each). The gradient of the first group's embedded codes was summed over
all chips as an array [512, 8, 1024], mostly zeros; with one look-up for all codes it is not there.
"""
COLUMNS = (
    *(
        "slice",
        "mesh",
        "other mesh",
        "remat",
        "HBM",
        "TFLOP",
        "traffic GB",
        "sent GB",
        "least step",
    ),
    *("waiting", "bound", "of peak", "images/s", "recipe", "chip-hours", "compile"),
)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The document."""
    parts = [HEADER]
    for name in programs():
        rows = [
            _row(topology, results[f"{name} | {topology}"])
            for topology in SLICES
            if f"{name} | {topology}" in results
        ]
        if rows:
            images = {r["images_a_step"] for k, r in results.items() if k.startswith(f"{name} |")}
            batch = ", ".join(map(str, sorted(images)))
            parts += [f"## {name}, batch {batch}\n", _line(COLUMNS), _line("-" * len(COLUMNS))]
            parts += [*rows, ""]
    return "\n".join(parts)


def _line(cells: Any) -> str:
    return "|" + "|".join(cells) + "|"


def _row(topology: str, found: dict[str, Any]) -> str:
    if not found["fits"]:
        needed = (found.get("needed_bytes") or 0) / 2**30
        reason = found.get("error") or f"does not fit: {needed:.1f} GiB needed"
        return _line([topology, reason, *[""] * (len(COLUMNS) - 2)])
    remat = [s.partition("=")[2] for s in found["settings"] if "remat" in s]
    sent = sum(entry["bytes"] for entry in found["collectives"].values())
    waiting = found.get("waiting_seconds")
    cells = (
        topology + ("*" if waiting is None else ""),
        _sizes(found["mesh"]),
        "; ".join(map(_other, found.get("others", []))),
        remat[0] if remat else "none",
        f"{found['memory']['peak'] / 2**30:.1f} GiB, {found['memory_share']:.0%}",
        f"{found['flops'] / 1e12:.3g}",
        f"{found['bytes'] / 1e9:.3g}",
        f"{sent / 1e9:.2g}",
        _milliseconds(found["step_seconds"]),
        "" if waiting is None else _milliseconds(waiting),
        found["bound"],
        f"{found['flops_utilisation']:.0%}",
        f"{found['images_per_second_pod']:,.0f}",
        report.duration(86_400 * found["days"]),
        f"{found['chip_hours']:,.3g}"
        if found["chip_hours"] < 100
        else f"{found['chip_hours']:,.0f}",
        f"{found['compile_seconds']:.0f} ({found['compile_cpu_seconds']:.0f}) s, "
        f"{found['compile_host_bytes'] / 2**30:.1f} GiB",
    )
    return _line(cells)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _sizes(mesh: dict[str, int]) -> str:
    return "x".join(str(size) for size in mesh.values())


def _other(found: dict[str, Any]) -> str:
    seconds = found["step_seconds"]
    return f"{_sizes(found['mesh'])}: {_milliseconds(seconds) if seconds else 'does not fit'}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="programs whose name has this in it")
    parser.add_argument("--slices", default=",".join(SLICES), help="slices to compile for")
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument(
        "--remat", choices=TRIES, default="none", help="start with it: those before do not fit"
    )
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wanted = [
        (name, topology)
        for name in programs()
        for topology in args.slices.split(",")
        if args.only in name and (args.again or f"{name} | {topology}" not in results)
    ]
    for name, topology in (progress := tqdm(wanted, unit="program")):
        progress.set_description(f"{name} on {topology}")
        results[f"{name} | {topology}"] = compile_first_that_fits(
            programs()[name], topology, args.remat
        )
        write_atomically(RESULTS, (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())
        write_atomically(TABLE, table(results).encode())
    write_atomically(TABLE, table(results).encode())


if __name__ == "__main__":
    main()
