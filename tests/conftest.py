"""Fixtures of several files, and what every test process starts with."""

import pathlib
import signal

import jax
import pytest

# The background jobs of a shell script ignore SIGINT, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW_ROOMS = ("benchmarks", "end_to_end", "processes")
FULL_TIMEOUT = 900  # Seconds; that of the other tests stands in pyproject.toml.


def pytest_collection_modifyitems(items):
    """Marks by room, and a longer limit for what is of full size."""
    for item in items:
        if pathlib.Path(item.path).parent.name in SLOW_ROOMS:
            item.add_marker("slow")
        if item.get_closest_marker("full") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(FULL_TIMEOUT))


@pytest.fixture(scope="module")
def hasty_compiler():
    """For files of small networks, whose time is XLA's: leaves its costly passes out."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
