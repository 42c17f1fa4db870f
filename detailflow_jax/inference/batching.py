"""One function over many rows: cut into equal batches, placed on the devices, put together again.

Shapes: N rows, M rows per batch.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from detailflow_jax.inference.checks import check_whole
from detailflow_jax.inference.errors import InputError
from detailflow_jax.ops import Array
from detailflow_jax.runtime import sharding


def split_count(mesh: Mesh | None) -> int:
    """The number of parts into which the mesh splits a batch; 1 without a mesh."""
    return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in sharding.BATCH]))


def whole_shares(batch_size: int, mesh: Mesh | None) -> int:
    """The batch size rounded up to a multiple of `split_count`.

    Raises:
      InputError: it is no whole number of at least 1.
    """
    parts = split_count(mesh)
    return -(-check_whole("batch_size", batch_size, 1) // parts) * parts


def in_batches(
    function: Callable[..., Any],
    batch_size: int,
    *rows: Shaped[np.ndarray, "_ ..."],
    mesh: Mesh | None = None,
    whole: bool = False,
    finish: Callable[[Any], Any] = lambda result: result,
) -> Any:
    """`function` over all rows, in batches of one size: one compiled program for any number.

    The last batch is padded with its last row; results of the padding are cut off.

    Args:
      function: arrays [M, ...] -> a tree of arrays [M, ...].
      batch_size: M, rounded up to whole shares of the mesh.
      *rows: arrays [N, ...], which are batched together.
      mesh: splits every batch over its data and fsdp axes. It may span processes; all of them
        then give the same rows, and each gets the whole result.
      whole: batches have M rows even where N is less; otherwise a small N makes a smaller batch.
      finish: applied on the host to the result of each batch, before batches are put together.

    Returns:
      the tree of results, numpy [N, ...].

    Raises:
      InputError: arrays of different lengths, or a batch size below 1.
    """
    count = len(rows[0])
    if any(len(x) != count for x in rows):
        counts = " and ".join(str(len(x)) for x in rows)
        raise InputError(f"found {counts} rows in arrays that belong together")
    batch_size = check_whole("batch_size", batch_size, 1)
    size = whole_shares(batch_size if whole else min(batch_size, max(count, 1)), mesh)
    parts: list[Any] = []
    waiting: list[Any] = []  # a batch is computed while the result of the one before is fetched

    def fetch() -> None:
        parts.append(finish(jax.tree.map(sharding.to_host, waiting.pop(0))))

    with used(mesh):
        for start in range(0, count, size):
            batch = [place(pad(x[start : start + size], size), mesh) for x in rows]
            waiting.append(function(*batch))
            if len(waiting) > 1:
                fetch()
        if not count:  # Of no rows some networks cannot tell the shapes.
            waiting.append(
                function(*(place(np.zeros((size, *x.shape[1:]), x.dtype), mesh) for x in rows))
            )
        fetch()
    return jax.tree.map(lambda *x: np.concatenate(x)[:count], *parts)


def over_processes(function: Callable[..., Any], *rows: Shaped[np.ndarray, "N ..."]) -> Any:
    """`function` over all rows, of which each process takes an equal share.

    Args:
      function: (index of the first row, *arrays [M, ...]) -> a tree of arrays [M, ...].
      *rows: arrays [N, ...], the same in every process. The last process repeats the last row
        until its share is as long as the others.

    Returns:
      the tree of results of all rows, [N, ...], in every process.
    """
    count, processes = len(rows[0]), jax.process_count()
    share = -(-count // processes)
    first = jax.process_index() * share
    own = [pad(x, share * processes)[first : first + share] for x in rows]
    found = function(first, *own)
    return jax.tree.map(lambda x: sharding.gather_processes(x)[:count], found)


def pad(x: Shaped[np.ndarray, "M ..."], size: int) -> Shaped[np.ndarray, "{size} ..."]:
    """[M, ...] -> [size, ...], size >= M: the last row is repeated."""
    missing = size - len(x)
    return np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), "edge") if missing else x


def used(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """`sharding.use` of a mesh, if there is one."""
    return contextlib.nullcontext() if mesh is None else sharding.use(mesh)


def place(x: Shaped[np.ndarray, "M ..."], mesh: Mesh | None) -> Shaped[Array, "M ..."]:
    """An array split over the mesh, whose parts must divide M; without a mesh the array itself."""
    if mesh is None:
        return x
    split = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    return jax.make_array_from_callback(x.shape, split, x.__getitem__)
