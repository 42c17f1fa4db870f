"""Compiles a program for a TPU pod on any CPU and estimates how it would run there.

    detailflow compile-pod --config configs/generator.py:detailflow_16:size=GPT-3B \\
        --topology v5e-256 --mesh auto

The train step is the one that `detailflow train` runs, with the same placements; the compiler is
the TPU's own (libtpu, `pip install 'jax[tpu]'`). It prints the memory per chip, the arithmetic,
memory traffic and collectives per step, the shortest time they can take, and what the recipe of
the configuration costs at that speed. These are bounds, not measurements.

Exit codes:
    0  compiled
    2  the command line, the configuration or the mesh cannot be used
    3  the program does not fit into the chip's memory; printed is by how much and what to change
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from detailflow_jax.pod import advice, meshes, programs, report, topologies
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.command import make_parser, number, whole
from detailflow_jax.runtime.config import load_config
from detailflow_jax.runtime.errors import reported

COMPILED, UNUSABLE, DOES_NOT_FIT = 0, 2, 3


def compile_pod(
    config: ConfigDict,
    topology: topologies.Topology,
    *,
    mesh: str = "",
    what: str = "train",
    batch_size: int = 0,
    cfg_scale: float = 1.5,
) -> dict[str, Any]:
    """Compiles one program for one slice.

    Args:
      config: of any task.
      topology: of `topologies.find`.
      mesh: "" for the configuration's, "auto" for the one that should be fastest, "best" for the
        faster of the two that should be, both compiled, or sizes such as "data=-1,fsdp=16".
      what: "train" or "sampler".
      batch_size: images of one run of the sampler over the pod; 0: 32 per chip.
      cfg_scale: guidance of the sampler; 1 computes no null half.

    Returns:
      `report.summary`; for a program that does not fit {"fits": False, "advice": text, ...}. With
      "best" also {"others": [{"mesh", "step_seconds"}]} of the other meshes.

    Raises:
      ConfigError: what is asked for cannot be used; the text says what to do.
    """
    devices = topologies.devices(topology)
    options = {"what": what, "batch_size": batch_size, "cfg_scale": cfg_scale}
    if mesh != "best":
        chosen = meshes.choose(mesh, config, what, topology, devices)
        return _compile(config, topology, chosen, **options)
    ranked = meshes.ranked(config, what, topology, devices)[:_TRIED]
    found = [
        _compile(config, topology, sharding.make_mesh(each.sizes, devices), **options)
        for each in ranked
    ]
    found.sort(key=lambda each: (not each["fits"], each.get("step_seconds", 0.0)))
    rest = [{name: each.get(name) for name in ("mesh", "step_seconds")} for each in found[1:]]
    return found[0] | {"others": rest}


_TRIED = 2  # How many meshes are compiled to find the best one.


def _compile(
    config: ConfigDict,
    topology: topologies.Topology,
    mesh: Mesh,
    *,
    what: str,
    batch_size: int,
    cfg_scale: float,
) -> dict[str, Any]:
    if what == "train":
        program = programs.train_program(config, mesh)
    else:
        batch_size = batch_size or 32 * topology.chips
        program = programs.sampler_program(config, mesh, batch_size, cfg_scale)
    try:
        compiled = programs.compile_program(program)
    except programs.DoesNotFit as error:
        return {
            "fits": False,
            **report.heading(program, config, topology),
            "needed_bytes": error.used,
            "state_bytes": error.state,
            "memory_bytes": topology.chip.memory,
            "advice": advice.suggest(error, program, config, topology),
        }
    return report.summary(compiled, config, topology)


# ------------------------------------------------------------------------------- the command line


def parse_command_line(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """(arguments, overrides of the configuration); leaves with UNUSABLE on an unknown option."""
    parser = make_parser(
        "compile-pod",
        description="Compile a train step or a sampler for a TPU pod, without a TPU.",
        epilog="""\
any field of the configuration can be set from here:
  --config.batch_size=1024 --config.model.remat=full

exit codes: 0 compiled; 2 unusable command line, configuration or mesh; 3 does not fit.""",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py[:VARIANT]", help="as for detailflow train")
    add("--topology", required=True, metavar="NAME", help="such as v5e-256, v6e-256 or v5p-128")
    add(
        "--mesh",
        default="",
        metavar="SIZES",
        help="data=-1,fsdp=16,tensor=1 (one may be -1), auto: the one that should be fastest "
        "(sampler: the least fsdp that fits), or best: the faster of two, compiled; default the "
        "configuration's",
    )
    add("--what", choices=("train", "sampler"), default="train", help="default train")
    add(
        "--batch_size",
        type=whole(1),
        default=0,
        metavar="N",
        help="of the sampler, over the pod; default 32 per chip",
    )
    add("--cfg_scale", type=number(1), default=1.5, help="of the sampler; 1 means no guidance")
    add("--json", action="store_true", help="print JSON: bytes, seconds, counts")
    args, overrides = parser.parse_known_args(argv)
    for override in overrides:
        if not re.match(r"--config\.[^=]+=", override):
            parser.error(f"unknown option {override!r}: see --help")
    if args.batch_size and args.what == "train":
        parser.error("--batch_size is of the sampler; for training use --config.batch_size=N")
    return args, overrides


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args, overrides = parse_command_line(argv)
    options = {name: getattr(args, name) for name in ("mesh", "what", "batch_size", "cfg_scale")}
    config = load_config(args.config, overrides)
    found = compile_pod(config, topologies.find(args.topology), **options)
    if args.json:
        print(json.dumps(found))
    elif found["fits"]:
        print(report.text(found))
    else:
        print(found["advice"], file=sys.stderr)
    return COMPILED if found["fits"] else DOES_NOT_FIT
