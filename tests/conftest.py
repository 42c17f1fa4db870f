"""Fixtures of several files."""

import jax
import pytest


@pytest.fixture(scope="module")
def hasty_compiler():
    """For files of small networks, whose time is XLA's: leaves its costly passes out."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
