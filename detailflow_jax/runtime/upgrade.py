"""Fields of configurations that have a new name. Old workdirs are read with their names changed."""

from collections.abc import Mapping
from typing import Any

from detailflow_jax.runtime.errors import ConfigError

_BOTH = {
    "loss.mse": "losses.mse.weight",
    "loss.perceptual": "losses.perceptual.weight",
    "loss.perceptual_ramp": "losses.perceptual.ramp",
    "loss.adversarial": "losses.adversarial.weight",
    "perceptual.path": "losses.perceptual.path",
    "perceptual.linear": "losses.perceptual.linear",
    "perceptual.random": "losses.perceptual.random",
}
RENAMED = {
    "tokenizer": _BOTH
    | {
        "loss.commitment": "losses.commit.weight",
        "loss.entropy": "losses.entropy.weight",
        "loss.align": "losses.align.weight",
        "loss.repa": "losses.repa.weight",
        "loss.full_probability": "full_probability",
        "loss.correction": "correction.enabled",
        "loss.noise_per_sample": "correction.noise_per_sample",
        "loss.noise_top": "correction.noise_top",
    },
    "vae": _BOTH | {"loss.kl": "losses.kl.weight"},
}
"""Task -> old full name -> new full name."""

_ADDED = {"tokenizer": {"losses.vq.weight": 1.0}, "vae": {}}
"""Task -> fields that had no name of their own, as they were then."""

_ABSENT = object()


def _at(fields: Any, name: str) -> Any:
    for part in name.split("."):
        if not hasattr(fields, "keys") or part not in fields:
            return _ABSENT
        fields = fields[part]
    return fields


def _old_names(fields: Mapping[str, Any]) -> dict[str, str]:
    names = RENAMED.get(fields.get("task"), {})
    return {old: new for old, new in names.items() if _at(fields, old) is not _ABSENT}


def new_name(fields: Mapping[str, Any], name: str) -> str | None:
    """The new full name of the field `name` of a task's configuration, if it was renamed."""
    return RENAMED.get(fields.get("task"), {}).get(name)


def check_names(fields: Mapping[str, Any]) -> None:
    """Raises ConfigError if a configuration has fields under their old names."""
    if old := _old_names(fields):
        changes = "; ".join(f"config.{a} is now config.{b}" for a, b in old.items())
        raise ConfigError(f"the configuration has old names: {changes}")


def upgraded(fields: dict[str, Any]) -> dict[str, Any]:
    """Nested fields of a configuration as written, with the names of today."""
    old = _old_names(fields)
    if not old:
        return fields
    new = {name: value for name, value in fields.items() if name not in ("loss", "perceptual")}
    moved = {b: _at(fields, a) for a, b in old.items()} | _ADDED[fields["task"]]
    for name, value in moved.items():
        *groups, last = name.split(".")
        place = new
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return new
