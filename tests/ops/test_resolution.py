"""Token counts, resolutions, and the counts that training draws."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from detailflow_jax.ops.resolution import ResolutionMap
from group_sizes import groups

settings = hypothesis.settings(max_examples=50, deadline=None)


@settings
@hypothesis.given(
    groups(), st.integers(1, 512), st.sampled_from([1, 8, 14, 16]), st.floats(0.5, 2.0)
)
def test_resolution_map_is_monotone_and_valid(sizes, image_size, patch, power):
    found = ResolutionMap(image_size, *sizes, patch, power)
    num_tokens, group_size, causal_num = sizes
    counts = found.token_counts
    whole = {n for n in range(1, num_tokens + 1) if n % group_size == 0}
    assert set(counts) == set(range(1, causal_num + 1)) | whole
    assert list(counts) == sorted(counts)
    resolutions = [found.resolution(n) for n in counts]
    assert resolutions == sorted(resolutions) and resolutions[-1] == image_size
    assert min(resolutions) >= 1
    for n, resolution in zip(counts, resolutions, strict=True):
        size = found.decoded_size(n)
        assert size % patch == 0 and 0 <= size - resolution < patch
        best = found.best_count(size)
        assert found.decoded_size(best) == size
        assert abs(found.resolution(best) - size) <= size - resolution
        assert (abs(found.resolution(best) - size), -best) <= (size - resolution, -n)


SMALL = ResolutionMap(64, 32, 4, 8, 8)


@pytest.mark.parametrize("count", [0, -4, 9, 30, 36])
def test_counts_without_meaning_are_refused(count):
    with pytest.raises(ValueError, match=f"num_tokens={count} .*1..8.*multiples of 4 up to 32"):
        SMALL.resolution(count)


def test_without_causal_tokens_only_whole_groups_count():
    found = ResolutionMap(64, 32, 4, 0, 8)
    assert found.token_counts == tuple(range(4, 33, 4))
    with pytest.raises(ValueError, match=r"num_tokens=1 .* counts are multiples of 4 up to 32"):
        found.resolution(1)
    rng = np.random.default_rng(0)
    assert {found.draw_count(rng, 0.0) for _ in range(200)} == set(range(4, 29, 4))


def test_a_size_that_no_count_decodes_to_is_refused():
    with pytest.raises(ValueError, match=r"100 px; possible sizes: \[.*64\]"):
        SMALL.best_count(100)


def test_drawn_counts():
    """0.8 in full; else U[1, N - g], rounded up to a multiple of g beyond the causal part."""
    rng = np.random.default_rng(0)
    drawn = np.array([SMALL.draw_count(rng) for _ in range(8000)])
    assert np.mean(drawn == 32) == pytest.approx(0.8, abs=0.02)
    rest = drawn[drawn != 32]
    counts, times = np.unique(rest, return_counts=True)
    assert counts.tolist() == [*range(1, 9), 12, 16, 20, 24, 28]
    want = np.array([1] * 8 + [4] * 5) / 28
    assert np.abs(times / len(rest) - want).max() < 0.04
    assert {SMALL.draw_count(rng, 1.0) for _ in range(50)} == {32}
    assert {ResolutionMap(8, 4, 4, 4, 8).draw_count(rng, 0.0) for _ in range(50)} == {4}
