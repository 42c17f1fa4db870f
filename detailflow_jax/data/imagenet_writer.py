"""Writes ImageNet from its tars as a TFDS dataset of ArrayRecord files, shard by shard.

    imagenet2012/unfinished.5.1.0/tars.json    what the shards are made of
                                  imagenet2012-train.array_record-00003-of-01101, ...

A fixed permutation spreads the images over the shards, so that every slice of a split holds all
classes. A shard is written whole or not at all, and a run writes only those that are missing. The
folder gets its final name, imagenet2012/5.1.0, once it is complete.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from detailflow_jax.data.imagenet import Member, Split, TarError
from detailflow_jax.data.shards import num_records, write_records
from detailflow_jax.runtime.files import remove_partial, sync_folder, write_atomically

SHARD_BYTES = 2**27  # of images


def progress_folder(builder: Any) -> pathlib.Path:
    """Where the shards of an unfinished dataset lie."""
    return pathlib.Path(builder.data_path.parent, f"unfinished.{builder.data_path.name}")


def progress_bytes(builder: Any) -> int:
    """What earlier runs have written of an unfinished dataset."""
    return sum(file.stat().st_size for file in progress_folder(builder).glob("*"))


def write(builder: Any, splits: Sequence[Split]) -> None:
    """Writes the dataset of `builder`, a local one, from the tars; resumable.

    Raises:
        TarError: a tar has changed since it was indexed.
        FileError: the disk is full or cannot be written.
    """
    import tensorflow_datasets as tfds

    folder, info = progress_folder(builder), builder.info
    _open(folder, {"dataset": info.full_name, "tars": [split.fingerprint for split in splits]})
    info.set_file_format("array_record", override=True)
    info.set_splits(tfds.core.SplitDict([_write_split(builder, folder, x) for x in splits]))
    info.write_to_directory(folder)
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(folder)
    folder.rename(builder.data_path)
    sync_folder(folder.parent)


def _open(folder: pathlib.Path, made_of: Mapping[str, Any]) -> None:
    """Makes the folder, after removing one whose shards are made of something else."""
    file, content = folder / "tars.json", json.dumps(made_of, indent=1).encode()
    if folder.exists() and not (file.exists() and file.read_bytes() == content):
        if any(folder.glob("*array_record*")):
            print(f"removing {folder}: unfinished, and made of other files", flush=True)
        file.unlink(missing_ok=True)  # First: what is left without it is removed the next time.
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True, parents=True)
    remove_partial(folder)
    if not file.exists():
        write_atomically(file, content)


def _write_split(builder: Any, folder: pathlib.Path, split: Split) -> Any:
    """Writes the shards that are missing or damaged; returns the `SplitInfo`."""
    import tensorflow_datasets as tfds

    members = split.members
    size = sum(member.size for member in members)
    number = max(1, round(size / SHARD_BYTES))
    template = tfds.core.ShardedFileTemplate(
        dataset_name=builder.name,
        data_dir=builder.data_path,
        split=split.name,
        filetype_suffix="array_record",
    )
    order = np.random.default_rng(0).permutation(len(members))
    parts = [[members[i] for i in part] for part in np.array_split(order, number)]
    shards = [folder / path.name for path in template.sharded_filepaths(number)]
    with split.path.open("rb") as tar:
        for shard, part in tqdm(
            list(zip(shards, parts, strict=True)), desc=f"write {split.name}", unit="file"
        ):
            if not _is_whole(shard, len(part)):
                write_records(shard, _records(builder, tar, part), len(part))
    return tfds.core.SplitInfo(
        name=split.name,
        shard_lengths=[len(part) for part in parts],
        num_bytes=size,
        filename_template=template,
    )


def _is_whole(shard: pathlib.Path, count: int) -> bool:
    if not shard.exists():
        return False
    try:
        whole = num_records(shard) == count
    except (RuntimeError, ValueError):
        whole = False
    if not whole:
        print(f"{shard} is damaged: writing it again", flush=True)
    return whole


def _records(builder: Any, tar: BinaryIO, members: Sequence[Member]) -> Iterator[bytes]:
    images = {}
    for member in sorted(members, key=lambda member: member.offset):  # Forwards through the tar.
        tar.seek(member.offset)
        images[member.name] = tar.read(member.size)
        if len(images[member.name]) != member.size:
            raise TarError(f"{member.name}: the tar ends in it; it has changed meanwhile")
    for member in members:
        image = _as_rgb_jpeg(member.name, images.pop(member.name))
        example = {"image": image, "label": member.label, "file_name": member.name}
        yield builder.info.features.serialize_example(example)


def _as_rgb_jpeg(name: str, image: bytes) -> bytes:
    """The image as TFDS publishes it: 22 known CMYK files and one PNG are encoded again."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as published

    if name in published.CMYK_IMAGES:
        return tfds.core.utils.jpeg_cmyk_to_rgb(image)
    return tfds.core.utils.png_to_jpeg(image) if name in published.PNG_IMAGES else image
