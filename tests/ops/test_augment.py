"""Augmentation of what the discriminator sees, and its views."""

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detailflow_jax.ops import augment
from pixels import images


def test_shift_moves_whole_pixels_and_brings_zeros():
    x = images(3, 6, 5)
    down, right = np.array([0, 2, -1]), np.array([0, -1, 4])
    got = augment.shift(x, down, right)
    np.testing.assert_array_equal(got[0], x[0])
    want = np.zeros_like(x[1])
    want[2:, :-1] = x[1, :-2, 1:]
    np.testing.assert_array_equal(got[1], want)
    want = np.zeros_like(x[2])
    want[:-1, 4:] = x[2, 1:, :-4]
    np.testing.assert_array_equal(got[2], want)


def test_translations_are_whole_pixels_up_to_an_eighth():
    x = np.zeros((500, 32, 16, 3), np.float32)
    x[:, 16, 8] = 1
    moved = np.argwhere(augment.translate(jax.random.key(0), x)[..., 0])[:, 1:] - (16, 8)
    assert len(moved) == 500
    assert set(moved[:, 0]) == set(range(-4, 5)) and set(moved[:, 1]) == set(range(-2, 3))


@pytest.mark.parametrize(("share", "size"), [(0.2, 6), (0.5, 16)])
def test_cut_out(share, size):
    x = np.ones((400, 32, 32, 3), np.float32)
    got = np.asarray(augment.cut_out(jax.random.key(0), x, share))
    assert set(np.unique(got)) == {0, 1}
    heights = 32 - got[..., 0].max(axis=2).sum(axis=1)
    holes = (got[..., 0] == 0).any(axis=2).sum(axis=1)
    assert holes.max() == size and holes.min() >= size // 2  # it may lie half outside
    for axes in ((0, 1), (0, 2)):  # it reaches every row and column
        assert (got[..., 0] == 0).any(axis=axes).all()
    areas = (got[..., 0] == 0).sum(axis=(1, 2))
    assert areas.max() == size * size and heights.max() == 0
    gradient = jax.grad(lambda x: augment.cut_out(jax.random.key(0), x, share).sum())(x)
    np.testing.assert_array_equal(gradient, got)


def test_colour():
    """Whatever is drawn, grey stays grey, and order within a channel is kept."""
    x = images(64, 8)
    grey = np.repeat(x[..., :1], 3, axis=-1)
    out = np.asarray(augment.jitter_colour(jax.random.key(1), grey))
    np.testing.assert_allclose(out, np.repeat(out[..., :1], 3, axis=-1), atol=1e-6)
    slope = np.std(out, axis=(1, 2, 3)) / np.std(grey, axis=(1, 2, 3))
    assert 0.5 <= slope.min() < 0.6 and 1.4 < slope.max() <= 1.5
    level = out.mean(axis=(1, 2, 3)) - grey.mean(axis=(1, 2, 3))
    assert -0.5 <= level.min() < -0.4 and 0.4 < level.max() <= 0.5
    out = np.asarray(augment.jitter_colour(jax.random.key(1), x))
    spread = np.std(out - out.mean(-1, keepdims=True), axis=(1, 2, 3)) / slope
    spread /= np.std(x - x.mean(-1, keepdims=True), axis=(1, 2, 3))
    assert 0 <= spread.min() < 0.2 and 1.8 < spread.max() <= 2


def test_policies():
    """Each change is for the whole batch: half of the time when weak, always when strong."""
    x = images(2, 48)
    changed = jax.jit(lambda key, p: augment.diff_augment(key, x, p), static_argnums=1)
    draws = [np.asarray(changed(jax.random.key(i), augment.WEAK)) for i in range(64)]
    same = np.array([(y == x).reshape(2, -1).all(axis=1) for y in draws])
    assert (same[:, 0] == same[:, 1]).all()
    assert 1 <= same[:, 0].sum() <= 20  # an eighth is expected
    for i in range(8):
        assert (changed(jax.random.key(i), augment.STRONG) == 0).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(("size", "mode"), [((48, 40), "area"), ((17, 24), "bicubic")])
def test_view_without_a_key_resizes_as_published(size, mode):
    x = images(2, *size)
    want = F.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), (32, 32), mode=mode)
    got = augment.random_view(None, x, 32)
    if size == (17, 24):
        got_small = augment.random_view(jax.random.key(0), x, 32)
        np.testing.assert_array_equal(got, got_small)  # small images are never cropped
    np.testing.assert_allclose(got, want.permute(0, 2, 3, 1), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(augment.random_view(None, x[:, :16, :16], 16), x[:, :16, :16])


def test_views_of_large_images_are_crops_half_of_the_time():
    x = images(2, 12, 10)
    resized = np.asarray(augment.random_view(None, x, 8))
    view = jax.jit(lambda key: augment.random_view(key, x, 8))
    windows = {(i, j): x[:, i : i + 8, j : j + 8] for i in range(5) for j in range(3)}
    seen, cropped = set(), 0
    for i in range(120):
        got = np.asarray(view(jax.random.key(i)))
        at = [place for place, window in windows.items() if np.array_equal(window, got)]
        seen.update(at)
        cropped += bool(at)
        assert at or np.allclose(got, resized, atol=1e-6)
    assert 40 <= cropped <= 80
    assert {i for i, _ in seen} == set(range(5)) and {j for _, j in seen} == set(range(3))
