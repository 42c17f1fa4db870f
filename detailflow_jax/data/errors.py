"""Errors that every data source raises in the same way."""

from collections.abc import Iterable

from detailflow_jax.runtime.errors import ConfigError, near_names


class UnreadableImage(Exception):
    """A record whose image cannot be decoded. `name` says which, `reason` says why.

    Training counts and skips such a record; extraction lists it in the manifest.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at the names nearest to `name` to end an error with; empty if none is near."""
    near = near_names(name, known, count=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def unknown_name(what: str, name: str, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not one of `known`, with the nearest ones suggested."""
    known = list(known)
    expected = f"expected one of {', '.join(known)}"
    return ConfigError(f"unknown {what} {name!r}: {expected}{did_you_mean(name, known)}")
