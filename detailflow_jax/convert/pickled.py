"""Tensors of PyTorch and arrays of NumPy: what a pickle says of them, and the arrays it describes.

The functions and classes here stand for those that a pickle names, see `torch_file`; none of them
is PyTorch's or NumPy's. What they are given is unchecked.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from detailflow_jax.convert.errors import CheckpointError

# Larger numbers may be made to take for ever, or cannot be printed in a message.
_MAX_ELEMENTS, _MAX_SIZE = 1 << 48, 1 << 128
# Tied or expanded weights may be in a file once and be read often. A file whose tensors are larger
# than this many times its size, and than this many bytes, is made to fill the memory.
_MAX_UNFOLDING, _ALWAYS_UNFOLDED = 4, 1 << 28
_PLAIN = re.compile(r"[iu][1248]|f[248]|c8|c16|b1")
AGAIN = "Download or copy the file again."
RESAVE = (
    "If you trust the file, load it in PyTorch and write `torch.save(model.state_dict(), ...)`."
)


@dataclasses.dataclass(slots=True)
class Storage:
    """`numel` numbers elsewhere in the file: their bytes, or None if the file lacks them.

    `checksum` is what the file says to be their CRC-32; 0: it says nothing.
    """

    key: str
    dtype: np.dtype
    numel: int
    data: np.ndarray | None = None
    checksum: int = 0


@dataclasses.dataclass(slots=True)
class TensorSpec:
    """A tensor: a strided view of a storage, counted in elements."""

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

    def check(self) -> None:
        """Raises ValueError unless this is a plain tensor inside its storage."""
        storage, offset, shape, strides = self.storage, self.offset, self.shape, self.strides
        if not all(map(are_sizes, ((offset,), shape, strides))):
            raise ValueError("its shape or strides are not whole numbers")
        if len(shape) != len(strides) or len(shape) > 64:
            raise ValueError("its shape and strides do not match")
        if any(self.metadata):
            raise ValueError("it is stored negated or conjugated")
        if storage.data is None:
            raise ValueError(f"its storage {storage.key!r} is not in the file")
        size, declared = storage.data.size, storage.numel * storage.dtype.itemsize
        if size != declared:
            raise ValueError(f"its storage {storage.key!r} holds {size} bytes; expected {declared}")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        if 0 not in shape and (last + 1) * self.dtype.itemsize > size:
            raise ValueError(
                f"shape {shape} with strides {strides} from element {offset} reaches element "
                f"{last}; expected at most the {size // self.dtype.itemsize} elements of its "
                "storage"
            )
        if storage.checksum and zlib.crc32(storage.data) != storage.checksum:
            raise ValueError(f"the bytes of its storage {storage.key!r} have another checksum")
        storage.checksum = 0  # Tensors may share it.

    def array(self) -> np.ndarray:
        """Returns a read-only view of the file; raises ValueError if NumPy has no such array."""
        itemsize = self.dtype.itemsize
        strides = tuple(n * itemsize for n in self.strides)
        try:
            return strided_view(
                self.storage.data, self.offset * itemsize, self.dtype, tuple(self.shape), strides
            )
        except (ValueError, OverflowError) as error:
            raise ValueError(f"shape {self.shape} is impossible: {error}") from error


def tensor_spec(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> TensorSpec:
    """The versions of `_rebuild_tensor`; `more`: gradient, hooks, dtype where given, metadata."""
    dtype, metadata = getattr(storage, "dtype", None), more[2:]
    if metadata and (isinstance(metadata[0], np.dtype) or hasattr(metadata[0], "parts")):
        dtype, metadata = metadata[0], metadata[1:]
    return TensorSpec(storage, offset, shape, strides, dtype, metadata)


def are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, tuple | list) and all(
        type(n) is int and 0 <= n < _MAX_SIZE for n in numbers
    )


class NumpyType:
    """A type of NumPy's; `dtype` is None if it is not one of plain numbers."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any = "", *_: Any):
        self.dtype: np.dtype | None = None
        if isinstance(code, str) and _PLAIN.fullmatch(code):
            self.dtype = np.dtype(code).newbyteorder("<")
        elif getattr(code, "name", "") == "ml_dtypes.bfloat16":
            self.dtype = np.dtype(ml_dtypes.bfloat16)

    def build(self, state: Any) -> None:
        """Takes the order of the bytes, second in the state that a pickle gives a type."""
        if self.dtype is not None and isinstance(state, tuple) and state[1:2] == (">",):
            self.dtype = self.dtype.newbyteorder(">")


