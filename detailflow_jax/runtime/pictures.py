"""Pictures for people: grids of images with captions, written as PNG."""

import io
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detailflow_jax.runtime.files import write_atomically

WHITE, BLACK = 255, 0
_MARGIN = 4  # Pixels around a caption.


def grid(
    images: np.ndarray,
    columns: int | None = None,
    padding: int = 2,
    scale: int = 1,
    *,
    row_captions: Sequence[str] = (),
    column_captions: Sequence[str] = (),
) -> np.ndarray:
    """Lays images out row by row on white.

    Args:
        images: uint8 [N, H, W, 3].
        columns: images per row; default the smallest square that holds all.
        padding: white pixels around each image.
        scale: each pixel becomes scale x scale pixels, for small images.
        row_captions, column_captions: one per row, at its left; one per column, above it.

    Returns:
        uint8 [rows * (scale * H + padding) + padding (+ captions), ..., 3].

    Raises:
        ValueError: images of another shape or type, or captions that are too many or too few.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}: expected uint8 [N, H, W, 3], N > 0"
        )
    columns = columns or math.isqrt(len(images) - 1) + 1
    rows = -(-len(images) // columns)
    for captions, count, what in (
        (row_captions, rows, "row"),
        (column_captions, columns, "column"),
    ):
        if captions and len(captions) != count:
            raise ValueError(f"{len(captions)} {what} captions for {count} {what}s")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    _, height, width, _ = images.shape
    height, width = height + padding, width + padding
    canvas = np.full((rows * height + padding, columns * width + padding, 3), WHITE, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height + padding, i % columns * width + padding
        canvas[top : top + height - padding, left : left + width - padding] = image
    if row_captions or column_captions:
        return _with_captions(canvas, row_captions, column_captions, height, width, padding)
    return canvas


def _with_captions(canvas, row_captions, column_captions, height, width, padding) -> np.ndarray:
    font = ImageFont.load_default()
    left, top = 0, 0
    if row_captions:
        left = math.ceil(max(map(font.getlength, row_captions))) + 2 * _MARGIN
    if column_captions:
        top = font.getbbox("Ag")[3] + 2 * _MARGIN
    page = Image.new("RGB", (canvas.shape[1] + left, canvas.shape[0] + top), (WHITE,) * 3)
    page.paste(Image.fromarray(canvas), (left, top))
    draw = ImageDraw.Draw(page)
    # Anchors: "rm" is the right end of a caption at mid height, "ms" its middle on the baseline.
    for row, caption in enumerate(row_captions):
        middle = top + padding + row * height + (height - padding) // 2
        draw.text((left - _MARGIN, middle), caption, BLACK, font, anchor="rm")
    for column, caption in enumerate(column_captions):
        middle = left + padding + column * width + (width - padding) // 2
        draw.text((middle, top - _MARGIN), caption, BLACK, font, anchor="ms")
    return np.array(page)


def save_png(path: str | os.PathLike, picture: np.ndarray) -> None:
    """Writes `picture`, uint8 [H, W, 3], as a PNG file, atomically."""
    write_atomically(path, png(picture))


def png(picture: np.ndarray, **options: Any) -> bytes:
    """Returns `picture`, uint8 [H, W, 3], as the content of a PNG file; `options` are Pillow's."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="PNG", **options)
    return stream.getvalue()
