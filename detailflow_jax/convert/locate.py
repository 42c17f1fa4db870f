"""Which file of a folder holds the weights.

It is chosen in this order:

1. `model.safetensors`
2. `model.safetensors.index.json`, then `pytorch_model.bin.index.json` (shards); then the names that
   diffusers has for the same: `diffusion_pytorch_model.safetensors` or `.bin`, whole or in shards
3. the only other `*.safetensors` or `*.safetensors.index.json`
4. the only file in `checkpoints/`, as the published folders have it
5. the only `.pt`, `.pth`, `.ckpt`, `.bin` or `.pth.tar` in the folder itself
6. shards without an index, if all of them are there
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.convert.folders import Folder

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pth.tar")
INDEX_SUFFIX = ".index.json"
_FIRST = (
    "model.safetensors",
    f"model.safetensors{INDEX_SUFFIX}",
    f"pytorch_model.bin{INDEX_SUFFIX}",
    *(
        f"diffusion_pytorch_model{suffix}{index}"
        for suffix in (".safetensors", ".bin")
        for index in ("", INDEX_SUFFIX)
    ),
)
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.")
# What trainers and file systems leave beside the weights under the same suffixes.
_NOT_WEIGHTS = re.compile(
    r"(^|/)(\.|((optimizer|scheduler|sampler|dl_state_dict)(_\d+)?|rng_state\w*|training_args|"
    r"scaler|opt\d+|\w*optim_states|zero_pp_rank_\w+)\.\w+$)"
)
# What a folder without weights of its own has -> what to do.
_REMEDIES = {
    r"^model_index\.json$": "This is a pipeline: name its folder vae.",
    r"^latest$": "DeepSpeed's file `latest` names the folder that holds them.",
    r"^zero_pp_rank_": "These are parts for each process: DeepSpeed's zero_to_fp32.py, in the "
    "folder above, makes one file of them.",
    r"\.distcp$": "These are parts for each process: `python -m "
    "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER x.pt` makes one file of them.",
    r"^data\.pkl$": "A file of torch.save was unpacked: download it again and leave it packed.",
    r"\.(npz|npy|h5|hdf5|msgpack|onnx|pkl|pickle|joblib|pt2)$": "Name the file itself: the "
    "error says how a checkpoint is made of it.",
    _SHARD.pattern: "Download the missing shards.",
}
# No configuration or index is near this; a file that is would only fill the memory.
_MAX_TEXT_BYTES = 64 << 20
_MOST_VALUES = 1 << 19  # An index has two per tensor.


def choose_weights(names: Sequence[str], where: str) -> str:
    """Returns the file that holds the weights, or the first of its shards, in the module's order.

    Args:
        names: the files of the folder and of `checkpoints/` under it.
        where: what messages call the folder.

    Raises:
        CheckpointError: no candidate, or several of the same rank; both list what is there.
    """
    for name in _FIRST:
        if name in names:
            return name
    candidates = _candidates(names)
    ranks = (
        [n for n in candidates if "/" not in n and ".safetensors" in n],
        [n for n in candidates if "/" in n],
        [n for n in candidates if "/" not in n],
    )
    for found in ranks:
        if len(found) > 1:
            raise CheckpointError(
                f"{where}: holds several checkpoints: {_listed(found)}",
                expected="one",
                remedy="Name the file itself.",
            )
        if found:
            return found[0]
    if shards := _all_shards(names):
        return shards[0]
    raise CheckpointError(
        f"{where}: holds no weights ({_listed(names)})",
        expected="model.safetensors, an index of shards, checkpoints/*.pt, or one .safetensors, "
        ".pt, .pth, .ckpt or .bin file",
        remedy=next(
            (
                remedy
                for pattern, remedy in _REMEDIES.items()
                if any(re.search(pattern, name) for name in names)
            ),
            "Name the folder or the file that holds them.",
        ),
    )


def read_mapping(path: Path, where: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Returns the mapping that a JSON or YAML file holds.

    Args:
        path: the file.
        where: what messages call it.
        parse: text -> value, raising ValueError.

    Raises:
        CheckpointError: the file does not parse, holds no mapping, or is far too large.
    """
    try:
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        content = parse(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict | None):
            raise ValueError(f"it holds a {type(content).__name__}")
        _check_bounded(content)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: cannot be read: {error}",
            expected="one mapping in plain JSON or YAML, without Python objects",
            remedy="Download it again, or remove it and name the configuration yourself.",
        ) from error
    return content or {}


