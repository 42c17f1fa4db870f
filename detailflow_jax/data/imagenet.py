"""The tars of ImageNet-1k (ILSVRC 2012): where they come from, whether they are whole, what is in.

Every member is looked at by its header before anything is written: training images belong to the
class that their tar is named after, and validation images get their labels by number, so that one
file too few or too many would shift the labels silently.
"""

import dataclasses
import hashlib
import importlib.resources
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath
from tqdm import tqdm

from detailflow_jax.runtime.errors import UserError

DOWNLOAD_PAGE = "https://image-net.org/download-images"
_CHUNK = 16 * 2**20


class TarError(UserError, ValueError):
    """Tars that are missing, incomplete or of another form; the text says what to do."""


@dataclasses.dataclass(frozen=True)
class Tar:
    """One of the official files."""

    split: str
    file: str
    title: str  # on the download page
    num_bytes: int
    md5: str
    num_images: int


class Member(NamedTuple):
    """One image in a tar: `size` bytes from `offset` on; label -1 is none."""

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


TARS = (
    Tar(
        split="train",
        file="ILSVRC2012_img_train.tar",
        title="Training images (Task 1 & 2)",
        num_bytes=147_897_477_120,
        md5="1d675b47d978889d74fa0da5fadfb00e",
        num_images=1_281_167,
    ),
    Tar(
        split="validation",
        file="ILSVRC2012_img_val.tar",
        title="Validation images (all tasks)",
        num_bytes=6_744_924_160,
        md5="29b22e2961454d5413ddabcf34fc5622",
        num_images=50_000,
    ),
)

_TEST_TAR = "ILSVRC2012_img_test.tar"  # Becomes a third split, without labels, where it is there.


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
    found = [tar for tar in TARS if (folder / tar.file).exists()]
    missing = [tar for tar in TARS if tar not in found]
    if missing and not (partial and [tar.split for tar in missing] == ["train"]):
        raise TarError(_how_to_download(manual_dir, missing))
    splits, problems = [], []
    for tar in found:
        path = folder / tar.file
        try:
            _check_size(path, tar, partial=partial)
            members = _train(path, synsets) if tar.split == "train" else _validation(path)
            if not members:
                raise TarError("it holds no images; download it again")
            if not partial:
                _check_content(path, tar, len(members), md5=md5)
            splits.append(Split(tar.split, path, members))
        except TarError as error:
            problems.append(f"{path}: {error}")
        except (tarfile.TarError, EOFError) as error:
            problems.append(f"{path}: {error}; download it again")
    if problems:
        raise TarError("the tars cannot be prepared:\n" + "\n".join(f"  {p}" for p in problems))
    if (path := folder / _TEST_TAR).exists():
        splits.append(Split("test", path, sorted(_images(path))))
    return splits


def _how_to_download(manual_dir: str | os.PathLike, missing: list[Tar]) -> str:
    files = "\n".join(f'  {t.file}  {t.num_bytes:,} bytes, "{t.title}"' for t in missing)
    return (
        f"{manual_dir} lacks\n{files}\n"
        f"ImageNet may not be passed on, so you have to fetch it: register at {DOWNLOAD_PAGE}, "
        "agree to its terms, open ILSVRC2012, download the files named above (do not unpack "
        f"them), put them into\n  {manual_dir}\nand run this command again"
    )


def _check_size(path: epath.Path, tar: Tar, *, partial: bool) -> None:
    size = path.stat().length
    if size != tar.num_bytes and not partial:
        state = "the download is incomplete" if size < tar.num_bytes else "it is another file"
        raise TarError(
            f"{size:,} bytes, the official file has {tar.num_bytes:,}: {state}; --partial accepts "
            "smaller tars of the same form"
        )


def _check_content(path: epath.Path, tar: Tar, images: int, *, md5: bool) -> None:
    if images != tar.num_images:
        raise TarError(f"{images:,} images, expected {tar.num_images:,}; download it again")
    if md5 and (digest := _md5(path)) != tar.md5:
        raise TarError(f"MD5 {digest}, the official file has {tar.md5}; download it again")


def _train(path: epath.Path, synsets: Sequence[str]) -> list[Member]:
    """The images of a tar of synset tars, nNNNNNNNN.tar, each of JPEGs named after it."""
    known, members = set(synsets), []
    for outer, member in _members(path):
        synset = member.name.removesuffix(".tar")
        if synset == member.name or synset not in known:
            raise TarError(f"member {member.name!r}, expected SYNSET.tar, such as n01440764.tar")
        try:
            with tarfile.open(mode="r:", fileobj=outer.extractfile(member)) as inner:
                for image in inner:
                    if not re.fullmatch(rf"{synset}_\d+\.JPEG", image.name):
                        raise TarError(
                            f"its member {member.name!r} holds {image.name!r}, expected "
                            f"{synset}_NUMBER.JPEG"
                        )
                    offset = member.offset_data + image.offset_data
                    members.append(Member(image.name, synset, offset, image.size))
        except tarfile.TarError as error:
            raise TarError(
                f"its member {member.name!r} is not a whole tar: {error}; download it again"
            ) from error
    return members


def _validation(path: epath.Path) -> list[Member]:
    """The images of a flat tar, ILSVRC2012_val_00000001.JPEG and so on without a gap."""
    images = sorted(_images(path))
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


def _images(path: epath.Path) -> Iterator[Member]:
    for _, member in _members(path):
        yield Member(member.name, -1, member.offset_data, member.size)


def _members(path: epath.Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Every file in a tar, by its headers alone; raises on a tar that is cut short."""
    with path.open("rb") as file, tarfile.open(mode="r:", fileobj=file) as archive:
        for member in tqdm(archive, desc=f"index {path.name}", unit=" members", mininterval=1):
            if member.isfile():
                yield archive, member


def _md5(path: epath.Path) -> str:
    digest = hashlib.md5()
    size = path.stat().length
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=f"MD5 of {path.name}", unit="B", unit_scale=True) as progress,
    ):
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress.update(len(chunk))
    return digest.hexdigest()
