"""Grids of images and their files."""

import numpy as np
import pytest
from PIL import Image

from detailflow_jax.runtime.pictures import grid, save_png


def coloured(count: int, height: int = 4, width: int = 6) -> np.ndarray:
    """uint8 [N, H, W, 3]; image i is filled with 10 (i + 1)."""
    return np.stack([np.full((height, width, 3), 10 * (i + 1), np.uint8) for i in range(count)])


def test_images_lie_row_by_row_on_white():
    picture = grid(coloured(5), columns=3, padding=2)
    assert picture.shape == (2 * 6 + 2, 3 * 8 + 2, 3) and picture.dtype == np.uint8
    assert (picture[2:6, 2:8] == 10).all()
    assert (picture[2:6, 18:24] == 30).all()
    assert (picture[8:12, 2:8] == 40).all()
    assert (picture[8:12, 18:24] == 255).all()  # The sixth place is empty.
    assert (picture[:2] == 255).all() and (picture[:, :2] == 255).all()


def test_scale_repeats_pixels_and_default_is_a_square():
    image = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    picture = grid(image, padding=0, scale=3)
    np.testing.assert_array_equal(picture[::3, ::3], image[0])
    np.testing.assert_array_equal(picture[1, 4], image[0, 0, 1])
    assert grid(coloured(7), padding=0).shape == (3 * 4, 3 * 6, 3)
    assert grid(coloured(9), padding=0).shape == (3 * 4, 3 * 6, 3)


def test_captions_stand_beside_the_images():
    plain = grid(coloured(4, 16, 48), columns=2)
    picture = grid(
        coloured(4, 16, 48),
        columns=2,
        row_captions=["first", "2"],
        column_captions=["4 tokens", "all"],
    )
    top, left = (a - b for a, b in zip(picture.shape[:2], plain.shape[:2], strict=True))
    assert top > 8 and left > 16
    np.testing.assert_array_equal(picture[top:, left:], plain)
    assert (picture[:top] < 128).any() and (picture[top:, :left] < 128).any()
    assert (picture[:top, :left] == 255).all()
    half = top + plain.shape[0] // 2  # Both rows have one.
    assert (picture[top:half, :left] < 128).any() and (picture[half:, :left] < 128).any()


@pytest.mark.parametrize(
    ("images", "options", "text"),
    [
        (coloured(2)[0], {}, r"uint8 \[4, 6, 3\]: expected uint8 \[N, H, W, 3\]"),
        (coloured(2).astype(np.float32), {}, "images are float32"),
        (coloured(2)[:0], {}, "N > 0"),
        (coloured(4), {"columns": 2, "row_captions": ["a"]}, "1 row captions for 2 rows"),
        (coloured(4), {"columns": 2, "column_captions": ["a"] * 3}, "3 column captions for 2"),
    ],
)
def test_wrong_images_or_captions_are_refused(images, options, text):
    with pytest.raises(ValueError, match=text):
        grid(images, **options)


def test_png_holds_the_picture_exactly(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    save_png(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
