"""The two tars of ImageNet-1k (ILSVRC 2012): where they come from, and whether they are whole.

The TFDS builder `imagenet2012` trusts its tars: it leaves out the training images if their tar is
missing, and gives the validation images their labels by the place of their names in sorted order,
so one file too few or too many would shift the labels without a word. Hence these checks before
it starts.
"""

import dataclasses
import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence

from etils import epath
from tqdm import tqdm

DOWNLOAD_PAGE = "https://image-net.org/download-images"
_CHUNK = 16 * 2**20


class TarError(ValueError):
    """Tars that are missing, incomplete or of another form; the text says what to do."""


@dataclasses.dataclass(frozen=True)
class Tar:
    """One of the official files."""

    split: str
    file: str
    title: str  # on the download page
    num_bytes: int
    md5: str
    num_members: int
    num_images: int


TARS = (
    Tar(
        split="train",
        file="ILSVRC2012_img_train.tar",
        title="Training images (Task 1 & 2)",
        num_bytes=147_897_477_120,
        md5="1d675b47d978889d74fa0da5fadfb00e",
        num_members=1000,
        num_images=1_281_167,
    ),
    Tar(
        split="validation",
        file="ILSVRC2012_img_val.tar",
        title="Validation images (all tasks)",
        num_bytes=6_744_924_160,
        md5="29b22e2961454d5413ddabcf34fc5622",
        num_members=50_000,
        num_images=50_000,
    ),
)


def check_tars(
    manual_dir: str | os.PathLike,
    synsets: Sequence[str],
    *,
    partial: bool = False,
    md5: bool = False,
) -> list[Tar]:
    """Makes sure that the tars in `manual_dir` can be prepared, and returns those that are there.

    Args:
        manual_dir: local, mounted or gs:// folder.
        synsets: the names of the classes, WordNet's numbers.
        partial: accept tars of the same form that hold less than the official ones, and the
            absence of the training images; the builder does not run without the others.
        md5: also compare the checksums, which reads every byte.

    Raises:
        TarError: with every problem that was found.
    """
    folder = epath.Path(manual_dir)
    found = [tar for tar in TARS if (folder / tar.file).exists()]
    missing = [tar for tar in TARS if tar not in found]
    if missing and not (partial and [tar.split for tar in missing] == ["train"]):
        raise TarError(_how_to_download(manual_dir, missing))
    problems = []
    for tar in found:
        problems += _problems(folder / tar.file, tar, synsets, partial=partial, md5=md5)
    if problems:
        raise TarError("the tars cannot be prepared:\n" + "\n".join(f"  {p}" for p in problems))
    return found


def _how_to_download(manual_dir: str | os.PathLike, missing: list[Tar]) -> str:
    files = "\n".join(f'  {t.file}  {t.num_bytes:,} bytes, "{t.title}"' for t in missing)
    return (
        f"{manual_dir} lacks\n{files}\n"
        f"ImageNet may not be passed on, so you have to fetch it: register at {DOWNLOAD_PAGE}, "
        "agree to its terms, open ILSVRC2012, download the files named above (do not unpack "
        f"them), put them into\n  {manual_dir}\nand run this command again"
    )


def _problems(
    path: epath.Path, tar: Tar, synsets: Sequence[str], *, partial: bool, md5: bool
) -> Iterator[str]:
    size = path.stat().length
    if size != tar.num_bytes and not partial:
        state = "the download is incomplete" if size < tar.num_bytes else "it is another file"
        yield (
            f"{path}: {size:,} bytes, the official file has {tar.num_bytes:,}: {state}; "
            "--partial accepts smaller tars of the same form"
        )
        return
    try:
        names = _check_train(path, synsets) if tar.split == "train" else _check_validation(path)
    except (tarfile.TarError, TarError, EOFError) as error:
        yield f"{path}: {error}; download it again"
        return
    if len(names) != tar.num_members and not partial:
        yield f"{path}: {len(names):,} members, expected {tar.num_members:,}; download it again"
    elif md5 and not partial and (digest := _md5(path)) != tar.md5:
        yield f"{path}: MD5 {digest}, the official file has {tar.md5}; download it again"


def _check_train(path: epath.Path, synsets: Sequence[str]) -> list[str]:
    """The members of a tar of synset tars, nNNNNNNNN.tar, each of JPEGs named after it."""
    known = set(synsets)
    names = []
    for outer, member in _members(path):
        synset = member.name.removesuffix(".tar")
        if synset == member.name or synset not in known:
            raise TarError(f"member {member.name!r}, expected SYNSET.tar, such as n01440764.tar")
        try:
            with tarfile.open(mode="r:", fileobj=outer.extractfile(member)) as inner:
                first = inner.next()
        except tarfile.TarError as error:
            raise TarError(f"its member {member.name!r} is not a whole tar: {error}") from error
        if first is None or not re.fullmatch(rf"{synset}_\d+\.JPEG", first.name):
            raise TarError(
                f"its member {member.name!r} begins with {first and first.name!r}, expected "
                f"{synset}_NUMBER.JPEG"
            )
        names.append(member.name)
    return names


def _check_validation(path: epath.Path) -> list[str]:
    """The members of a flat tar, ILSVRC2012_val_00000001.JPEG and so on without a gap."""
    names = sorted(member.name for _, member in _members(path))
    for number, name in enumerate(names, start=1):
        if name != (expected := f"ILSVRC2012_val_{number:08d}.JPEG"):
            raise TarError(
                f"member {name!r} in the place of {expected!r}: labels go by place, so they would "
                "all be wrong from here on"
            )
    return names


def _members(path: epath.Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Every member of a tar, by its headers alone; raises on a tar that is cut short."""
    with path.open("rb") as file, tarfile.open(mode="r:", fileobj=file) as archive:
        for member in tqdm(archive, desc=f"check {path.name}", unit=" members", mininterval=1):
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
