"""The mesh to compile for: the configuration's, the command line's, or one that should be fast."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from detailflow_jax.pod import collectives, programs
from detailflow_jax.pod.topologies import Topology
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.errors import ConfigError


def choose(
    asked: str, config: ConfigDict, what: str, topology: Topology, devices: Sequence[jax.Device]
) -> Mesh:
    """The mesh of a slice.

    Args:
      asked: "" for the configuration's, "auto", or sizes such as "data=-1,fsdp=16".
      config: the configuration; `auto` looks at the size of its state.
      what: "train" or "sampler".
      topology: the slice.
      devices: of the slice.

    Raises:
      ConfigError: sizes that cannot be read, or that the slice cannot be cut into.
    """
    if asked == "auto":
        return auto(config, what, topology, devices)
    sizes = parse(asked) if asked else config.mesh.to_dict()
    return sharding.make_mesh(sizes, devices)


def parse(text: str) -> dict[str, int]:
    """ "data=2,fsdp=8" -> sizes by axis; `data` takes the rest where it is not given.

    Raises:
      ConfigError: not of this form.
    """
    sizes = {"data": -1}
    for item in text.split(","):
        axis, _, size = item.strip().partition("=")
        if axis not in sharding.AXES or not size.removeprefix("-").isdigit():
            raise ConfigError(
                f"cannot read --mesh {text!r}: expected auto, or sizes of "
                f"{', '.join(sharding.AXES)} as data=-1,fsdp=16"
            )
        sizes[axis] = int(size)
    return sizes


def auto(config: ConfigDict, what: str, topology: Topology, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh that should be fastest; see `ranked`."""
    return sharding.make_mesh(ranked(config, what, topology, devices)[0].sizes, devices)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What is known of a mesh before anything is compiled for it.

    Attributes:
      sizes: by axis.
      state: bytes of the state on each chip.
      seconds: of what depends on the mesh: gathering parameters, reducing gradients, the update.
      falls_back: the compiler replaces gathers and scatters by all-reduces.
    """

    sizes: Mapping[str, int]
    state: int
    seconds: float
    falls_back: bool


def ranked(
    config: ConfigDict,
    what: str,
    topology: Topology,
    devices: Sequence[jax.Device],
    tensor: int = 1,
) -> list[Estimate]:
    """Meshes of a slice, the one that should be fastest first; fsdp in powers of two.

    Those whose state leaves too little of a chip's memory to the step come last, and so do, for
    the sampler, larger sizes of fsdp: it would gather its parameters for every few tokens.
    """
    if topology.chips % tensor:
        raise ConfigError(f"tensor={tensor} does not divide the {topology.chips} chips")
    found, fsdp = [], 1
    while topology.chips % (fsdp * tensor) == 0:
        sizes = {"data": topology.chips // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
        found.append(_estimate(config, what, topology, devices, sizes))
        fsdp *= 2
    if what == "sampler":
        return sorted(found, key=lambda each: each.state > topology.chip.memory / 3)
    room = _STATE_SHARE * topology.chip.memory
    return sorted(found, key=lambda each: (max(each.state, room), each.seconds))


# A state of more than this share of the memory leaves too little for the step itself.
_STATE_SHARE = 0.5
# The update reads and writes the state, and reads the gradients.
_UPDATE_PASSES = 2.25
_LARGE = 2**20  # bytes of a parameter whose gather takes time


def _estimate(
    config: ConfigDict,
    what: str,
    topology: Topology,
    devices: Sequence[jax.Device],
    sizes: Mapping[str, int],
) -> Estimate:
    mesh, chip = sharding.make_mesh(sizes, devices), topology.chip
    state = programs.state(config, what, _abstract_mesh(sizes))
    kept = programs.bytes_a_chip(state)
    params = state if what == "sampler" else state.params
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    passed = 2 * count / sizes["tensor"]  # bytes of all parameters in bfloat16
    coords = np.array([device.coords[: len(topology.shape)] for device in mesh.devices.flat])
    numbers = np.arange(mesh.size).reshape(mesh.devices.shape)
    fsdp = sizes["fsdp"]
    falls_back = _falls_back(topology, fsdp, _rows(params))

    def seconds(sent: float, group: np.ndarray) -> float:
        if len(group) == 1:
            return 0.0
        share = (len(group) - 1) / len(group)
        return sent * share / (chip.link * collectives.links(group, coords, topology))

    # A gather forward, one backward, and a scatter of the gradients; then a sum over copies.
    passes = 3 * (2 if falls_back else 1)
    total = seconds(passes * passed, numbers[0, :, 0]) + seconds(
        2 * passed / fsdp, numbers[:, 0, 0]
    )
    total += _UPDATE_PASSES * kept / chip.bandwidth
    return Estimate(sizes, kept, total, falls_back)


def _rows(params: Any) -> int:
    """The fewest rows of a large parameter that a chip holds under fsdp."""
    rows = [
        leaf.sharding.shard_shape(leaf.shape)[leaf.sharding.spec.index("fsdp")]
        for leaf in jax.tree.leaves(params)
        if "fsdp" in leaf.sharding.spec and math.prod(leaf.shape) * 4 > _LARGE
    ]
    return min(rows, default=_FEWEST_ROWS)


_FEWEST_ROWS = 8


def _falls_back(topology: Topology, fsdp: int, rows: int) -> bool:
    """Whether the compiler was seen to write all-reduces for such gathers (docs/tpu_pods.md)."""
    whole = fsdp == topology.chips and (topology.chip.kind == "v5" or fsdp >= 256)
    return fsdp > 1 and (whole or rows < _FEWEST_ROWS)


def _abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    shape = tuple(sizes[axis] for axis in sharding.AXES)
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))
