"""An inert reader of the pickles that `torch.save` writes.

A pickle is a program for a small stack machine. This module interprets the few instructions that a
PyTorch checkpoint needs, over values that cannot do anything: `None`, numbers, strings, bytes,
lists, tuples, dicts, `Namespace`, `TensorSpec`, `Opaque`. Nothing that the file names is ever
imported or called, so reading cannot run code, whatever the bytes are. A name outside the short
tables below refuses the file.

The standard `pickle.Unpickler` with a restricted `find_class` is not enough: its C code resizes
the memo to any index that the file states (one flipped byte asks for 64 GiB) and applies `BUILD`
to live objects.
"""

from __future__ import annotations

import dataclasses
import io
import pickletools
import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from detailflow_jax.convert.errors import CheckpointError

# Some 100 bytes describe a tensor, so this leaves room for tens of thousands of them, and bounds
# what a hostile file can make us allocate.
MAX_PICKLE_BYTES = 8 << 20

_RESAVE = (
    "If you trust the file, load it in PyTorch and write `torch.save(model.state_dict(), ...)`."
)


class Namespace(dict):
    """Stands for a pickled `argparse.Namespace`: its attributes as plain items."""


class Opaque:
    """Stands for a value that no weight depends on (a scalar metric, a device); holds nothing."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """A flat run of numbers elsewhere in the file; `dtype` None means bytes of any type."""

    key: str
    dtype: np.dtype | None
    numel: int


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A tensor as the pickle describes it: a strided view of a storage, counted in elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Global(str):
    """A dotted name that the file refers to and that is in one of the tables below."""


_DTYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "float64": np.float64, "float32": np.float32, "float16": np.float16,
        "bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e5m2": ml_dtypes.float8_e5m2, "int64": np.int64, "int32": np.int32,
        "int16": np.int16, "int8": np.int8, "uint64": np.uint64, "uint32": np.uint32,
        "uint16": np.uint16, "uint8": np.uint8, "bool": np.bool_,
        "complex64": np.complex64, "complex128": np.complex128,
    }.items()
}  # fmt: skip
_STORAGE_TYPES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
_STORAGES: dict[str, np.dtype | None] = {
    f"torch.{device}{kind}Storage": _DTYPES[dtype]
    for device in ("", "cuda.")
    for kind, dtype in _STORAGE_TYPES.items()
} | {"torch.storage.UntypedStorage": None}

# Names whose value is not needed: metrics, devices, random states, scheduler counters.
_OPAQUE = frozenset(
    [f"{m}.{n}" for m in ("builtins", "__builtin__") for n in ("dict", "list", "set", "frozenset")]
    + [f"numpy.{c}.multiarray.{n}" for c in ("core", "_core") for n in ("scalar", "_reconstruct")]
    + ["numpy.dtype", "numpy.ndarray", "_codecs.encode", "torch.device", "pathlib.PosixPath"]
    + ["collections.Counter", "collections.defaultdict"]
)


def _ordered_dict(pairs: Any = ()) -> dict:
    result: dict = {}
    for key, value in pairs:
        _set_item(result, key, value)
    return result


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError("a tensor's shape or strides are not whole numbers")
    return tuple(value)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any) -> TensorSpec:
    if not (isinstance(storage, Storage) and isinstance(dtype, np.dtype)):
        raise ValueError("a tensor without a storage or a type")
    spec = TensorSpec(storage, dtype, *_sizes([offset]), _sizes(shape), _sizes(strides))
    if len(spec.shape) != len(spec.strides) or len(spec.shape) > 64:
        raise ValueError("a tensor's shape and strides do not match")
    return spec


def _tensor_v2(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
    if metadata:
        raise ValueError(f"a tensor with lazy bits {sorted(map(str, metadata))}")
    return _tensor(storage, offset, shape, strides, getattr(storage, "dtype", None))


def _tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata=None):
    if metadata:
        raise ValueError(f"a tensor with lazy bits {sorted(map(str, metadata))}")
    return _tensor(storage, offset, shape, strides, dtype)


def _parameter(data: Any, requires_grad: Any = None, hooks: Any = None) -> TensorSpec:
    if not isinstance(data, TensorSpec):
        raise ValueError("a parameter without a tensor")
    return data


# What a call in the file makes here. These functions are ours; the file only chooses among them.
_CALLS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": lambda sizes=(): _sizes(sizes),
    "collections.OrderedDict": _ordered_dict,
    "argparse.Namespace": lambda: Namespace(),
} | {name: lambda *_: Opaque() for name in _OPAQUE}


def _set_item(target: Any, key: Any, value: Any) -> None:
    if isinstance(target, Opaque):
        return
    # Only keys whose hashes a file cannot choose freely: colliding ones would take hours.
    if not (isinstance(key, str) or (type(key) is int and abs(key) < 2**63)):
        raise ValueError(f"a dict key of type {type(key).__name__}")
    if not isinstance(target, dict):
        raise ValueError(f"an item set on a {type(target).__name__}")
    target[key] = value


class _Machine:
    """The stack machine; `_ACTIONS` says which method does which instruction."""

    def __init__(self, name: str):
        self.name = name
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each MARK
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def run(self, stream: io.BytesIO) -> Any:
        for opcode, arg, _ in pickletools.genops(stream):
            action = _ACTIONS.get(opcode.name)
            if action is None:
                raise ValueError(f"instruction {opcode.name}, which torch.save does not write")
            action(self, arg)
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def mark(self, _: None) -> None:
        self.below.append(self.stack)
        self.stack = []

    def make_tuple(self, size: int) -> None:
        items = [self.stack.pop() for _ in range(size)]
        self.push(tuple(reversed(items)))

    def remember(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise ValueError(f"items appended to a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            _set_item(self.stack[-1], key, value)

    def push_global(self, name: str) -> None:
        if name in _STORAGES or name in _CALLS:
            self.push(_Global(name))
        elif name.startswith("torch.") and name[6:] in _DTYPES:
            self.push(_DTYPES[name[6:]])
        else:
            raise CheckpointError(
                f"{self.name}: refused, and nothing in it was run: it names the Python object "
                f"'{name}', and unpickling would import that and run what the file asks of it",
                expected="tensors, containers, numbers, strings and argparse.Namespace only",
                remedy=_RESAVE,
            )

    def stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push_global(f"{module}.{name}")

    def call(self, _: None) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not (isinstance(function, _Global) and function in _CALLS and isinstance(args, tuple)):
            raise ValueError(f"a call of a {type(function).__name__}")
        self.push(_CALLS[function](*args))

    def build(self, _: None) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Namespace) and isinstance(state, dict):
            target.update(state)
        # An OrderedDict of weights carries its `_metadata` this way; it is not needed.
        elif type(target) is not dict and not isinstance(target, Opaque):
            raise ValueError(f"attributes set on a {type(target).__name__}")

    def storage(self, _: None) -> None:
        match self.stack.pop():
            case ("storage", _Global() as kind, str(key), _, int(numel), *view) if (
                kind in _STORAGES and numel >= 0 and not any(view)
            ):
                storage = Storage(key, _STORAGES[kind], numel)
            case _:
                raise ValueError("a reference outside the file that is no storage")
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"storage {key!r} is described twice, differently")
        self.push(storage)


_LITERALS = (
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINBYTES "
    "SHORT_BINBYTES BINBYTES8 BINUNICODE SHORT_BINUNICODE BINUNICODE8"
)
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(_LITERALS.split(), _Machine.push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, arg: None),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_SET": lambda m, _: m.push(Opaque()),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "TUPLE1": lambda m, _: m.make_tuple(1),
    "TUPLE2": lambda m, _: m.make_tuple(2),
    "TUPLE3": lambda m, _: m.make_tuple(3),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "MARK": _Machine.mark,
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda m, _: m.extend(m.pop_mark())),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "GLOBAL": lambda m, names: m.push_global(names.replace(" ", ".", 1)),
    "STACK_GLOBAL": _Machine.stack_global,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.call),
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}


def load(stream: io.BytesIO, name: str) -> tuple[Any, dict[str, Storage]]:
    """Reads one pickle from `stream`, leaving the position just after it.

    Args:
        stream: the bytes of the pickle; what follows it is left alone.
        name: what errors call the file.

    Returns:
        The value, made of inert types only, and the storages it refers to by key.

    Raises:
        CheckpointError: a name outside the tables (nothing is run), or a damaged pickle.
    """
    machine = _Machine(name)
    try:
        return machine.run(stream), machine.storages
    except CheckpointError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise CheckpointError(
            f"{name}: its pickle is damaged or not one of torch.save, near byte {stream.tell()}: "
            f"{type(error).__name__}: {error}",
            expected="a dict of tensors written by torch.save",
            remedy="Download or copy the file again. " + _RESAVE,
        ) from error
