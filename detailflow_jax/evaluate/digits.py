"""Are generated digits the digits that were asked for? A classifier fitted on real ones tells."""

from typing import Any

import numpy as np

from detailflow_jax.data.sources import DigitsSource
from detailflow_jax.ops import interpolation
from detailflow_jax.runtime import extras


def classifier() -> Any:
    """Returns scikit-learn's RBF support-vector classifier, fitted on the 8x8 training digits."""
    datasets, svm = extras.require("sklearn.datasets"), extras.require("sklearn.svm")
    digits = datasets.load_digits()
    train = DigitsSource("train").positions
    return svm.SVC(gamma=0.001).fit(digits.data[train], digits.target[train])


def to_features(images: np.ndarray) -> np.ndarray:
    """uint8 [B, S, S, 3] -> float [B, 64]: grey 8x8 area averages on the scale 0..16."""
    matrix = interpolation.area_matrix(images.shape[1], 8)
    grey = np.asarray(interpolation.apply_matrices(images, matrix, matrix)).mean(axis=-1)
    return grey.reshape(len(images), 64) * (16 / 255)


def accuracy(images: np.ndarray, labels: np.ndarray, judge: Any = None) -> float:
    """Share of images uint8 [B, S, S, 3] that the classifier assigns to their label."""
    judge = judge or classifier()
    return float(np.mean(judge.predict(to_features(images)) == labels))
