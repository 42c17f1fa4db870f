"""Resizing, against PyTorch's."""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from detailflow_jax.ops import interpolation

settings = hypothesis.settings(max_examples=50, deadline=None)


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
