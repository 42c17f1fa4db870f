"""Noise spans, what follows them, and the quantizer with its losses."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from detailflow_jax.ops import correction, quantization

N, G, C = 16, 4, 8  # tokens, group, causal

# ------------------------------------------------------------------------------------------ spans


def draw(token_count, *, per_sample=True, seed=0, batch=2000, causal_num=C):
    span = correction.draw_span(
        jax.random.key(seed),
        batch,
        jnp.int32(token_count),
        num_tokens=N,
        group_size=G,
        causal_num=causal_num,
        per_sample=per_sample,
    )
    assert span.start.shape == span.stop.shape == (batch,)
    assert span.start.dtype == span.stop.dtype == jnp.int32
    return np.asarray(span.start), np.asarray(span.stop)


def chances(starts):
    values, times = np.unique(starts, return_counts=True)
    return dict(zip(values.tolist(), (times / len(starts)).tolist(), strict=True))


@pytest.mark.parametrize("token_count", [2, 5, C])
def test_noise_among_few_tokens_is_one_of_them(token_count):
    """t <= c: m ~ U[0, t), a single token."""
    start, stop = draw(token_count)
    np.testing.assert_array_equal(stop, start + 1)
    found = chances(start)
    assert set(found) == set(range(token_count))
    assert max(abs(share - 1 / token_count) for share in found.values()) < 0.06


@pytest.mark.parametrize("token_count", [12, N])
def test_noise_among_many_tokens_spares_the_last_group(token_count):
    """t > c: m ~ U[0, t - g); single below c, a whole group from there on."""
    start, stop = draw(token_count)
    found, limit = chances(start), token_count - G
    assert set(found) == {*range(C), *range(C, limit, G)}
    np.testing.assert_array_equal(stop - start, np.where(start < C, 1, G))
    for first, share in found.items():
        assert share == pytest.approx((1 if first < C else G) / limit, abs=0.05)


def test_a_single_token_is_never_perturbed():
    start, stop = draw(1)
    assert (start == N).all() and (stop == N).all()


@pytest.mark.parametrize("token_count", [G, 2 * G, N])
def test_without_causal_tokens_noise_strikes_whole_groups(token_count):
    """c = 0: m ~ U[0, t - g) as ever; in one group alone there is nothing to correct."""
    start, stop = draw(token_count, causal_num=0)
    if token_count == G:
        assert (start == N).all() and (stop == N).all()
        return
    found = chances(start)
    assert set(found) == set(range(0, token_count - G, G))
    np.testing.assert_array_equal(stop - start, G)
    assert max(abs(share - G / (token_count - G)) for share in found.values()) < 0.06


def test_one_position_for_the_batch():
    positions = set()
    for seed in range(40):
        start, stop = draw(N, per_sample=False, seed=seed, batch=6)
        assert len(set(start.tolist())) == len(set(stop.tolist())) == 1
        positions.add(int(start[0]))
    assert len(positions) > 4


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.integers(0, N - 1))
def test_span_of_a_position(position):
    span = correction.span_of(jnp.array([position]), G, C)
    if position < C:
        assert (span.start[0], span.stop[0]) == (position, position + 1)
    else:
        assert (span.start[0], span.stop[0]) == (position // G * G, position // G * G + G)
    inside = np.asarray(correction.inside(span, N))[0]
    after = np.asarray(correction.after(span, N))[0]
    assert inside.tolist() == [span.start[0] <= n < span.stop[0] for n in range(N)]
    assert after.tolist() == [n >= span.stop[0] for n in range(N)]


@pytest.mark.parametrize("depth", [(), (3,)])
def test_splice(depth):
    span = correction.Span(jnp.array([2, 0, N]), jnp.array([4, 1, N]))
    before, noisy, later = (jnp.full((3, N, *depth), float(value)) for value in (1, 2, 3))
    got = np.asarray(correction.splice(span, before, noisy, later))
    want = np.array([[1] * 2 + [2] * 2 + [3] * 12, [2] + [3] * 15, [1] * 16])
    np.testing.assert_array_equal(
        got, np.broadcast_to(want.reshape(3, N, *(1 for _ in depth)), got.shape)
    )


def test_near_code_ranks_by_distance():
    distances = np.random.default_rng(0).uniform(size=(2, 3, 80)).astype(np.float32)
    choice = np.array([[0, 1, 49], [5, 0, 7]])
    got = correction.near_code(jnp.asarray(distances), jnp.asarray(choice))
    want = np.take_along_axis(distances.argsort(-1), choice[..., None], -1)[..., 0]
    np.testing.assert_array_equal(got, want)
    assert got.dtype == jnp.int32
    few = correction.near_code(jnp.asarray(distances[..., :4]), jnp.full((2, 3), 3))
    np.testing.assert_array_equal(few, distances[..., :4].argmax(-1))  # fewer codes than `top`


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
