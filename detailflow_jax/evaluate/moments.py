"""Mean and covariance of features, gathered batch by batch in float64.

Shapes: N rows, D features. Merging two sets of rows uses the pairwise update of Chan, Golub and
LeVeque (1979), which works on deviations from the mean: nothing is lost where the mean is large
and the spread small, as it would be with plain sums of squares.
"""

from collections.abc import Iterable

import numpy as np

from detailflow_jax.evaluate.errors import EvaluationError


class Moments:
    """Count, mean and scatter (the sum of outer products of deviations) of all rows so far."""

    def __init__(self, width: int):
        self.count = 0
        self.mean = np.zeros(width)
        self.scatter = np.zeros((width, width))

    @classmethod
    def of(cls, parts: Iterable[np.ndarray]) -> "Moments":
        """The moments of all rows of some parts [n, D], of which there is at least one."""
        moments = None
        for part in parts:
            moments = moments or cls(part.shape[1])
            moments.update(part)
        if moments is None:
            raise EvaluationError("there are no features to take a mean of")
        return moments

    def update(self, rows: np.ndarray) -> None:
        """Adds rows, float [n, D], n >= 0.

        Raises:
          EvaluationError: rows of another width, or values that are not finite.
        """
        rows = np.asarray(rows, np.float64)
        if rows.ndim != 2 or rows.shape[1] != len(self.mean):
            raise EvaluationError(f"features are {rows.shape}, expected [n, {len(self.mean)}]")
        if not len(rows):
            return
        if not np.isfinite(rows).all():
            raise EvaluationError("features hold NaN or infinity: are the images or weights sound?")
        mean = rows.mean(axis=0)
        deviations = rows - mean
        self._add(len(rows), mean, deviations.T @ deviations)

    def merge(self, other: "Moments") -> None:
        """Adds all rows that `other` has seen, such as those of another process.

        Raises:
          EvaluationError: moments of another width.
        """
        if other.mean.shape != self.mean.shape:
            raise EvaluationError(
                f"moments of {len(other.mean)} features cannot join those of {len(self.mean)}"
            )
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(delta, delta * (self.count * count / total))
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> np.ndarray:
        """float64 [D, D], divided by N - 1 as `np.cov(rowvar=False)` does.

        Raises:
          EvaluationError: fewer than two rows.
        """
        if self.count < 2:
            raise EvaluationError(f"{self.count} images have no covariance: at least 2 are needed")
        return self.scatter / (self.count - 1)
