"""What to change in a program that does not fit into the memory of a chip.

Two parts need memory: the state, which `fsdp` and `tensor` split, and everything that a step makes,
mostly activations, which shrink with the batch on each chip and with `remat`. The figures are
estimates from the sizes that the compiler reported; compiling again tells.
"""

import math

from ml_collections import ConfigDict

from detailflow_jax.pod import meshes
from detailflow_jax.pod.programs import DoesNotFit, Program
from detailflow_jax.pod.topologies import GIB, Topology

# A state of more than this share of the memory leaves too little for the step itself.
_STATE_SHARE = 0.3


def suggest(error: DoesNotFit, program: Program, config: ConfigDict, topology: Topology) -> str:
    """By how much a program exceeds the memory, and what makes it smaller, most useful first."""
    limit, changes = topology.chip.memory, []
    if error.state > _STATE_SHARE * limit:
        changes.append(_split_state(program, config, topology))
    if program.name == "train" and config.model.get("remat") == "none":
        changes.append(
            "--config.model.remat=full keeps only the input of each block (about a third more "
            "arithmetic); =dots keeps the matrix products too"
        )
    changes += _shrink_batch(_share_that_fits(error, limit), program, config)
    changes.append(f"a slice with more chips or larger ones than {topology.name} (--topology)")
    lines = [_shortage(error, limit), "what to change, most useful first:"]
    return "\n".join([*lines, *(f"  - {change}" for change in changes)])


def _shortage(error: DoesNotFit, limit: int) -> str:
    state = f"its arguments (state and batch) take {error.state / GIB:.2f} GiB of it"
    if error.used is None:
        return f"does not fit: more than the {limit / GIB:.2f} GiB of a chip are needed; {state}"
    over = error.used - limit
    return (
        f"does not fit: {error.used / GIB:.2f} GiB are needed on a chip, {over / GIB:.2f} GiB more "
        f"than the {limit / GIB:.2f} GiB it has; {state}"
    )


def _split_state(program: Program, config: ConfigDict, topology: Topology) -> str:
    now, devices = program.mesh.shape, list(program.mesh.devices.flat)
    every = meshes.ranked(config, program.name, topology, devices, now["tensor"])
    best = min(every, key=lambda each: each.state).sizes
    if best["fsdp"] <= now["fsdp"]:
        return "--mesh with a larger tensor: fsdp does not split the state any further"
    sizes = ",".join(f"{axis}={size}" for axis, size in best.items())
    return f"--mesh {sizes} splits the state {best['fsdp']} ways, now {now['fsdp']}"


def _shrink_batch(share: float, program: Program, config: ConfigDict) -> list[str]:
    """How to have only `share` of the batch in memory at once, if there is such a share."""
    rows = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    batch = int(program.images * share) // rows * rows
    if not batch:
        return []
    flag = "--batch_size" if program.name == "sampler" else "--config.batch_size"
    changes = [f"{flag}={batch} leaves less on each chip (now {program.images})"]
    parts = 2 ** math.ceil(-math.log2(share))
    # Its batch norm wants the batch at once.
    whole = config.get("losses", {}).get("adversarial", {}).get("weight")
    divides = not program.images % (parts * rows)
    if "accumulate" in config and program.name == "train" and divides and not whole:
        changes.insert(
            0,
            f"--config.accumulate={parts * config.accumulate} computes the same batch in parts, "
            "one after another",
        )
    return changes


def _share_that_fits(error: DoesNotFit, limit: int) -> float:
    """The share of the batch whose memory should fit beside the state; 0 where none does."""
    if error.used is None or error.used <= limit or error.state >= 0.9 * limit:
        return 0.0
    return (0.9 * limit - error.state) / (error.used - error.state)
