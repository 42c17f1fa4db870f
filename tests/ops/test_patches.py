"""Images cut into patches and put together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detailflow_jax.ops import padded, patches


def test_patches_are_row_column_channel():
    picture = jnp.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
    tokens = patches.patchify(picture, 4)
    assert tokens.shape == (2, 6, 48)
    np.testing.assert_array_equal(tokens[1, 4], picture[1, 4:8, 4:8].reshape(-1))
    np.testing.assert_array_equal(patches.unpatchify(tokens, 4, 2, 3), picture)
    with pytest.raises(ValueError, match=r"8x12 .* patches of 5"):
        patches.patchify(picture, 5)


def test_overlapping_windows_hide_their_borders():
    windows = jax.random.normal(jax.random.key(0), (2, 6, 8 * 8 * 3))
    picture = patches.blend(windows, 4, 2, 3)
    assert picture.shape == (2, 8, 12, 3)
    # In between four centres: all four windows with equal weights, up to half a pixel.
    np.testing.assert_allclose(patches.blend(jnp.ones_like(windows), 4, 2, 3), 1.0, rtol=1e-6)
    even = jnp.broadcast_to(jnp.arange(6.0)[:, None], (1, 6, 192))  # of one value each
    row = patches.blend(even, 4, 2, 3)[0, 0, :, 0]
    np.testing.assert_allclose(row, [0, 0, *np.arange(0.125, 2, 0.25), 2, 2], atol=1e-6)


def test_a_window_reaches_half_a_patch_beyond_its_own():
    def value(windows):
        return patches.blend(windows, 4, 3, 3)[0, 4:8, 4:8].sum()  # the middle patch

    gradient = jax.grad(value)(jnp.zeros((1, 9, 192))).reshape(3, 3, 8, 8, 3)[..., 0]
    seen = gradient[1, 1]
    assert np.all(seen[2:6, 2:6] > 0) and np.all(seen[:2] == 0) and np.all(seen[:, 6:] == 0)
    assert np.all(gradient[0, 0, 6:, 6:] > 0) and np.all(gradient[0, 0, :6] == 0)


def test_windows_on_a_part_of_the_grid_are_blended_as_on_a_smaller_one():
    windows = jax.random.normal(jax.random.key(0), (2, 4, 192))
    part = padded.Part(np.int32(0), (2, 3))
    wide = jnp.pad(windows.reshape(2, 2, 2, 192), [(0, 0), (0, 1), (0, 1), (0, 0)])
    got = patches.blend(wide.reshape(2, 9, 192), 4, 3, 3, part)
    np.testing.assert_allclose(got[:, :8, :8], patches.blend(windows, 4, 2, 2), atol=1e-6)
    assert not got[:, 8:].any() and not got[:, :, 8:].any()
