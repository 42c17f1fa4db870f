"""Distances between sets of images against recorded numbers, numpy and scipy."""

import warnings

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import scipy.special

from detailflow_jax.evaluate import distances, image_quality
from detailflow_jax.evaluate.errors import EvaluationError
from golden_files import FOLDER

RNG = np.random.default_rng


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(FOLDER / "metrics.npz"))


def rectified(rows, width, zeros=0, seed=0):
    """Features as after a ReLU, some of them never active."""
    rng = RNG(seed)
    mix = rng.standard_normal((width, width)) * np.exp(-np.arange(width) / width * 4) / width**0.5
    features = np.maximum(rng.standard_normal((rows, width)) @ mix + 0.1 * seed, 0)
    features[:, :zeros] = 0
    return features


def by_numpy(features):
    return features.mean(0), np.cov(features, rowvar=False)


def by_square_root(mean1, covariance1, mean2, covariance2):
    with warnings.catch_warnings():  # A product may be singular and still have a root.
        warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)
        root = scipy.linalg.sqrtm(covariance1 @ covariance2)
    assert np.isfinite(root).all()
    spread = np.trace(covariance1) + np.trace(covariance2) - 2 * np.trace(root).real
    return np.sum((mean1 - mean2) ** 2) + spread


# ------------------------------------------------------------------------------------- golden


def test_golden_fid(golden):
    reference = distances.gaussian([golden["reference"]])
    sample = distances.gaussian(np.split(golden["sample"], 5))
    fid = distances.frechet_distance(*reference, *sample)
    assert fid == pytest.approx(golden["fid"], rel=1e-5)


def test_golden_inception_score(golden):
    score = distances.inception_score(golden["probabilities"], split_size=100)
    assert score == pytest.approx(golden["inception_score_split_100"], rel=1e-5)


def test_golden_precision_and_recall(golden):
    reference, sample = golden["reference"], golden["sample"]
    precision, recall = distances.precision_recall(reference, sample)
    assert abs(precision - golden["precision"]) * len(sample) <= 2
    assert abs(recall - golden["recall"]) * len(reference) <= 2


# ------------------------------------------------------------------------------------ moments


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_equal_numpy_however_rows_come(offset):
    rows = (RNG(0).standard_normal((700, 30)) * RNG(1).random(30) + offset).astype(np.float32)
    expected = np.cov(rows, rowvar=False)
    scale = np.abs(expected).max()
    for cuts in ([], [1, 2, 64, 650], list(range(1, 700))):
        found = distances.gaussian(np.split(rows, cuts))
        np.testing.assert_allclose(found.covariance, expected, rtol=0, atol=1e-10 * scale)
        np.testing.assert_allclose(found.mean, rows.mean(0, dtype=np.float64), rtol=1e-12)


@pytest.mark.parametrize(
    ("rows", "words"),
    [(np.ones((1, 3)), "1 images have no covariance"), (np.array([[1, np.nan, 0]] * 2), "NaN")],
)
def test_features_that_have_no_moments_are_an_error(rows, words):
    with pytest.raises(EvaluationError, match=words):
        distances.gaussian([rows])


# --------------------------------------------------------------------------- Fréchet distance


@pytest.mark.parametrize(
    ("width", "rows", "zeros"), [(64, 400, 0), (64, 20, 0), (64, 200, 5), (256, 60, 40)]
)
def test_frechet_distance_is_that_of_the_matrix_square_root(width, rows, zeros):
    a = by_numpy(rectified(rows, width, zeros))
    b = by_numpy(rectified(rows + 7, width, zeros, seed=1))
    # Off full rank scipy's root itself is uncertain by about the root of float64's epsilon.
    expected = by_square_root(*a, *b)
    assert distances.frechet_distance(*a, *b) == pytest.approx(expected, rel=1e-6)
    assert abs(distances.frechet_distance(*a, *a)) < 1e-10 * np.trace(a[1])


def test_frechet_distance_of_more_features_than_images():
    a, b = rectified(250, 1024), rectified(257, 1024, seed=1)
    # With S = X^T X the product has the eigenvalues of (Y X^T)(Y X^T)^T, a matrix of 257 rows,
    # whose root scipy takes much faster.
    x, y = ((f - f.mean(0)) / (len(f) - 1) ** 0.5 for f in (a, b))
    gram = y @ x.T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)
        root = scipy.linalg.sqrtm(gram @ gram.T)
    spread = np.sum(x**2) + np.sum(y**2) - 2 * np.trace(root).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + spread
    got = distances.frechet_distance(*by_numpy(a), *by_numpy(b))
    assert got == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_orthogonal_and_empty_spreads():
    zero, one = np.zeros(2), np.diag([1.0, 0.0])
    assert distances.frechet_distance(zero, one, zero, np.diag([0.0, 4.0])) == pytest.approx(5.0)
    empty = np.zeros((2, 2))
    assert distances.frechet_distance(zero, empty, zero + 2, one) == pytest.approx(9.0)


@pytest.mark.parametrize(
    ("mean", "matrix", "words"),
    [
        (np.zeros(2), np.diag([1.0, -0.5]), "eigenvalue -0.5"),
        (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), "not symmetric"),
        (np.zeros(2), np.diag([1.0, np.nan]), "NaN"),
        (np.zeros(2), np.eye(3), r"expected \(2, 2\)"),
        (np.zeros(3), np.eye(3), "width 2 and 3"),
    ],
)
def test_frechet_distance_refuses_damaged_statistics(mean, matrix, words):
    with pytest.raises(EvaluationError, match=words):
        distances.frechet_distance(np.zeros(2), np.eye(2), mean, matrix)


