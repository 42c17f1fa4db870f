"""Writes weights in the published layout, for the published PyTorch code to load."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.locate import TORCH_SUFFIXES
from detailflow_jax.runtime.extras import require

Tensors = Mapping[str, np.ndarray]
_FILE_SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")


def write_pytorch(
    tensors: Tensors,
    path: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    wrap: str | None = "model",
    ema: Tensors | None = None,
    ema_key: str = "ema",
    extra_yaml: Mapping[str, Any] | None = None,
    dtype: Any = None,
    name: str = "model",
    overwrite: bool = False,
) -> Path:
    """Writes weights and configuration.

    A `path` without a known suffix becomes a folder of the published layout, `config.json`,
    `config.yaml` and `checkpoints/NAME.pt`, which appears whole or not at all (an empty folder may
    be there). A `path` that ends
    in `.pt`, `.pth`, `.ckpt`, `.bin` or `.safetensors` becomes that file, with the two
    configurations beside it; each of the three appears whole, the weights last.

    Args:
        tensors: arrays by published name; numpy arrays or what `np.asarray` takes without a copy.
            Contiguous ones are written from where they lie, without a copy.
        path: a local path.
        config: the content of `config.json`; numbers, strings, lists and dicts.
        wrap: key of the weights in a PyTorch file, None for a bare state dict. A `.safetensors`
            file has no such key.
        ema: a second set of weights in a PyTorch file; may be `tensors` itself, which is then
            written once.
        ema_key: key of that set.
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
    target = Path(path).expanduser()
    if "://" in os.fspath(path):
        raise CheckpointError(
            f"{os.fspath(path)}: not a local path", remedy="Write here and copy it there."
        )
    texts = _config_texts(config, extra_yaml or {}, target)
    averages = {} if ema is None else {ema_key: ema}
    if target.suffix == ".safetensors" and ema is not None:
        raise CheckpointError(
            f"{target}: ema was given, but safetensors holds one set of weights",
            remedy="Write the two sets into two files, or a .pt file.",
        )
    if target.suffix in _FILE_SUFFIXES:
        saver = _saver(target.suffix, tensors, averages, wrap, dtype)
        _write_beside(target, texts, saver, overwrite)
    else:
        save = _saver(".pt", tensors, averages, wrap, dtype)
        _write_folder(target, texts, save, f"{name}.pt", overwrite)
    return target


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


def _saver(
    suffix: str, tensors: Tensors, averages: dict[str, Tensors], wrap: str | None, dtype: Any
) -> Callable[[Path], None]:
    """The function that writes the weights to a path; a missing library raises at once."""
    if suffix == ".safetensors":
        return functools.partial(_save_safetensors, tensors, dtype)
    torch = require("torch")  # a .safetensors file does not need it

    def save(path: Path) -> None:
        state = {k: _torch_tensor(_prepared(x, dtype)) for k, x in tensors.items()}
        content = {wrap: state} if wrap else state
        for key, ema in averages.items():
            own = {} if ema is tensors else ema
            average = {k: _torch_tensor(_prepared(x, dtype)) for k, x in own.items()}
            content = {**content, key: average or state}
        torch.save(content, path)

    return save


def _save_safetensors(tensors: Tensors, dtype: Any, path: Path) -> None:
    import safetensors.numpy

    path.touch()
    mode = path.stat().st_mode
    ready = {k: _prepared(x, dtype) for k, x in tensors.items()}
    safetensors.numpy.save_file(ready, path, metadata={"format": "pt"})
    path.chmod(mode)  # the library makes files that only their owner may read


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


def _write_folder(
    target: Path, texts: Mapping[str, str], save: Callable[[Path], None], file: str, overwrite: bool
) -> None:
    weights = Path("checkpoints") / file
    check_replaceable(target, {*map(Path, texts), weights, weights.parent}, overwrite)
    with appearing(target) as new:
        (new / "checkpoints").mkdir(parents=True)
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8")
        save(new / weights)


@contextlib.contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """The name of a folder to make and fill: on leaving it takes the place of `target`, if any.

    After an error within there is no trace of it. `check_replaceable` comes before.
    """
    with _beside(target) as new, _beside(target) as old:
        yield new
        for path in (*new.rglob("*"), new):
            _sync(path)
        replaced = target.exists()
        if replaced:
            os.replace(target, old)
        try:
            os.replace(new, target)
        except OSError:
            if replaced:
                os.replace(old, target)
            raise
    _sync(target.parent)


def is_free(target: Path) -> bool:
    """Whether nothing is at `target`, or an empty folder."""
    if target.is_symlink() or not target.is_dir():
        return not os.path.lexists(target)
    return not any(target.iterdir())


def check_replaceable(target: Path, ours: set[Path], overwrite: bool) -> None:
    """A folder is replaced whole, so only one that holds nothing but a checkpoint may be.

    Args:
        target: the folder to write, which may exist.
        ours: paths of a checkpoint, relative to the folder; what lies under them is of it too.
        overwrite: whether it may be replaced at all.

    Raises:
        CheckpointError: it may not, or holds more.
    """
    if is_free(target):
        return
    if not overwrite:
        raise _exists(target)
    inside = {path.relative_to(target) for path in target.rglob("*")}
    strange = {path for path in inside if ours.isdisjoint((path, *path.parents))}
    if strange or not target.is_dir() or target.is_symlink():
        raise CheckpointError(
            f"{target}: holds more than the checkpoint to replace "
            f"({', '.join(sorted(map(str, strange))[:5]) or 'it is no plain folder'})",
            expected=f"nothing but {', '.join(sorted(map(str, ours)))}",
            remedy="Choose another path, or remove it yourself.",
        )


def _write_beside(
    target: Path, texts: Mapping[str, str], save: Callable[[Path], None], overwrite: bool
) -> None:
    # The weights come last: a file that is there has its configuration beside it.
    paths = {target.with_name(name): text for name, text in texts.items()}
    for path in (*paths, target):
        if path.exists() and not overwrite:
            raise _exists(path)
    with contextlib.ExitStack() as stack:
        ready = {path: stack.enter_context(_beside(path)) for path in (*paths, target)}
        for path, text in paths.items():
            ready[path].write_text(text, encoding="utf-8")
        save(ready[target])
        for path, new in ready.items():
            _sync(new)
            os.replace(new, path)
    _sync(target.parent)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary name in the folder of `target`; what is still there in the end is removed."""
    path = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield path
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written: {error}",
            remedy="Is the disk full or read-only? What was there before is unchanged.",
        ) from error
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Makes sure that a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: exists already",
        expected="a new path",
        remedy="Choose another, remove it, or allow overwriting.",
    )
