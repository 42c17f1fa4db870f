"""The memory that a compiled step needs, by XLA's analysis, against what a device has."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from detailflow_jax.runtime.errors import ConfigError

_GIB = 2**30
# Of a container, in the second and in the first version of control groups.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_SIGNS = ("RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "Ran out of memory")


class TooLarge(ConfigError):
    """A step that does not fit into memory; the text says what to lower."""


def check(program: jax.stages.Compiled, config: ConfigDict) -> str:
    """Compares the memory that a compiled step needs with that of the device.

    Args:
      program: the step; its first argument is the state.
      config: of the run, for the advice.

    Returns:
      a line for the log, empty if the backend does not tell.

    Raises:
      TooLarge: it needs more than the device has.
    """
    stats = program.memory_analysis()
    if stats is None:
        return ""
    kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    kept, temporary = kept * _shared_by(), stats.temp_size_in_bytes * _shared_by()
    there = available()
    text = f"{(kept + temporary) / _GIB:.1f} GiB"
    if there is None:
        return f"; it needs {text}"
    if kept + temporary > there:
        raise TooLarge(
            f"a step needs {text} of memory, there are {there / _GIB:.1f} GiB: "
            f"{kept / _GIB:.1f} GiB for the state and the batch, {temporary / _GIB:.1f} GiB for "
            f"what is computed in between. {advice(config, kept, temporary, there)}"
        )
    return f"; it needs {text} of {there / _GIB:.1f} GiB"


@contextlib.contextmanager
def explained(config: ConfigDict) -> Iterator[None]:
    """Raises TooLarge, with advice, where the block runs out of the memory of a device."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not any(sign in str(error) for sign in _SIGNS):
            raise
        first = str(error).strip().splitlines()[0][:300]
        raise TooLarge(f"out of memory ({first}). {advice(config)}") from error


def available() -> int | None:
    """Bytes that the step of a run may use: of one device, or of this machine if that is a CPU."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number.
            sizes.append(int(pathlib.Path(path).read_text()))
    return min(sizes)


def _shared_by() -> int:
    """How many devices have the memory together: XLA's figures are those of one."""
    devices = jax.local_devices()
    return len(devices) if devices[0].platform == "cpu" else 1


def advice(
    config: ConfigDict, kept: float = 0, temporary: float = 0, there: float | None = None
) -> str:
    """What to lower so that a step needs less memory.

    Args:
      config: of the run.
      kept: bytes of the state and the batch.
      temporary: bytes of what a step computes in between, about proportional to its images.
      there: bytes that there are; None: unknown.
    """
    lines = [f"Lower --config.batch_size ({config.batch_size})"]
    parts = [n for n in range(2, config.batch_size + 1) if config.batch_size % n == 0]
    now = config.accumulate
    fits = lambda n: there is None or kept + temporary * now / n < 0.9 * there  # noqa: E731
    parts = [n for n in parts if n > now and fits(n)]
    if parts:
        lines.append(f"or compute it in parts, --config.accumulate={parts[0]}")
    model: Any = config.get("model", {})
    if model.get("remat") == "none":
        lines.append("or compute activations again, --config.model.remat=full")
    if kept > temporary and config.get("mesh", {}).get("fsdp") == 1 and jax.device_count() > 1:
        lines.append("or split the state over the devices, --config.mesh.fsdp=-1")
    if config.get("task") in ("tokenizer", "vae", "generator", "flowar"):
        lines.append(f"or train a smaller network, such as configs/{config.task}.py:small")
    return ", ".join(lines) + "."


def in_use() -> tuple[int, int]:
    """(bytes now, bytes at most so far) of the local device that has most; zeros on a CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    names = "bytes_in_use", "peak_bytes_in_use"
    now, most = (max(stat.get(name, 0) for stat in stats) for name in names)
    return now, most
