"""Reads published weights: `.pt`, `.pth`, `.ckpt`, `.bin`, `.safetensors`, shards and folders.

Reading never runs code from a file and needs no PyTorch; see `torch_file`. The format of a file is
recognised by its content, not by its name. Which of its tensors are the weights is decided in
`select`.
"""

import contextlib
import dataclasses
import json
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from detailflow_jax.convert import foreign, select
from detailflow_jax.convert.errors import CheckpointError, some
from detailflow_jax.convert.folders import Folder, open_folder
from detailflow_jax.convert.locate import find, read_mapping
from detailflow_jax.convert.pickled import read_tensors, strided_view
from detailflow_jax.convert.select import Preference, Recognise, Weights
from detailflow_jax.convert.torch_file import PICKLE_MAGIC, ZIP_MAGIC, items_of, open_torch
from detailflow_jax.runtime.yaml_text import parse_yaml

# Where a training checkpoint keeps its settings, the first one present being read.
_ARGUMENTS = ("args", "hyper_parameters", "hparams", "config", "cfg", "opt", "model_args")
_SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32,
    "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_, "C64": np.complex64,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Weights as they were published.

    Attributes:
        tensors: arrays by published name, without names of wrappers such as `module.`. They are
            read-only views of a memory map: a tensor that is not used is not read. bfloat16 is
            `ml_dtypes.bfloat16`.
        config: `config.json` over `config.yaml` over the pickled arguments beside the weights;
            empty if there is none.
        source: the file or index read, as the user would name it.
        notices: what the user should know: a fallback, a choice among files, entries left out.
        taken: "model", "ema" or "discriminator", the set that was read.
    """

    tensors: Mapping[str, np.ndarray]
    config: dict[str, Any]
    source: str
    notices: list[str]
    taken: Weights = "model"


@dataclasses.dataclass(frozen=True)
class _File:
    """One file: its entries by dotted path, its settings, and what messages say that it holds."""

    size: int
    entries: Mapping[str, Any]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    holds: str = "nothing"


def read_checkpoint(
    path: str | os.PathLike[str], weights: Preference = None, recognise: Recognise | None = None
) -> Checkpoint:
    """Opens a checkpoint; numbers are read when a tensor is used.

    Args:
        path: a file or a folder (see `locate` for what is chosen there), local, `gs://` or
            `s3://`; or `hf:OWNER/NAME[@REVISION][/FILE]`, through the hub's cache.
        weights: the set to read if a file holds several: "model" (also None), "ema", or a function
            from the tensors' names to one of them. If the file lacks it, the other one is read with
            a notice. "discriminator" is what training checkpoints keep under this name; of any
            other file it is the same as "model".
        recognise: see `select`. Default: the weights are where training checkpoints keep them.

    Raises:
        CheckpointError: nothing readable there, a file that would run code (it is not run), a
            damaged or foreign file, a folder with several candidates, a hub out of reach.
        ValueError: `weights` is neither.
    """
    if weights not in (*typing.get_args(Weights), None) and not callable(weights):
        raise ValueError(f"weights={weights!r}; expected 'model', 'ema', 'discriminator' or None")
    with contextlib.ExitStack() as stack:
        folder, named = open_folder(path, stack)
        chosen, names, shard_of, notices = find(folder, named)
        config = _read_config(folder, notices)
        files = {name: _read_file(folder.fetch(name), folder.label(name)) for name in names}
    source = folder.label(chosen)
    for file in files.values():
        config = file.settings | config
    shard_of = shard_of or {e: name for name, file in files.items() for e in file.entries}
    if missing := [entry for entry, shard in shard_of.items() if entry not in files[shard].entries]:
        raise CheckpointError(
            f"{source}: {len(missing)} tensors are not in the shards it names for them: "
            f"{some(missing)}",
            expected="an index and shards of the same checkpoint",
            remedy="Download the index and its shards again, together.",
        )
    entries = {entry: files[shard].entries[entry] for entry, shard in shard_of.items()}
    holds = next(iter(files.values())).holds
    paths, taken, more = select.select(entries, weights, recognise, source, holds)
    tensors: dict[str, np.ndarray] = {}
    for name, file in files.items():
        specs = {bare: entries[e] for bare, e in paths.items() if shard_of[e] == name}
        tensors |= read_tensors(folder.label(name), file.size, specs)
    ordered = {bare: tensors[bare] for bare in paths}
    return Checkpoint(ordered, config, source, notices + more, taken)


def check_finite(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Returns a notice of weights that are NaN or infinite; an empty list if all are finite.

    Reads every number, so it is left to the one who is about to use them.
    """
    bad = [
        name for name, x in tensors.items()
        if x.dtype.kind not in "biu" and not np.isfinite(x).all()
    ]  # fmt: skip
    text = f"{len(bad)} of {len(tensors)} tensors hold NaN or infinite numbers: {some(bad)}"
    return [text] if bad else []


