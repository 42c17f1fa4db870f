"""Figures of sampled digits: is each the digit asked for, and are they spread as real ones are?"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from detailflow_jax import data
from detailflow_jax.evaluate import digits
from detailflow_jax.evaluate.distances import frechet_distance, gaussian
from detailflow_jax.runtime.config import load_config

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


def config(part: str, seed: int, steps: int, fields: Mapping[str, Any]) -> ConfigDict:
    """`configs/PART.py:digits` (or PART.py:VARIANT) of a length, silent; `fields` by full names."""
    file, _, variant = part.partition(":")
    lengths = {"seed": seed, "total_steps": steps, "optim.warmup_steps": steps // 10}
    quiet = {"figures_every": 0, "keep_checkpoints": 1, "tensorboard": False}
    overrides = [f"--config.{name}={x}" for name, x in (lengths | quiet | dict(fields)).items()]
    return load_config(f"{CONFIGS / file}.py:{variant or 'digits'}", overrides)


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
