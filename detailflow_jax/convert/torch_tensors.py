"""Tensors of PyTorch files, from what a pickle says of them to arrays over the mapped file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.numpy_pickle import ArraySpec

Spans = dict[str, tuple[int, int]]  # first byte and number of bytes of each storage, by key
# Tied or expanded weights may be in a file once and be read often. A file whose tensors are larger
# than this many times its size, and than this many bytes, is made to fill the memory.
_MAX_UNFOLDING, _ALWAYS_UNFOLDED = 4, 1 << 28
_MAX_SIZE = 1 << 128  # Longer integers cannot be printed in a message.
AGAIN = "Download or copy the file again."
RESAVE = (
    "If you trust the file, load it in PyTorch and write `torch.save(model.state_dict(), ...)`."
)


class Storage(NamedTuple):
    """`numel` numbers elsewhere in the file."""

    key: str
    dtype: np.dtype
    numel: int


class TensorSpec(NamedTuple):
    """A tensor as the pickle describes it, unchecked: a strided view, counted in elements."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: Any
    metadata: Any

    @property
    def known(self) -> bool:
        """Whether there is a storage, and numbers of a type that NumPy has."""
        return isinstance(self.storage, Storage) and isinstance(self.dtype, np.dtype)


def tensor_spec(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> TensorSpec:
    """The versions of `_rebuild_tensor`; `more`: gradient, hooks, dtype where given, metadata."""
    dtype, metadata = getattr(storage, "dtype", None), more[2:]
    if metadata and (isinstance(metadata[0], np.dtype) or hasattr(metadata[0], "parts")):
        dtype, metadata = metadata[0], metadata[1:]
    return TensorSpec(storage, offset, shape, strides, dtype, metadata)


def strided_view(
    raw: np.ndarray,
    start: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Returns a read-only array over mapped bytes.

    Args:
        raw: uint8 [n], the mapped file.
        start: byte at which the first element lies.
        dtype: of the result.
        shape: of the result.
        strides: in bytes; None is row-major.

    Raises:
        ValueError: the array would reach outside `raw`, or its size overflows.
    """
    if 0 in shape:
        return np.empty(shape, dtype)
    view = np.ndarray(shape, dtype, buffer=raw, offset=start, strides=strides)
    # Formats that do not align their storages leave odd addresses, which few libraries accept.
    return view if view.flags.aligned else view.copy()


def read_tensors(
    raw: np.ndarray, spans: Spans, specs: Mapping[str, TensorSpec | ArraySpec], name: str
) -> dict[str, np.ndarray]:
    """Returns the arrays that `specs` describe, as views of the file or of its pickle.

    Args:
        raw: uint8 [n], the mapped file.
        spans: where the storages lie.
        specs: descriptions by label.
        name: what errors call the file.

    Raises:
        CheckpointError: a description is no plain tensor, reaches outside its storage, or all
            together unfold to far more than the file.
    """
    arrays, total = {}, 0
    for label, spec in specs.items():
        if isinstance(spec, ArraySpec):
            arrays[label] = spec.array()
            continue
        problem = _problem(spec, spans)
        if not problem:
            total += math.prod(spec.shape) * spec.dtype.itemsize
            if total > max(_MAX_UNFOLDING * len(raw), _ALWAYS_UNFOLDED):
                problem = f"{len(raw)} bytes of file unfold to tensors of {total}"
        if not problem:
            start, itemsize = spans[spec.storage.key][0], spec.dtype.itemsize
            start, strides = start + spec.offset * itemsize, [n * itemsize for n in spec.strides]
            try:
                arrays[label] = strided_view(
                    raw, start, spec.dtype, tuple(spec.shape), tuple(strides)
                )
            except (ValueError, OverflowError) as error:
                problem = f"shape {spec.shape} is impossible: {error}"
        if problem:
            raise CheckpointError(
                f"{name}: tensor {label!r}: {problem}", remedy=f"{AGAIN} {RESAVE}"
            )
    return arrays


def _problem(spec: TensorSpec, spans: Spans) -> str:
    """What is wrong with a description; empty if it is a plain tensor inside its storage."""
    storage, offset, shape, strides, dtype, metadata = spec
    if not all(map(are_sizes, ((offset,), shape, strides))):
        return "its shape or strides are not whole numbers"
    if len(shape) != len(strides) or len(shape) > 64:
        return "its shape and strides do not match"
    if any(metadata):
        return "it is stored negated or conjugated"
    size, declared = spans.get(storage.key, (0, -1))[1], storage.numel * storage.dtype.itemsize
    if size < 0:
        return f"its storage {storage.key!r} is not in the file"
    if size != declared:
        return f"its storage {storage.key!r} holds {size} bytes; expected {declared}"
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > size:
        return (
            f"shape {shape} with strides {strides} from element {offset} reaches element {last}; "
            f"expected at most the {size // dtype.itemsize} elements of its storage"
        )
    return ""


def are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, tuple | list) and all(
        type(n) is int and 0 <= n < _MAX_SIZE for n in numbers
    )
