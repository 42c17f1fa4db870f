"""Image files to RGB pictures, decoded whole or, for large JPEGs, at a half, quarter or eighth."""

import dataclasses
import errno
import io
import os

import numpy as np
from PIL import Image, ImageFile, ImageOps

from detailflow_jax.data.errors import UnreadableImage

# Only these: some of Pillow's other readers start programs (EPS) or accept almost any bytes.
_WANTED = ("JPEG", "MPO", "JPEG2000", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "PPM")
Image.init()
_FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)  # This build of Pillow's.
_ONE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
_ORIENTATION = 0x0112  # The EXIF tag; 1 is upright.
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
    """Returns the bytes of an image file.

    Raises:
        UnreadableImage: this file is at fault, such as a link that leads nowhere.
        OSError: the disk or the network is.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno not in _ONE_FILE:
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
    scaled to 8 bits, CMYK and palettes are converted.

    Args:
        data: the file's bytes.
        name: goes into the error.
        reduce_to: where the short side may be halved and stay at least so long, a JPEG is decoded
            at a half, a quarter or an eighth of its size; cheaper, and not quite the same as
            halving by averages (docs/imagenet.md). None: always whole.
        upright: turn the image as its EXIF orientation says.

    Raises:
        UnreadableImage: not an image, truncated, broken, or of a pixel type without a defined
            range (32-bit integers beyond 16 bits, floating point).
    """
    # A global of Pillow that other libraries set: a half-grey image must never pass as whole.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            size = image.size
            turned = upright and image.getexif().get(_ORIENTATION, 1) != 1
            reduction = 1 if turned or reduce_to is None else _draft(image, reduce_to)
            image.load()
            if turned:
                image = ImageOps.exif_transpose(image)
                size = image.size
            return Picture(_to_rgb(image), size, reduction)
    except MemoryError:
        raise
    except Exception as error:  # On broken bytes Pillow's readers raise almost any class.
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not an image of {', '.join(_FORMATS)}"
        raise UnreadableImage(name, reason) from error


def _draft(image: Image.Image, short: int) -> int:
    """Asks a JPEG for the smallest size with a short side of at least `short`: the reduction."""
    width, height = image.size
    reduction = 1
    while min(width, height) // (2 * reduction) >= short and reduction < _LARGEST_REDUCTION:
        reduction *= 2
    if reduction == 1 or image.format != "JPEG":
        return 1
    drafted = image.draft(None, (width // reduction, height // reduction))
    return round(width / drafted[1][2]) if drafted else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range; save it with 8 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit pixels have no defined range; save it with 8 or 16 bits")
        return Image.fromarray(np.round(grey / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
