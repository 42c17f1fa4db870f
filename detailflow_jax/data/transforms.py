"""Crops for training and for encoding, on numpy arrays through Pillow.

Shapes: H, W the source image; R the output side; K the number of crops of one image.
All images are uint8 RGB, [H, W, 3]. Resizing is the recipe of the paper's code (facts 3): halve
with a box filter while the short side is at least twice the target, then one bicubic resize.
"""

import math

import numpy as np
from PIL import Image

from detailflow_jax.data.errors import unknown_name

TRAINING_CROPS = ("random", "center", "none")
ENCODING_CROPS = {"ten": 10, "five": 5, "center": 1, "none": 1}  # name -> K


def _halve(image: Image.Image, short: int) -> Image.Image:
    """Repeated 2x box reduction while the short side is at least twice `short`."""
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _scaled_size(image: Image.Image, short: int) -> tuple[int, int]:
    """(width, height) of the image once its short side is `short`."""
    scale = short / min(image.size)
    return round(image.width * scale), round(image.height * scale)


def _window(image: Image.Image, short: int, left: int, top: int, side: int) -> np.ndarray:
    """The side x side window at (left, top) of `image` resized to short side `short`.

    Equal to resizing and then cropping, but only the window is computed, so that a very long
    image costs no more than a square one.
    """
    width, height = _scaled_size(image, short)
    x, y = image.width / width, image.height / height
    right = min((left + side) * x, image.width)
    bottom = min((top + side) * y, image.height)
    box = (left * x, top * y, right, bottom)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box))


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Reduces the short side to `size` and cuts the centre: uint8 [H, W, 3] -> [size, size, 3]."""
    halved = _halve(Image.fromarray(image), size)
    width, height = _scaled_size(halved, size)
    return _window(halved, size, (width - size) // 2, (height - size) // 2, size)


def random_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    *,
    min_scale: float = 0.8,
    max_scale: float = 1.0,
) -> np.ndarray:
    """Resizes the short side to a draw from [size / max_scale, size / min_scale], cuts anywhere.

    uint8 [H, W, 3] -> uint8 [size, size, 3]. Raises ValueError unless
    0 < min_scale <= max_scale <= 1.
    """
    if not 0 < min_scale <= max_scale <= 1:
        raise ValueError(
            f"min_scale={min_scale}, max_scale={max_scale}: need 0 < min_scale <= max_scale <= 1"
        )
    short = int(rng.integers(math.ceil(size / max_scale), math.ceil(size / min_scale) + 1))
    halved = _halve(Image.fromarray(image), short)
    width, height = _scaled_size(halved, short)
    left = int(rng.integers(width - size + 1))
    top = int(rng.integers(height - size + 1))
    return _window(halved, short, left, top, size)


def resize_exact(image: np.ndarray, size: int) -> np.ndarray:
    """Bicubic resize to [size, size, 3] without keeping the aspect; untouched if it fits."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def training_crop(
    image: np.ndarray,
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
    ValueError for another kind, with the near names.
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
    return np.ascontiguousarray(view[:, ::-1] if flip and mirrored else view)


def encoding_crops(image: np.ndarray, size: int, kind: str) -> np.ndarray:
    """The views of one image that are encoded for the generator (facts 4).

    Args:
        image: uint8 [H, W, 3].
        size: R.
        kind: "ten" (centre crop at int(1.1 R); its four corners, top left, top right, bottom
            left, bottom right, and its centre, then the same five mirrored), "five" (without
            the mirrored ones), "center" or "none" (resized to R x R).

    Returns:
        uint8 [K, R, R, 3] with K = ENCODING_CROPS[kind].

    Raises:
        ValueError: for another `kind`, with the near names.
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
