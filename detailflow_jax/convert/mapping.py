"""One table per network: published tensor names <-> parameter paths, read in both directions.

A published name with `{}` stands for one tensor per layer. Its parameters lie under `layers` with a
leading layer axis if blocks are scanned, under `layers_0`, `layers_1`, ... if they are not. Tables
name the former; both layouts are read and written, depending on the parameters that are given.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from detailflow_jax.convert.errors import CheckpointError, some

# What XLA asks of host memory that it is to use in place.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published tensor, or one per layer if `name` holds `{}`.

    Attributes:
      name: published name.
      paths: parameter paths, "/"-separated; several are concatenated along the published axis 0.
      transpose: a linear layer: published [out, in], here [in, out].
      permute: any other order of the axes: ours is `published.transpose(permute)`.
      lead: how many leading axes of size 1 the published tensor has and ours lacks.
      extra: how many leading axes of size 1 ours has and the published tensor lacks: a 1x1
        convolution that is published as a linear layer.
    """

    name: str
    paths: tuple[str, ...]
    transpose: bool = False
    lead: int = 0
    extra: int = 0
    permute: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.permute is None:
            return
        if self.transpose or sorted(self.permute) != list(range(len(self.permute))):
            raise ValueError(
                f"{self.name}: permute={self.permute}, transpose={self.transpose}; "
                "expected an order of all the axes, and one of the two"
            )


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One published tensor and its places: (path, layer index in that leaf or None)."""

    name: str
    places: tuple[tuple[str, int | None], ...]
    entry: Entry

    def axes(self, rank: int) -> tuple[int, ...]:
        """The order of our axes that gives the published one."""
        if self.entry.permute is not None:
            return tuple(self.entry.permute.index(axis) for axis in range(rank))
        return tuple(range(rank))[:: -1 if self.entry.transpose else 1]

    def shape(self, flat: Mapping[str, Any]) -> tuple[int, ...]:
        """The published shape."""
        shapes = [
            tuple(flat[path].shape[(layer is not None) + self.entry.extra :])
            for path, layer in self.places
        ]
        shapes = [tuple(shape[axis] for axis in self.axes(len(shape))) for shape in shapes]
        return (1,) * self.entry.lead + (sum(s[0] for s in shapes), *shapes[0][1:])


@dataclasses.dataclass
class Report:
    """Published names by what was done with them."""

    loaded: list[str] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)
    unused: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)


def linear(name: str, *paths: str, use_bias: bool = True) -> tuple[Entry, ...]:
    """Returns the entries of a linear layer (`weight`, `bias`), here a Dense (`kernel`, `bias`).

    Several `paths` are layers that the published one fuses, such as queries, keys and values.
    """
    kernels, biases = (tuple(f"{path}/{leaf}" for path in paths) for leaf in ("kernel", "bias"))
    kernel = Entry(f"{name}.weight", kernels, transpose=True)
    return (kernel, Entry(f"{name}.bias", biases)) if use_bias else (kernel,)


def conv(name: str, path: str, *, use_bias: bool = True) -> tuple[Entry, ...]:
    """Returns the entries of a 2-D convolution (OIHW `weight`, `bias`), here HWIO `kernel`."""
    kernel = Entry(f"{name}.weight", (f"{path}/kernel",), permute=(2, 3, 1, 0))
    return (kernel, Entry(f"{name}.bias", (f"{path}/bias",))) if use_bias else (kernel,)


def norm(name: str, path: str) -> tuple[Entry, Entry]:
    """Returns the entries of a published LayerNorm (`weight`, `bias`) as (`scale`, `bias`)."""
    return Entry(f"{name}.weight", (f"{path}/scale",)), Entry(f"{name}.bias", (f"{path}/bias",))


def counters(table: Iterable[Entry]) -> tuple[str, ...]:
    """Returns the names of the batch counters (int64 scalars) of batch norms.

    Nothing needs them, but strict loading asks for them.
    """
    end = ".running_mean"
    names = (entry.name for entry in table if entry.name.endswith(end))
    return tuple(f"{name.removesuffix(end)}.num_batches_tracked" for name in names)


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"blocks/layers/w1/kernel": leaf, ...} of nested parameters."""
    return traverse_util.flatten_dict(params, sep="/")


def _expand(table: Iterable[Entry], flat: Mapping[str, Any]) -> Iterator[_Tensor]:
    """Every tensor that the table has for these parameters; parts that they lack have none."""
    for entry in table:
        for layer in itertools.count() if "{}" in entry.name else (None,):
            name = entry.name if layer is None else entry.name.format(layer)
            places = _places(entry.paths, layer, flat)
            if places is None:
                break
            yield _Tensor(name, places, entry)


def _places(
    paths: tuple[str, ...], layer: int | None, flat: Mapping[str, Any]
) -> tuple[tuple[str, int | None], ...] | None:
    """Where a tensor's parameters are: in a stacked leaf, in leaves of its own, or nowhere."""
    if paths[0] in flat:
        inside = layer is None or layer < flat[paths[0]].shape[0]
        return tuple((path, layer) for path in paths) if inside else None
    if layer is None:
        return None
    own = tuple(f"/{path}".replace("/layers/", f"/layers_{layer}/", 1)[1:] for path in paths)
    return tuple((path, None) for path in own) if own[0] in flat else None


def published_shapes(table: Iterable[Entry], params: Mapping[str, Any]) -> dict[str, tuple]:
    """Returns published name -> shape of all that the table writes for (abstract) parameters."""
    flat = flatten(params)
    return {tensor.name: tensor.shape(flat) for tensor in _expand(table, flat)}


