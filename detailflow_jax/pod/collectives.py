"""Bytes between the chips: which collectives run, over which chips and links, and how long.

A collective over a group of n chips moves, a chip, at least (n - 1) / n of the whole array for an
all-gather, a reduce-scatter or an all-to-all, and twice that for an all-reduce. The group's
place in the torus tells which links it can use: both directions of each axis that it spans, one
where the axis is not closed to a ring.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from detailflow_jax.pod.hlo import Execution, Instruction, Module
from detailflow_jax.pod.topologies import Topology

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: one of `KINDS`.
      size: bytes of the whole array (gathered, or before it is scattered), on one chip.
      group: numbers of the chips of one group, in the order of the mesh.
      times: how often it runs.
      waits: the core waits for it; others run beside its work.
    """

    kind: str
    size: int
    group: tuple[int, ...]
    times: int
    waits: bool = True

    @property
    def sent(self) -> float:
        """Bytes that a chip must send for one run."""
        if self.kind == "collective-permute":
            return float(self.size)
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.size * (len(self.group) - 1) / len(self.group)


def find(module: Module, executions: Iterable[Execution], num_chips: int) -> list[Collective]:
    """Every collective of the program over more than one chip.

    A collective that the compiler cut into pieces, to run beside other work, counts once.
    """
    found, seen = [], set()
    instructions = [i for c in module.computations.values() for i in c.instructions.values()]
    started = {i.called("calls") for i in instructions if i.opcode == "async-start"}
    for execution in executions:
        computation = execution.computation
        # The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice.
        scatters = computation.name.startswith("all-reduce-scatter")
        beside = computation.name in started
        for instruction in computation.instructions.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            channel = instruction.attribute(r"channel_id=(\d+)")
            pieces = "chain_id=" in instruction.attributes
            if pieces:
                if channel in seen:
                    continue
                seen.add(channel)
            waits = not pieces and not instruction.opcode.endswith("-start") and not beside
            group = _group(instruction, num_chips)
            if len(group) > 1:
                operands = [computation.instructions[name] for name in instruction.operands]
                size = sum(operand.shapes[0].bytes for operand in operands)
                size *= len(group) if kind == "all-gather" else 1
                kind = "reduce-scatter" if scatters else kind
                found.append(Collective(kind, size, group, execution.times, waits))
    return found


def _group(instruction: Instruction, num_chips: int) -> tuple[int, ...]:
    """The first group of chips that take part together."""
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return tuple(int(i) for i in pairs.groups())
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(i) for i in listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return tuple(_iota(iota[3]).reshape(int(iota[1]), int(iota[2]))[0].tolist())
    pattern = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?)\))? \{([^}]*)\}"
    if mesh := re.search(pattern, text):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        sizes = [int(size) for size in axes.values()]
        ids = _iota(mesh[2] or f"[{np.prod(sizes)}]").reshape(sizes)
        kept = [list(axes).index(name) for name in re.findall(r"'([^']+)'", mesh[3])]
        rest = [i for i in range(len(sizes)) if i not in kept]
        count = int(np.prod([sizes[i] for i in kept]))
        return tuple(ids.transpose(rest + kept).reshape(-1, count)[0].tolist())
    return tuple(range(num_chips))


def _iota(text: str) -> np.ndarray:
    """ "[16,16]T(1,0)" -> the numbers 0 .. 255, reshaped and transposed, in one row."""
    shape, _, order = text.partition("T")
    sizes = [int(size) for size in shape.strip("[]").split(",")]
    numbers = np.arange(np.prod(sizes)).reshape(sizes)
    if order:
        numbers = numbers.transpose([int(axis) for axis in order.strip("()").split(",")])
    return numbers.reshape(-1)


# ------------------------------------------------------------------------------------------ time


def links(group: Sequence[int], coords: np.ndarray, topology: Topology) -> int:
    """How many of a chip's links a group can send over: 2 an axis of the torus that it spans.

    Args:
      group: numbers of chips.
      coords: place of each chip in the torus, int [chips, axes].
      topology: the slice.
    """
    places = coords[list(group)]
    count = 0
    for axis, size in enumerate(topology.shape):
        spanned = len(np.unique(places[:, axis]))
        if spanned > 1:
            count += 2 if spanned == size and topology.wraps(axis) else 1
    return max(count, 1)


def seconds(found: Iterable[Collective], coords: np.ndarray, topology: Topology) -> float:
    """Time on the links, without latency, as if one collective ran after the other."""
    total = 0.0
    for collective in found:
        speed = topology.chip.link * links(collective.group, coords, topology)
        total += collective.times * collective.sent / speed
    return total


def totals(found: Iterable[Collective]) -> dict[str, dict[str, float]]:
    """{kind: {"count": runs, "bytes": bytes that a chip sends}}, kinds that occur only."""
    out: dict[str, dict[str, float]] = {}
    for collective in found:
        entry = out.setdefault(collective.kind, {"count": 0, "bytes": 0.0})
        entry["count"] += collective.times
        entry["bytes"] += collective.times * collective.sent
    return {kind: out[kind] for kind in KINDS if kind in out}
