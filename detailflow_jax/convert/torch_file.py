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

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from detailflow_jax.convert import foreign
from detailflow_jax.convert.errors import CheckpointError, some
from detailflow_jax.convert.pickled import (
    AGAIN,
    NUMPY,
    RESAVE,
    ArraySpec,
    NumpyType,
    Storage,
    TensorSpec,
    are_sizes,
    tensor_spec,
)

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
# About 100 bytes describe a tensor, so this leaves room for tens of thousands of them and for the
# history of a run, and bounds what a hostile file can make us allocate. Long strings and arrays of
# NumPy do not count: they allocate no more than they take in the file.
MAX_PICKLE_BYTES = 32 << 20
_LONG = 1 << 12
_LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_MOST_LISTED = 4096  # Longer lists are no lists of modules or parameters.


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
    """Returns what a dict, an object, or a list of these or of tensors holds, else None.

    A module holds its parameters, buffers and modules. Lists may be in lists. A dict whose keys are
    whole numbers is a list, a list of names and tensors is a dict.
    """
    parts = value.parts if isinstance(value, Inert) else value
    if isinstance(value, list | tuple) and len(value) <= _MOST_LISTED:
        if value and all(map(_is_named, value)):
            return [(name, part) for name, part in value]
        parts = dict(enumerate(value))
    if not isinstance(parts, dict):
        return None
    if len(parts) <= _MOST_LISTED and all(type(key) is int for key in parts):
        order = sorted(parts) if {*parts} == {*range(len(parts))} else parts  # else of addresses
        held = any(map(_is_held, parts.values()))
        return [(str(i), parts[i]) for i in order] if held else None
    if not any(isinstance(key, str | float) for key in parts):
        return None
    if "_parameters" in parts:
        stores = [parts.get(name) for name in ("_parameters", "_buffers", "_modules")]
        return [item for store in stores for item in items_of(store) or ()]
    for inside in ("_content", "_fields"):  # of OmegaConf, of ml_collections
        if isinstance(parts.get(inside), dict):
            parts = parts[inside]
    plain = {
        k: x.parts["_val"] for k, x in parts.items() if isinstance(x, Inert) and "_val" in x.parts
    }
    return list((parts | plain).items())


def _is_held(value: Any, depth: int = 2) -> bool:
    if isinstance(value, list | tuple):
        return depth > 0 and any(_is_held(x, depth - 1) for x in value[:2])
    return isinstance(value, dict | Inert | TensorSpec | ArraySpec)


def _is_named(value: Any) -> bool:
    """Whether this is one of `list(module.named_parameters())`."""
    match value:
        case (str(), TensorSpec() | ArraySpec()):
            return True
    return False


def _set_items(target: Any, pairs: Any) -> None:
    """Sets items of a dict; a key whose hash the file could choose is replaced by a placeholder."""
    target = target.parts if isinstance(target, Inert) else target
    for key, value in pairs:
        plain = type(key) in (str, float, Inert) or (type(key) is int and abs(key) < 2**63)
        dict.__setitem__(target, key if plain else Inert(type(key).__name__), value)


def _ordered_dict(pairs: Any = ()) -> dict:
    result: dict = {}
    _set_items(result, pairs)
    return result


def _first(value: Any = None, *_: Any) -> Any:
    return value


def _encoded(text: Any, *_: Any) -> Any:
    """Bytes, which protocol 2 writes as text."""
    return text.encode("latin-1", "replace") if isinstance(text, str) else Inert("bytes")


def _of_type(function: Any, _: Any, args: Any, state: Any = None, *__: Any) -> Any:
    """A tensor of some class; of a DTensor the part of its process, if that is all of it."""
    local = state.get("_local_tensor") if isinstance(state, dict) else None
    # Its arguments are a class, a type and the whole shape.
    if isinstance(local, TensorSpec) and len(args) > 2 and local.shape == args[2]:
        return local
    return function(*args)


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
    **{f"torch._utils._rebuild_tensor{version}": tensor_spec for version in ("", "_v2", "_v3")},
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    # What was saved on a TPU or the like lies here as a tensor or array of the host.
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._utils._rebuild_xla_tensor": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.Size": _first,
    "collections.OrderedDict": _ordered_dict,
    # Numbers that remember how they stood in a YAML file; the published training scripts keep
    # their arguments in these.
    "ruamel.yaml.scalarbool.ScalarBoolean": lambda value=False, *_: value != 0,
    "ruamel.yaml.comments.CommentedSeq": lambda *_: [],
    **NUMPY,
    "_codecs.encode": _encoded,
    "__builtin__.bytes": lambda *args: Inert("bytes") if args else b"",  # no bytes, in protocol 2
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


class _Stream:
    """The bytes of a pickle; raises ValueError if it has too many instructions."""

    def __init__(self, raw: np.ndarray):
        self._raw, self._at, self._short = memoryview(raw), 0, 0

    def read(self, size: int) -> bytes:
        data = bytes(self._raw[self._at : self._at + size])
        self._at += len(data)
        self._short += len(data) if len(data) < _LONG else 0
        if self._short > MAX_PICKLE_BYTES:
            raise ValueError(
                f"more than {MAX_PICKLE_BYTES} bytes of instructions, which is enough for tens of "
                "thousands of tensors"
            )
        return data

    def readline(self) -> bytes:
        end = bytes(self._raw[self._at : self._at + _LONG]).find(b"\n")
        return self.read(end + 1 if end >= 0 else _LONG - 1)

    def tell(self) -> int:
        return self._at