def depth(table: Iterable[Entry], params: Mapping[str, Any]) -> int:
    """Returns how many layers (abstract) parameters have."""
    flat = flatten(params)
    layered = next(entry for entry in table if "{}" in entry.name)
    return sum(1 for _ in _expand([layered], flat))


def from_published(
    table: Iterable[Entry],
    tensors: Mapping[str, np.ndarray],
    abstract: Mapping[str, Any],
    *,
    source: str = "the checkpoint",
    skip: Iterable[str] = (),
    optional: Iterable[str] = (),
    allow_unused: bool = True,
    initial: Callable[[], Mapping[str, Any]] | None = None,
    progress: Callable[[list], Iterable] = iter,
) -> tuple[dict[str, Any], Report]:
    """Returns nested parameters of published tensors; each number is written once, into its place.

    Args:
      table: entries of the network.
      tensors: published name -> array; may be lazy, each is read once.
      abstract: nested parameters with `.shape` (from `jax.eval_shape`), scanned or not.
      source: what messages call the file.
      skip: prefixes of published names that are not needed, by design.
      optional: prefixes of published names; the parameters of one that no tensor has are left out.
      allow_unused: leave out tensors that belong to no parameter.
      initial: makes parameters like `abstract`, of which those without a published tensor are
        taken. None: every tensor has to be there.
      progress: wraps the list of what is to be read, such as `tqdm`.

    Returns:
      parameters (NumPy, float32, in memory that XLA can use without a copy) and the report.

    Raises:
      CheckpointError: a tensor is missing, unused or of another shape, or holds no numbers.
    """
    flat = flatten(abstract)
    wanted = list(_expand(table, flat))
    covered = {path for tensor in wanted for path, _ in tensor.places}
    if uncovered := sorted(set(flat) - covered):
        raise ValueError(f"the table names no published tensor for {', '.join(uncovered)}")
    skip = tuple(skip)
    absent = tuple(p for p in optional if not any(name.startswith(p) for name in tensors))
    wanted = {t.name: t for t in wanted if not t.name.startswith(absent)}
    # No parameter is a tensor of no numbers, or a number beside the modules such as "epoch".
    rest = [n for n, x in tensors.items() if n not in wanted and 0 not in x.shape]
    rest = [name for name in rest if tensors[name].shape or "." in name]
    report = Report(
        loaded=[name for name in wanted if name in tensors],
        missing=[name for name in wanted if name not in tensors],
        unused=[name for name in rest if not name.startswith(skip)],
        skipped=[name for name in rest if name.startswith(skip)],
    )
    if report.missing and initial is None:
        raise CheckpointError(
            f"{source}: {len(report.missing)} of {len(wanted)} tensors are missing: "
            f"{some(report.missing)} (the file holds {len(tensors)})",
            expected="every tensor of this network",
            remedy="Is this a checkpoint of another network or size? To initialise the missing "
            "ones, allow it (allow_missing).",
        )
    for name in report.loaded:  # All shapes first: an error comes before gigabytes are read.
        _check_tensor(wanted[name], tensors[name], flat, source)
    if report.unused and not allow_unused:
        raise CheckpointError(
            f"{source}: {len(report.unused)} of its tensors belong to no parameter: "
            f"{some(report.unused)}",
            expected="the tensors of this network alone",
            remedy="Is this a checkpoint of another network or size? To leave them out, allow it "
            "(allow_unused).",
        )
    made = to_published(table, initial()) if initial and report.missing else {}
    out: dict[str, np.ndarray] = {}
    for name in progress(list(wanted)):
        _place(
            wanted[name], np.asarray(tensors[name] if name in tensors else made[name]), flat, out
        )
    return traverse_util.unflatten_dict(out, sep="/"), report


def _check_tensor(tensor: _Tensor, array: Any, flat: Mapping[str, Any], source: str) -> None:
    expected = tensor.shape(flat)
    if tuple(array.shape) != expected:
        raise CheckpointError(
            f"{source}: tensor {tensor.name!r} has shape {tuple(array.shape)}",
            expected=f"{expected}",
            remedy="Is this a checkpoint of another size, or damaged?",
        )
    if array.dtype.kind in "biucOSU":
        raise CheckpointError(
            f"{source}: tensor {tensor.name!r} is {array.dtype}",
            expected="real numbers, in floating point",
            remedy="If they are quantised, restore them with the library that did it.",
        )


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array that `jax.device_put` takes over on a CPU instead of copying it."""
    size = int(np.prod(shape)) * 4
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(np.float32).reshape(shape)


def _place(tensor: _Tensor, array: np.ndarray, flat, out) -> None:
    """Writes one published tensor into the leaf or leaves it belongs to."""
    array = array.reshape(array.shape[tensor.entry.lead :])
    start = 0
    for path, layer in tensor.places:
        if path not in out:
            out[path] = _aligned(tuple(flat[path].shape))
        target = out[path] if layer is None else out[path][layer]
        target = target.reshape(target.shape[tensor.entry.extra :])  # a view
        target = target.transpose(tensor.axes(target.ndim))
        target[...] = array[start : start + target.shape[0]]
        start += target.shape[0]


def to_published(table: Iterable[Entry], params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns published names and arrays of nested parameters, scanned or not, in table order.

    The arrays are views of the parameters where these are in the host's memory, but for fused ones.
    """
    flat = flatten(params)
    out = {}
    for tensor in _expand(table, flat):
        parts = []
        for path, layer in tensor.places:
            part = np.asarray(flat[path]) if layer is None else np.asarray(flat[path][layer])
            part = part.reshape(part.shape[tensor.entry.extra :])
            parts.append(part.transpose(tensor.axes(part.ndim)))
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        out[tensor.name] = whole.reshape((1,) * tensor.entry.lead + whole.shape)
    return out
