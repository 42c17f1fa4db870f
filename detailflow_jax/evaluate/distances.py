"""Distances between sets of images by their features, with the conventions of published numbers.

Shapes: N images, D features, K classes. Fréchet distance: Heusel et al. 2017 (FID; on spatial
features sFID, Nash et al. 2021). Inception score: Salimans et al. 2016. Precision and recall:
Kynkäänniemi et al. 2019. The conventions are those of the guided-diffusion evaluator, which nearly
every published ImageNet table uses.
"""

import functools
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.inference.batching import split_count
from detailflow_jax.runtime import sharding

NEIGHBOUR = 3
SPLIT_SIZE = 5000
_ROWS, _COLUMNS = 1024, 1024  # of a block of distances on one device

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

    Images must be in an order that mixes classes: a split of few classes scores too low.

    Args:
      probabilities: float32 [N, K], rows that sum to 1; a zero counts as 0 log 0 = 0.
      split_size: images a split; the last one may be smaller.

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


# ---------------------------------------------------------------------------- precision and recall


def precision_recall(
    reference: np.ndarray, sample: np.ndarray, *, neighbour: int = NEIGHBOUR, mesh=None
) -> tuple[float, float]:
    """Improved precision and recall by k nearest neighbours, computed in blocks.

    The radius of a point is its distance to its k-th neighbour in its own set. Precision is the
    share of samples within the radius of a reference point, recall the share of reference points
    within the radius of a sample. Squared distances are rounded to float16 as published; in a
    set where that overflows they are float32.

    Args:
      reference: float32 [N, D], samples' features of real images.
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
    radii = [_radii(x, neighbour, mesh) for x in (reference, sample)]
    reference_in, sample_in = _inside(reference, sample, *radii, mesh)
    return float(np.mean(sample_in)), float(np.mean(reference_in))


class _Points(typing.NamedTuple):
    """Features [N, D] and their squared norms [N], float32 arrays of perhaps float16 values."""

    features: np.ndarray
    norms: np.ndarray


def _points(features: np.ndarray, half: bool) -> _Points:
    # Rounded here by numpy, for compilers keep more digits than asked where they fuse.
    with np.errstate(over="ignore"):  # What overflows is found, and computed in float32.
        kept = np.asarray(features).astype(np.float16 if half else np.float32)
        norms = np.square(kept).sum(axis=1, dtype=np.float32).astype(kept.dtype)
    return _Points(kept.astype(np.float32), norms.astype(np.float32))


def _squared_distances(u: _Points, v: _Points, half: bool) -> jax.Array:
    """|u|^2 - 2uv + |v|^2, at least 0: float32 [rows, columns]."""

    def rounded(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10) if half else x

    products = jnp.matmul(u.features, v.features.T, precision=jax.lax.Precision.HIGHEST)
    half_way = rounded(u.norms[:, None] - rounded(2.0 * products))
    return jnp.maximum(rounded(half_way + v.norms), 0.0)


@functools.partial(jax.jit, static_argnames=("neighbour", "half"))
def _block_radii(rows: _Points, columns: _Points, valid: jax.Array, neighbour: int, half: bool):
    """Radii of rows [b] over column blocks [blocks, c]; and whether no distance overflowed."""

    def step(carry, block):
        nearest, finite = carry
        points, is_valid = block
        distances = _squared_distances(rows, points, half)
        finite &= jnp.isfinite(distances).all()
        distances = jnp.where(is_valid, distances, jnp.inf)
        joined = jnp.concatenate([nearest, distances], axis=1)
        return (-jax.lax.top_k(-joined, neighbour + 1)[0], finite), None

    nearest = jnp.full((len(rows.norms), neighbour + 1), jnp.inf)
    (nearest, finite), _ = jax.lax.scan(step, (nearest, jnp.array(True)), (columns, valid))
    return nearest[:, neighbour], finite


@functools.partial(jax.jit, static_argnames="half")
def _block_inside(rows: _Points, row_radii, columns: _Points, column_radii, half: bool):
    """Which rows lie within a column's radius [b], and which columns within a row's [blocks, c]."""

    def step(carry, block):
        row_in, finite = carry
        points, radii = block
        distances = _squared_distances(rows, points, half)
        finite &= jnp.isfinite(distances).all()
        row_in |= (distances <= radii).any(axis=1)
        return (row_in, finite), (distances <= row_radii[:, None]).any(axis=0)

    start = jnp.zeros(len(row_radii), bool), jnp.array(True)
    (row_in, finite), column_in = jax.lax.scan(step, start, (columns, column_radii))
    return row_in, column_in, finite


def _radii(features: np.ndarray, neighbour: int, mesh: Mesh | None, half: bool = True):
    points = _points(features, half)
    columns = _replicated(_column_blocks(points), mesh)
    valid = _column_blocks(np.ones(len(features), bool))
    radii = []
    for rows in _row_blocks(points, mesh):
        part, finite = _block_radii(rows, columns, valid, neighbour, half)
        if half and not finite:
            return _radii(features, neighbour, mesh, half=False)
        radii.append(np.asarray(part))
    return np.concatenate(radii)[: len(features)]


def _inside(reference, sample, reference_radii, sample_radii, mesh, half: bool = True):
    """(bool [N] reference points within a sample's radius, bool [M] the reverse)."""
    columns = _replicated(_column_blocks(_points(sample, half)), mesh)
    # A radius of -1 lets nothing in, so what pads a block counts nowhere.
    column_radii = _column_blocks(sample_radii, -1.0)
    row_in, column_in = [], np.zeros(column_radii.shape, bool)
    row_radii = _row_blocks(reference_radii, mesh, -1.0)
    for rows, radii in zip(_row_blocks(_points(reference, half), mesh), row_radii, strict=True):
        part, columns_in, finite = _block_inside(rows, radii, columns, column_radii, half)
        if half and not finite:
            return _inside(reference, sample, reference_radii, sample_radii, mesh, half=False)
        row_in.append(np.asarray(part))
        column_in |= np.asarray(columns_in)
    return np.concatenate(row_in)[: len(reference)], column_in.reshape(-1)[: len(sample)]


def _blocks(tree, size: int, fill: float = 0.0):
    """Arrays [N, ...] padded and cut into [blocks, size, ...]."""

    def cut(x: np.ndarray) -> np.ndarray:
        widths = [(0, -len(x) % size)] + [(0, 0)] * (x.ndim - 1)
        padded = np.pad(x, widths, constant_values=False if x.dtype == bool else fill)
        return padded.reshape(-1, size, *x.shape[1:])

    return jax.tree.map(cut, tree)


def _column_blocks(tree, fill: float = 0.0):
    return _blocks(tree, min(_COLUMNS, len(jax.tree.leaves(tree)[0])), fill)


def _row_blocks(tree, mesh: Mesh | None, fill: float = 0.0):
    """Blocks of rows one after the other, each split over the mesh."""
    parts = 1 if mesh is None else split_count(mesh)
    share = min(_ROWS, -(-len(jax.tree.leaves(tree)[0]) // parts))
    blocks = _blocks(tree, share * parts, fill)
    for i in range(len(jax.tree.leaves(blocks)[0])):
        block = jax.tree.map(lambda x, i=i: x[i], blocks)
        where = None if mesh is None else NamedSharding(mesh, PartitionSpec(sharding.BATCH))
        yield jax.device_put(block, where)


def _replicated(tree, mesh: Mesh | None):
    return jax.device_put(tree, None if mesh is None else NamedSharding(mesh, PartitionSpec()))
