"""What a compiled program does on its chips, as a dictionary and as text for people.

Four times are compared: arithmetic at the peak of the matrix unit, memory traffic at the memory's
bandwidth, the core's cycles as the compiler estimates them, and collectives at the links'
bandwidth. The first three overlap. So do collectives that the compiler made asynchronous; the core
waits for the others. The least step is the longest of the three and this waiting, or all
collectives if they take longer. Latency and the input pipeline are in none of them.
"""

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from detailflow_jax.pod import collectives, cycles, flops, hlo, traffic
from detailflow_jax.pod.programs import Compiled, Program
from detailflow_jax.pod.topologies import GIB, Topology
from detailflow_jax.runtime.flops import written

SAMPLES = 50_000  # how many images a published evaluation generates


def heading(program: Program, config: ConfigDict, topology: Topology) -> dict[str, Any]:
    """The program, its task and the pod that it is compiled for."""
    return {
        "what": program.name,
        "task": config.task,
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": dict(program.mesh.shape),
        "images_a_step": program.images,
    }


def summary(compiled: Compiled, config: ConfigDict, topology: Topology) -> dict[str, Any]:
    """Everything the text shows: bytes, seconds, counts; of one chip if nothing else is said.

    `memory` is of HBM. Outputs that take the place of donated arguments are not counted, and the
    peak may be less than the sum. `flops` are those of matrix products as compiled,
    `flops_written_pod` as traced. `collectives` are {kind: {"count", "bytes"}}, bytes that a chip
    sends. `seconds` is {bound: least time of one run}. `unknown_loops` are loops whose trip count
    could not be read; each is counted as one round.
    """
    program, chip = compiled.program, topology.chip
    module = hlo.parse(compiled.executable.as_text())
    executions = hlo.executions(module)
    done, weighted = flops.executed(module, executions)
    in_kernels, kernels_weighted = flops.kernels(executions)
    done, weighted = done + in_kernels, weighted + in_kernels
    moved = traffic.memory_bytes(module, executions)
    sent = collectives.find(module, executions, topology.chips)
    axes = len(topology.shape)
    coords = np.array([device.coords[:axes] for device in program.mesh.devices.flat])
    seconds = {
        "compute": weighted / chip.peak,
        "HBM": moved / chip.bandwidth,
        "cycles": cycles.estimated(executions) / chip.clock + kernels_weighted / chip.peak,
        "interconnect": collectives.seconds(sent, coords, topology),
    }
    waiting = collectives.seconds([each for each in sent if each.waits], coords, topology)
    core = max(seconds[name] for name in ("compute", "HBM", "cycles"))
    least = max(core + waiting, seconds["interconnect"])
    stats = compiled.executable.memory_analysis()
    steps = config.total_steps if program.name == "train" else -(-SAMPLES // program.images)
    return {
        "fits": True,
        **heading(program, config, topology),
        "note": program.note,
        "whole": program.whole,
        "memory": {
            "arguments": stats.argument_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
            "peak": stats.peak_memory_in_bytes,
        },
        "memory_share": stats.peak_memory_in_bytes / chip.memory,
        "flops": done,
        "flops_written_pod": written(compiled.traced),
        "bytes": moved,
        "collectives": collectives.totals(sent),
        "seconds": seconds,
        "bound": max(seconds, key=seconds.get),
        "waiting_seconds": waiting,
        "step_seconds": least,
        "step_seconds_no_overlap": core + seconds["interconnect"],
        "images_per_second_pod": program.images / least,
        "flops_utilisation": done / chip.peak / least,
        "unknown_loops": sum(each.unknown for each in executions if not each.fused),
        "compile_seconds": compiled.seconds,
        "compile_cpu_seconds": compiled.cpu_seconds,
        "compile_host_bytes": compiled.host_memory,
        "steps": steps,
        "days": steps * least / 86_400,
        "chip_hours": steps * least / 3_600 * topology.chips,
    }


def text(found: dict[str, Any]) -> str:
    """The summary as a table."""
    mesh = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    title = (
        f"{found['task']} {found['what']}, {found['images_a_step']} images per step, on "
        f"{found['topology']} ({found['chips']} chips), mesh {mesh}"
    )
    notes = [("note", found["note"]), ("not split by fsdp", _whole(found))]
    rows = [row for row in notes if row[1]] + _work_rows(found) + _time_rows(found)
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in rows)])


def _whole(found: dict[str, Any]) -> str:
    if not found["whole"]:
        return ""
    total, name = sum(found["whole"].values()), max(found["whole"], key=found["whole"].get)
    return (
        f"{size(total)} in {len(found['whole'])} arrays, such as {name}: "
        f"{found['mesh']['fsdp']} divides none of their widths; --mesh auto finds a size that does"
    )


def _work_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    memory = {name: size(value) for name, value in found["memory"].items()}
    useful = found["flops_written_pod"] / max(found["flops"] * found["chips"], 1)
    as_written = f"{found['flops_written_pod'] / 1e12:.4g} T as written"
    rows = [
        ("HBM of a chip, arguments", memory["arguments"]),
        ("HBM of a chip, temporaries", memory["temporaries"]),
        ("HBM of a chip, peak", f"{memory['peak']}, {found['memory_share']:.0%} of the chip's"),
        ("FLOPs of a chip", f"{found['flops'] / 1e12:.4g} T"),
        ("FLOPs of the pod", f"{as_written}, {useful:.0%} of those executed"),
        ("HBM traffic of a chip", f"{found['bytes'] / 1e9:.3g} GB"),
    ]
    for kind, entry in found["collectives"].items():
        value = f"{entry['bytes'] / 1e6:.4g} MB sent by a chip in {entry['count']:.0f} runs"
        rows.append((kind, value))
    if found["unknown_loops"]:
        rows.append(("loops of unknown length", f"{found['unknown_loops']}, counted as one round"))
    return rows


def _time_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    parts = ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in found["seconds"].items())
    goal = (
        f"{found['steps']} steps of the recipe"
        if found["what"] == "train"
        else f"{SAMPLES} images, {found['steps']} batches"
    )
    step = (
        f"{1e3 * found['step_seconds']:.3g} ms, bound by {found['bound']}, "
        f"{1e3 * found['waiting_seconds']:.3g} ms of it waiting for other chips "
        f"({1e3 * found['step_seconds_no_overlap']:.3g} ms if all collectives do); "
        f"{found['flops_utilisation']:.0%} of peak FLOP/s"
    )
    cost = f"{duration(found['days'] * 86_400)}, {found['chip_hours']:,.3g} chip-hours at best"
    compiled = (
        f"{found['compile_seconds']:.0f} s, {found['compile_cpu_seconds']:.0f} s of CPU, "
        f"{size(found['compile_host_bytes'])} of host memory"
    )
    return [
        ("least times", parts),
        ("least step", step),
        ("at best", f"{found['images_per_second_pod']:,.0f} images/s for the pod"),
        (goal, cost),
        ("compiled in", compiled),
    ]


def size(count: float) -> str:
    """Bytes in a unit of their size."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{1024 * count / GIB:.3g} MiB"


def duration(seconds: float) -> str:
    """A length of time in a unit of its size."""
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"
