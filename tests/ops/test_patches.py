"""Images cut into patches and put together."""

import jax.numpy as jnp
import numpy as np
import pytest

from detailflow_jax.ops import patches


def test_patches_are_row_column_channel():
    picture = jnp.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
    tokens = patches.patchify(picture, 4)
    assert tokens.shape == (2, 6, 48)
    np.testing.assert_array_equal(tokens[1, 4], picture[1, 4:8, 4:8].reshape(-1))
    np.testing.assert_array_equal(patches.unpatchify(tokens, 4, 2, 3), picture)
    with pytest.raises(ValueError, match=r"8x12 .* patches of 5"):
        patches.patchify(picture, 5)
