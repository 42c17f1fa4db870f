"""Writes weights in the published layout, for the published PyTorch code to load."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from detailflow_jax.convert.errors import CheckpointError, some
from detailflow_jax.convert.locate import TORCH_SUFFIXES
from detailflow_jax.runtime import files
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.runtime.extras import require
from detailflow_jax.runtime.files import atomic_folder, atomic_path

Tensors = Mapping[str, np.ndarray]
SAFETENSORS = ".safetensors"


def write_pytorch(
    tensors: Tensors,
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    wrap: str | None = "model",
    more: Mapping[str, Tensors] | None = None,
    extra_yaml: Mapping[str, Any] | None = None,
    dtype: Any = None,
    name: str = "model",
    overwrite: bool = False,
) -> Path:
    """Writes weights and configuration.

    A `path` without a known suffix becomes a folder of the published layout, `config.json`,
    `config.yaml` and `checkpoints/NAME.pt`, which appears whole or not at all (an empty folder may
    be there). A `path` that ends in `.pt`, `.pth`, `.ckpt`, `.bin` or `.safetensors` becomes that
    file, with the two configurations beside it; each of the three appears whole, the weights last.

    Args:
        tensors: arrays by published name; numpy arrays or what `np.asarray` takes without a copy.
            Contiguous ones are written from where they lie, without a copy.
        path: a local path.
        config: the content of `config.json`; numbers, strings, lists and dicts.
        wrap: key of the weights in a PyTorch file, None for a bare state dict. A `.safetensors`
            file has no such key.
        more: other sets of weights of a PyTorch file by key; one that is `tensors` itself is in
            the file once.
        extra_yaml: what `config.yaml` holds besides `config`.
        dtype: floating-point type to write, None for that of each tensor; integers stay.
        name: stem of the file in `checkpoints/`.
        overwrite: whether what is at `path` may be replaced.

    Returns:
        The path written.

    Raises:
        CheckpointError: `path` exists and `overwrite` is false, it cannot be written, or `config`
            holds something that JSON cannot.
        MissingExtra: PyTorch is missing for a PyTorch file.
    """
    target, more = local_path(path), more or {}
    texts = _config_texts(config, extra_yaml or {}, target)
    single = target.suffix == SAFETENSORS
    if single and more:
        raise CheckpointError(
            f"{target}: {', '.join(more)} was given, but safetensors holds one set of weights",
            remedy="Write the two sets into two files, or a .pt file.",
        )
    if not single:
        require("torch")  # A missing library is an error before anything is written.

    def save(file: Path) -> None:
        if single:
            save_safetensors({k: _prepared(x, dtype) for k, x in tensors.items()}, file)
        else:
            _save_torch(tensors, more, wrap, dtype, file)

    if single or target.suffix in TORCH_SUFFIXES:
        for file in (*map(target.with_name, texts), target):
            check_free(file, overwrite)
        with _writing(target), contextlib.ExitStack() as stack:
            # The first one entered appears last: weights that are there have their configuration.
            weights = stack.enter_context(atomic_path(target))
            for file, text in texts.items():
                config_file = stack.enter_context(atomic_path(target.with_name(file)))
                config_file.write_text(text, encoding="utf-8")
            save(weights)
    else:
        weights = Path("checkpoints") / f"{name}.pt"
        with folder_for(target, {*map(Path, texts), weights, weights.parent}, overwrite) as new:
            (new / weights.parent).mkdir()
            for file, text in texts.items():
                (new / file).write_text(text, encoding="utf-8")
            save(new / weights)
    return target


def local_path(path: str | os.PathLike[str]) -> Path:
    """Returns the path to write to; raises CheckpointError if it is not a local one."""
    try:
        return files.local_path(path, "path")
    except ConfigError as error:
        raise CheckpointError(
            f"{os.fspath(path)}: not a local path", remedy="Write here and copy it there."
        ) from error


def check_free(target: Path, overwrite: bool) -> bool:
    """Returns whether nothing is at `target`, or an empty folder.

    Raises:
        CheckpointError: something is there, and `overwrite` is false.
    """
    is_folder = target.is_dir() and not target.is_symlink()
    free = not any(target.iterdir()) if is_folder else not os.path.lexists(target)
    if not free and not overwrite:
        raise CheckpointError(
            f"{target}: exists already",
            expected="a new path",
            remedy="Choose another, remove it, or allow overwriting (--overwrite).",
        )
    return free


@contextlib.contextmanager
def folder_for(target: Path, ours: set[Path], overwrite: bool) -> Iterator[Path]:
    """Gives a folder to fill, which takes the place of `target` when the block ends well.

    Args:
        target: the folder to write. It is replaced whole, so it may hold only a checkpoint.
        ours: paths of a checkpoint, relative to the folder; what lies under them is of it too.
        overwrite: whether a checkpoint there may be replaced.

    Raises:
        CheckpointError: it may not, or holds more, or cannot be written.
    """
    if not check_free(target, overwrite):
        inside = {path.relative_to(target) for path in target.rglob("*")}
        strange = {path for path in inside if ours.isdisjoint((path, *path.parents))}
        if strange or not target.is_dir() or target.is_symlink():
            raise CheckpointError(
                f"{target}: holds more than the checkpoint to replace "
                f"({some(sorted(map(str, strange))) or 'it is no plain folder'})",
                expected=f"nothing but {', '.join(sorted(map(str, ours)))}",
                remedy="Choose another path, or remove it yourself.",
            )
    with _writing(target), atomic_folder(target) as new:
        yield new


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written: {error}",
            remedy="Is the disk full or read-only? What was there before is unchanged.",
        ) from error


def _config_texts(
    config: Mapping[str, Any], extra: Mapping[str, Any], target: Path
) -> dict[str, str]:
    import yaml

    try:
        text = json.dumps({**config}, indent=2, default=_plain, allow_nan=False)
        both = json.dumps({**config, **extra}, default=_plain, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{target}: its configuration cannot be written: {error}",
            expected="numbers, strings, None, lists and dicts",
            remedy="Convert the value first.",
        ) from error
    return {
        "config.json": text + "\n",
        "config.yaml": yaml.safe_dump(json.loads(both), sort_keys=False, allow_unicode=True),
    }


def _plain(value: Any) -> Any:
    """A numpy number as Python's own; ConfigDict and other mappings as dicts."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def save_safetensors(tensors: Tensors, path: Path, format: str = "pt") -> None:
    """Writes a file of safetensors; `format` says in its header what wrote it."""
    import safetensors.numpy

    ready = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    safetensors.numpy.save_file(ready, path, metadata={"format": format})


def _save_torch(
    tensors: Tensors, more: Mapping[str, Tensors], wrap: str | None, dtype: Any, path: Path
) -> None:
    torch = require("torch")
    made: dict[int, dict] = {}  # By identity: the same tensors are in the file once.
    for each in (tensors, *more.values()):
        if id(each) not in made:
            made[id(each)] = {k: _torch_tensor(_prepared(x, dtype)) for k, x in each.items()}
    content = {wrap: made[id(tensors)]} if wrap else made[id(tensors)]
    torch.save(content | {key: made[id(each)] for key, each in more.items()}, path)


def _prepared(array: Any, dtype: Any) -> np.ndarray:
    """Row-major, little-endian, of the type asked for; the same memory where it is so already."""
    array = np.asarray(array)
    if dtype is not None and array.dtype.kind not in "biuc":
        array = array.astype(dtype, copy=False)
    return np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")


def _torch_tensor(array: np.ndarray) -> Any:
    """A tensor over the same memory."""
    import torch

    with warnings.catch_warnings():
        # Views of jax arrays and memory maps are read-only; nothing here writes to them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
