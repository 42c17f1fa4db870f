"""What the sampling benchmarks share: random weights, seconds, memory."""

import concurrent.futures
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm


def random_params(init: Callable, *args: Any) -> Any:
    """Weights of std 0.02 (norms: 1), made on the host: no initialisation is compiled."""
    abstract = nn.unbox(jax.eval_shape(init, jax.random.key(0), *args))["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf) -> np.ndarray:
        if path[-1].key == "scale":
            return np.ones(leaf.shape, np.float32)
        weights = rng.standard_normal(leaf.shape, np.float32)
        weights *= 0.02
        return weights

    return jax.tree_util.tree_map_with_path(draw, abstract)


def seconds_of(function: Callable, *args: Any) -> tuple[float, Any]:
    """Wall-clock seconds of one call, waited for, and what it returned."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def least_seconds(
    runs: Mapping[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """(least seconds, last result) of every run by name; the runs alternate `repeats` times."""
    best: dict[str, float] = {}
    results: dict[str, Any] = {}
    rounds = [name for _ in range(repeats) for name in runs]
    for name in (progress := tqdm(rounds, unit="run", disable=None, leave=False)):
        progress.set_description(name)
        seconds, results[name] = seconds_of(runs[name])
        best[name] = min(seconds, best.get(name, seconds))
    return best, results


def memory_bandwidth() -> float:
    """Bytes per second that this machine (CPU) or device reads from memory; the best of 5."""
    if jax.default_backend() != "cpu":
        data = jnp.ones((2**28,), jnp.float32)
        read = jax.jit(jnp.sum)
        read(data).block_until_ready()
        return data.nbytes / min(seconds_of(read, data)[0] for _ in range(5))
    # XLA sums on one core; one BLAS dot product a core reads as fast as the memory allows.
    parts = np.ones((len(os.sched_getaffinity(0)), 2**26), np.float32)
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        read = lambda: list(pool.map(lambda part: part @ part, parts))  # noqa: E731
        return parts.nbytes / min(seconds_of(read)[0] for _ in range(5))


def peak_memory() -> int:
    """Most bytes held so far: by the device, or by this process on a CPU."""
    statistics = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if statistics:
        return statistics["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of text as lines, their cells in line."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)
