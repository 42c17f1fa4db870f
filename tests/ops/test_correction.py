"""Spans of correction noise: how they are drawn, and what they replace."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from detailflow_jax.ops import correction

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
