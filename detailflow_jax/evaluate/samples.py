"""Sets of images on disk: the guided-diffusion `.npz`, a folder of pictures, a data source.

The `.npz` holds `arr_0`, uint8 [N, H, W, 3]. At 50,000 images of 256 px that is 10 GB, so it is
read and written as a stream.
"""

import contextlib
import hashlib
import io
import os
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from detailflow_jax.data.errors import UnreadableImage
from detailflow_jax.data.folders import find_images
from detailflow_jax.data.images import decode_image, read_file
from detailflow_jax.data.pipeline import iterate_crops
from detailflow_jax.data.sources import Source
from detailflow_jax.data.transforms import center_crop
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.runtime.files import atomic_file

_BLOCK = 1 << 24  # bytes hashed at a time
_WHY_ALL = "replace or remove it, for the score of the others would not be the score of the set"


# ------------------------------------------------------------------------------------------ writing


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


# ------------------------------------------------------------------------------------------ reading


class NpzImages:
    """`arr_0` of an `.npz`, read as a stream.

    `len()` images of `shape` [H, W, 3]; `other` names the further arrays of the file.
    """

    def __init__(self, path: str | os.PathLike):
        """Reads the headers.

        Raises:
          EvaluationError: not an `.npz`, truncated, or `arr_0` is missing or not images.
        """
        self.name = str(path)
        with _readable(self.name), zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if "arr_0" not in names:
                raise EvaluationError(
                    f"{path} holds {', '.join(names) or 'nothing'}: expected arr_0, uint8 "
                    "[N, H, W, 3], as the guided-diffusion evaluator reads it"
                )
            with archive.open("arr_0.npy") as member:
                shape, dtype = _read_header(member)
                if np.issubdtype(dtype, np.floating):
                    _refuse_floats(self.name, member, shape, dtype)
        if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or not shape[0]:
            raise EvaluationError(
                f"{path}: arr_0 is {dtype} {list(shape)}, expected uint8 [N, H, W, 3] with N > 0"
            )
        self._length, self.shape = shape[0], tuple(shape[1:])
        self._member, self._next = None, 0

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start .. stop - 1: uint8 [n, H, W, 3]; quick where calls go forward.

        Raises:
          EvaluationError: the file ends early or is damaged.
        """
        size = int(np.prod(self.shape))
        with _readable(self.name):
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

    @property
    def fingerprint(self) -> str:
        """A hash of the whole file."""
        return hash_file(self.name)


def read_arrays(path: str | os.PathLike, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an `.npz` holds.

    Raises:
      EvaluationError: not an `.npz`, or truncated.
    """
    with _readable(str(path)), np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in names if name in file.files}


def array_names(path: str | os.PathLike) -> list[str]:
    """Names of the arrays that an `.npz` holds.

    Raises:
      EvaluationError: not an `.npz`, or truncated.
    """
    with _readable(str(path)), np.load(path, allow_pickle=False) as file:
        return list(file.files)


def hash_file(path: str | os.PathLike) -> str:
    """A hash of a file's bytes, such as "file:0123456789abcdef"."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return f"file:{digest.hexdigest()[:16]}"


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns what the readers of damaged files raise into one clear error."""
    try:
        yield
    except FileNotFoundError as error:
        raise EvaluationError(f"{name}: there is no such file") from error
    except EvaluationError:
        raise
    except (zipfile.BadZipFile, EOFError, ValueError, KeyError, NotImplementedError) as error:
        raise EvaluationError(
            f"{name} cannot be read ({error}): it is truncated or not an .npz; copy or make it "
            "again"
        ) from error


def _read_header(member) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(member)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ValueError(f"npy version {version}")
    shape, fortran_order, dtype = read[version](member)
    if fortran_order and len(shape) > 1:
        raise ValueError("arr_0 is in Fortran order")
    return shape, dtype


