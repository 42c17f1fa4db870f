"""What was found out about a program, as a dictionary and as text for people."""

from typing import Any

from ml_collections import ConfigDict

from detailflow_jax.pod.programs import Compiled
from detailflow_jax.pod.roofline import Analysis
from detailflow_jax.pod.topologies import GIB, Topology

SAMPLES = 50_000  # how many images a published evaluation generates


def summary(
    analysis: Analysis, compiled: Compiled, config: ConfigDict, topology: Topology
) -> dict[str, Any]:
    """Everything the text shows: bytes, seconds, counts; of one chip if nothing else is said."""
    program, chip = compiled.program, topology.chip
    seconds = analysis.least_seconds
    found = {
        "fits": True,
        "what": program.name,
        "task": config.task,
        "topology": topology.name,
        "chips": topology.chips,
        "mesh": dict(program.mesh.shape),
        "images_a_step": program.images,
        "note": program.note,
        "whole": program.whole,
        "memory": analysis.memory,
        "memory_share": analysis.memory["peak"] / chip.memory,
        "flops": analysis.flops,
        "flops_written_pod": analysis.flops_written,
        "bytes": analysis.bytes,
        "collectives": analysis.collectives,
        "seconds": analysis.seconds,
        "bound": analysis.bound,
        "step_seconds": seconds,
        "step_seconds_no_overlap": sum(analysis.seconds.values()),
        "images_per_second_pod": program.images / seconds,
        "flops_utilisation": analysis.flops / chip.peak / seconds,
        "unknown_loops": analysis.unknown_loops,
        "compile_seconds": compiled.seconds,
        "compile_cpu_seconds": compiled.cpu_seconds,
        "compile_host_bytes": compiled.host_memory,
    }
    steps = config.total_steps if program.name == "train" else -(-SAMPLES // program.images)
    found["steps"] = steps
    found["days"] = steps * seconds / 86_400
    found["chip_hours"] = steps * seconds / 3_600 * topology.chips
    return found


def text(found: dict[str, Any]) -> str:
    """The summary as a table."""
    mesh = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    title = (
        f"{found['task']} {found['what']}, {found['images_a_step']} images per step, on "
        f"{found['topology']} ({found['chips']} chips), mesh {mesh}"
    )
    rows = [
        *([("note", found["note"])] if found["note"] else []),
        *_memory_rows(found),
        *_work_rows(found),
        *_time_rows(found),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in rows)])


def _memory_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    memory = {name: size(value) for name, value in found["memory"].items()}
    return [
        *([("not split by fsdp", whole)] if (whole := _whole(found)) else []),
        ("HBM of a chip, arguments", memory["arguments"]),
        ("HBM of a chip, temporaries", memory["temporaries"]),
        ("HBM of a chip, peak", f"{memory['peak']}, {found['memory_share']:.0%} of the chip's"),
    ]


def _whole(found: dict[str, Any]) -> str:
    if not found["whole"]:
        return ""
    total, name = sum(found["whole"].values()), max(found["whole"], key=found["whole"].get)
    return (
        f"{size(total)} in {len(found['whole'])} arrays, such as {name}: "
        f"{found['mesh']['fsdp']} divides none of their widths; --mesh auto finds a size that does"
    )


def _work_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    useful = found["flops_written_pod"] / max(found["flops"] * found["chips"], 1)
    rows = [
        ("FLOPs of a chip", f"{found['flops'] / 1e12:.4g} T"),
        (
            "FLOPs of the pod",
            f"{found['flops_written_pod'] / 1e12:.4g} T as written, {useful:.0%} of those executed",
        ),
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
    return [
        ("least times", parts),
        (
            "least step",
            f"{1e3 * found['step_seconds']:.3g} ms, bound by {found['bound']} "
            f"({1e3 * found['step_seconds_no_overlap']:.3g} ms if nothing overlaps); "
            f"{found['flops_utilisation']:.0%} of peak FLOP/s",
        ),
        ("at best", f"{found['images_per_second_pod']:,.0f} images/s for the pod"),
        (
            goal,
            f"{duration(found['days'] * 86_400)}, {found['chip_hours']:,.3g} chip-hours at best",
        ),
        (
            "compiled in",
            f"{found['compile_seconds']:.0f} s, {found['compile_cpu_seconds']:.0f} s of CPU, "
            f"{size(found['compile_host_bytes'])} of host memory",
        ),
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
