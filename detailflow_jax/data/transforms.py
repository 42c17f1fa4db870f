"""Crops for training and for encoding, on numpy arrays through Pillow.

Shapes: H, W the source image; R the output side; K the number of crops of one image.
An image is uint8 RGB, [H, W, 3], or a Picture (images.py). Resizing follows the published
code: halve with a box filter while the short side is at least twice the target, then
one bicubic resize.
"""

import math

import numpy as np
from PIL import Image

from detailflow_jax.data.images import Picture
from detailflow_jax.runtime.errors import ConfigError, unknown_name

TRAINING_CROPS = ("random", "center", "none")
ENCODING_CROPS = {"ten": 10, "five": 5, "center": 1, "none": 1}  # name -> K


def _halve(
    picture: Picture, short: int
) -> tuple[Image.Image, tuple[float, float], tuple[int, int]]:
    """Repeated 2x box reduction while the short side is at least twice `short`.

    Returns the reduced pixels, what of them the image covers, and the size that the image has
    by the recipe. What a reduced decoding has halved already is not halved again.
    """
    pixels, extent, (width, height) = picture.pixels, picture.extent, picture.size
    reduction = 1
    while min(width, height) >= 2 * short:
        width, height, reduction = width // 2, height // 2, 2 * reduction
        if picture.reduction == 1:
            pixels = pixels.resize((width, height), Image.Resampling.BOX)
            extent = (width, height)
        elif reduction > picture.reduction:  # By whole pixels: the last may be partly outside.
            pixels = pixels.reduce(2)
            extent = (extent[0] / 2, extent[1] / 2)
    return pixels, extent, (width, height)


def _scaled_size(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(width, height) of an image of `size` once its short side is `short`."""
    scale = short / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def _window(
    pixels: Image.Image,
    extent: tuple[float, float],
    scaled: tuple[int, int],
    left: int,
    top: int,
    side: int,
) -> np.ndarray:
    """The side x side window at (left, top) of the covered pixels resized to `scaled`.

    Equal to resizing and then cropping, but only the window is computed, so that a very long
    image costs no more than a square one.
    """
    x, y = extent[0] / scaled[0], extent[1] / scaled[1]
    right = min((left + side) * x, extent[0])
    bottom = min((top + side) * y, extent[1])
    box = (left * x, top * y, right, bottom)
    return np.asarray(pixels.resize((side, side), Image.Resampling.BICUBIC, box=box))


def center_crop(image: np.ndarray | Picture, size: int) -> np.ndarray:
    """Reduces the short side to `size` and cuts the centre: uint8 [H, W, 3] -> [size, size, 3]."""
    pixels, extent, halved = _halve(Picture.of(image), size)
    width, height = scaled = _scaled_size(halved, size)
    return _window(pixels, extent, scaled, (width - size) // 2, (height - size) // 2, size)


def check_scales(min_scale: float, max_scale: float) -> None:
    """Raises ConfigError unless 0 < min_scale <= max_scale <= 1."""
    if not 0 < min_scale <= max_scale <= 1:
        raise ConfigError(
            f"min_scale={min_scale}, max_scale={max_scale}: need 0 < min_scale <= max_scale <= 1"
        )


def random_crop(
    image: np.ndarray | Picture,
    size: int,
    rng: np.random.Generator,
    *,
    min_scale: float = 0.8,
    max_scale: float = 1.0,
) -> np.ndarray:
    """Resizes the short side to a draw from [size / max_scale, size / min_scale], cuts anywhere.

    uint8 [H, W, 3] -> uint8 [size, size, 3]. Raises what `check_scales` raises.
    """
    check_scales(min_scale, max_scale)
    shortest, longest = math.ceil(size / max_scale), math.ceil(size / min_scale)
    short = int(rng.integers(shortest, longest + 1))
    pixels, extent, halved = _halve(Picture.of(image), short)
    width, height = scaled = _scaled_size(halved, short)
    left = int(rng.integers(width - size + 1))
    top = int(rng.integers(height - size + 1))
    return _window(pixels, extent, scaled, left, top, size)


def resize_exact(image: np.ndarray | Picture, size: int) -> np.ndarray:
    """Bicubic resize to [size, size, 3] without keeping the aspect; untouched if it fits."""
    picture = Picture.of(image)
    if picture.pixels.size == (size, size):
        return np.asarray(picture.pixels)
    resized = picture.pixels.resize(
        (size, size), Image.Resampling.BICUBIC, box=(0, 0, *picture.extent)
    )
    return np.asarray(resized)


def longest_short_side(kind: str, size: int, min_scale: float = 0.8) -> int | None:
    """The largest short side that a training crop may reduce an image to; None: it does not.

    A picture decoded at that size or more serves every draw of the crop.
    """
    if kind == "none":
        return None
    return math.ceil(size / min_scale) if kind == "random" else size


def training_crop(
    image: np.ndarray | Picture,
    size: int,
    kind: str,
    rng: np.random.Generator,
    *,
    min_scale: float = 0.8,
    max_scale: float = 1.0,
    flip: bool = False,
) -> np.ndarray:
    """One training view, uint8 [H, W, 3] -> uint8 [size, size, 3].

    `kind` is one of TRAINING_CROPS; with `flip` half of the views are mirrored. Raises
    ConfigError for another kind, with the closest names.
    """
    if kind not in TRAINING_CROPS:
        raise unknown_name("crop", kind, TRAINING_CROPS)
    mirrored = rng.random() < 0.5  # Drawn always: switching `flip` moves no crop.
    if kind == "random":
        view = random_crop(image, size, rng, min_scale=min_scale, max_scale=max_scale)
    elif kind == "center":
        view = center_crop(image, size)
    else:
        view = resize_exact(image, size)
    if flip and mirrored:  # By Pillow: numpy copies reversed rows three times as slowly.
        view = np.asarray(Image.fromarray(view).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    return np.ascontiguousarray(view)


def encoding_crops(image: np.ndarray | Picture, size: int, kind: str) -> np.ndarray:
    """Returns the views of one image that are encoded for the generator.

    Args:
        image: uint8 [H, W, 3], or a Picture.
        size: R.
        kind: "ten" (centre crop at int(1.1 R); its four corners, top left, top right, bottom
            left, bottom right, and its centre, then the same five mirrored), "five" (without
            the mirrored ones), "center" or "none" (resized to R x R).

    Returns:
        uint8 [K, R, R, 3] with K = ENCODING_CROPS[kind].

    Raises:
        ConfigError: another `kind`; the text suggests the closest names.
    """
    if kind not in ENCODING_CROPS:
        raise unknown_name("encoding crop", kind, ENCODING_CROPS)
    if kind == "center":
        return center_crop(image, size)[None]
    if kind == "none":
        return resize_exact(image, size)[None]
    side = int(1.1 * size)
    image = center_crop(image, side)
    end, middle = side - size, round((side - size) / 2)
    corners = [(0, 0), (0, end), (end, 0), (end, end), (middle, middle)]
    views = np.stack([image[y : y + size, x : x + size] for y, x in corners])
    return np.concatenate([views, views[:, :, ::-1]]) if kind == "ten" else views
