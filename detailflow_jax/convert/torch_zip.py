"""PyTorch files without PyTorch: the zip archives and the older stream that `torch.save` writes.

A zip archive holds `NAME/data.pkl` and one member `NAME/data/KEY` per storage, uncompressed, so
tensors are read-only views of one memory map of the file: nothing is copied, and what is not
looked at is not read. Before PyTorch 1.6 a file was five pickles followed by the storages.
"""

from __future__ import annotations

import dataclasses
import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.torch_pickle import MAX_PICKLE_BYTES, Storage, TensorSpec, load

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
_LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, of the extra field
_AGAIN = "Download or copy the file again."


def strided_view(
    raw: np.ndarray,
    start: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
) -> np.ndarray:
    """A read-only array over mapped bytes.

    Args:
        raw: uint8 [n], the mapped file.
        start: byte at which the first element lies.
        dtype, shape: of the result.
        strides: in bytes; None is row-major.

    Raises:
        ValueError: the array would reach outside `raw`, or its size overflows.
    """
    if 0 in shape:
        return np.empty(shape, dtype)
    view = np.ndarray(shape, dtype, buffer=raw, offset=start, strides=strides)
    # Formats that do not align their storages leave odd addresses, which few libraries accept.
    return view if view.flags.aligned else view.copy()


@dataclasses.dataclass(frozen=True)
class Archive:
    """An open PyTorch file.

    Attributes:
        name: what errors call the file.
        tree: the pickled value, of inert types (`torch_pickle`), tensors as `TensorSpec`.
        raw: uint8 [n], the mapped file.
        spans: first byte and number of bytes of each storage.
    """

    name: str
    tree: Any
    raw: np.ndarray
    spans: Mapping[str, tuple[int, int]]

    def tensor(self, label: str, spec: TensorSpec) -> np.ndarray:
        """The array that `spec` describes, checked against the bytes that are there.

        Raises:
            CheckpointError: the storage is absent or of another size, or the tensor reaches
                beyond it; `label` names the tensor in the message.
        """
        where, storage = f"{self.name}: tensor {label!r}", spec.storage
        if storage.key not in self.spans:
            raise CheckpointError(
                f"{where}: its storage {storage.key!r} is not in the file", remedy=_AGAIN
            )
        start, size = self.spans[storage.key]
        itemsize = spec.dtype.itemsize
        declared = storage.numel * (storage.dtype.itemsize if storage.dtype else 1)
        if declared != size:
            raise CheckpointError(
                f"{where}: its storage {storage.key!r} holds {size} bytes",
                expected=f"{declared} bytes, as the pickle says",
                remedy=_AGAIN,
            )
        last = sum((n - 1) * s for n, s in zip(spec.shape, spec.strides, strict=True))
        if 0 not in spec.shape and (spec.offset + last + 1) * itemsize > size:
            raise CheckpointError(
                f"{where}: shape {spec.shape} with strides {spec.strides} from element "
                f"{spec.offset} reaches element {spec.offset + last}",
                expected=f"at most the {size // itemsize} elements of its storage",
                remedy=_AGAIN,
            )
        try:
            strides = tuple(s * itemsize for s in spec.strides)
            return strided_view(
                self.raw, start + spec.offset * itemsize, spec.dtype, spec.shape, strides
            )
        except (ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{where}: shape {spec.shape} is impossible: {error}", remedy=_AGAIN
            ) from error


def open_torch(raw: np.ndarray, path: Path, name: str) -> Archive:
    """Opens what `torch.save` wrote, without running anything.

    Args:
        raw: uint8 [n], the mapped file.
        path: the same file.
        name: what errors call it.

    Raises:
        CheckpointError: see `torch_pickle.load`, and for a file that is cut, compressed,
            big-endian, a TorchScript archive or otherwise not of `torch.save`.
    """
    if raw[:4].tobytes() == ZIP_MAGIC:
        return _open_zip(raw, path, name)
    return _open_legacy(raw, name)


def _open_zip(raw: np.ndarray, path: Path, name: str) -> Archive:
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
    if size and raw[start : start + size].tobytes() != b"little":
        raise CheckpointError(
            f"{name}: written on a big-endian machine",
            expected="little-endian numbers",
            remedy="Load it in PyTorch on a little-endian machine and save it again.",
        )
    start, size = members[pickles[0]]
    _check_pickle_size(size, name)
    tree, _ = load(io.BytesIO(raw[start : start + size].tobytes()), name)
    prefix = f"{root}data/"
    spans = {m.removeprefix(prefix): s for m, s in members.items() if m.startswith(prefix)}
    return Archive(name, tree, raw, spans)