class ArraySpec:
    """An array of NumPy's, whose numbers are in the pickle."""

    __slots__ = ("data", "fortran", "shape", "type")

    def __init__(self, data: Any = None, kind: Any = None, shape: Any = None, order: Any = "C"):
        self.data, self.type, self.shape, self.fortran = data, kind, shape, order == "F"

    def build(self, state: Any) -> None:
        """Takes the state that a pickle gives an array: version, shape, type, order, data."""
        if isinstance(state, tuple) and len(state) == 5:
            _, self.shape, self.type, self.fortran, self.data = state

    @property
    def known(self) -> bool:
        """Whether it holds plain numbers, as many as its shape says."""
        dtype = getattr(self.type, "dtype", None)
        return (
            isinstance(dtype, np.dtype)
            and isinstance(self.data, bytes)
            and isinstance(self.shape, tuple)
            and len(self.shape) <= 64
            and all(type(n) is int and 0 <= n < _MAX_ELEMENTS for n in self.shape)
            and math.prod(self.shape) * dtype.itemsize == len(self.data)
        )

    def array(self) -> np.ndarray:
        """Returns the array, read-only and in the byte order of this machine, if it is `known`."""
        flat = np.frombuffer(self.data, self.type.dtype)
        array = flat.reshape(self.shape, order="F" if self.fortran is True else "C")
        return array.astype(array.dtype.newbyteorder("="), copy=False)


def _scalar(kind: Any = None, data: Any = None, *_: Any) -> Any:
    """The number, or a description of nothing if it is not a plain one."""
    dtype = getattr(kind, "dtype", None)
    if isinstance(dtype, np.dtype) and isinstance(data, bytes) and len(data) == dtype.itemsize:
        return np.frombuffer(data, dtype)[0].item()
    return ArraySpec()


NUMPY: dict[str, Any] = {"numpy.dtype": NumpyType}
"""Name in a pickle -> what stands for it."""
for _core in ("numpy.core", "numpy._core"):
    NUMPY[f"{_core}.multiarray.scalar"] = _scalar
    NUMPY[f"{_core}.multiarray._reconstruct"] = lambda *_: ArraySpec()
    NUMPY[f"{_core}.numeric._frombuffer"] = ArraySpec


def strided_view(
    raw: np.ndarray,
    start: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Returns a read-only array over mapped bytes.

    Args:
        raw: uint8 [n], bytes of the mapped file.
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
    name: str, size: int, specs: Mapping[str, np.ndarray | TensorSpec | ArraySpec]
) -> dict[str, np.ndarray]:
    """Returns the arrays that `specs` describe, as views of the file or of its pickle.

    Args:
        name: of the file, for errors.
        size: of the file in bytes.
        specs: `known` descriptions, or arrays, by label.

    Raises:
        CheckpointError: a description is no plain tensor, reaches outside its storage, or all
            together unfold to far more than the file.
    """
    arrays, total = {}, 0
    for label, spec in specs.items():
        try:
            if isinstance(spec, TensorSpec):
                spec.check()
                total += math.prod(spec.shape) * spec.dtype.itemsize
                if total > max(_MAX_UNFOLDING * size, _ALWAYS_UNFOLDED):
                    raise ValueError(f"{size} bytes of file unfold to tensors of {total}")
            arrays[label] = spec if isinstance(spec, np.ndarray) else spec.array()
        except ValueError as error:
            raise CheckpointError(
                f"{name}: tensor {label!r}: {error}", remedy=f"{AGAIN} {RESAVE}"
            ) from error
    return arrays
