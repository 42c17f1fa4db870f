"""The quantizer and its losses, and their weights under noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detailflow_jax.ops import correction, quantization

N, G, C = 16, 4, 8  # tokens, group, causal

# ------------------------------------------------------------------------------- weighted losses


@pytest.fixture
def errors():
    rng = np.random.default_rng(0)
    return rng.uniform(size=(3, N)).astype(np.float32), rng.uniform(size=(3, N)).astype(np.float32)


@pytest.mark.parametrize("end", [1, 5, 12])
def test_weighted_vq_is_the_published_formula_for_one_end(errors, end):
    clean, corrected = errors
    span = correction.Span(jnp.full(3, end - 1), jnp.full(3, end))
    total = 2 * N - end
    want = N / total * clean.mean() + (N - end) / total * corrected[:, end:].mean()
    assert float(correction.weighted_vq(clean, corrected, span)) == pytest.approx(want, rel=1e-6)
    weights = correction.pass_weights(span, N)
    np.testing.assert_allclose(weights, [N / total, (N - end) / total], rtol=1e-6)


def test_weighted_vq_without_noise_is_the_plain_mean(errors):
    clean, corrected = errors
    span = correction.no_span(3, N)
    got = correction.weighted_vq(clean, corrected, span)
    assert float(got) == pytest.approx(clean.mean(), rel=1e-6)
    np.testing.assert_array_equal(correction.pass_weights(span, N), [1.0, 0.0])


def test_weighted_vq_weighs_each_sample_by_its_own_span(errors):
    clean, corrected = errors
    ends = [1, 8, 16]
    span = correction.Span(jnp.array(ends) - 1, jnp.array(ends))
    want = [
        (clean[i].sum() + corrected[i, end:].sum()) / (2 * N - end) for i, end in enumerate(ends)
    ]
    got = correction.weighted_vq(clean, corrected, span)
    assert float(got) == pytest.approx(np.mean(want), rel=1e-6)


# -------------------------------------------------------------------------------------- quantizer


def test_normalize_and_its_gradient_at_zero():
    x = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    got = quantization.normalize(jnp.asarray(x, jnp.bfloat16))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1, rtol=1e-6)
    want = x / np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(quantization.normalize(jnp.asarray(x)), want, rtol=1e-6)
    zero = jnp.zeros(5)
    assert not quantization.normalize(zero).any()
    assert jnp.isfinite(jax.grad(lambda x: quantization.normalize(x).sum())(zero)).all()


def test_distances_and_nearest_codes():
    rng = np.random.default_rng(0)
    z, codes = (rng.standard_normal((*shape, 4)).astype(np.float32) for shape in ((2, 3), (9,)))
    want = np.square(z[:, :, None] - codes).sum(-1)
    got = quantization.code_distances(jnp.asarray(z), jnp.asarray(codes))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_array_equal(quantization.nearest_codes(got), want.argmin(-1))


def test_straight_through_and_the_two_errors():
    """The codebook error moves codes only, the commitment error latents only."""
    z, codes = jnp.array([[[1.0, 2.0]]]), jnp.array([[[3.0, 5.0]]])
    np.testing.assert_array_equal(quantization.straight_through(codes, z), codes)
    through = jax.grad(lambda z: (2 * quantization.straight_through(codes, z)).sum())(z)
    np.testing.assert_array_equal(through, jnp.full_like(z, 2.0))
    for which in (0, 1):
        error = lambda z, codes, w=which: quantization.vq_errors(z, codes)[w].sum()  # noqa: E731
        assert float(error(z, codes)) == pytest.approx((4 + 9) / 2)
        by_z, by_codes = jax.grad(error, argnums=(0, 1))(z, codes)
        assert bool(by_codes.any()) == (which == 0) and bool(by_z.any()) == (which == 1)


def test_entropy_loss():
    distances = np.random.default_rng(0).uniform(0, 0.05, size=(2, 3, 6))
    p = np.exp(-distances / 0.01)
    p /= p.sum(-1, keepdims=True)
    mean = p.reshape(-1, 6).mean(0)
    want = -(p * np.log(p)).sum(-1).mean() + (mean * np.log(mean + 1e-5)).sum()
    got = quantization.entropy_loss(jnp.asarray(distances, jnp.float32))
    assert float(got) == pytest.approx(want, rel=1e-4)
    # Sure and evenly used is the best there is; distances far apart give no NaN.
    even = quantization.entropy_loss(10.0 * (1 - jnp.eye(6))[None])
    assert float(even) == pytest.approx(-np.log(6), abs=1e-3)
    one = quantization.entropy_loss(jnp.zeros((1, 6, 6)).at[..., 1:].set(10.0))
    assert float(one) == pytest.approx(0, abs=1e-3)


def test_window_of_recent_codes():
    window = jnp.full((5,), -1, jnp.int32)
    assert float(quantization.codebook_usage(window, 4)) == 0.0
    window = quantization.remember_codes(window, jnp.array([[3, 1, 3]]))
    assert window.tolist() == [-1, -1, 3, 1, 3]
    assert float(quantization.codebook_usage(window, 4)) == 0.5
    window = quantization.remember_codes(window, jnp.array([[0], [2], [0]]))
    assert window.tolist() == [1, 3, 0, 2, 0] and window.dtype == jnp.int32
    assert float(quantization.codebook_usage(window, 4)) == 1.0
    window = quantization.remember_codes(window, jnp.arange(8) % 2)  # more than the window holds
    assert window.tolist() == [1, 0, 1, 0, 1]
    assert float(quantization.codebook_usage(window, 4)) == 0.5
