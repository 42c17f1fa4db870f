"""Distances between sets of images by their features, with the conventions of published numbers.

Shapes: N, M images, D features, K classes. Fréchet distance: Heusel et al. 2017 (FID; on spatial
features sFID, Nash et al. 2021). Inception score: Salimans et al. 2016. Precision and recall:
Kynkäänniemi et al. 2019. The conventions are those of the guided-diffusion evaluator, which nearly
every published ImageNet table uses.
"""

import functools
import typing
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.inference.batching import pad, place, split_count, whole_shares

NEIGHBOUR = 3
SPLIT_SIZE = 5000
_ROWS = 1024  # of a block of distances on one device


class Gaussian(typing.NamedTuple):
    """Mean float64 [D] and covariance float64 [D, D] of features."""

    mean: np.ndarray
    covariance: np.ndarray


def gaussian(parts: Iterable[np.ndarray]) -> Gaussian:
    """Mean and covariance, divided by N - 1, of features that come in parts [n, D].

    Parts are merged in float64 by the pairwise update of Chan, Golub and LeVeque (1979). It works
    on deviations from the mean: nothing is lost where the mean is large and the spread small.

    Raises:
      EvaluationError: fewer than two rows in all, or values that are not finite.
    """
    count, mean, scatter = 0, np.zeros(()), np.zeros(())
    for part in parts:
        rows = np.asarray(part, np.float64)
        if not np.isfinite(rows).all():
            raise EvaluationError("features hold NaN or infinity: are the images or weights sound?")
        total, part_mean = count + len(rows), rows.mean(axis=0)
        delta, rows = part_mean - mean, rows - part_mean
        scatter = scatter + rows.T @ rows
        scatter += np.outer(delta, delta * (count * len(rows) / total))
        mean = mean + delta * (len(rows) / total)
        count = total
    if count < 2:
        raise EvaluationError(f"{count} images have no covariance: at least 2 are needed")
    return Gaussian(mean, scatter / (count - 1))


# ------------------------------------------------------------------------------- Fréchet distance


def frechet_distance(
    mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray
) -> float:
    """|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)) between two Gaussians.

    The last trace is the sum of the singular values of F1^T F2 with S = F F^T. That equals the
    trace of the matrix square root, is real by construction and loses nothing where covariances
    are singular (fewer images than features), so no multiple of the identity is ever added.

    Args:
      mean1, mean2: float64 [D].
      covariance1, covariance2: float64 [D, D].

    Raises:
      EvaluationError: sizes that differ, values that are not finite, or a matrix that is not a
        covariance (not symmetric, or clearly negative eigenvalues).
    """
    if len(mean1) != len(mean2):
        raise EvaluationError(
            f"features of width {len(mean1)} and {len(mean2)} cannot be compared: both sides "
            "must come from the same network"
        )
    factor1, factor2 = _factor(mean1, covariance1), _factor(mean2, covariance2)
    difference = np.asarray(mean1, np.float64) - np.asarray(mean2, np.float64)
    root_trace = np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum()
    traces = np.trace(covariance1, dtype=np.float64) + np.trace(covariance2, dtype=np.float64)
    return float(difference @ difference + traces - 2 * root_trace)


