"""One table a network: published tensor names <-> parameter paths, read in both directions.

Parameters here are in the scanned layout: blocks lie under `layers` with a leading layer axis, and
a published name with `{}` stands for one tensor a layer. `models.layers.unstack_layers` turns the
result into the unrolled layout.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published tensor, or one a layer where `name` holds `{}`.

    Attributes:
      name: published name.
      paths: parameter paths, "/"-separated; several are concatenated along the published axis 0.
      transpose: a linear layer: published [out, in], here [in, out].
      lead: how many leading axes of size 1 the published tensor has and ours lacks.
    """

    name: str
    paths: tuple[str, ...]
    transpose: bool = False
    lead: int = 0


@dataclasses.dataclass
class Report:
    """What became of every name: lists of published names."""

    loaded: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)


class ConversionError(ValueError):
    """Weights and network do not belong together."""


def linear(name: str, path: str) -> tuple[Entry, Entry]:
    """A published linear layer (`weight`, `bias`) as a Dense (`kernel`, `bias`)."""
    return (
        Entry(f"{name}.weight", (f"{path}/kernel",), transpose=True),
        Entry(f"{name}.bias", (f"{path}/bias",)),
    )


def norm(name: str, path: str) -> tuple[Entry, Entry]:
    """A published LayerNorm (`weight`, `bias`) as (`scale`, `bias`)."""
    return Entry(f"{name}.weight", (f"{path}/scale",)), Entry(f"{name}.bias", (f"{path}/bias",))


def _expand(entry: Entry, abstract: Mapping[str, Any]) -> Iterator[tuple[str, int | None]]:
    """(published name, layer or None) of every tensor an entry stands for."""
    if "{}" not in entry.name:
        yield entry.name, None
        return
    for layer in range(abstract[entry.paths[0]].shape[0]):
        yield entry.name.format(layer), layer


def _present(table: Iterable[Entry], flat: Mapping[str, Any]) -> list[Entry]:
    """The entries whose parameters this network has (optional parts, like alignment, may lack)."""
    return [entry for entry in table if entry.paths[0] in flat]


def _published_shape(entry: Entry, flat: Mapping[str, Any], layer: int | None) -> tuple[int, ...]:
    shapes = [tuple(flat[path].shape[0 if layer is None else 1 :]) for path in entry.paths]
    if entry.transpose:
        shapes = [shape[::-1] for shape in shapes]
    return (1,) * entry.lead + (sum(s[0] for s in shapes), *shapes[0][1:])


def published_shapes(table: Iterable[Entry], params: Mapping[str, Any]) -> dict[str, tuple]:
    """Published name -> shape of everything the table writes for (abstract) parameters."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return {
        name: _published_shape(entry, flat, layer)
        for entry in _present(table, flat)
        for name, layer in _expand(entry, flat)
    }


def from_published(
    table: Iterable[Entry],
    tensors: Mapping[str, np.ndarray],
    abstract: Mapping[str, Any],
    *,
    skip: Iterable[str] = (),
    allow_missing: bool = False,
    dtype: Any = np.float32,
) -> tuple[dict[str, Any], Report]:
    """Published tensors -> nested parameters, each written once into its final place.

    Args:
      table: entries of the network.
      tensors: published name -> array; may be lazy, each is read once.
      abstract: nested parameters with `.shape` (from `jax.eval_shape`), scanned layout.
      skip: prefixes of published names that are not needed, by design.
      allow_missing: leave parameters without a published tensor out, instead of refusing.
      dtype: of the result.

    Returns:
      parameters (NumPy) and the report.

    Raises:
      ConversionError: a tensor is missing or has another shape; both are named.
    """
    flat = traverse_util.flatten_dict(abstract, sep="/")
    out: dict[str, np.ndarray] = {}
    report = Report()
    for entry in _present(table, flat):
        for name, layer in _expand(entry, flat):
            if name not in tensors:
                report.missing.append(name)
                continue
            _place(entry, name, layer, tensors[name], flat, out, dtype)
            report.loaded.append(name)
    covered = {path for entry in _present(table, flat) for path in entry.paths}
    if uncovered := sorted(set(flat) - covered):
        raise ConversionError(f"the table names no published tensor for {', '.join(uncovered)}")
    if report.missing and not allow_missing:
        raise ConversionError(
            f"{len(report.missing)} tensors are missing, first {report.missing[0]!r} "
            f"(the file holds {len(tensors)}); is this a checkpoint of another network or size?"
        )
    done = set(report.loaded)
    for name in tensors:
        if name not in done:
            kind = report.skipped if name.startswith(tuple(skip)) else report.unused
            kind.append(name)
    return traverse_util.unflatten_dict(out, sep="/"), report


def _place(entry, name, layer, tensor, flat, out, dtype) -> None:
    """Write one published tensor into the leaf or leaves it belongs to."""
    expected = _published_shape(entry, flat, layer)
    if tuple(tensor.shape) != expected:
        raise ConversionError(
            f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {expected}"
        )
    tensor = np.asarray(tensor).reshape(expected[entry.lead :])
    start = 0
    for path in entry.paths:
        shape = tuple(flat[path].shape)
        leaf = out.setdefault(path, np.empty(shape, dtype))
        target = leaf if layer is None else leaf[layer]
        target = target.T if entry.transpose else target
        target[...] = tensor[start : start + target.shape[0]]
        start += target.shape[0]


def to_published(
    table: Iterable[Entry], params: Mapping[str, Any], dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """Nested parameters (scanned layout) -> published names and arrays, in table order."""
    flat = traverse_util.flatten_dict(params, sep="/")
    out = {}
    for entry in _present(table, flat):
        leaves = [np.asarray(flat[path]) for path in entry.paths]
        for name, layer in _expand(entry, flat):
            parts = [leaf if layer is None else leaf[layer] for leaf in leaves]
            parts = [part.T if entry.transpose else part for part in parts]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            whole = np.ascontiguousarray(whole, dtype).reshape((1,) * entry.lead + whole.shape)
            out[name] = whole
    return out
