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

import numpy as np

from detailflow_jax.data.errors import UnreadableImage
from detailflow_jax.data.folders import find_images
from detailflow_jax.data.images import decode_picture, read_file
from detailflow_jax.data.pipeline import iterate_crops
from detailflow_jax.data.sources import Source
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.runtime.files import atomic_file

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
    """Raises EvaluationError where the block finds an `.npz` missing or damaged."""
    try:
        yield
    except FileNotFoundError as error:
        raise EvaluationError(f"{name}: {missing}") from error
    except EvaluationError:
        raise
    except (zipfile.BadZipFile, EOFError, ValueError, KeyError, NotImplementedError) as error:
        raise EvaluationError(f"{name} is damaged ({error}): {damaged}") from error


def read_arrays(
    path: str | os.PathLike, names: Iterable[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Those of the named arrays that an `.npz` holds, and the names of all that it holds.

    Raises:
      EvaluationError: not an `.npz`, or truncated.
    """
    with readable(path), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names if name in file.files}, list(file.files)


def hash_file(path: str | os.PathLike) -> str:
    """A hash of a file's bytes, such as "file:0123456789abcdef"."""
    with open(path, "rb") as file:
        return f"file:{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"


# ---------------------------------------------------------------------------------- sets of images


class NpzImages:
    """`arr_0` of an `.npz`, read as a stream: `len()` images of `shape` [H, W, 3]."""

    def __init__(self, path: str | os.PathLike):
        """Reads the headers.

        Raises:
          EvaluationError: not an `.npz`, truncated, or `arr_0` is missing or not images.
        """
        self.name = str(path)
        with readable(path), zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" not in names:
                raise EvaluationError(
                    f"{path} holds {', '.join(names) or 'nothing'}: expected arr_0, uint8 "
                    "[N, H, W, 3], as the guided-diffusion evaluator reads it"
                )
            with archive.open("arr_0.npy") as member:
                shape, dtype = _read_header(member)
        if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or not shape[0]:
            raise EvaluationError(
                f"{path}: arr_0 is {dtype} {list(shape)}, expected uint8 [N, H, W, 3] with N > 0; "
                "images in [-1, 1] become uint8 by clip(127.5 * x + 128, 0, 255)"
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
        size = int(np.prod(self.shape))
        with readable(self.name):
            # One stream for all calls: to find a place, a member is read from its beginning.
            if self._member is None or start < self._next:
                self._member = zipfile.ZipFile(self.name).open("arr_0.npy")  # noqa: SIM115
                self._next = 0
                _read_header(self._member)
            self._member.seek((start - self._next) * size, io.SEEK_CUR)
            data = self._member.read((stop - start) * size)
            if len(data) != (stop - start) * size:
                raise EOFError(f"arr_0 ends within images {start} to {stop}")
        self._next = stop
        return np.frombuffer(data, np.uint8).reshape(-1, *self.shape)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the whole file."""
        return hash_file(self.name)


def _read_header(member) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read = getattr(np.lib.format, f"read_array_header_{version[0]}_0", None)
    if read is None:
        raise ValueError(f"npy version {version}")
    shape, fortran_order, dtype = read(member)
    if fortran_order and len(shape) > 1:
        raise ValueError("arr_0 is in Fortran order")
    return shape, dtype


class PictureSource(Source):
    """Pictures below a folder, with or without subfolders, by their relative names; no labels."""

    class_names = ("",)

    def __init__(self, path: str | os.PathLike):
        """Lists the files.

        Raises:
          EvaluationError: no such folder, or no pictures in it.
        """
        self.name = str(path)
        self._root = pathlib.Path(path).expanduser()
        if not self._root.is_dir():
            raise EvaluationError(f"{path}: there is no such folder or .npz file")
        self._files = find_images(self._root)
        if not self._files:
            raise EvaluationError(f"{path} holds no pictures: expected PNG or JPEG files")

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int, reduce_to: int | None = None) -> dict:
        """One picture; raises UnreadableImage where it cannot be read."""
        file = self._root / self._files[index]
        try:
            data = read_file(file)
        except OSError as error:
            raise UnreadableImage(str(file), str(error)) from error
        picture = decode_picture(data, str(file), reduce_to=reduce_to)
        return {"image": picture, "label": 0, "name": str(file)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash over every file's relative name, size and time of change."""
        digest = hashlib.sha256()
        for name in self._files:
            file = self._root / name
            stat = file.stat() if file.exists() else file.lstat()  # A link may lead nowhere.
            line = f"{pathlib.PurePath(name).as_posix()}\t{stat.st_size}\t{stat.st_mtime_ns}\n"
            digest.update(os.fsencode(line))
        return f"pictures:{digest.hexdigest()[:16]}"


class SourceImages:
    """A source of images, each reduced and centre-cropped to size x size.

    Without a size, all must have the size of the first.
    """

    def __init__(self, source: Source, size: int | None = None):
        """Looks at the first image.

        Raises:
          EvaluationError: without a size, if the first image cannot be read.
        """
        self.name, self._source, self._size = source.name, source, size
        self.shape: tuple[int, ...] | None = None
        self.shape = (size, size, 3) if size else self.original(0).shape

    def __len__(self) -> int:
        return len(self._source)

    def original(self, index: int) -> np.ndarray:
        """One image as it is stored: uint8 [H, W, 3].

        Raises:
          EvaluationError: it cannot be read, or has not the size that all must have.
        """
        try:
            example = self._source[index]
        except UnreadableImage as error:
            raise self._unreadable(index, error) from error
        image, shape = example["image"], self.shape
        if not self._size and shape not in (None, image.shape):
            raise EvaluationError(
                f"{example.get('name', f'{self.name}: image {index}')} is {image.shape[1]}x"
                f"{image.shape[0]} px, the first one {shape[1]}x{shape[0]}: expected one size"
            )
        return image

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start .. stop - 1: uint8 [n, H, W, 3].

        Raises:
          EvaluationError: an image that cannot be read, or is of another size than the first.
        """
        if not self._size:
            return np.stack([self.original(index) for index in range(start, stop)])
        images = []
        for index, found in iterate_crops(self._source, range(start, stop), self._size, "center"):
            if isinstance(found, UnreadableImage):
                raise self._unreadable(index, found)
            images.append(found["crops"][0])
        return np.stack(images)

    def _unreadable(self, index: int, error: UnreadableImage) -> EvaluationError:
        return EvaluationError(
            f"{self.name}: cannot read image {index}: {error}; replace or remove it, since the "
            "score of the others would not be the score of the set"
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the source, and of the size."""
        return f"{self._source.fingerprint}:{self._size}"


Images = NpzImages | SourceImages


def open_samples(path: str | os.PathLike) -> Images:
    """The images of an `.npz` file or of a folder of pictures."""
    if str(path).endswith(".npz") or pathlib.Path(path).is_file():
        return NpzImages(path)
    return SourceImages(PictureSource(path))