def _read_file(path: Path, name: str) -> _File:
    try:
        size = path.stat().st_size
        # numpy cannot map an empty file.
        raw = np.memmap(path, np.uint8, "r").view(np.ndarray) if size else np.empty(0, np.uint8)
    except OSError as error:
        link = f", it is a link to {os.readlink(path)}" if path.is_symlink() else ""
        raise CheckpointError(
            f"{name}: cannot be read: {error.strerror or error}{link}",
            expected="a file that this user may read",
            remedy="Download or copy the file again, or make it readable.",
        ) from error
    head = raw[:4096].tobytes()
    # First, because the length that comes before the header may begin with any byte.
    if head[8:9] == b"{":
        return _File(size, _read_safetensors(raw, path, name))
    found = foreign.what_it_is(head, name)
    if not found and head.startswith((ZIP_MAGIC, PICKLE_MAGIC)):
        tree = open_torch(raw, path, name)
        top = dict(items_of(tree) or ())
        settings = next((top[key] for key in _ARGUMENTS if items_of(top.get(key))), None)
        sections = dict(items_of(settings) or ())
        plain: dict[str, Any] = {}
        for section in (*(sections.get(key) for key in (*_ARGUMENTS, "model")), settings):
            plain |= _plain_arguments(section)
        return _File(size, select.entries(tree), plain, select.listed(tree))
    what = f"begins with {head[:60]!r}" if head else "is empty"
    what, remedy = found or (what, "Check that it is the checkpoint, and download it again.")
    raise CheckpointError(
        f"{name}: {what}", expected="a file of torch.save or of safetensors", remedy=remedy
    )


def _plain_arguments(settings: Any) -> dict[str, Any]:
    """Scalars and short lists among pickled arguments.

    Nothing deeper: a pickle can share one list a million times, so that walking it never ends.
    """

    def is_plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return len(value) <= 64 and all(map(is_scalar, value))
        return is_scalar(value)

    def is_scalar(value: Any) -> bool:
        small = type(value) is int and abs(value) < 2**63
        return small or isinstance(value, str | float | bool | None)

    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in items_of(settings) or ()
        if isinstance(key, str) and is_plain(value)
    }


def _read_safetensors(raw: np.ndarray, path: Path, name: str) -> dict[str, np.ndarray]:
    import safetensors

    try:
        # The library checks the header against the file; the views below are then zero-copy.
        with safetensors.safe_open(path, "numpy"):
            pass
        length = int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        tensors = {}
        for label, entry in header.items():
            if entry["dtype"] not in _SAFETENSORS_DTYPES:
                raise ValueError(f"tensor {label!r} has the unknown type {entry['dtype']}")
            dtype = np.dtype(_SAFETENSORS_DTYPES[entry["dtype"]])
            start = 8 + length + entry["data_offsets"][0]
            tensors[label] = strided_view(raw, start, dtype, tuple(entry["shape"]))
        return tensors
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{name}: a damaged or cut safetensors file ({len(raw)} bytes): {error}",
            expected="a whole file of safetensors",
            remedy="Download or copy the file again.",
        ) from error


def _read_config(folder: Folder, notices: list[str]) -> dict[str, Any]:
    """`config.json` over `config.yaml`, with a notice where they differ."""
    config: dict[str, Any] = {}
    for name, parse in (("config.yaml", parse_yaml), ("config.json", json.loads)):
        if name not in folder.names:
            continue
        where = folder.label(name)
        read = read_mapping(folder.fetch(name), where, parse)
        if differ := sorted(str(k) for k in read.keys() & config.keys() if read[k] != config[k]):
            notices.append(f"{where}: differs from config.yaml in {', '.join(differ)}; it is used")
        config |= read
    return config