def _factor(mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """F [D, r] with F F^T = S, of the rank r that float64 can tell from zero."""
    covariance = np.asarray(covariance, np.float64)
    if covariance.shape != (len(mean), len(mean)):
        raise EvaluationError(
            f"a mean of {len(mean)} features with a covariance {covariance.shape}: expected "
            f"({len(mean)}, {len(mean)})"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise EvaluationError("a mean or covariance holds NaN or infinity: the file is damaged")
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max()):
        raise EvaluationError("a covariance is not symmetric: the statistics are damaged")
    values, vectors = np.linalg.eigh(covariance)
    largest = max(values[-1], 0.0)
    # Statistics stored in float32 have eigenvalues of about -1e-7 of the largest.
    if values[0] < -1e-5 * largest or (values[0] < 0 and not largest):
        raise EvaluationError(
            f"a covariance has the eigenvalue {values[0]:.3g}: the statistics are damaged"
        )
    kept = values > len(values) * np.finfo(np.float64).eps * largest
    return vectors[:, kept] * np.sqrt(values[kept])


# -------------------------------------------------------------------------------- inception score


def inception_score(probabilities: np.ndarray, split_size: int = SPLIT_SIZE) -> float:
    """Mean over consecutive splits of exp(mean KL(p(y|x) || p(y))), in float32.

    Images must be in an order that mixes classes, see `mixed`: a split of few classes scores too
    low.

    Args:
      probabilities: float32 [N, K], rows that sum to 1; a zero counts as 0 log 0 = 0.
      split_size: images per split; the last one may be smaller.

    Raises:
      EvaluationError: no images, or rows that are not probabilities.
    """
    probabilities = np.asarray(probabilities, np.float32)
    if probabilities.ndim != 2 or not len(probabilities):
        raise EvaluationError(f"class probabilities are {probabilities.shape}, expected [N, K]")
    if not np.allclose(probabilities.sum(axis=1), 1.0, atol=1e-3):
        raise EvaluationError("class probabilities do not sum to 1: logits need a softmax first")
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = probabilities[start : start + split_size]
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
        divergence = np.where(part > 0, terms, np.float32(0)).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def mixed(probabilities: np.ndarray) -> np.ndarray:
    """Rows [N, K] of probabilities in an order that mixes classes, for `inception_score`.

    Rows are sorted by their values and then permuted by a fixed seed, so that the same set of
    images gives the same score in whatever order it is stored, such as class by class.
    """
    rows = np.ascontiguousarray(probabilities, ">f4")  # Sorts as bytes as it does by value.
    order = np.argsort(rows.view(f"S{rows[0].nbytes}").ravel(), kind="stable")
    return probabilities[order[np.random.default_rng(0).permutation(len(rows))]]


# ---------------------------------------------------------------------------- precision and recall


def precision_recall(
    reference: np.ndarray, sample: np.ndarray, *, neighbour: int = NEIGHBOUR, mesh=None
) -> tuple[float, float]:
    """Improved precision and recall by k nearest neighbours.

    The radius of a point is its distance to its k-th neighbour in its own set. Precision is the
    share of samples within the radius of a reference point, recall the share of reference points
    within the radius of a sample. Squared distances are rounded to float16 as published; in a
    set where that overflows they are float32.

    Args:
      reference: float32 [N, D], features of real images.
      sample: float32 [M, D].
      neighbour: k.
      mesh: rows are split over its data and fsdp axes; None computes on one device.

    Returns:
      (precision, recall) in [0, 1].

    Raises:
      EvaluationError: a set of k images or fewer, or of another width.
    """
    for name, features in (("reference", reference), ("sample", sample)):
        if len(features) <= neighbour:
            raise EvaluationError(
                f"the {name} has {len(features)} images: precision and recall with k={neighbour} "
                f"need at least {neighbour + 1}"
            )
    if reference.shape[1] != sample.shape[1]:
        raise EvaluationError(
            f"reference features have width {reference.shape[1]}, sample features "
            f"{sample.shape[1]}: both must come from the same network"
        )
    find_radii = functools.partial(_block_radii, neighbour=neighbour)
    sets = []
    for features in (reference, sample):
        points = _Points(features, np.zeros(len(features), np.float32))
        [radii] = zip(*_over_blocks(find_radii, points, points, mesh), strict=True)
        sets.append(_Points(features, np.concatenate(radii)[: len(features)]))
    rows, columns = zip(*_over_blocks(_block_inside, *sets, mesh), strict=True)
    reference_inside = np.concatenate(rows)[: len(reference)]
    return float(np.any(columns, axis=0).mean()), float(reference_inside.mean())


class _Points(typing.NamedTuple):
    """Features [N, D], float32 arrays of perhaps float16 values; [N] squared radii and norms."""

    features: np.ndarray
    radii: np.ndarray
    norms: np.ndarray | None = None

    def rounded(self, half: bool) -> "_Points":
        """With norms, in float16 if `half`."""
        # Rounded here by numpy, for compilers keep more digits than asked where they fuse.
        with np.errstate(over="ignore"):  # What overflows is found, and computed in float32.
            kept = np.asarray(self.features).astype(np.float16 if half else np.float32)
            norms = np.square(kept).sum(axis=1, dtype=np.float32).astype(kept.dtype)
        return _Points(kept.astype(np.float32), self.radii, norms.astype(np.float32))


def _over_blocks(
    compare: Callable, rows: _Points, columns: _Points, mesh: Mesh | None, half: bool = True
) -> list[list[np.ndarray]]:
    """Arrays that `compare` makes of each block of rows and all columns.

    The last block is filled up with its last row.
    """
    size = whole_shares(min(_ROWS * split_count(mesh), len(rows.features)), mesh)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    placed, found = jax.device_put(columns.rounded(half), everywhere), []
    rounded = rows.rounded(half)
    for start in range(0, len(rows.features), size):
        block = [place(pad(x[start : start + size], size), mesh) for x in rounded]
        *results, finite = compare(_Points(*block), placed, half=half)
        if half and not finite:
            return _over_blocks(compare, rows, columns, mesh, half=False)
        found.append([np.asarray(x) for x in results])
    return found


@functools.partial(jax.jit, static_argnames=("neighbour", "half"))
def _block_radii(rows: _Points, columns: _Points, *, neighbour: int, half: bool):
    """Squared radii of rows [b]; and whether no distance overflowed."""
    distances = _squared_distances(rows, columns, half)
    nearest = -jax.lax.top_k(-distances, neighbour + 1)[0]
    return nearest[:, neighbour], jnp.isfinite(distances).all()


@functools.partial(jax.jit, static_argnames="half")
def _block_inside(rows: _Points, columns: _Points, *, half: bool):
    """Which rows lie within a column's radius [b], and which columns within a row's [M]."""
    distances = _squared_distances(rows, columns, half)
    rows_in = (distances <= columns.radii).any(axis=1)
    columns_in = (distances <= rows.radii[:, None]).any(axis=0)
    return rows_in, columns_in, jnp.isfinite(distances).all()


def _squared_distances(u: _Points, v: _Points, half: bool) -> jax.Array:
    """|u|^2 - 2uv + |v|^2, at least 0: float32 [rows, columns]."""

    def rounded(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10) if half else x

    products = jnp.matmul(u.features, v.features.T, precision=jax.lax.Precision.HIGHEST)
    half_way = rounded(u.norms[:, None] - rounded(2.0 * products))
    return jnp.maximum(rounded(half_way + v.norms), 0.0)
