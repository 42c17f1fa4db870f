"""Are generated digits the digits that were asked for? Classifiers fitted on real ones tell."""

from typing import Any

import numpy as np

from detailflow_jax.data import transforms
from detailflow_jax.data.sources import DigitsSource, make_source
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
    return _grey(images, 8).reshape(len(images), 64) * (16 / 255)


def accuracy(images: np.ndarray, labels: np.ndarray, judge: Any = None) -> float:
    """Share of images uint8 [B, S, S, 3] that the classifier assigns to their label."""
    judge = judge or classifier()
    return float(np.mean(judge.predict(to_features(images)) == labels))


def _grey(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 [B, S, S, 3] -> float [B, side, side], by area averages."""
    matrix = interpolation.area_matrix(images.shape[1], side)
    return np.asarray(interpolation.apply_matrices(images, matrix, matrix)).mean(axis=-1)


class Judge:
    """Names the digit on an image: a support-vector machine on histograms of gradients.

    It is fitted on a split of a source of digits, such as the 4,000 of `mnist:train`, and right on
    98% of those held out.
    """

    def __init__(self, source: str):
        images, labels = load(source, 28)
        svm = extras.require("sklearn.svm")
        self._svm = svm.SVC(C=3.0).fit(self._features(images), labels)

    @staticmethod
    def _features(images: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] -> [B, F]."""
        hog = extras.require("skimage.feature").hog
        size = {"orientations": 8, "pixels_per_cell": (4, 4), "cells_per_block": (2, 2)}
        return np.stack([hog(image, **size) for image in _grey(images, 28)])

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Share of images uint8 [B, S, S, 3] whose digit it names as `labels` do."""
        return float(np.mean(self._svm.predict(self._features(images)) == labels))


def load(source: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """All images of a source, uint8 [B, side, side, 3], and their labels, int [B]."""
    examples = list(make_source(source))
    images = [transforms.center_crop(example["image"], side) for example in examples]
    return np.stack(images), np.array([example["label"] for example in examples])
