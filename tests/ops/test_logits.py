"""Guidance, filters and draws of logits."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from detailflow_jax.ops import logits as filters

settings = hypothesis.settings(max_examples=50, deadline=None)


def test_guidance_scales():
    """s * (G - i + 1)/(G + 1) for group i from c/g on."""
    constant = filters.guidance_scales(1.5, 16, 4, 4)
    np.testing.assert_array_equal(constant, np.full(16, 1.5, np.float32))
    gradual = filters.guidance_scales(1.5, 16, 4, 8, gradual=True)
    np.testing.assert_allclose(gradual, 1.5 * np.repeat([1, 1, 3 / 5, 2 / 5], 4), rtol=1e-6)
    assert gradual.dtype == np.float32
    none_causal = filters.guidance_scales(1.5, 16, 4, 0, gradual=True)
    np.testing.assert_allclose(none_causal, 1.5 * np.repeat([5, 4, 3, 2], 4) / 5, rtol=1e-6)


@settings
@hypothesis.given(
    st.integers(0, 12), st.floats(0.05, 1.0), st.integers(0, 2**31), st.sampled_from([0, 2])
)
def test_filters_keep_the_smallest_likely_set(k, p, seed, ties):
    logits = np.random.default_rng(seed).standard_normal(10).astype(np.float32)
    logits[:ties] = logits.max() + 1  # equal best ones
    kept = np.isfinite(filters.top_k_filter(jnp.asarray(logits), k))
    assert kept.sum() == (10 if k in (0, 10, 11, 12) else max(k, ties))
    assert logits[kept].min() >= np.max(logits[~kept], initial=-np.inf)

    filtered = np.asarray(filters.top_p_filter(jnp.asarray(logits), p))
    chosen = np.isfinite(filtered)
    chance = np.exp(logits.astype(np.float64))
    chance /= chance.sum()
    np.testing.assert_array_equal(filtered[chosen], logits[chosen])
    assert chance[chosen].sum() >= p - 1e-5
    assert chance[chosen].sum() - chance[chosen].min() <= p + 1e-5
    assert chance[chosen].min() >= np.max(chance[~chosen], initial=0)


def test_guide():
    conditional, null = jnp.array([1.0, 2.0]), jnp.array([0.5, 4.0])
    np.testing.assert_allclose(filters.guide(conditional, null, 3.0), [2.0, -2.0])


def test_sample_codes_draws_by_key():
    keys = jax.random.split(jax.random.key(0), 3)
    logits = jnp.zeros((3, 5, 7))
    codes = filters.sample_codes(keys, logits)
    assert codes.shape == (3, 5) and codes.dtype == jnp.int32
    np.testing.assert_array_equal(filters.sample_codes(keys[1:2], logits[1:2]), codes[1:2])
    only = jnp.where(jnp.arange(7) == 4, 0.0, -jnp.inf)
    assert (filters.sample_codes(keys, jnp.broadcast_to(only, (3, 5, 7))) == 4).all()
