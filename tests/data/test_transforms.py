"""Crops: shapes and ranges for every size, and equality with the plain way of computing them."""

import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detailflow_jax.data import ENCODING_CROPS, TRAINING_CROPS, encoding_crops, training_crop
from detailflow_jax.data.images import decode_picture
from detailflow_jax.data.transforms import center_crop, longest_short_side, random_crop
from pixels import photographs


def picture(height, width, seed=0):
    """A smooth random colour picture: uint8 [height, width, 3]."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def plainly_resized(image, short):
    """The recipe without any saving: halve by box, then resize the whole image."""
    image = Image.fromarray(image)
    while min(image.size) >= 2 * short:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = short / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def close(a, b):
    """Equal up to the rounding of one grey level."""
    return a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1


sides = st.integers(1, 300)


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 48), st.sampled_from(TRAINING_CROPS), st.booleans())
def test_training_crop_has_the_asked_shape_at_any_size(height, width, size, kind, flip):
    rng = np.random.default_rng(height)
    out = training_crop(picture(height, width), size, kind, rng, flip=flip)
    assert out.shape == (size, size, 3) and out.dtype == np.uint8 and out.flags.c_contiguous


@settings(max_examples=40, deadline=None)
@given(sides, sides, st.integers(1, 48), st.sampled_from(sorted(ENCODING_CROPS)))
def test_encoding_crops_have_the_asked_shape_at_any_size(height, width, size, kind):
    out = encoding_crops(picture(height, width), size, kind)
    assert out.shape == (ENCODING_CROPS[kind], size, size, 3) and out.dtype == np.uint8


@pytest.mark.parametrize("shape", [(64, 64), (40, 61), (500, 333), (129, 128), (7, 9), (31, 400)])
def test_center_crop_equals_resize_then_crop(shape):
    image, size = picture(*shape), 32
    whole = plainly_resized(image, size)
    top, left = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
    assert close(center_crop(image, size), whole[top : top + size, left : left + size])


@pytest.mark.parametrize("shape", [(64, 64), (120, 301), (33, 20)])
def test_random_crop_is_a_window_of_the_resized_image(shape):
    image, size = picture(*shape), 16
    shorts = set()
    for seed in range(60):
        out = random_crop(image, size, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        short = rng.integers(16, 21)  # [R / 1.0, R / 0.8], both ends included
        whole = plainly_resized(image, short)
        left, top = rng.integers(whole.shape[1] - 15), rng.integers(whole.shape[0] - 15)
        assert close(out, whole[top : top + size, left : left + size])
        shorts.add(int(short))
    assert shorts == {16, 17, 18, 19, 20}


def test_extreme_aspect_does_not_build_the_long_image():
    line = picture(1, 60_000)  # Resized whole it would be 256 x 15,360,000: 11.8 GB.
    assert center_crop(line, 256).shape == (256, 256, 3)
    rng = np.random.default_rng(0)
    assert training_crop(line, 256, "random", rng).shape == (256, 256, 3)


def test_ten_crop_equals_hand_slices():
    size, image = 32, picture(100, 70)
    c = center_crop(image, 35)  # int(1.1 * 32)
    five = [c[:32, :32], c[:32, 3:], c[3:, :32], c[3:, 3:], c[2:34, 2:34]]
    ten = encoding_crops(image, size, "ten")
    np.testing.assert_array_equal(ten, np.stack(five + [v[:, ::-1] for v in five]))
    np.testing.assert_array_equal(encoding_crops(image, size, "five"), ten[:5])
    assert len({view.tobytes() for view in ten}) == 10
    np.testing.assert_array_equal(encoding_crops(image, size, "center")[0], center_crop(image, 32))


def test_no_crop_keeps_an_image_of_the_right_size():
    image = picture(32, 32)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(training_crop(image, 32, "none", rng), image)
    np.testing.assert_array_equal(encoding_crops(image, 32, "none")[0], image)


def test_flip_mirrors_half_of_the_views_and_moves_no_crop():
    image, mirrored = picture(40, 40), 0
    for seed in range(100):
        plain = training_crop(image, 16, "random", np.random.default_rng(seed))
        flipped = training_crop(image, 16, "random", np.random.default_rng(seed), flip=True)
        is_mirrored = not np.array_equal(plain, flipped)
        np.testing.assert_array_equal(flipped, plain[:, ::-1] if is_mirrored else plain)
        mirrored += is_mirrored
    assert 35 <= mirrored <= 65


def test_grey_stays_grey():
    grey = np.repeat(picture(50, 80)[..., :1], 3, axis=-1)
    for view in encoding_crops(grey, 24, "ten"):
        assert (view == view[..., :1]).all()


def test_box_halving_averages_before_the_bicubic_resize():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 254
    assert (center_crop(stripes, 32) == 127).all()


@pytest.mark.parametrize("scales", [(0.0, 1.0), (0.9, 0.8), (0.5, 1.5), (math.nan, 1.0)])
def test_impossible_scales_are_refused(scales):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="min_scale"):
        random_crop(picture(9, 9), 4, rng, min_scale=scales[0], max_scale=scales[1])


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(512, 640), (427, 640), (515, 389), (261, 1031)])
@pytest.mark.parametrize("size", [50, 100, 200])
def test_reduced_decoding_moves_nothing(shape, size):
    """The crop lies where it lies in the whole image, so that a smooth one hardly changes."""
    data = jpeg(picture(*shape))
    whole = decode_picture(data, "x")
    reduced = decode_picture(data, "x", reduce_to=longest_short_side("random", size))
    assert reduced.size == whole.size == shape[::-1]
    assert reduced.reduction == max(
        r for r in (1, 2, 4, 8) if r == 1 or min(shape) // r >= math.ceil(size / 0.8)
    )
    for seed in range(4):
        views = [
            training_crop(image, size, "random", np.random.default_rng(seed), flip=True)
            for image in (whole, reduced)
        ]
        far = np.abs(np.subtract(*views, dtype=np.int16))
        assert far.mean() < 1.7 and far.max() <= 7, (far.mean(), far.max())
    far = np.abs(np.subtract(center_crop(whole, size), center_crop(reduced, size), dtype=np.int16))
    assert far.mean() < 1.7


def test_reduced_decoding_of_photographs_differs_as_documented():
    for photo in photographs():
        data = jpeg(photo)
        reduced = decode_picture(data, "x", reduce_to=128)
        assert reduced.pixels.size == (320, 214) and reduced.reduction == 2
        error = center_crop(decode_picture(data, "x"), 128) - center_crop(reduced, 128).astype(int)
        assert 0 < np.sqrt(np.mean(error**2)) < 3.5


def test_what_cannot_be_reduced_is_decoded_whole():
    image = picture(200, 200)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    assert decode_picture(file.getvalue(), "x", reduce_to=50).reduction == 1
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", exif=exif)
    assert decode_picture(file.getvalue(), "x", reduce_to=50).reduction == 1
    assert decode_picture(file.getvalue(), "x", reduce_to=50, upright=False).reduction == 4
    assert longest_short_side("none", 50) is None


def test_unknown_crops_name_the_near_ones():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"unknown crop 'randon'.*closest names: random"):
        training_crop(picture(9, 9), 4, "randon", rng)
    with pytest.raises(ValueError, match=r"unknown encoding crop 'tenn'.*closest names: ten"):
        encoding_crops(picture(9, 9), 4, "tenn")
