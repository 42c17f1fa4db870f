"""Fixtures of the tests of evaluation."""

import numpy as np
import pytest

from detailflow_jax.evaluate import (
    chunks,
    references,
)
from scored_models import (
    SIZE,
    extractor,
    images,
)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 16)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    np.savez(folder / "images.npz", images())
    found = references.load_reference(
        folder / "images.npz", extractor(), image_size=SIZE, cache=folder / "cache"
    )
    return found
