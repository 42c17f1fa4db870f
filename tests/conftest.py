"""What every test process starts with."""

import os
import pathlib
import shutil
import signal
import sys
import tempfile
import types

import jax
import jaxlib
import jaxtyping
import pytest

# Before the package is imported: every call of an annotated function checks its shapes and dtypes.
ROOMS = ("ops", "models", "inference", "tasks")
jaxtyping.install_import_hook([f"detailflow_jax.{room}" for room in ROOMS], "typechecker.check")

# TensorBoard's readers then leave TensorFlow alone, whose import takes seconds.
sys.modules["tensorboard.compat.notf"] = types.ModuleType("notf")

# The background jobs of a shell script ignore SIGINT, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONG_ROOMS = ("end_to_end", "processes")
FIRST_ROOMS = (*LONG_ROOMS, "training", "tasks", "models", "evaluate")
LONG = 900  # Seconds for those rooms and full tests; the others' limit is in pyproject.toml.


def pytest_configure(config):
    """Sets up the compiler of the tests, and one cache of compiled programs for all processes."""
    if not hasattr(config, "workerinput"):  # Workers and children inherit the variables.
        config.compiled = tempfile.mkdtemp(prefix="compiled")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.compiled
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    compile_fast(config)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(config.compiled, ignore_errors=True)


def compile_fast(config):
    """Has XLA compile fast, here and in child processes: most of the tests' time is its own.

    `-m full` keeps XLA as it is for users: there networks are large, and results recorded.
    """
    if config.option.markexpr == "full":
        return
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    jax.config.update("jax_disable_most_optimizations", True)
    if jaxlib.__version__.startswith("0.10."):  # XLA aborts on flags that it does not know.
        flags = os.environ.get("XLA_FLAGS", "").split()
        flags += ["--xla_cpu_use_fusion_emitters=false"]
        flags += ["--xla_cpu_parallel_codegen_split_count=1"]  # Each part costs, and cores are few.
        os.environ["XLA_FLAGS"] = " ".join(dict.fromkeys(flags))


def pytest_collection_modifyitems(items):
    """Puts what takes long first, so that no worker ends with it alone, and gives it more time."""
    room = lambda item: pathlib.Path(item.path).parent.name  # noqa: E731
    items.sort(key=lambda item: (*FIRST_ROOMS, room(item)).index(room(item)))
    for item in items:
        long = room(item) in LONG_ROOMS or item.get_closest_marker("full")
        if long and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG))


@pytest.fixture(scope="module")
def optimizing_compiler():
    """XLA as it is for users, where small programs compute much or the compiler is the subject."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def unchecked():
    """Values of any type reach the functions, as those of users do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