# ------------------------------------------------------------------- inception score, neighbours


def test_inception_score_with_zeros_and_a_short_last_split():
    certain = np.eye(4, dtype=np.float32)[np.arange(8) % 4]
    assert distances.inception_score(certain) == pytest.approx(4.0)
    assert distances.inception_score(certain, split_size=6) == pytest.approx(
        (np.exp(-2 / 3 * np.log(1 / 3) - 1 / 3 * np.log(1 / 6)) + 2) / 2, rel=1e-6
    )
    with pytest.raises(EvaluationError, match="softmax"):
        distances.inception_score(np.ones((4, 3)))


def by_guided_diffusion(probabilities, split_size=5000):
    """The inception score as the arithmetic of the guided-diffusion evaluator has it."""
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = probabilities[start : start + split_size]
        divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        scores.append(np.exp(divergence.sum(axis=1).mean()))
    return np.mean(scores)


def test_inception_score_is_that_of_mixed_classes_in_any_order():
    """12,000 images of 100 classes, stored class by class, and shuffled."""
    labels = np.repeat(np.arange(100), 120)
    logits = RNG(0).normal(0, 1, (12_000, 100)) + 9 * np.eye(100)[labels]
    probabilities = scipy.special.softmax(logits.astype(np.float32), axis=1)
    shuffled = probabilities[RNG(1).permutation(12_000)]
    assert distances.inception_score(shuffled) == pytest.approx(by_guided_diffusion(shuffled))
    assert by_guided_diffusion(probabilities) < 0.5 * by_guided_diffusion(shuffled)
    score = distances.inception_score(distances.mixed(probabilities))
    assert score == pytest.approx(by_guided_diffusion(shuffled), rel=5e-3)
    for order in (shuffled, probabilities[::-1]):
        assert distances.inception_score(distances.mixed(order)) == score


def brute_force(reference, sample, k=3):
    def squared(u, v):
        return ((u[:, None].astype(np.float64) - v[None]) ** 2).sum(-1)

    radii = [np.sort(squared(x, x), axis=1)[:, k] for x in (reference, sample)]
    between = squared(reference, sample)
    inside_sample = (between <= radii[1]).any(axis=1)
    return (between <= radii[0][:, None]).any(axis=0).mean(), inside_sample.mean()


@pytest.mark.parametrize("scale", [1.0, 1024.0])  # Squares of the second overflow float16.
def test_precision_and_recall_by_blocks_equal_brute_force(monkeypatch, scale):
    monkeypatch.setattr(distances, "_ROWS", 24)
    jax.clear_caches()
    reference = (scale * RNG(0).integers(3, 10, (130, 3))).astype(np.float32)
    sample = (scale * RNG(1).integers(4, 12, (90, 3))).astype(np.float32)
    # What lies at 0 is far from all samples, but not from zeros, if they padded a block; what lies
    # at -20 has those samples at -41 within its radius, unless padding counted as neighbours.
    reference[0], reference[1], sample[:4] = 0, -20 * scale, -41 * scale
    precision, recall = distances.precision_recall(reference, sample)
    assert (precision, recall) == pytest.approx(brute_force(reference, sample))
    assert distances.precision_recall(sample, reference) == (recall, precision)
    assert 0 < recall < 1


def test_precision_and_recall_need_neighbours():
    with pytest.raises(EvaluationError, match=r"the sample has 3 images.*at least 4"):
        distances.precision_recall(np.ones((9, 2)), np.ones((3, 2)))


# ------------------------------------------------------------------------------- image quality


@pytest.fixture(scope="module")
def pair():
    rng = RNG(0)
    smooth = scipy.ndimage.gaussian_filter(rng.random((2, 24, 20, 3)), (0, 2, 2, 0))
    images = (255 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8)
    noisy = np.clip(images + rng.normal(0, 12, images.shape), 0, 255).astype(np.uint8)
    return images, noisy


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_equals_its_definition_in_float64(pair, data_range):
    expected = []
    for x, y in zip(*(z / 255.0 for z in pair), strict=True):
        x, y = (np.lib.stride_tricks.sliding_window_view(z, (7, 7), (0, 1)) for z in (x, y))
        ux, uy = x.mean((-1, -2)), y.mean((-1, -2))
        vx, vy = x.var((-1, -2), ddof=1), y.var((-1, -2), ddof=1)
        shared = ((x - ux[..., None, None]) * (y - uy[..., None, None])).sum((-1, -2)) / 48
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        map_ = (2 * ux * uy + c1) * (2 * shared + c2)
        expected.append((map_ / ((ux**2 + uy**2 + c1) * (vx + vy + c2))).mean())
    np.testing.assert_allclose(image_quality.ssim(*pair, data_range), expected, rtol=2e-6)
    np.testing.assert_allclose(image_quality.ssim(pair[0], pair[0]), 1.0, rtol=1e-6)


def test_psnr(pair):
    error = np.mean(((pair[0] - pair[1].astype(float)) / 255) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(image_quality.psnr(*pair), -10 * np.log10(error), rtol=1e-5)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 7"):
        image_quality.ssim(np.zeros((1, 6, 9, 3), np.uint8), np.zeros((1, 6, 9, 3), np.uint8))
