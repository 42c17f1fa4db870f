"""PyTorch files without PyTorch: zip archives and the older streams that `torch.save` writes.

A zip archive holds `NAME/data.pkl` and one uncompressed member `NAME/data/KEY` per storage, so
tensors are read-only views of one memory map of the file. Before PyTorch 1.6 a file was five
pickles followed by the storages.

A pickle is a program. Here it runs on the standard library's unpickler, but every name in it means
something inert: a name of the table `_KNOWN` describes a tensor or a plain value, any other is an
`Inert` placeholder. Nothing that a file names is imported or called.

The base is the Python version of the unpickler. The version in C hashes every dict key itself, and
a file of some bytes can make a tuple whose hash takes for ever or overflows the C stack. It also
allocates memory for any memo index that a file states.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from detailflow_jax.convert.errors import CheckpointError

Spans = dict[str, tuple[int, int]]  # first byte and number of bytes of each storage, by key

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
# About 100 bytes describe a tensor, so this leaves room for tens of thousands of them and for the
# history of a run, and bounds what a hostile file can make us allocate.
MAX_PICKLE_BYTES = 32 << 20
_LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
# Tied or expanded weights may be in a file once and be read often. A file whose tensors are larger
# than this many times its size, and than this many bytes, is made to fill the memory.
_MAX_UNFOLDING, _ALWAYS_UNFOLDED = 4, 1 << 28
_MOST_LISTED = 4096  # Longer lists are no lists of modules or parameters.
_MAX_SIZE = 1 << 128  # Longer integers cannot be printed in a message.
_AGAIN = "Download or copy the file again."
_RESAVE = (
    "If you trust the file, load it in PyTorch and write `torch.save(model.state_dict(), ...)`."
)


class Inert:
    """Stands for a Python object or its class, by its dotted `name`.

    Attributes:
        name: what the file calls the class.
        parts: attributes and items that the file gives the object.
    """

    __slots__ = ("name", "parts")

    def __init__(self, name: str):
        self.name, self.parts = name, {}

    def __call__(self, *_: Any) -> Inert:
        return Inert(self.name)

    def extend(self, _: Any) -> None:
        """Items of a list or set; they are dropped."""

    append = extend


def items_of(value: Any) -> list[tuple[Any, Any]] | None:
    """Returns what a dict, an object or a list of these or of tensors holds, else None.

    A module holds its parameters, buffers and modules.
    """
    if isinstance(value, list) or type(value) is tuple:
        held = any(isinstance(x, dict | Inert | TensorSpec) for x in value[:_MOST_LISTED])
        few = len(value) <= _MOST_LISTED
        return [(str(i), x) for i, x in enumerate(value)] if held and few else None
    parts = value.parts if isinstance(value, Inert) else value
    if not isinstance(parts, dict) or not any(isinstance(key, str) for key in parts):
        return None
    if "_parameters" in parts:
        stores = [parts.get(name) for name in ("_parameters", "_buffers", "_modules")]
        return [item for store in stores for item in items_of(store) or ()]
    if isinstance(parts.get("_content"), dict):  # of OmegaConf
        parts = parts["_content"]
    plain = {
        k: x.parts["_val"] for k, x in parts.items() if isinstance(x, Inert) and "_val" in x.parts
    }
    return list((parts | plain).items())


class Namespace(dict):
    """The attributes of a pickled `argparse.Namespace` as items."""


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


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> TensorSpec:
    """The versions of `_rebuild_tensor`; `more`: gradient, hooks, dtype where given, metadata."""
    dtype, metadata = getattr(storage, "dtype", None), more[2:]
    if metadata and isinstance(metadata[0], np.dtype | Inert):
        dtype, metadata = metadata[0], metadata[1:]
    return TensorSpec(storage, offset, shape, strides, dtype, metadata)


def _set_items(target: Any, pairs: Any) -> None:
    """Sets items of a dict; a key whose hash the file could choose is replaced by a placeholder."""
    if isinstance(target, Inert):
        target = target.parts
    for key, value in pairs:
        plain = type(key) in (str, Inert) or (type(key) is int and abs(key) < 2**63)
        dict.__setitem__(target, key if plain else Inert(type(key).__name__), value)


def _ordered_dict(pairs: Any = ()) -> dict:
    result: dict = {}
    _set_items(result, pairs)
    return result


def _first(value: Any = None, *_: Any) -> Any:
    return value


def _numpy_dtype(code: Any = "", *_: Any) -> Any:
    plain = isinstance(code, str) and re.fullmatch(r"[fiu][1248]|b1", code)
    return np.dtype(code) if plain and code != "f1" else Inert("numpy.dtype")


def _numpy_scalar(dtype: Any, data: Any = None, *_: Any) -> Any:
    if isinstance(dtype, np.dtype) and isinstance(data, bytes) and len(data) == dtype.itemsize:
        return np.frombuffer(data, dtype)[0].item()
    return Inert("numpy.scalar")


def _encoded(text: Any, *_: Any) -> Any:
    """Bytes, which protocol 2 writes as text."""
    return text.encode("latin-1", "replace") if isinstance(text, str) else Inert("bytes")


_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64",
        "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool", "complex64",
        "complex128",
    )
}  # fmt: skip
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
_KNOWN: dict[str, Any] = {
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch.{on}{k}Storage": _DTYPES[v] for on in ("", "cuda.") for k, v in _STORAGES.items()},
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
    **{f"torch._utils._rebuild_tensor{version}": _tensor for version in ("", "_v2", "_v3")},
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, args, *_: function(*args),
    "torch.Size": _first,
    "collections.OrderedDict": _ordered_dict,
    "argparse.Namespace": lambda *_: Namespace(),
    "types.SimpleNamespace": lambda *_: Namespace(),
    # Numbers that remember how they stood in a YAML file; the published training scripts keep
    # their arguments in these.
    "ruamel.yaml.scalarbool.ScalarBoolean": lambda value=False, *_: value != 0,
    "ruamel.yaml.comments.CommentedSeq": lambda *_: [],
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "_codecs.encode": _encoded,
}
_RUAMEL = ("ruamel.yaml.scalarfloat.", "ruamel.yaml.scalarint.", "ruamel.yaml.scalarstring.")
# What torch.save never writes: text instructions, calls other than REDUCE, references to the
# process, and what would allocate or hash as the file likes.
_UNUSED = (
    pickle.INT, pickle.LONG, pickle.FLOAT, pickle.STRING, pickle.UNICODE, pickle.GET, pickle.PUT,
    pickle.DICT, pickle.INST, pickle.OBJ, pickle.PERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4,
    pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
)  # fmt: skip


_Base: Any = pickle._Unpickler  # pyright: ignore


class _Unpickler(_Base):
    """Makes plain containers, numbers, strings, `TensorSpec`, `Namespace` and `Inert` only."""

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="latin-1")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        dotted = f"{module}.{name}"
        if dotted.startswith(_RUAMEL):
            return _first
        return _KNOWN[dotted] if dotted in _KNOWN else Inert(dotted)

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), _, int(numel), *view) if _are_sizes(
                [numel]
            ) and not any(view):
                return self.storages.setdefault(key, Storage(key, dtype, numel))
            case ("module", Inert() as module, *_):  # Old files hold the source beside it.
                return module
        return Inert("a storage")

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Namespace | Inert):
            # Objects with slots have a second dict.
            for attributes in state if isinstance(state, tuple) else (state,):
                if isinstance(attributes, dict):
                    _set_items(target, attributes.items())

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [(key, value)])

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments
        self.load_reduce()

    def load_unused(self) -> None:
        raise ValueError("an instruction that torch.save does not write")

    dispatch = _Base.dispatch | {
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        # An object is made by calling what stands for its class.
        pickle.NEWOBJ[0]: _Base.load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        # Its own method allocates any length that the file states.
        pickle.BYTEARRAY8[0]: _Base.load_binbytes8,
        # Sets are lists here, so that their items are not hashed.
        pickle.EMPTY_SET[0]: _Base.load_empty_list,
        pickle.ADDITEMS[0]: _Base.load_appends,
        pickle.FROZENSET[0]: _Base.load_list,
        **dict.fromkeys((code[0] for code in _UNUSED), load_unused),
    }


def _load(stream: io.BytesIO, name: str) -> tuple[Any, dict[str, Storage]]:
    """One pickle, leaving the position just after it, and the storages it refers to by key."""
    unpickler = _Unpickler(stream)
    try:
        return unpickler.load(), unpickler.storages
    except (
        ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, EOFError,
        RecursionError, struct.error, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{name}: its pickle is damaged or not one of torch.save, near byte {stream.tell()}: "
            f"{type(error).__name__}: {error}",
            expected="a dict of tensors written by torch.save",
            remedy=f"{_AGAIN} {_RESAVE}",
        ) from error


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
    raw: np.ndarray, spans: Spans, specs: Mapping[str, TensorSpec], name: str
) -> dict[str, np.ndarray]:
    """Returns the arrays that `specs` describe, as views of the file.

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
                f"{name}: tensor {label!r}: {problem}", remedy=f"{_AGAIN} {_RESAVE}"
            )
    return arrays


