"""ImageNet-1k (ILSVRC 2012): checks its tars, and writes them as a TFDS dataset, shard by shard.

    imagenet2012/unfinished.5.1.0/tars.json    what the shards are made of
                                  imagenet2012-train.array_record-00003-of-01101, ...

The headers of all members are read before anything is written. Training images belong to the class
that their inner tar is named after. Validation images get their labels by number, so that one file
too few or too many would shift the labels silently.

A fixed permutation spreads the images over the shards, so that every slice of a split holds all
classes. A shard is written whole or not at all, and a run writes only those that are missing. The
folder gets its final name, imagenet2012/5.1.0, once it is complete.
"""

import dataclasses
import hashlib
import importlib.resources
import json
import os
import pathlib
import re
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from detailflow_jax.data.shards import num_records, write_records
from detailflow_jax.runtime.errors import UserError
from detailflow_jax.runtime.files import remove_partial, sync, write_atomically

SHARD_BYTES = 2**27  # of images


class TarError(UserError, ValueError):
    """Tars that are missing, incomplete or of another form; the text says what to do."""


class Tar(NamedTuple):
    """One of the official files; `title` is its name on the download page."""

    split: str
    file: str
    title: str
    num_bytes: int
    md5: str
    num_images: int


TARS = (
    Tar(
        *("train", "ILSVRC2012_img_train.tar", "Training images (Task 1 & 2)"),
        *(147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e", 1_281_167),
    ),
    Tar(
        *("validation", "ILSVRC2012_img_val.tar", "Validation images (all tasks)"),
        *(6_744_924_160, "29b22e2961454d5413ddabcf34fc5622", 50_000),
    ),
)
_TEST_TAR = "ILSVRC2012_img_test.tar"  # Becomes a third split, without labels, if it is there.


class Member(NamedTuple):
    """One image of a tar: `size` bytes from `offset` on; label -1 means none."""

    name: str
    label: str | int
    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one tar."""

    name: str
    path: epath.Path
    members: list[Member]

    @property
    def fingerprint(self) -> list:
        """JSON that tells this tar from others: name, bytes, time of change, number of images."""
        stat = self.path.stat()
        return [self.path.name, stat.length, stat.mtime, len(self.members)]


# ---------------------------------------------------------------------------------------- the tars


def index_tars(
    manual_dir: str | os.PathLike,
    synsets: Sequence[str],
    *,
    partial: bool = False,
    md5: bool = False,
) -> list[Split]:
    """Returns the images in the tars of `manual_dir`, after checking that they are the right ones.

    Args:
        manual_dir: local, mounted or gs:// folder.
        synsets: the names of the classes, WordNet numbers.
        partial: accept tars of the same form that hold less than the official ones, and the
            absence of the training images.
        md5: also compare the checksums, which reads every byte.

    Raises:
        TarError: with every problem that was found.
    """
    folder = epath.Path(manual_dir)
    missing = [tar for tar in TARS if not (folder / tar.file).exists()]
    if missing and not (partial and [tar.split for tar in missing] == ["train"]):
        files = "\n".join(f'  {t.file}  {t.num_bytes:,} bytes, "{t.title}"' for t in missing)
        raise TarError(
            f"{manual_dir} lacks\n{files}\n"
            "ImageNet may not be passed on, so you have to fetch it: register at "
            "https://image-net.org/download-images, agree to its terms, open ILSVRC2012, download "
            "the files named above (do not unpack them), put them into\n"
            f"  {manual_dir}\nand run this command again"
        )
    splits, problems = [], []
    for tar in TARS:
        if tar in missing:
            continue
        path = folder / tar.file
        try:
            members = _index(path, tar, synsets, partial=partial, md5=md5)
            splits.append(Split(tar.split, path, members))
        except (TarError, tarfile.TarError, EOFError) as error:
            problems.append(f"  {path}: {error}\n")
    if problems:
        raise TarError(
            f"the tars cannot be prepared:\n{''.join(problems)}download it again where a tar is "
            "incomplete or damaged"
        )
    if (path := folder / _TEST_TAR).exists():
        splits.append(Split("test", path, sorted(image for _, image in _images(path))))
    return splits


def _index(path: epath.Path, tar: Tar, synsets: Sequence[str], *, partial: bool, md5: bool):
    """The labelled images of one tar, or an error."""
    size = path.stat().length
    if size != tar.num_bytes and not partial:
        state = "the download is incomplete" if size < tar.num_bytes else "it is another file"
        raise TarError(
            f"{size:,} bytes, the official file has {tar.num_bytes:,}: {state}; --partial accepts "
            "smaller tars of the same form"
        )
    members = _train(path, set(synsets)) if tar.split == "train" else _validation(path)
    if not members:
        raise TarError("it holds no images")
    if not partial and len(members) != tar.num_images:
        raise TarError(f"{len(members):,} images, expected {tar.num_images:,}")
    if not partial and md5 and (digest := _md5(path)) != tar.md5:
        raise TarError(f"MD5 {digest}, the official file has {tar.md5}")
    return members


def _train(path: epath.Path, synsets: set[str]) -> list[Member]:
    """The images of a tar of synset tars, nNNNNNNNN.tar, each of JPEGs named after it."""
    members = []
    for inner, image in _images(path, tars=True):
        synset = inner.removesuffix(".tar")
        if synset == inner or synset not in synsets:
            raise TarError(f"member {inner!r}, expected SYNSET.tar, such as n01440764.tar")
        if image is None:
            continue
        if not re.fullmatch(rf"{synset}_\d+\.JPEG", image.name):
            raise TarError(
                f"its member {inner!r} holds {image.name!r}, expected {synset}_NUMBER.JPEG"
            )
        members.append(image._replace(label=synset))
    return members


def _validation(path: epath.Path) -> list[Member]:
    """The images of a flat tar, ILSVRC2012_val_00000001.JPEG and so on without a gap."""
    images = sorted(image for _, image in _images(path))
    folder = importlib.resources.files("tensorflow_datasets.datasets.imagenet2012")
    labels = (folder / "validation_labels.txt").read_text().split()
    for number, image in enumerate(images, start=1):
        if image.name != (expected := f"ILSVRC2012_val_{number:08d}.JPEG"):
            raise TarError(
                f"member {image.name!r} in the place of {expected!r}: labels go by place, so they "
                "would all be wrong from here on"
            )
    if len(images) > len(labels):
        raise TarError(f"{len(images):,} images, expected at most {len(labels):,}")
    return [image._replace(label=label) for image, label in zip(images, labels, strict=False)]


def _images(path: epath.Path, tars: bool = False) -> Iterator[tuple[str, Any]]:
    """Yields (name, image) for every file of a tar, by its headers alone.

    With `tars` a file is itself a tar: (its name, None), then (its name, image) for each image.
    Raises on a tar that is cut short.
    """
    with path.open("rb") as file, tarfile.open(mode="r:", fileobj=file) as archive:
        for member in tqdm(archive, desc=f"index {path.name}", unit=" members", mininterval=1):
            if not member.isfile():
                continue
            if not tars:
                yield member.name, Member(member.name, -1, member.offset_data, member.size)
                continue
            yield member.name, None
            with tarfile.open(mode="r:", fileobj=archive.extractfile(member)) as inner:
                for image in inner:
                    offset = member.offset_data + image.offset_data
                    yield member.name, Member(image.name, -1, offset, image.size)


def _md5(path: epath.Path) -> str:
    progress = {"desc": f"MD5 of {path.name}", "total": path.stat().length, "unit_scale": True}
    with path.open("rb") as file, tqdm.wrapattr(file, "read", unit="B", **progress) as read:
        digest = hashlib.md5()
        while chunk := read.read(2**24):
            digest.update(chunk)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------- the dataset


def progress_folder(builder: Any) -> pathlib.Path:
    """Where the shards of an unfinished dataset are."""
    return pathlib.Path(builder.data_path.parent, f"unfinished.{builder.data_path.name}")


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
    for path in (*folder.iterdir(), folder):
        sync(path)
    folder.rename(builder.data_path)
    sync(folder.parent)


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
    paths = [folder / path.name for path in template.sharded_filepaths(number)]
    pairs = list(zip(paths, parts, strict=True))
    with split.path.open("rb") as tar:
        for path, part in tqdm(pairs, desc=f"write {split.name}", unit="file"):
            if not _is_whole(path, len(part)):
                write_records(path, _records(builder, tar, part), len(part))
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
        if num_records(shard) == count:
            return True
    except (RuntimeError, ValueError):
        pass
    print(f"{shard} is damaged: writing it again", flush=True)
    return False


def _records(builder: Any, tar: BinaryIO, members: Sequence[Member]) -> Iterator[bytes]:
    """The serialized examples, images as TFDS publishes them: 23 files are encoded again as RGB."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as published

    again = dict.fromkeys(published.CMYK_IMAGES, tfds.core.utils.jpeg_cmyk_to_rgb)
    again |= dict.fromkeys(published.PNG_IMAGES, tfds.core.utils.png_to_jpeg)
    images = {}
    for member in sorted(members, key=lambda member: member.offset):  # Forwards through the tar.
        tar.seek(member.offset)
        images[member.name] = tar.read(member.size)
        if len(images[member.name]) != member.size:
            raise TarError(f"{member.name}: the tar ends in it; it has changed meanwhile")
    for name, label, *_ in members:
        image = again.get(name, lambda data: data)(images.pop(name))
        example = {"image": image, "label": label, "file_name": name}
        yield builder.info.features.serialize_example(example)
