"""The formulas: masks, resolutions, resizing, rotary turns, filters and pixels."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from detailflow_jax.ops import images, interpolation, masks, patches, rotary
from detailflow_jax.ops import logits as filters
from detailflow_jax.ops.resolution import ResolutionMap

settings = hypothesis.settings(max_examples=50, deadline=None)


@st.composite
def groups(draw, most=12):
    """(N, g, c) that belong together."""
    size, count = draw(st.integers(1, 6)), draw(st.integers(1, most))
    return size * count, size, size * draw(st.integers(0, count))


# ------------------------------------------------------------------------------------------ masks


def may_see(row, column, group_size, causal_num):
    """The rule in words: one by one at first, then whole groups see themselves and the past."""
    if row < causal_num:
        return column <= row
    return column < (row // group_size + 1) * group_size


@settings
@hypothesis.given(groups())
def test_group_mask_follows_the_rule(sizes):
    num_tokens, group_size, causal_num = sizes
    mask = masks.group_mask(*sizes)
    assert mask.dtype == bool and mask.shape == (num_tokens, num_tokens)
    for row in range(num_tokens):
        want = [may_see(row, column, group_size, causal_num) for column in range(num_tokens)]
        assert mask[row].tolist() == want


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((10, 4, 4), "num_tokens=10"),
        ((8, 0, 4), "group_size=0"),
        ((8, 4, 6), "causal_num=6"),
        ((8, 4, 12), "causal_num=12"),
        ((8, 4, -4), "causal_num=-4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, named):
    with pytest.raises(ValueError, match=named):
        masks.group_mask(*sizes)


# ------------------------------------------------------------------------------------- resolution


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


# ---------------------------------------------------------------------------------- interpolation


def torch_resize(pictures, size, **options):
    """torch's result for [B, H, W, C], in float64: in float32 its own rounding reaches 1e-5."""
    channels_first = torch.from_numpy(np.moveaxis(pictures, -1, 1).astype(np.float64))
    resized = torch.nn.functional.interpolate(channels_first, size=size, **options)
    return np.moveaxis(resized.numpy(), 1, -1)


MATRICES = {
    "area": interpolation.area_matrix,
    "bicubic": interpolation.bicubic_matrix,
    "bilinear": interpolation.antialiased_bilinear_matrix,
}
SIZES = [(16, 16), (16, 5), (16, 7), (5, 16), (7, 32), (64, 44), (1, 8), (31, 1)]


@pytest.mark.parametrize("kind", MATRICES)
@settings
@hypothesis.given(st.integers(1, 80), st.integers(1, 80))
def test_rows_of_matrices_sum_to_one(kind, size_in, size_out):
    matrix = MATRICES[kind](size_in, size_out)
    assert matrix.dtype == np.float32 and matrix.shape == (size_out, size_in)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    if size_in == size_out:
        np.testing.assert_allclose(matrix, np.eye(size_in), atol=1e-6)


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("sizes", SIZES)
def test_resizing_equals_torch(kind, sizes):
    size_in, size_out = sizes
    picture = np.random.default_rng(0).standard_normal((2, size_in, size_in + 3, 3))
    picture = picture.astype(np.float32)
    options = {"mode": kind}
    if kind != "area":
        options |= {"align_corners": False, "antialias": kind == "bilinear"}
    size = (size_out, size_out + 1)
    rows, columns = MATRICES[kind](size_in, size[0]), MATRICES[kind](size_in + 3, size[1])
    got = interpolation.apply_matrices(picture, rows, columns)
    np.testing.assert_allclose(got, torch_resize(picture, size, **options), atol=2e-6)


def test_degraded_target_equals_torch():
    """Area reduction to R(n), then bicubic enlargement; no change at full resolution."""
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
    low = torch_resize(picture, (11, 11), mode="area")
    matrix = interpolation.degradation_matrix(32, 11, 16)
    got = interpolation.apply_matrices(picture, matrix, matrix)
    np.testing.assert_allclose(got, torch_resize(low, (16, 16), mode="bicubic"), atol=2e-6)
    np.testing.assert_array_equal(interpolation.degradation_matrix(32, 32, 32), np.eye(32))


def test_enlarging_equals_torch():
    picture = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    want = torch_resize(picture, (20, 20), mode="bicubic")
    np.testing.assert_allclose(interpolation.enlarge(picture, 20), want, atol=2e-6)


def test_position_table():
    table = np.random.default_rng(0).standard_normal((16, 5)).astype(np.float32)
    np.testing.assert_array_equal(interpolation.resize_position_table(table, 4, 4), table)
    want = torch_resize(table.reshape(1, 4, 4, 5), (3, 6), mode="bilinear", antialias=True)
    got = interpolation.resize_position_table(table, 3, 6)
    np.testing.assert_allclose(got, want.reshape(18, 5), atol=2e-6)
    with pytest.raises(ValueError, match="15 rows"):
        interpolation.resize_position_table(table[:15], 3, 6)


# --------------------------------------------------------------------------------- rotary, patches


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


def test_rotary_needs_whole_quarters():
    with pytest.raises(ValueError, match="head_dim=6"):
        rotary.group_rotary_table(8, 4, 6)


def test_patches_are_row_column_channel():
    picture = jnp.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
    tokens = patches.patchify(picture, 4)
    assert tokens.shape == (2, 6, 48)
    np.testing.assert_array_equal(tokens[1, 4], picture[1, 4:8, 4:8].reshape(-1))
    np.testing.assert_array_equal(patches.unpatchify(tokens, 4, 2, 3), picture)
    with pytest.raises(ValueError, match=r"8x12 .* patches of 5"):
        patches.patchify(picture, 5)


# ------------------------------------------------------------------------------- logits and pixels


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


def test_sample_codes_draws_by_key():
    keys = jax.random.split(jax.random.key(0), 3)
    logits = jnp.zeros((3, 5, 7))
    codes = filters.sample_codes(keys, logits)
    assert codes.shape == (3, 5) and codes.dtype == jnp.int32
    np.testing.assert_array_equal(filters.sample_codes(keys[1:2], logits[1:2]), codes[1:2])
    only = jnp.where(jnp.arange(7) == 4, 0.0, -jnp.inf)
    assert (filters.sample_codes(keys, jnp.broadcast_to(only, (3, 5, 7))) == 4).all()
