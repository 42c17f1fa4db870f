"""What NumPy writes into pickles: arrays, types and scalars, described but not made.

The functions here stand for those that a pickle names, see `torch_file`; none of them is NumPy's.
"""

from __future__ import annotations

import math
import re
from typing import Any

import ml_dtypes
import numpy as np

_MOST = 1 << 48  # Larger integers may be made to take for ever.
_PLAIN = re.compile(r"[fiu][1248]|c8|c16|b1")


class NumpyType:
    """A type of numbers.

    Attributes:
        dtype: the type, None if it is not one of plain numbers.
    """

    __slots__ = ("dtype",)

    def __init__(self, code: Any = "", *_: Any):
        self.dtype: np.dtype | None = None
        if isinstance(code, str) and _PLAIN.fullmatch(code) and code != "f1":
            self.dtype = np.dtype(code).newbyteorder("<")
        elif getattr(code, "name", "") == "ml_dtypes.bfloat16":
            self.dtype = np.dtype(ml_dtypes.bfloat16)

    def build(self, state: Any) -> None:
        """Takes the order of the bytes, second in the state that a pickle gives a type."""
        if self.dtype is not None and isinstance(state, tuple) and state[1:2] == (">",):
            self.dtype = self.dtype.newbyteorder(">")


class ArraySpec:
    """An array as the pickle describes it, unchecked; its numbers are in the pickle."""

    __slots__ = ("data", "fortran", "shape", "type")

    def __init__(self, data: Any = None, kind: Any = None, shape: Any = None, fortran: Any = False):
        self.data, self.type, self.shape, self.fortran = data, kind, shape, fortran

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
            and all(type(n) is int and 0 <= n < _MOST for n in self.shape)
            and math.prod(self.shape) * dtype.itemsize == len(self.data)
        )

    def array(self) -> np.ndarray:
        """The array, read-only and in the byte order of this machine, if it is `known`."""
        flat = np.frombuffer(self.data, self.type.dtype)
        array = flat.reshape(self.shape, order="F" if self.fortran is True else "C")
        return array.astype(array.dtype.newbyteorder("="), copy=False)


def _scalar(kind: Any = None, data: Any = None, *_: Any) -> Any:
    """The number, or a description of nothing if it is not a plain one."""
    dtype = getattr(kind, "dtype", None)
    if isinstance(dtype, np.dtype) and isinstance(data, bytes) and len(data) == dtype.itemsize:
        return np.frombuffer(data, dtype)[0].item()
    return ArraySpec()


def _from_buffer(
    data: Any = None, kind: Any = None, shape: Any = None, order: Any = "C"
) -> ArraySpec:
    """What protocol 5 calls, with the state as arguments."""
    return ArraySpec(data, kind, shape, order == "F")


KNOWN: dict[str, Any] = {
    "numpy.dtype": NumpyType,
    **{
        f"numpy.{core}.{name}": function
        for core in ("core", "_core")
        for name, function in {
            "multiarray.scalar": _scalar,
            "multiarray._reconstruct": lambda *_: ArraySpec(),
            "numeric._frombuffer": _from_buffer,
        }.items()
    },
}
"""Name in a pickle -> what stands for it."""
