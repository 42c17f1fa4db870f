"""Folders of images as people have them; one walker for training, extraction and evaluation.

Links are followed. Hidden entries, and folders that operating systems, file servers and notebooks
add by themselves, are left out with one notice.
"""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from absl import logging

from detailflow_jax.runtime import files
from detailflow_jax.runtime.errors import BucketError, ConfigError, NotFoundError

IMAGE_FILE = re.compile(
    r".+\.(jpe?g|jpe|jfif|jp2|a?png|webp|avif|heic|heif|hif|bmp|dib|gif|tiff?|p[pgbn]m)",
    re.IGNORECASE | re.DOTALL,
)
CLASSES_FILE = "classes.txt"
"""In the folder of the class folders: their names in the order of the labels, one per line."""

_SYSTEM = re.compile(
    r"__macosx|lost\+found|lost\.dir|found\.\d{3}|\$recycle\.bin|__pycache__|"
    r"system volume information|network trash folder|temporary items|thevolumesettingsfolder|"
    r"@(eadir|tmp|recycle|recently-snapshot|sharebin|sharesnap|transcode|syno\w*)|"
    r"[#~]snapshot|#recycle",
    re.IGNORECASE,
)


class Folder(NamedTuple):
    """The names of what one folder holds, each list sorted as text."""

    folders: list[str]
    images: list[str]
    others: list[str]
    left_out: list[str]  # hidden folders and images, and folders of the system


def list_folder(path: str | os.PathLike) -> Folder:
    """Returns what a folder holds.

    A link counts as what it leads to; a broken one with an image's name as an image, which is
    then reported as unreadable. Hidden files that are no images are not listed at all.

    Raises:
        ConfigError: the folder cannot be listed.
    """
    folder = Folder([], [], [], [])
    try:
        for name, is_folder, is_file in _entries(path):
            is_image = is_file and bool(IMAGE_FILE.fullmatch(name))
            if name.startswith(".") or (is_folder and _SYSTEM.fullmatch(name)):
                folder.left_out.extend([name] if is_folder or is_image else [])
            else:
                kind = folder.folders if is_folder else folder.images
                (kind if is_folder or is_image else folder.others).append(name)
    except BucketError:
        raise
    except OSError as error:
        raise ConfigError(
            f"cannot list the folder {os.fspath(path)}: {error.strerror or error}; make it "
            "readable, or remove it from the data"
        ) from error
    for names in folder:
        names.sort()
    return folder


def _entries(path: str | os.PathLike) -> Iterator[tuple[str, bool, bool]]:
    """(name, is a folder, is a file) of what a folder holds."""
    if not files.is_remote(path):
        with os.scandir(path) as entries:
            yield from ((entry.name, *_kind(entry)) for entry in entries)
        return
    place = files.address(path)
    with files.reaching(place, "list"):
        for entry in files.file_system(place).ls(place, detail=True):
            inside, name = entry["name"].rstrip("/").rsplit("/", 1)
            if place.endswith(f"://{inside}"):  # Some tools also make an object for the folder.
                yield name, entry["type"] == "directory", entry["type"] == "file"


def _kind(entry: os.DirEntry) -> tuple[bool, bool]:
    """(is a folder, is a file); a link that leads nowhere counts as a file, a device as neither."""
    try:
        is_folder = entry.is_dir()
        return is_folder, not is_folder and (entry.is_file() or not os.path.exists(entry.path))
    except OSError:  # Such as a link to itself.
        return False, True


def class_folders(root: str) -> dict[str, list[str]]:
    """Returns the image files of every class folder, {class: sorted names}, in the order of labels.

    That is the order of `classes.txt` where there is one, else of the names, with numbers in them
    by value: 2 before 10.

    Args:
        root: holds one subfolder per class, with images directly in it.

    Raises:
        NotFoundError: no such folder, or no subfolders in it.
        ConfigError: images elsewhere, a class without images, a folder that cannot be listed, or
            a `classes.txt` that does not list the subfolders.
    """
    if not root or not files.is_dir(root):
        packed = ", but a file, which may have to be unpacked" * bool(root and files.exists(root))
        raise NotFoundError(
            f"no image folder {root!r}{packed}: expected folder:PATH with one subfolder per class"
        )
    listing = list_folder(root)
    left_out = [os.path.join(root, name) for name in listing.left_out]
    if listing.images:
        raise ConfigError(
            f"{root} holds images outside of a class folder (such as {listing.images[0]}): "
            "move them into one subfolder per class"
        )
    for path in (os.path.join(root, name) for name in listing.others):
        if os.path.islink(path) and not os.path.exists(path):
            raise ConfigError(
                f"{path} is a link to {os.readlink(path)}, which is not there: mount or copy that "
                "class folder, or remove the link"
            )
    if not listing.folders:
        found = f"holds no folders but {listing.others[0]}" if listing.others else "is empty"
        raise NotFoundError(f"{root} {found}: expected one subfolder per class")
    check_distinct(listing.folders, root)
    classes = {}
    for name in _in_order(root, listing.folders):
        where = os.path.join(root, name)
        folder = list_folder(where)
        left_out += [os.path.join(where, other) for other in folder.left_out]
        _check_class(where, folder)
        classes[name] = folder.images
    _notice(root, left_out)
    return classes


