"""Pixels, PSNR and tiles."""

import jax.numpy as jnp
import numpy as np
import pytest

from detailflow_jax.ops import images


def test_pixels_survive_the_round_trip():
    every = np.arange(256, dtype=np.uint8)
    floats = images.to_float(jnp.asarray(every))
    assert floats.dtype == jnp.float32 and (floats[0], floats[-1]) == (-1.0, 1.0)
    np.testing.assert_array_equal(images.to_uint8(floats), every)
    extremes = images.to_uint8(jnp.array([-7.0, -1.0, 0.0, 0.9999, 1.0, 7.0]))
    assert extremes.tolist() == [0, 0, 128, 255, 255, 255]
    assert images.to_float(jnp.zeros(2, jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="int32"):
        images.to_float(jnp.zeros(2, jnp.int32))


def test_psnr():
    reference = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4, 3)).astype(np.float32)
    shifted = np.clip(reference, -0.9, 0.9)
    moved = shifted + np.array([0.1, 0.02], np.float32).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(images.psnr(moved, shifted), [26.0206, 40.0], atol=1e-3)
    assert images.psnr(reference, reference).min() > 100
    # What leaves the range counts as cut off.
    assert images.psnr(reference * 0 + 9, reference * 0 + 1).min() > 100


def test_tile():
    pictures = np.arange(2 * 3 * 4 * 5 * 3).reshape(2, 3, 4, 5, 3)
    whole = images.tile(pictures)
    assert whole.shape == (8, 15, 3)
    np.testing.assert_array_equal(whole[4:8, 10:15], pictures[1, 2])
