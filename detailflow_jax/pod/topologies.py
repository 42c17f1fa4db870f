"""TPU slices: what a chip can do, and devices to compile for without having one.

Figures are the vendor's (docs.cloud.google.com/tpu/docs). The usable part of the memory is what the
compiler allows a program. `clock` is that at which the matrix units reach the peak; the vendor
gives none. `link` is one direction of one link: the vendor gives the sum over both directions of
all links of a chip: 400 GB/s for v5e (4 links), 800 for v6e (4), 1200 for v5p (6).
"""

import dataclasses
import importlib.util
import math
import os

import jax

from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.runtime.flops import PEAKS


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip.

    Attributes:
      memory: usable HBM in bytes.
      peak: bfloat16 FLOP/s.
      bandwidth: HBM bytes/s.
      clock: cycles/s.
      link: bytes/s of one link, one direction.
      ring: an axis of the torus is closed to a ring if its size is a multiple of this.
      kind: how the compiler names it.
    """

    memory: int
    peak: float
    bandwidth: float
    clock: float
    link: float
    ring: int
    kind: str


GIB = 2**30
CHIPS = {
    "v5e": Chip(int(15.75 * GIB), PEAKS["TPU v5e"], 819e9, 1.5e9, 50e9, 16, "v5e"),
    "v6e": Chip(int(31.24 * GIB), PEAKS["TPU v6e"], 1638e9, 1.75e9, 100e9, 16, "v6e"),
    "v5p": Chip(int(95.73 * GIB), PEAKS["TPU v5"], 2765e9, 1.75e9, 100e9, 4, "v5"),
}

# Chips of a slice -> its shape. The names of v5p count cores, two per chip.
_FLAT = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES = {
    8: (2, 2, 1),
    16: (2, 2, 2),
    32: (2, 2, 4),
    64: (2, 4, 4),
    128: (4, 4, 4),
    256: (4, 4, 8),
    512: (4, 8, 8),
    1024: (8, 8, 8),
    2048: (8, 8, 16),
}
SLICES = {
    **{f"v5e-{chips}": ("v5e", shape) for chips, shape in _FLAT.items()},
    **{f"v6e-{chips}": ("v6e", shape) for chips, shape in _FLAT.items()},
    **{f"v5p-{cores}": ("v5p", shape) for cores, shape in _CUBES.items()},
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its name, its chip, and its shape in chips."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many chips it has."""
        return math.prod(self.shape)

    @property
    def compiler_name(self) -> str:
        """How the compiler names it, such as "v5e:16x16"."""
        return f"{self.chip.kind}:{'x'.join(map(str, self.shape))}"

    def wraps(self, axis: int) -> bool:
        """Whether the last chip along an axis of the torus is linked to the first."""
        return self.shape[axis] % self.chip.ring == 0


def find(name: str) -> Topology:
    """A slice by the name that the cloud gives it ("v5e-256"), or by its shape ("v5p:4x4x8").

    Raises:
      ConfigError: there is no such slice.
    """
    kind, _, shape = name.partition(":")
    if name in SLICES:
        kind, sizes = SLICES[name]
        return Topology(name, CHIPS[kind], sizes)
    sizes = tuple(int(size) for size in shape.split("x") if size.isdigit())
    if kind in CHIPS and len(sizes) == (3 if kind == "v5p" else 2):
        return Topology(name, CHIPS[kind], sizes)
    raise ConfigError(
        f"unknown topology {name!r}: expected one of {', '.join(SLICES)}, or a shape as v5e:8x8"
    )


def devices(topology: Topology) -> list[jax.Device]:
    """Devices of a slice that is not there: programs can be compiled for them, not run.

    Call it before anything else starts JAX's backends; it keeps them on the CPU.

    Raises:
      ConfigError: the TPU compiler is not installed, or does not know the slice.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ConfigError(
            "the TPU compiler is not installed: pip install 'jax[tpu]' brings it (libtpu, for "
            "Linux on x86-64); it runs on any CPU"
        )
    _keep_quiet()
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies  # Not at the top: it is slow to import.

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.compiler_name)
    except Exception as error:  # The compiler's own errors have no common class.
        raise ConfigError(
            f"the TPU compiler rejects the slice {topology.compiler_name}: {str(error)[:300]}"
        ) from error
    return list(found.devices)


def _keep_quiet() -> None:
    """Tells libtpu that there is no TPU to look for, no server to ask and no lock to take."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