def _problem(spec: TensorSpec, spans: Spans) -> str:
    """What is wrong with a description; empty if it is a plain tensor inside its storage."""
    storage, offset, shape, strides, dtype, metadata = spec
    if not all(map(_are_sizes, ((offset,), shape, strides))):
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


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, tuple | list) and all(
        type(n) is int and 0 <= n < _MAX_SIZE for n in numbers
    )


def open_torch(raw: np.ndarray, path: Path, name: str) -> tuple[Any, Spans]:
    """Returns what `torch.save` wrote, with tensors as `TensorSpec`, and where storages are.

    Args:
        raw: uint8 [n], the mapped file.
        path: the same file.
        name: what errors call it.

    Raises:
        CheckpointError: the file is cut, damaged, compressed, big-endian, a TorchScript archive or
            otherwise not of `torch.save`.
    """
    is_zip = raw[:4].tobytes() == ZIP_MAGIC
    return _open_zip(raw, path, name) if is_zip else _open_legacy(raw, name)


def _open_zip(raw: np.ndarray, path: Path, name: str) -> tuple[Any, Spans]:
    members = _members(raw, path, name)
    pickles = [m for m in members if m.count("/") == 1 and m.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{name}: a zip archive with {len(pickles)} members NAME/data.pkl "
            f"({', '.join(list(members)[:5])})",
            expected="one, as torch.save writes",
            remedy="Name a file that torch.save wrote.",
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise CheckpointError(
            f"{name}: a TorchScript archive, which holds a program",
            expected="a state dict",
            remedy="Write `torch.save(torch.jit.load(file).state_dict(), ...)` in PyTorch.",
        )
    start, size = members.get(f"{root}byteorder", (0, 0))
    _check_order(not size or raw[start : start + size].tobytes() == b"little", name)
    start, size = members[pickles[0]]
    if size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{name}: a pickle of {size} bytes",
            expected=f"at most {MAX_PICKLE_BYTES}, which describes tens of thousands of tensors",
            remedy="Save the state dict alone.",
        )
    tree, _ = _load(io.BytesIO(raw[start : start + size].tobytes()), name)
    prefix = f"{root}data/"
    spans = {m.removeprefix(prefix): s for m, s in members.items() if m.startswith(prefix)}
    return tree, spans


