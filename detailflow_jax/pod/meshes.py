"""The mesh to compile for: the configuration's, the command line's, or one that fits."""

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh
from ml_collections import ConfigDict

from detailflow_jax.pod import programs
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


def auto(
    config: ConfigDict,
    what: str,
    topology: Topology,
    devices: Sequence[jax.Device],
    tensor: int = 1,
) -> Mesh:
    """The mesh with the best fsdp axis; see `rank_fsdp`."""
    if topology.chips % tensor:
        raise ConfigError(f"tensor={tensor} does not divide the {topology.chips} chips")
    fsdp = rank_fsdp(config, what, topology, tensor)[0]
    return sharding.make_mesh({"data": -1, "fsdp": fsdp, "tensor": tensor}, devices)


def rank_fsdp(config: ConfigDict, what: str, topology: Topology, tensor: int = 1) -> list[int]:
    """Sizes of the fsdp axis, the best first; powers of two that divide the chips are tried.

    For training, the best leaves the least of the state on each chip. Where a size does not divide
    a network's widths, they stay whole, so it is not always the largest: 3200 splits 128 ways, not
    256. A sampler would gather its parameters for every few tokens: it takes the smallest size
    that leaves at most a third of the memory to them.
    """
    needed, fsdp = {}, 1
    while topology.chips % (fsdp * tensor) == 0:
        sizes = {"data": topology.chips // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
        needed[fsdp] = programs.state_bytes(config, what, _abstract_mesh(sizes))
        fsdp *= 2
    if what == "sampler":
        return sorted(needed, key=lambda size: needed[size] > topology.chip.memory / 3)
    return sorted(needed, key=needed.get)


def _abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    shape = tuple(sizes[axis] for axis in sharding.AXES)
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))
