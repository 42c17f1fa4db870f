"""What programs are compiled for, where they are kept, and the options of XLA for train steps.

Options are given with the program, not by environment variables, so that every launcher and
`detailflow compile-pod` compile the same. What was seen stands in docs/tpu_pods.md.
"""

import contextlib
import contextvars
import os
from collections.abc import Iterator, Mapping

import jax

from detailflow_jax.runtime import files
from detailflow_jax.runtime.errors import ConfigError

VARIABLE, CACHE = "DETAILFLOW_XLA_OPTIONS", "JAX_COMPILATION_CACHE_DIR"

OPTIONS: Mapping[str, Mapping[str, str]] = {
    "tpu": {
        # A product whose operand is larger than this becomes a loop over the shards of its other
        # operand, to overlap the gather with parts of the product. It reads and writes the whole
        # float32 result once per shard: of FlowAR-S's traffic on 16 chips that was half.
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    },
    "TPU v5 lite": {  # v5e
        # Without it gathers over a whole slice become all-reduces of arrays that are mostly zero,
        # twice the bytes, for which the core waits; docs/launch.md has figures.
        "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    },
}
"""{platform, or kind of device: {option: value}}, each with what it changed here."""

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def target(platform: str) -> Iterator[None]:
    """Within it, programs are traced for the devices of this platform."""
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def platform() -> str:
    """The platform that programs are traced for: that of `target`, else JAX's default."""
    return _target.get() or jax.default_backend()


def check_cache() -> None:
    """Checks the address of a bucket that is to keep compiled programs.

    JAX itself would compile every program with a warning, and make a folder of a mistyped address.

    Raises:
      ConfigError: it is no address of a bucket, there is no such bucket, or it refuses.
      BucketError: the bucket does not answer.
    """
    place = jax.config.jax_compilation_cache_dir
    if not place:
        return
    try:
        if files.is_remote(files.path(place)):
            files.make_folder(place)
    except ConfigError as error:
        raise ConfigError(f"{CACHE}={place}, for compiled programs: {error}") from error


def options(device: jax.Device) -> dict[str, str]:
    """The options of a device, changed by the variable `DETAILFLOW_XLA_OPTIONS`.

    The variable holds `name=value` separated by commas; `name=` leaves an option out.

    Raises:
      ConfigError: the variable is not of this form.
    """
    chosen = {**OPTIONS.get(device.platform, {}), **OPTIONS.get(device.device_kind, {})}
    for item in filter(None, os.environ.get(VARIABLE, "").split(",")):
        name, equals, value = item.strip().partition("=")
        if not (name and equals):
            raise ConfigError(f"{VARIABLE}: cannot read {item!r}, expected name=value or name=")
        chosen[name] = value
    return {name: value for name, value in chosen.items() if value}