def _check_class(where: str, folder: Folder) -> None:
    if folder.folders:
        raise ConfigError(
            f"class folder {where} holds folders (such as {folder.folders[0]}): images must be "
            f"directly in it; if {os.path.basename(where)!r} is a split, use the source "
            f"folder:{where}"
        )
    if not folder.images:
        others = f", but files such as {folder.others[0]}" if folder.others else ""
        raise ConfigError(
            f"class folder {where} holds no images{others}: add images or remove the folder "
            "(read, by suffix, are JPEG, PNG, WebP, AVIF, HEIC, BMP, GIF, TIFF, PPM and JPEG 2000)"
        )
    if folder.others:
        logging.warning(
            "%s: %d files are not images by suffix and are left out, such as %s",
            where,
            len(folder.others),
            folder.others[0],
        )


def _in_order(root: str, names: Sequence[str]) -> list[str]:
    """The class folders `names`, sorted as text, in the order of labels."""
    path = os.path.join(root, CLASSES_FILE)
    if not files.exists(path):
        ordered = natural_order(names)
        if ordered != list(names):
            first = next(i for i, name in enumerate(names) if ordered[i] != name)
            logging.warning(
                "%s: the numbers in class names are ordered by value: label %d is %r, not %r; "
                "for another order list the names in %s, one per line",
                root,
                first,
                ordered[first],
                names[first],
                path,
            )
        return ordered
    try:
        lines = files.read_bytes(path).decode("utf-8-sig").splitlines()
        there = {as_typed(name): name for name in names}
        listed = [there.get(as_typed(line), line.strip()) for line in lines if line.strip()]
    except BucketError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}; expected UTF-8 text") from error
    if len(set(listed)) < len(listed):
        twice = next(name for i, name in enumerate(listed) if name in listed[:i])
        raise ConfigError(f"{path} lists {twice!r} twice: list every class folder once")
    problems = [f"it lacks the folder {name!r}" for name in names if name not in listed]
    problems += [f"there is no folder {name!r}" for name in listed if name not in names]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ConfigError(
            f"{path} does not list the class folders: {'; '.join(problems[:3])}{more}; write one "
            "folder name per line, in the order of the labels"
        )
    return listed


def as_typed(name: str) -> str:
    """Returns a name as people type it: with its accents in one form, no space at its ends."""
    return unicodedata.normalize("NFC", name).strip()


def check_distinct(names: Sequence[str], where: str | os.PathLike[str]) -> None:
    """Raises ConfigError if two class names are typed the same."""
    twice = [name for name, count in Counter(map(as_typed, names)).items() if count > 1]
    if twice:
        raise ConfigError(f"{where}: two classes have the name {twice[0]!r}: rename one of them")


def natural_order(names: Sequence[str]) -> list[str]:
    """Returns names sorted as text, but the numbers in them by value: 1, 2, 10."""
    by_value = lambda name: re.sub("[0-9]+", lambda number: number[0].zfill(255), name)  # noqa: E731
    return sorted(names, key=lambda name: (by_value(name), name))


def find_images(root: str | os.PathLike) -> list[str]:
    """Returns every image below a folder, at any depth, in the order of the relative paths.

    A link that leads back to a folder above it is not followed.

    Returns:
        paths relative to `root`.

    Raises:
        ConfigError: a folder that cannot be listed.
    """
    root, left_out = os.fspath(root), []

    images: list[str] = []
    waiting: list[tuple[str, frozenset[str]]] = [("", frozenset())]  # and the folders above
    while waiting:
        folder, above = waiting.pop()
        here = os.path.join(root, folder)
        real = here if files.is_remote(here) else os.path.realpath(here)
        if real in above:
            continue
        found = list_folder(here)
        left_out.extend(os.path.join(here, name) for name in found.left_out)
        images.extend(os.path.join(folder, name) for name in found.images)
        waiting.extend((os.path.join(folder, name), above | {real}) for name in found.folders)
    images.sort(key=lambda path: path.split(os.sep))
    _notice(root, left_out)
    return images


def _notice(root: str, left_out: Sequence[str]) -> None:
    if left_out:
        logging.warning(
            "%s: %d hidden or system entries are left out, such as %s",
            root,
            len(left_out),
            left_out[0],
        )