def _refuse_floats(name: str, member, shape: Sequence[int], dtype: np.dtype) -> None:
    first = np.frombuffer(member.read(int(np.prod(shape[1:])) * dtype.itemsize), dtype)
    found = "NaN or infinity" if not np.isfinite(first).all() else "floating-point numbers"
    raise EvaluationError(
        f"{name}: arr_0 is {dtype} and holds {found}: expected uint8 images in 0..255; convert "
        "them with clip(127.5 * x + 128, 0, 255) from [-1, 1]"
    )


class PictureImages:
    """PNG, JPEG or other picture files below a folder, in the order of their relative names.

    With `size` each picture is reduced and centre-cropped to size x size; without it all must
    have the size of the first.
    """

    def __init__(self, path: str | os.PathLike, size: int | None = None):
        """Lists the files.

        Raises:
          EvaluationError: no such folder, or no pictures in it.
        """
        self.name, self._size = str(path), size
        root = pathlib.Path(path).expanduser()
        if not root.is_dir():
            raise EvaluationError(f"{path}: there is no such folder or .npz file")
        self._files = [root / file for file in find_images(root)]
        self._root = root
        if not self._files:
            raise EvaluationError(f"{path} holds no pictures: expected PNG or JPEG files")
        self.shape = (size, size, 3) if size else self.original(0).shape

    def __len__(self) -> int:
        return len(self._files)

    def original(self, index: int) -> np.ndarray:
        """One picture as it is in the file: uint8 [H, W, 3].

        Raises:
          EvaluationError: it cannot be read.
        """
        file = self._files[index]
        try:
            return decode_image(read_file(file), str(file))
        except (UnreadableImage, OSError) as error:
            raise EvaluationError(f"cannot read a picture: {error}; {_WHY_ALL}") from error

    def read(self, start: int, stop: int) -> np.ndarray:
        """Pictures start .. stop - 1: uint8 [n, H, W, 3].

        Raises:
          EvaluationError: a picture of another size, or one that cannot be read.
        """
        images = []
        for index in range(start, stop):
            image = self.original(index)
            images.append(center_crop(image, self._size) if self._size else image)
            if images[-1].shape != self.shape:
                raise EvaluationError(
                    f"{self._files[index]} is {image.shape[1]}x{image.shape[0]} px, the pictures "
                    f"before it {self.shape[1]}x{self.shape[0]}: expected one size"
                )
        return np.stack(images)

    @property
    def fingerprint(self) -> str:
        """A hash over every file's relative name, size and time of change."""
        digest = hashlib.sha256()
        for file in self._files:
            stat = file.lstat() if not file.exists() else file.stat()  # A link may lead nowhere.
            name = file.relative_to(self._root).as_posix()
            digest.update(os.fsencode(f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}\n"))
        return f"pictures:{digest.hexdigest()[:16]}"


class SourceImages:
    """A labelled data source, each image reduced and centre-cropped to size x size."""

    def __init__(self, source: Source, size: int):
        self.name, self.shape, self._source = source.name, (size, size, 3), source
        self.fingerprint = f"{source.fingerprint}:{size}"

    def __len__(self) -> int:
        return len(self._source)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start .. stop - 1: uint8 [n, size, size, 3].

        Raises:
          EvaluationError: an image that cannot be read.
        """
        images = []
        crops = iterate_crops(self._source, range(start, stop), self.shape[0], "center")
        for position, example in crops:
            if isinstance(example, UnreadableImage):
                raise EvaluationError(
                    f"{self.name}: cannot read image {position}: {example}; {_WHY_ALL}"
                )
            images.append(example["crops"][0])
        return np.stack(images)


def open_samples(path: str | os.PathLike) -> NpzImages | PictureImages:
    """The images of an `.npz` file or of a folder of pictures."""
    if str(path).endswith(".npz") or pathlib.Path(path).is_file():
        return NpzImages(path)
    return PictureImages(path)
