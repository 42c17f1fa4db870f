"""Image files to RGB arrays."""

import io
import re

import numpy as np
from PIL import Image, ImageFile, ImageOps

from detailflow_jax.data.errors import UnreadableImage

IMAGE_FILE = re.compile(
    r".+\.(jpe?g|jpe|jfif|jp2|a?png|webp|avif|bmp|dib|gif|tiff?|p[pgbn]m)", re.IGNORECASE
)
# Only these: some of Pillow's other readers start programs (EPS) or accept almost any bytes.
_WANTED = ("JPEG", "MPO", "JPEG2000", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "PPM")
Image.init()
_FORMATS = tuple(name for name in _WANTED if name in Image.OPEN)  # This build of Pillow's.


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes one encoded image to uint8 [H, W, 3] RGB.

    The first frame of an animation is taken, EXIF orientation is applied, transparency is laid
    over white, 16-bit grey is scaled to 8 bits, CMYK and palettes are converted.

    Raises:
        UnreadableImage: not an image, truncated, broken, or of a pixel type without a defined
            range (32-bit integers beyond 16 bits, floating point). `name` goes into the error.
    """
    # A global of Pillow that other libraries set: a half-grey image must never pass as whole.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except MemoryError:
        raise
    except Exception as error:  # On broken bytes Pillow's readers raise almost any class.
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, Image.UnidentifiedImageError):
            reason = f"not an image of {', '.join(_FORMATS)}"
        raise UnreadableImage(name, reason) from error


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
    return image.convert("RGB")
