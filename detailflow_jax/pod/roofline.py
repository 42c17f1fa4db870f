"""The least time that a compiled program can take on its chips, and what that costs.

Three times are compared: arithmetic at the peak of the matrix unit, memory traffic at the memory's
bandwidth, collectives at the links' bandwidth. A perfect overlap of the three takes as long as the
longest, no overlap as long as their sum; a real step lies above the first. Latency, work on single
numbers and the input pipeline are in none of them.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from detailflow_jax.pod import collectives, flops, hlo, traffic
from detailflow_jax.pod.programs import Compiled
from detailflow_jax.pod.topologies import Topology

BOUNDS = ("compute", "HBM", "interconnect")


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What a program does; memory, FLOPs and bytes are of one chip.

    Attributes:
      memory: {"arguments", "temporaries", "outputs", "peak"}: bytes of HBM. Outputs that take the
        place of donated arguments are not counted. The peak may be less than the sum.
      flops: of matrix products, as compiled.
      flops_written: the same as traced, of the whole pod.
      bytes: to and from HBM.
      collectives: {kind: {"count", "bytes"}}, bytes that a chip sends.
      seconds: {bound: least time of one run}.
      unknown_loops: loops whose trip count could not be read; each is counted as one round.
    """

    memory: dict[str, int]
    flops: int
    flops_written: int
    bytes: int
    collectives: dict[str, dict[str, float]]
    seconds: dict[str, float]
    unknown_loops: int

    @property
    def bound(self) -> str:
        """Which of `BOUNDS` rules."""
        return max(self.seconds, key=self.seconds.get)

    @property
    def least_seconds(self) -> float:
        """Of one run, if everything overlaps."""
        return max(self.seconds.values())


def analyse(compiled: Compiled, topology: Topology) -> Analysis:
    """Reads a compiled program; see `Analysis`."""
    module = hlo.parse(compiled.executable.as_text())
    executions = hlo.executions(module)
    done, weighted = flops.executed(module, executions)
    moved = traffic.memory_bytes(module, executions)
    sent = collectives.find(module, executions, topology.chips)
    coords = _coords(compiled.program.mesh.devices.flat, topology)
    chip = topology.chip
    return Analysis(
        memory=_memory(compiled.executable.memory_analysis()),
        flops=done,
        flops_written=flops.written(compiled.traced),
        bytes=moved,
        collectives=collectives.totals(sent),
        seconds={
            "compute": weighted / chip.peak,
            "HBM": moved / chip.bandwidth,
            "interconnect": collectives.seconds(sent, coords, topology),
        },
        unknown_loops=sum(execution.unknown for execution in executions if not execution.fused),
    )


def _coords(devices: Any, topology: Topology) -> np.ndarray:
    """Place of each chip of the mesh, in its order, in the torus: int [chips, axes]."""
    found: list[jax.Device] = list(devices)
    return np.array([device.coords[: len(topology.shape)] for device in found])


def _memory(stats: Any) -> dict[str, int]:
    return {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "peak": stats.peak_memory_in_bytes,
    }
