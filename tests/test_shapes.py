"""Annotated functions and methods refuse arrays of other shapes or dtypes, in all tests."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from detailflow_jax.ops import patches, quantization


def test_a_wrong_rank_names_the_argument():
    with pytest.raises(jaxtyping.TypeCheckError, match=r"'images'(.|\n)*f32\[8,8,3\]"):
        patches.patchify(jnp.zeros((8, 8, 3)), 4)


def test_sizes_that_disagree_name_the_argument():
    with pytest.raises(jaxtyping.TypeCheckError, match=r"'codebook'(.|\n)*f32\[5,3\]"):
        jax.eval_shape(quantization.code_distances, jnp.zeros((2, 4)), jnp.zeros((5, 3)))


def test_a_wrong_dtype_names_the_argument():
    with pytest.raises(jaxtyping.TypeCheckError, match=r"'indices'(.|\n)*f32\[3\]"):
        quantization.remember_codes(jnp.zeros(4, jnp.int32), jnp.zeros(3))