def _members(raw: np.ndarray, path: Path, name: str) -> dict[str, tuple[int, int]]:
    """First byte and number of bytes of every member of the archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    # zipfile raises all of these on damaged directories, besides its own error.
    except (
        zipfile.BadZipFile, struct.error, NotImplementedError, ValueError, KeyError, IndexError,
        EOFError, OverflowError, OSError, MemoryError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{name}: a damaged or cut zip archive ({len(raw)} bytes): {error}",
            expected="a whole file of torch.save",
            remedy=_AGAIN,
        ) from error
    members: dict[str, tuple[int, int]] = {}
    for info in infos:
        member = info.filename
        problem = _member_problem(raw, info) or ("it is there twice" * (member in members))
        if problem:
            raise CheckpointError(
                f"{name}: zip member {member!r}: {problem}",
                expected="plain uncompressed members, as torch.save writes",
                remedy=_AGAIN,
            )
        members[member] = (_data_start(raw, info), info.file_size)
    return members


def _data_start(raw: np.ndarray, info: zipfile.ZipInfo) -> int:
    header = raw[info.header_offset : info.header_offset + _LOCAL_HEADER.size].tobytes()
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    return info.header_offset + _LOCAL_HEADER.size + name_length + extra_length


def _member_problem(raw: np.ndarray, info: zipfile.ZipInfo) -> str:
    """Why a member is not one that torch.save writes; empty if it is."""
    if info.filename.startswith("/") or {"..", ""} & set(info.filename.split("/")):
        return "a name that leads elsewhere, or a folder"
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        return "it is compressed"
    if info.flag_bits & 1:
        return "it is encrypted"
    offset = info.header_offset
    if not 0 <= offset <= len(raw) - _LOCAL_HEADER.size:
        return "it lies outside the file"
    if raw[offset : offset + 4].tobytes() != ZIP_MAGIC:
        return "its header is damaged"
    start = _data_start(raw, info)
    if start + info.file_size > len(raw):
        return "it is cut"
    encoded = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
    written = raw[offset + _LOCAL_HEADER.size : offset + _LOCAL_HEADER.size + len(encoded)]
    if written.tobytes() != encoded:
        return "its header and the directory name it differently"
    return ""


def _check_pickle_size(size: int, name: str) -> None:
    if size > MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{name}: a pickle of {size} bytes",
            expected=f"at most {MAX_PICKLE_BYTES}, which describes tens of thousands of tensors",
            remedy="Save the state dict alone.",
        )


def _open_legacy(raw: np.ndarray, name: str) -> Archive:
    stream = io.BytesIO(raw[:MAX_PICKLE_BYTES].tobytes())
    magic, _ = load(stream, name)
    if magic != _LEGACY_MAGIC_NUMBER:
        raise CheckpointError(
            f"{name}: a pickle, but not one of torch.save",
            expected="a file of torch.save or a .safetensors file",
            remedy="Save the weights with torch.save(model.state_dict(), ...).",
        )
    load(stream, name)  # the version of the protocol
    system, _ = load(stream, name)
    tree, storages = load(stream, name)
    keys, _ = load(stream, name)
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise CheckpointError(
            f"{name}: not marked as little-endian",
            expected="little-endian numbers",
            remedy="Load it in PyTorch and save it again.",
        )
    return Archive(name, tree, raw, _legacy_spans(raw, stream.tell(), keys, storages, name))


def _legacy_spans(
    raw: np.ndarray, start: int, keys: Any, storages: Mapping[str, Storage], name: str
) -> dict[str, tuple[int, int]]:
    """The storages follow the pickles in the order of `keys`, each after its length as int64."""
    spans: dict[str, tuple[int, int]] = {}
    for key in keys if isinstance(keys, list) else []:
        storage = storages.get(key) if isinstance(key, str) else None
        numel = int.from_bytes(raw[start : start + 8].tobytes(), "little")
        if storage is None or numel != storage.numel:
            raise CheckpointError(
                f"{name}: storage {key!r} says {numel} elements",
                expected=f"{storage.numel if storage else 'a storage that a tensor uses'}",
                remedy=_AGAIN,
            )
        size = numel * (storage.dtype.itemsize if storage.dtype else 1)
        if start + 8 + size > len(raw):
            raise CheckpointError(
                f"{name}: cut at byte {len(raw)}",
                expected=f"{size} bytes of storage {key!r} from byte {start + 8}",
                remedy=_AGAIN,
            )
        spans[key] = (start + 8, size)
        start += 8 + size
    return spans
