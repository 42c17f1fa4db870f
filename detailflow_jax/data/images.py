"""Image files to RGB pictures, decoded whole or, for large JPEGs, at a half, quarter or eighth."""

import contextlib
import dataclasses
import errno
import functools
import importlib
import io
import os
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageFile

from detailflow_jax.data.errors import UnreadableImage
from detailflow_jax.runtime import files
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.runtime.retry import read_again

MAX_PIXELS = "DETAILFLOW_MAX_PIXELS"
"""Environment variable: larger images are not decoded whole, as a guard against faked sizes."""
_MAX_PIXELS = 178_956_970  # Pillow's own limit.

# Only these: some of Pillow's other readers start programs (EPS) or accept almost any bytes.
_WANTED = ("JPEG", "MPO", "JPEG2000", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "PPM")
_PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_avif": None}  # Used if installed.
_DRAFTED = ("JPEG", "MPO")  # What can be decoded at a fraction of its size.
_EXIF_AS_WRITTEN = (*_DRAFTED, "PNG", "WEBP")  # The readers of others turn some images themselves.
_ORIENTED = (b"Raw profile type exif", b"XML:com.adobe.xmp")  # Texts of PNG with an orientation.
# Of JPEG: what follows this marker are pixels; APP0 to APP15 and comments lie beside them.
_SCAN, _ADOBE, _BESIDE = 0xDA, 0xEE, (*range(0xE0, 0xF0), 0xFE)
_TURNS = {  # EXIF orientation -> what makes the image upright.
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ONE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
_ORIENTATION, _SHORT = 0x0112, 3  # The EXIF tag and its type, one number; 1 is upright.
_PNG_DEPTH = 24  # Where a PNG says how many bits a channel has.
_LARGEST_REDUCTION = 8  # Of a JPEG block, which has 8 x 8 coefficients.


@dataclasses.dataclass(frozen=True)
class Picture:
    """A decoded RGB image; it stays with Pillow between decoding and cropping, uncopied.

    `size` is the (width, height) of the image as it was encoded. `pixels` covers it with
    `reduction` times fewer pixels per side, rounded up, so the last row and column may be partly
    outside of it; with reduction 1 they are the image itself.
    """

    pixels: Image.Image
    size: tuple[int, int]
    reduction: int = 1

    @property
    def extent(self) -> tuple[float, float]:
        """(width, height) of the image in units of `pixels`."""
        return self.size[0] / self.reduction, self.size[1] / self.reduction

    @classmethod
    def of(cls, image: "np.ndarray | Picture") -> "Picture":
        """The picture of uint8 RGB [H, W, 3]; a Picture is returned as it is."""
        if isinstance(image, cls):
            return image
        pixels = Image.fromarray(image)
        return cls(pixels, pixels.size)


def read_file(path: str | os.PathLike) -> bytes:
    """Returns the bytes of an image file; a fault that may pass is tried again.

    Raises:
        UnreadableImage: this file is at fault, such as a link that leads nowhere.
        OSError: the disk or the network is.
    """
    try:
        return read_again(lambda: files.read_bytes(path, pipes=True), os.fspath(path))
    except OSError as error:
        if error.errno not in _ONE_FILE and not isinstance(error, FileNotFoundError):
            raise
        raise UnreadableImage(os.fspath(path), str(error)) from error


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes one encoded image to uint8 [H, W, 3] RGB; see `decode_picture`."""
    return np.asarray(decode_picture(data, name).pixels)


def decode_picture(
    data: bytes, name: str, *, reduce_to: int | None = None, upright: bool = True
) -> Picture:
    """Decodes one encoded image.

    The first frame of an animation is taken, transparency is laid over white, 16-bit grey is
    scaled to 8 bits, CMYK and palettes are converted. The one transparent colour of a PNG with 16
    bits per channel (tRNS) stays as it is: Pillow reads 8 of these bits.

    Args:
        data: the file's bytes.
        name: goes into the error.
        reduce_to: where the short side may be halved and stay at least so long, a JPEG is decoded
            at a half, a quarter or an eighth of its size; cheaper, and not quite the same as
            halving by averages (docs/imagenet.md). None: whole, except for a JPEG of more than
            179 megapixels (`MAX_PIXELS`).
        upright: turn the image as its EXIF orientation says.

    Raises:
        UnreadableImage: not an image, truncated, broken, too large, or of a pixel type without a
            defined range (32-bit integers beyond 16 bits, floating point).
    """
    first = None
    for beside in ("all", "orientation", "nothing"):
        try:
            return _decode(_trimmed(data, beside), reduce_to, upright)
        except (MemoryError, ConfigError):
            raise
        except Exception as error:  # On broken bytes Pillow's readers raise almost any class.
            first = first or error
            if _trimmed(data, "nothing") == data:  # There is nothing beside the pixels.
                break
    reason = f"{type(first).__name__}: {str(first) or 'the file is damaged'}"
    if isinstance(first, Image.UnidentifiedImageError):
        begins = f"it begins with {data[:40]!r}" if data else "the file is empty"
        reason = f"not an image of {', '.join(_formats())}, or its header is damaged: {begins}"
        if data[4:8] == b"ftyp" and "HEIF" not in _formats():
            reason += "; HEIC needs the package pillow-heif: pip install pillow-heif"
    raise UnreadableImage(name, reason) from first


def _decode(data: bytes, reduce_to: int | None, upright: bool) -> Picture:
    # Globals of Pillow. A half-grey image must never pass as whole, whatever other libraries set;
    # and `_check_pixels` is the guard here, since Pillow's would refuse what a draft can read.
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        size, reduction = image.size, _too_large(image)
        # Only of a JPEG: to tell the orientation, Pillow decodes the pixels of a PNG.
        turned = upright and image.format in _DRAFTED and _orientation(image) != 1
        if reduce_to is not None and image.format == "JPEG" and not turned:
            reduction = max(reduction, _reduction(size, reduce_to))
        if reduction > 1:
            reduction = _draft(image, reduction)
        _check_pixels(image)
        image.load()
        if image.format == "PNG" and image.mode == "RGB" and data[_PNG_DEPTH] == 16:
            # Pillow keeps 8 of the 16 bits, which cannot tell the transparent colour from others.
            image.info.pop("transparency", None)
        turn = _TURNS.get(_orientation(image)) if upright else None
        if turn is not None:  # Not of a TIFF, which Pillow has turned while it was loaded.
            # Not ImageOps.exif_transpose: it writes the EXIF again, and fails on malformed tags.
            image = image.transpose(turn)
        if reduction == 1 or turned:
            return Picture(_to_rgb(image), image.size)
        return Picture(_to_rgb(image), size, reduction)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats that this installation of Pillow and its plugins reads."""
    # Pillow warns of odd EXIF and the like without the file's name; what can be read is read.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.init()
    for package, register in _PLUGINS.items():
        with contextlib.suppress(ImportError):
            module = importlib.import_module(package)
            if register:
                getattr(module, register)()
    return tuple(name for name in (*_WANTED, "HEIF") if name in Image.OPEN)


def _orientation(image: Image.Image) -> object:
    """The EXIF orientation as it is written; 1, upright, where it is absent or cannot be read."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # Broken EXIF raises almost any class.
        found = None
    if not found and image.format in _EXIF_AS_WRITTEN:
        found = _written_orientation(image.info.get("exif", b""))
    return found or 1


def _written_orientation(exif: bytes) -> int | None:
    """The orientation in the first table of an EXIF block, whatever is wrong with the other tags.

    Pillow before version 13 leaves a table at the first tag whose value lies beyond the end.
    """
    block = exif.removeprefix(b"Exif\0\0")
    order = ">" if block.startswith(b"MM") else "<"
    try:
        (table,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, table)
        for place in range(table + 2, table + 2 + 12 * count, 12):
            tag, *kind, value = struct.unpack_from(f"{order}HHIH", block, place)
            if tag == _ORIENTATION and kind == [_SHORT, 1]:
                return value
    except struct.error:  # The table ends early, or there is none.
        pass
    return None


def _trimmed(data: bytes, beside: str) -> bytes:
    """A JPEG or PNG with "all", only the "orientation" or "nothing" of what lies beside its pixels.

    Texts, profiles and the like may be malformed, or larger than Pillow accepts. What is damaged by
    the checksums of a PNG stays, to be noticed.
    """
    if beside == "all":
        return data
    orientation = beside == "orientation"
    if data.startswith(b"\x89PNG"):
        return _trimmed_png(data, orientation)
    return _trimmed_jpeg(data, orientation) if data.startswith(b"\xff\xd8") else data


def _trimmed_png(data: bytes, orientation: bool) -> bytes:
    kept, start = [data[:8]], 8
    while start + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[start : start + 8])
        end = start + length + 12
        is_whole = struct.pack(">I", zlib.crc32(data[start + 4 : end - 4])) == data[end - 4 : end]
        keyword = data[start + 8 : end].partition(b"\0")[0]
        turns = kind == b"eXIf" or (orientation and keyword in _ORIENTED)
        # An upper-case initial means that the pixels need it.
        if kind[:1].isupper() or kind == b"tRNS" or turns or not is_whole:
            kept.append(data[start:end])
        start = end
    return b"".join(kept)


def _trimmed_jpeg(data: bytes, orientation: bool) -> bytes:
    kept, start = [data[:2]], 2
    while start + 4 <= len(data) and data[start] == 0xFF and data[start + 1] != _SCAN:
        kind, end = data[start + 1], start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        content = data[start + 4 : end]
        turns = orientation and content.startswith(b"Exif\0")
        # Adobe's segment tells the colours, if it is a whole one.
        colours = kind == _ADOBE and content.startswith(b"Adobe") and len(content) >= 12
        if end > len(data) or kind not in _BESIDE or turns or colours:
            kept.append(data[start:end])
        start = end
    return b"".join([*kept, data[start:]])


def _max_pixels() -> int:
    text = os.environ.get(MAX_PIXELS) or str(_MAX_PIXELS)
    if not text.isdecimal():
        raise ConfigError(f"{MAX_PIXELS}={text!r} in the environment: expected a number of pixels")
    return int(text)


def _check_pixels(image: Image.Image) -> None:
    width, height = image.size
    if width * height > _max_pixels():
        raise ValueError(
            f"{width}x{height} are {width * height / 1e6:.0f} megapixels; save it smaller, or as "
            f"JPEG, which is read at a fraction of its size, or set {MAX_PIXELS}={width * height}"
        )


def _too_large(image: Image.Image) -> int:
    """The least reduction with which a JPEG is not too large; 1 where none helps."""
    pixels = image.size[0] * image.size[1] / _max_pixels()
    possible = (2, 4, _LARGEST_REDUCTION) if image.format in _DRAFTED else ()
    return next((r for r in (1, *possible) if pixels <= r * r), 1)


def _reduction(size: tuple[int, int], short: int) -> int:
    """The largest reduction that keeps a short side of at least `short`."""
    reduction = 1
    while min(size) // (2 * reduction) >= short and reduction < _LARGEST_REDUCTION:
        reduction *= 2
    return reduction


def _draft(image: Image.Image, reduction: int) -> int:
    """Asks a JPEG for pixels reduced by `reduction`; returns by how much they will be."""
    width, height = image.size
    drafted = image.draft(None, (width // reduction, height // reduction))
    return round(width / drafted[1][2]) if drafted else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; save it with 8 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        clear = image.info.get("transparency", -1)  # a grey value, of a PNG
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit pixels have no defined range; save it with 8 or 16 bits")
        scaled = np.where(grey == clear, 255, np.round(grey / 257)).astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
