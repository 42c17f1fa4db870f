"""Random images, and photographs."""

import numpy as np
from PIL import Image

from detailflow_jax.runtime import extras


def images(batch, height, width=None, seed=0):
    """float32 [batch, height, width, 3] in [-1, 1]."""
    shape = (batch, height, width or height, 3)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def photographs():
    """Two photographs of 427x640 px, uint8."""
    folder = extras.folder("sklearn") / "datasets" / "images"
    return [np.asarray(Image.open(folder / name)) for name in ("china.jpg", "flower.jpg")]