def _members(raw: np.ndarray, path: Path, name: str) -> Spans:
    """First byte and number of bytes of every member of the archive."""
    members: Spans = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                archive.open(info).close()  # compares the member's own header with the directory
                at, member = info.header_offset, info.filename
                start = at + 30 + sum(struct.unpack("<HH", raw[at + 26 : at + 30].tobytes()))
                if info.is_dir():
                    continue
                if member.startswith("/") or {"..", ""} & set(member.split("/")):
                    problem = "a name that leads elsewhere"
                elif (
                    info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size
                ):
                    problem = "it is compressed"
                elif start + info.file_size > len(raw):
                    problem = "it is cut"
                else:
                    problem = "it is there twice" if member in members else ""
                if problem:
                    raise ValueError(f"member {member!r}: {problem}")
                members[member] = (start, info.file_size)
    # zipfile raises all of these on damaged archives, besides its own error.
    except (
        zipfile.BadZipFile, struct.error, RuntimeError, ValueError, KeyError, IndexError, EOFError,
        OverflowError, OSError, MemoryError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{name}: a damaged or cut zip archive, or not one of torch.save ({len(raw)} bytes): "
            f"{error}",
            expected="a whole file of plain uncompressed members, as torch.save writes",
            remedy=_AGAIN,
        ) from error
    return members


def _check_order(little: bool, name: str) -> None:
    if not little:
        raise CheckpointError(
            f"{name}: written on a big-endian machine, or not marked",
            expected="little-endian numbers",
            remedy="Load it in PyTorch on a little-endian machine and save it again.",
        )


def _open_legacy(raw: np.ndarray, name: str) -> tuple[Any, Spans]:
    stream = io.BytesIO(raw[:MAX_PICKLE_BYTES].tobytes())
    magic, _ = _load(stream, name)
    if magic != _LEGACY_MAGIC_NUMBER:
        raise CheckpointError(
            f"{name}: a pickle, but not one of torch.save",
            expected="a file of torch.save or a .safetensors file",
            remedy="Save the weights with torch.save(model.state_dict(), ...).",
        )
    _load(stream, name)  # the version of the protocol
    system, _ = _load(stream, name)
    tree, storages = _load(stream, name)
    keys, _ = _load(stream, name)
    _check_order(isinstance(system, dict) and system.get("little_endian") is True, name)
    # The storages follow in the order of `keys`, each after its length as int64.
    start, spans = stream.tell(), {}
    for key in keys if isinstance(keys, list) else []:
        storage = storages.get(key) if isinstance(key, str) else None
        numel = int.from_bytes(raw[start : start + 8].tobytes(), "little")
        size = numel * storage.dtype.itemsize if storage else 0
        if storage is None or numel != storage.numel or start + 8 + size > len(raw):
            raise CheckpointError(
                f"{name}: damaged, or cut at byte {len(raw)}: a storage at byte {start} says "
                f"{numel} elements",
                expected=f"{storage.numel} and their bytes" if storage else "one that is described",
                remedy=_AGAIN,
            )
        spans[key] = (start + 8, size)
        start += 8 + size
    return tree, spans