class _Unpickler(_Base):
    """Makes plain containers, numbers, strings, `Inert` and descriptions only."""

    def __init__(self, stream: _Stream):
        super().__init__(stream, encoding="latin-1")
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        dotted = f"{module}.{name}"
        if dotted.startswith(_RUAMEL):
            return _first
        return _KNOWN[dotted] if dotted in _KNOWN else Inert(dotted)

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", np.dtype() as dtype, str(key), _, int(numel), *view) if are_sizes(
                [numel]
            ) and not any(view):
                return self.storages.setdefault(key, Storage(key, dtype, numel))
            case ("module", Inert() as module, *_):  # Old files hold the source beside it.
                return module
        return Inert("a storage")

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, ArraySpec | NumpyType):
            target.build(state)
        elif isinstance(target, Inert):
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

    def load_frame(self) -> None:
        self.read(8)  # Its length; what is in it is read without it, and so counted.

    def load_unused(self) -> None:
        raise ValueError("an instruction that torch.save does not write")

    dispatch = _Base.dispatch | {
        pickle.BUILD[0]: load_build,
        pickle.FRAME[0]: load_frame,
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


def _load(stream: _Stream, name: str) -> tuple[Any, dict[str, Storage]]:
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
            remedy=f"{AGAIN} {RESAVE}",
        ) from error


def open_torch(raw: np.ndarray, path: Path, name: str) -> Any:
    """Returns what `torch.save` wrote, with `TensorSpec` and `ArraySpec` for tensors and arrays.

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


def _open_zip(raw: np.ndarray, path: Path, name: str) -> Any:
    members, checksums = _members(raw, path, name)
    pickles = [m for m in members if m.count("/") == 1 and m.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{name}: a zip archive with {len(pickles)} members NAME/data.pkl ({some(members)})",
            expected="one, as torch.save writes",
            remedy="Unpack it, or name a file that torch.save wrote.",
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise CheckpointError(
            f"{name}: a TorchScript archive, which holds a program",
            expected="a state dict",
            remedy="Write `torch.save(torch.jit.load(file).state_dict(), ...)` in PyTorch.",
        )
    _check_order(bytes(members.get(f"{root}byteorder", b"")) in (b"", b"little"), name)
    tree, storages = _load(_Stream(members[pickles[0]]), name)
    for key, storage in storages.items():
        storage.data = members.get(f"{root}data/{key}")
        storage.checksum = checksums.get(f"{root}data/{key}", 0)
    return tree


def _members(
    raw: np.ndarray, path: Path, name: str
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The bytes of every member of the archive, and the checksums of those that are numbers.

    The bytes of others are compared with theirs. PyTorch can leave checksums out; they are 0 then.
    """
    members: dict[str, np.ndarray] = {}
    checksums: dict[str, int] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                archive.open(info).close()  # compares the member's own header with the directory
                if info.is_dir():
                    continue
                at, member, size = info.header_offset, info.filename, info.file_size
                start = at + 30 + sum(struct.unpack("<HH", raw[at + 26 : at + 30].tobytes()))
                for problem, found in {
                    "a name that leads elsewhere": {"..", ""} & set(member.split("/")),
                    "it is compressed; unpack the archive, or save again": info.compress_type
                    or info.compress_size != size,
                    "it is cut": start + size > len(raw),
                    "it is there twice": member in members,
                }.items():
                    if found:
                        raise ValueError(f"member {member!r}: {problem}")
                members[member] = raw[start : start + size]
                if "/data/" in member:  # Read, and compared, only where they are used.
                    checksums[member] = info.CRC
                elif info.CRC and zlib.crc32(members[member]) != info.CRC:
                    raise ValueError(f"member {member!r}: its bytes have another checksum")
    # zipfile raises all of these on damaged archives, besides its own error.
    except (
        zipfile.BadZipFile, struct.error, RuntimeError, ValueError, KeyError, IndexError, EOFError,
        OverflowError, OSError, MemoryError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{name}: a damaged or cut zip archive, or not one of torch.save ({len(raw)} bytes): "
            f"{error}",
            expected="a whole file of plain uncompressed members, as torch.save writes",
            remedy=AGAIN,
        ) from error
    return members, checksums


def _check_order(little: bool, name: str) -> None:
    if not little:
        raise CheckpointError(
            f"{name}: written on a big-endian machine, or not marked",
            expected="little-endian numbers",
            remedy="Load it in PyTorch on a little-endian machine and save it again.",
        )


def _open_legacy(raw: np.ndarray, name: str) -> Any:
    stream = _Stream(raw)
    magic, _ = _load(stream, name)
    if magic != _LEGACY_MAGIC_NUMBER:
        raise CheckpointError(
            f"{name}: {foreign.NO_TORCH}",
            expected="a file of torch.save or a .safetensors file",
            remedy=foreign.recipe(foreign.RESAVE, name),
        )
    _load(stream, name)  # the version of the protocol
    system, _ = _load(stream, name)
    tree, storages = _load(stream, name)
    keys, _ = _load(stream, name)
    _check_order(isinstance(system, dict) and system.get("little_endian") is True, name)
    # The storages follow in the order of `keys`, each after its length as int64.
    start = stream.tell()
    for key in keys if isinstance(keys, list) else []:
        storage = storages.get(key) if isinstance(key, str) else None
        numel = int.from_bytes(raw[start : start + 8].tobytes(), "little")
        end = start + 8 + (numel * storage.dtype.itemsize if storage else 0)
        if storage is None or numel != storage.numel or end > len(raw):
            raise CheckpointError(
                f"{name}: damaged, or cut at byte {len(raw)}: a storage at byte {start} says "
                f"{numel} elements",
                expected=f"{storage.numel} and their bytes" if storage else "one that is described",
                remedy=AGAIN,
            )
        storage.data, start = raw[start + 8 : end], end
    return tree
