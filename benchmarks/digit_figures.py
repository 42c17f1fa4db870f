"""Figures of sampled digits: is each the digit asked for, and are they spread as real ones are?"""

from collections.abc import Mapping

import numpy as np

from detailflow_jax import data
from detailflow_jax.evaluate import digits
from detailflow_jax.evaluate.distances import frechet_distance, gaussian


def pictures(split: str) -> np.ndarray:
    """All digits of a split: uint8 [B, 32, 32, 3]."""
    return np.stack([example["image"] for example in data.make_source(f"digits:{split}")])


def distance(images: np.ndarray, real: np.ndarray) -> float:
    """Fréchet distance in the classifier's features between two sets uint8 [B, S, S, 3]."""
    first, second = (gaussian([digits.to_features(x)]) for x in (images, real))
    return frechet_distance(*first, *second)


def of_samples(images: np.ndarray, labels: np.ndarray) -> Mapping[str, float]:
    """`classifier` and `distance`, the latter to all real digits."""
    real = np.concatenate([pictures("train"), pictures("test")])
    return {"classifier": digits.accuracy(images, labels), "distance": distance(images, real)}
