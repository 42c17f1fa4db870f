"""Sets of images on disk: the guided-diffusion `.npz`, a folder of pictures, a data source.

The `.npz` holds `arr_0`, uint8 [N, H, W, 3]. At 50,000 images of 256 px that is 10 GB, so it is
read and written as a stream.
"""

import contextlib
import functools
import hashlib
import io
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from detailflow_jax.data.errors import UnreadableImage, printable, report_skipped
from detailflow_jax.data.folders import find_images
from detailflow_jax.data.images import decode_picture, read_file
from detailflow_jax.data.pipeline import iterate_crops
from detailflow_jax.data.sources import SHIPPED, Source
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.runtime import files
from detailflow_jax.runtime.errors import ReadError, UserError
from detailflow_jax.runtime.files import atomic_file
from detailflow_jax.runtime.retry import is_passing

# ------------------------------------------------------------------------------------ .npz files


def write_npz(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays as an `.npz`, atomically."""
    with atomic_file(path) as file:
        np.savez(file, **arrays)


def write_samples(
    path: str | os.PathLike, shape: Sequence[int], parts: Iterable[np.ndarray]
) -> None:
    """Writes images as the guided-diffusion evaluator reads them, part by part, atomically.

    Args:
      path: of the `.npz`.
      shape: (N, H, W, 3) of the whole.
      parts: uint8 [n, H, W, 3] in order, N images together.

    Raises:
      EvaluationError: the parts do not add up to the shape.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": tuple(int(n) for n in shape)}
    written = 0
    with (
        atomic_file(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
        # The size is not known when the member starts, hence the large header.
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for part in parts:
            if part.dtype != np.uint8 or tuple(part.shape[1:]) != tuple(shape[1:]):
                raise EvaluationError(f"a part is {part.dtype} {part.shape}, expected {shape}")
            member.write(np.ascontiguousarray(part).data)
            written += len(part)
        if written != shape[0]:
            raise EvaluationError(f"{written} images were given, expected {shape[0]}")


@contextlib.contextmanager
def readable(
    name: str | os.PathLike,
    missing: str = "there is no such file",
    damaged: str = "it is truncated or not an .npz; copy or make it again",
) -> Iterator[None]:
    """Raises EvaluationError where the block finds an `.npz` missing or damaged.

    One that cannot be read now is a ReadError or, in a bucket, a BucketError.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise EvaluationError(f"{name}: {missing}") from error
    except OSError as error:
        kind = ReadError if is_passing(error) else EvaluationError
        raise kind(f"cannot read {name}: {error}") from error
    except (zipfile.BadZipFile, EOFError, ValueError, KeyError, NotImplementedError) as error:
        raise EvaluationError(f"{name} is damaged ({error}): {damaged}") from error


def read_arrays(
    path: str | os.PathLike, names: Iterable[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Those of the named arrays that an `.npz` holds, and the names of all that it holds.

    Raises:
      EvaluationError: not an `.npz`, or truncated.
    """
    with readable(path), files.open_file(path) as opened, np.load(opened) as file:
        return {name: file[name] for name in names if name in file.files}, list(file.files)


def hash_file(path: str | os.PathLike) -> str:
    """A hash of a file's bytes, such as "file:0123456789abcdef"."""
    with files.open_file(path) as file:
        return f"file:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


# ---------------------------------------------------------------------------------- sets of images


class Part(NamedTuple):
    """Some images of a set.

    Attributes:
      images: those that can be read, uint8 [n, H, W, 3].
      positions: their positions in the set, int32 [n].
      unreadable: names of the others and the reasons.
    """

    images: np.ndarray
    positions: np.ndarray
    unreadable: list[str]


class NpzImages:
    """`arr_0` of an `.npz`, read as a stream: `len()` images of `shape` [H, W, 3]."""

    def __init__(self, path: str | os.PathLike):
        """Reads the headers.

        Raises:
          EvaluationError: not an `.npz`, truncated, or `arr_0` is missing or not images.
        """
        self.name = str(path)
        with readable(path), files.open_file(path) as file, zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" not in names:
                raise EvaluationError(
                    f"{path} holds {', '.join(names) or 'nothing'}: expected arr_0, uint8 "
                    "[N, H, W, 3], as the guided-diffusion evaluator reads it"
                )
            with archive.open("arr_0.npy") as member:
                shape, dtype, self._in_memory = _read_header(member)
        if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or 0 in shape:
            raise EvaluationError(
                f"{path}: arr_0 is {dtype} {list(shape)}, expected uint8 [N, H, W, 3] with N > 0"
                f"{_how_to_mend(shape, dtype)}"
            )
        self._length, self.shape = shape[0], tuple(shape[1:])
        self._member, self._next = None, 0

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start .. stop - 1: uint8 [n, H, W, 3]; fast where calls go forward.

        Raises:
          EvaluationError: the file ends early or is damaged.
        """
        with readable(self.name):
            images = self._whole[start:stop] if self._in_memory else self._read_on(start, stop)
        if start == 0 and images.max(initial=0) <= 1:
            logging.warning(
                "%s: no pixel of the first %d images is above 1; images in [0, 1] become uint8 by "
                "clip(255 * x, 0, 255)",
                self.name,
                stop,
            )
        return images

    def _read_on(self, start: int, stop: int) -> np.ndarray:
        size = int(np.prod(self.shape))
        # One stream for all calls: to find a place, a member is read from its beginning.
        if self._member is None or start < self._next:
            archive = zipfile.ZipFile(files.open_file(self.name))
            self._member = archive.open("arr_0.npy")
            self._next = 0
            _read_header(self._member)
        self._member.seek((start - self._next) * size, io.SEEK_CUR)
        data = self._member.read((stop - start) * size)
        if len(data) != (stop - start) * size:
            raise EOFError(f"arr_0 ends within images {start} to {stop}")
        self._next = stop
        return np.frombuffer(data, np.uint8).reshape(-1, *self.shape)

    def read_part(self, start: int, stop: int) -> Part:
        """Images start .. stop - 1, all of them readable."""
        return Part(self.read(start, stop), np.arange(start, stop, dtype=np.int32), [])

    @functools.cached_property
    def _whole(self) -> np.ndarray:
        """All images, of a file in Fortran order: there, an image's pixels lie far apart."""
        with files.open_file(self.name) as file, np.load(file) as arrays:
            return np.ascontiguousarray(arrays["arr_0"])

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the whole file."""
        return hash_file(self.name)


def _how_to_mend(shape: tuple[int, ...], dtype: np.dtype) -> str:
    """How an array x of such a shape and type becomes RGB images; it begins with a colon."""
    single, grey = len(shape) == 3 and shape[-1] in (3, 4), len(shape) == 3
    channels_first = len(shape) == 4 and shape[1] in (1, 3, 4) and shape[-1] not in (1, 3, 4)
    channels = 0 if len(shape) < 3 else shape[1 if channels_first else -1]
    steps = {
        "images become uint8 from [-1, 1] by clip(127.5 * x + 128, 0, 255), from [0, 1] by "
        "clip(255 * x, 0, 255)": dtype.kind == "f",
        "numbers from 0 to 255 become uint8 by x.astype('uint8')": dtype.kind in "iu"
        and dtype != np.uint8,
        "one image becomes a set of one by x[None]": single,
        "channels go last by moveaxis(x, 1, -1)": channels_first,
        "grey becomes RGB by stack([x, x, x], -1)": grey and not single,
        "grey becomes RGB by repeat(x, 3, -1)": not grey and channels == 1,
        "RGBA is laid over white by 255 - (255.0 - x[..., :3]) * (x[..., 3:] / 255), rounded to "
        "uint8": channels == 4 and (single or not grey),
    }
    wanted = "; ".join(step for step, needed in steps.items() if needed)
    return f": {wanted}" * bool(wanted)


def _read_header(member) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Shape and type of an `.npy`, and whether it is in Fortran order."""
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
        # It differs in the encoding of the names of fields, which images do not have.
        (3, 0): np.lib.format.read_array_header_2_0,
    }.get(version := np.lib.format.read_magic(member))
    if read is None:
        raise ValueError(f"npy version {version}")
    shape, fortran_order, dtype = read(member)
    return shape, dtype, fortran_order


class PictureSource(Source):
    """Pictures below a folder, with or without subfolders, by their relative names; no labels."""

    class_names = ("",)

    def __init__(self, path: str | os.PathLike):
        """Lists the files.

        Raises:
          EvaluationError: no such folder, or no pictures in it.
        """
        self.name = str(path)
        self._root = files.path(path)
        if not files.is_dir(self._root):
            if files.exists(self._root):
                raise EvaluationError(
                    f"{path} is a file: expected a folder of pictures or an .npz, which "
                    "np.savez(NEW, np.load(OLD)) makes of an .npy"
                )
            hint = f"; the images of a package are {path}:train and {path}:test"
            raise EvaluationError(
                f"{path}: there is no such folder or .npz file{hint * (str(path) in SHIPPED)}"
            )
        self._files = find_images(self._root)
        if not self._files:
            raise EvaluationError(f"{path} holds no pictures: expected PNG or JPEG files")

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int, reduce_to: int | None = None) -> dict:
        """One picture; raises UnreadableImage where it cannot be read."""
        file = self._root / self._files[index]
        picture = decode_picture(read_file(file), str(file), reduce_to=reduce_to)
        return {"image": picture, "label": 0, "name": str(file)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash over every file's relative name, size and time of change."""
        digest = hashlib.sha256()
        sizes = files.sizes(self._root) if files.is_remote(self._root) else {}
        for name in self._files:
            file = self._root / name
            if sizes:
                digest.update(os.fsencode(f"{name}\t{sizes[name]}\n"))
                continue
            stat = file.stat() if file.exists() else file.lstat()  # A link may lead nowhere.
            line = f"{pathlib.PurePath(name).as_posix()}\t{stat.st_size}\t{stat.st_mtime_ns}\n"
            digest.update(os.fsencode(line))
        return f"pictures:{digest.hexdigest()[:16]}"


class SourceImages:
    """A source of images, each reduced and centre-cropped to size x size.

    Without a size, all must have the size of the first. Images that cannot be read are skipped and
    named, as in training and extraction.
    """

    def __init__(self, source: Source, size: int | None = None):
        """Looks at the first image that can be read, if no size is given.

        Raises:
          EvaluationError: there is none.
        """
        self.name, self._source, self._size = source.name, source, size
        self.shape: tuple[int, ...] = (size, size, 3) if size else self.first(1)[0].shape

    def __len__(self) -> int:
        return len(self._source)

    def first(self, count: int) -> list[np.ndarray]:
        """The first images that can be read, as they are stored: uint8 [H, W, 3] each.

        Raises:
          EvaluationError: none can.
        """
        found = []
        for index in range(len(self)):
            try:
                found.append(self._source[index]["image"])
            except UnreadableImage as error:
                last = error
                report_skipped(error)
            if len(found) == count:
                break
        if not found:
            raise EvaluationError(
                f"{self.name}: none of its {len(self)} images can be read; the last is {last}"
            )
        return found

    def read(self, start: int, stop: int) -> np.ndarray:
        """Those of images start .. stop - 1 that can be read: uint8 [n, H, W, 3].

        Raises:
          EvaluationError: without a size, an image of another size than the first.
        """
        return self.read_part(start, stop).images

    def read_part(self, start: int, stop: int) -> Part:
        """Images start .. stop - 1, and the names of those that cannot be read; see `read`."""
        images, positions, unreadable = [], [], []
        for index, found in self._decoded(start, stop):
            if isinstance(found, UnreadableImage):
                report_skipped(found)
                unreadable.append(printable(str(found)))
            else:
                images.append(found)
                positions.append(index)
        stacked = np.stack(images) if images else np.zeros((0, *self.shape), np.uint8)
        return Part(stacked, np.array(positions, np.int32), unreadable)

    def _decoded(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray | UnreadableImage]]:
        if self._size:
            for index, found in iterate_crops(
                self._source, range(start, stop), self._size, "center"
            ):
                is_image = not isinstance(found, UnreadableImage)
                yield index, found["crops"][0] if is_image else found
            return
        for index in range(start, stop):
            try:
                example = self._source[index]
            except UnreadableImage as error:
                yield index, error
                continue
            image, shape = example["image"], self.shape
            if shape != image.shape:
                raise EvaluationError(
                    f"{example.get('name', f'{self.name}: image {index}')} is {image.shape[1]}x"
                    f"{image.shape[0]} px, the first one {shape[1]}x{shape[0]}: expected one size"
                )
            yield index, image

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the source, and of the size."""
        return f"{self._source.fingerprint}:{self._size}"


Images = NpzImages | SourceImages


def open_samples(path: str | os.PathLike) -> Images:
    """The images of an `.npz` file or of a folder of pictures, also as folder:PATH."""
    path = os.fspath(path).removeprefix("folder:")
    if path.endswith(".npz") or _is_zip(path):
        return NpzImages(path)
    return SourceImages(PictureSource(path))


def _is_zip(path: str) -> bool:
    if not files.exists(path) or files.is_dir(path):
        return False
    with readable(path), files.open_file(path) as file:
        return zipfile.is_zipfile(file)
