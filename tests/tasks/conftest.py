"""Fixtures of the tests of tasks."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def images():
    pictures = np.random.default_rng(0).integers(0, 256, (4, 2, 2, 3), np.uint8)
    return {"image": pictures.repeat(8, axis=1).repeat(8, axis=2)}