def _check_bounded(content: Any) -> None:
    """Raises ValueError if values could not be walked or shown, in YAML by aliases of aliases."""
    waiting, count = [content], 0
    while waiting:
        value = waiting.pop()
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"it unfolds to more than {_MOST_VALUES} values")
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif isinstance(value, int) and abs(value) >= 1 << 128:
            raise ValueError("it holds a whole number of more than 128 bits")


def _candidates(names: Sequence[str]) -> list[str]:
    suffixes = (*TORCH_SUFFIXES, ".safetensors", f".safetensors{INDEX_SUFFIX}")
    return [
        n for n in names
        if n.lower().endswith(suffixes) and not _SHARD.search(n) and not _NOT_WEIGHTS.search(n)
    ]  # fmt: skip


def _listed(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(sorted(names)[:limit]) + more) or "no files are in it"


def find(
    folder: Folder, file: str | None
) -> tuple[str, list[str], dict[str, str] | None, list[str]]:
    """Finds the files that hold the weights.

    Args:
        folder: where they are.
        file: the one that the user named, or None.

    Returns:
        name of the file or index chosen; names of the files with tensors; for an index the file of
        every tensor, else None; what the user should know about the choice.

    Raises:
        CheckpointError: nothing there, several candidates, or an index without its shards.
    """
    names, notices, shard_of = folder.names, [], None
    if file is not None and file not in names:
        raise CheckpointError(
            f"{folder.where}: has no file {file}",
            expected=f"one of those there ({_listed(names)})",
            remedy="Check the name.",
        )
    chosen = file or choose_weights(names, folder.where)
    if aside := [n for n in _candidates(names) if n != chosen and file is None]:
        notices.append(f"{folder.where}: reading {chosen}, leaving aside {_listed(aside)}")
    files = _all_shards(names) if not file and _SHARD.search(chosen) else [chosen]
    if chosen.endswith(INDEX_SUFFIX):
        shard_of = _read_index(folder, chosen)
        files = sorted(set(shard_of.values()))
    return chosen, files, shard_of, notices


def _all_shards(names: Sequence[str]) -> list[str]:
    """The shards of a checkpoint without an index; none if one is missing."""
    found = {name: match for name in names if (match := _SHARD.search(name))}
    series = {(name[: match.start()], int(match[1])) for name, match in found.items()}
    return sorted(found) if [count for _, count in series] == [len(found)] else []


def _read_index(folder: Folder, name: str) -> dict[str, str]:
    """Tensor name -> file name in the folder, from the `weight_map` of an index."""
    where = folder.label(name)
    weight_map = read_mapping(folder.fetch(name), where, json.loads).get("weight_map")
    named = isinstance(weight_map, dict) and bool(weight_map)  # {} names no file
    if not named or not all(isinstance(s, str) for s in weight_map.values()):
        raise CheckpointError(
            f"{where}: has no usable weight_map",
            expected='{"weight_map": {TENSOR: FILE}}',
            remedy="Download the index again.",
        )
    parent = PurePosixPath(name).parent
    shards = {tensor: (parent / shard).as_posix() for tensor, shard in weight_map.items()}
    # Only names that the folder lists, so that an index cannot point anywhere else.
    if missing := set(shards.values()) - set(folder.names):
        raise CheckpointError(
            f"{where}: names files that are not beside it: {_listed(sorted(missing))}",
            expected="every shard in the folder of the index",
            remedy="Download the missing shards.",
        )
    return shards
