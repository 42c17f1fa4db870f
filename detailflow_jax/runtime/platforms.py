"""The platform that a command computes on, chosen before JAX looks for one."""

import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import sys

_GOOGLE = "0x1ae0"  # as the vendor of a PCI device, which TPUs are
# Set by the machine or the user where TPUs are not among the devices. JAX sets others itself.
_VARIABLES = ("TPU_NAME", "TPU_WORKER_HOSTNAMES", "JAX_FORCE_TPU_INIT")


def choose(*, tell: bool = False) -> None:
    """Chooses the CPU where JAX would load the library of TPUs in vain, with lines of complaint.

    That is, where libtpu is installed and there is neither a TPU nor another accelerator's plugin
    of JAX. Everywhere else, and where JAX_PLATFORMS is set, the choice is JAX's.

    Args:
      tell: print one line on a choice made here to stderr.
    """
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None:
        return
    if _may_have_tpu() or _has_plugin():
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # Also for child processes.
    if jax := sys.modules.get("jax"):
        jax.config.update("jax_platforms", "cpu")
    if tell:
        print("no TPU found: computing on the CPU (JAX_PLATFORMS overrides this)", file=sys.stderr)


def _may_have_tpu() -> bool:
    if any(os.environ.get(name) for name in _VARIABLES):
        return True
    if glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"):
        return True
    vendors = glob.glob("/sys/bus/pci/devices/*/vendor")
    return any(pathlib.Path(file).read_text().strip() == _GOOGLE for file in vendors)


def _has_plugin() -> bool:
    entries = importlib.metadata.entry_points(group="jax_plugins")
    return bool(entries) or importlib.util.find_spec("jax_plugins") is not None
