"""Rotary turns by group and place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detailflow_jax.models import layers
from detailflow_jax.ops import rotary
from detailflow_jax.runtime import compiler


def test_rotary_turns_pairs_by_group_and_place():
    num_tokens, group_size, head_dim = 12, 4, 8
    table = rotary.group_rotary_table(num_tokens, group_size, head_dim)
    x = np.random.default_rng(0).standard_normal((2, 13, 3, head_dim)).astype(np.float32)
    got = np.asarray(rotary.rotate(jnp.asarray(x), table))
    assert not got[:, 0].any()  # the class position vanishes
    pairs = x[..., ::2] + 1j * x[..., 1::2]
    for position in range(1, 13):
        group, place = divmod(position - 1, group_size)
        for k in range(head_dim // 4):
            frequency = 10_000.0 ** (-4 * k / head_dim)
            for pair, angle in ((k, group), (k + head_dim // 4, place)):
                want = pairs[:, position, :, pair] * np.exp(1j * angle * frequency)
                np.testing.assert_allclose(got[:, position, :, 2 * pair], want.real, atol=1e-5)
                np.testing.assert_allclose(got[:, position, :, 2 * pair + 1], want.imag, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_way_of_a_tpu_gives_the_same(dtype):
    table = rotary.group_rotary_table(12, 4, 8)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 13, 3, 8)), dtype)
    np.testing.assert_array_equal(
        rotary.rotate_by_product(x, table), rotary.rotate(x, table), strict=True
    )


@pytest.mark.parametrize("platform", ["tpu", "cpu"])
def test_a_tpu_gets_no_arrays_of_pairs(platform):
    layer = layers.Attention(2, 2, use_bias=False, dtype=jnp.float32)
    table, x = rotary.group_rotary_table(12, 4, 8), jnp.zeros((2, 13, 16))
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    with compiler.target(platform):
        text = str(jax.make_jaxpr(lambda params: layer.apply(params, x, rope=table))(params))
    assert ("[2,13,2,4,2]" in text) == (platform != "tpu")


def test_rotary_needs_whole_quarters():
    with pytest.raises(ValueError, match="head_dim=6"):
        rotary.group_rotary_table(8, 4, 6)
