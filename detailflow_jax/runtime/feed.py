"""Reads batches and places them on the devices, one ahead of the running step."""

import copy
import functools
import math
from typing import Any

import jax
import numpy as np

from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.errors import DataError


class Feed:
    """The batches of a run, placed on its mesh; a context manager that closes the iterator.

    `state` is the state of the iterator after the batches that were taken, although one more has
    been read. Saved with the model's state, it makes a resumed run continue with the next batch.
    """

    def __init__(self, iterator: Any, mesh: jax.sharding.Mesh):
        """Wraps a Grain `DatasetIterator` of dicts of numpy arrays, this process's rows [b, ...].

        An entry "skipped", int [b], stays on the host and is summed by `skipped`.
        """
        self._iterator, self._mesh = iterator, mesh
        self._ahead = None
        self.state: dict | None = None
        self._skipped: int | None = None  # By this process, in this part of the run.
        self._skipped_before = 0

    @functools.cached_property
    def _blocks(self) -> int:
        """The number of processes that read different rows."""
        return sharding.batch_share(self._mesh)[1]

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self._iterator.close()

    def set_state(self, state: dict, skipped: int | None) -> None:
        """Continues from a saved run; call it before the first batch."""
        self._iterator.set_state(state)
        self.state = state
        if skipped is not None:
            self._skipped, self._skipped_before = 0, skipped

    @property
    def skipped(self) -> int | None:
        """Unreadable images skipped in the whole run; None if the data do not count them.

        Collective: every process must call it.
        """
        if self._skipped is None:
            return None
        skipped = int(sharding.gather_processes(np.array([self._skipped])).sum())
        if jax.process_count() > 1:  # Some may read the same rows.
            skipped = skipped * self._blocks // jax.process_count()
        return self._skipped_before + skipped

    def prefetch(self) -> None:
        """Reads the next batch and starts its transfer to the devices, unless that is already done.

        Raises:
            DataError: the iterator cannot give another batch.
        """
        if self._ahead is not None:
            return
        try:
            batch = dict(next(self._iterator))
        except StopIteration as error:
            raise DataError("the data have ended: expected an endless stream") from error
        except Exception as error:  # A reader can raise anything.
            raise DataError(f"cannot read the next batch: {error}") from error
        skipped = batch.pop("skipped", None)
        self._check_rows(batch)
        state = copy.deepcopy(self._iterator.get_state())
        self._ahead = sharding.global_batch(batch, self._mesh), state, skipped

    def _check_rows(self, batch: dict[str, np.ndarray]) -> None:
        rows = len(next(iter(batch.values()))) * self._blocks
        parts = math.prod(self._mesh.shape[axis] for axis in sharding.BATCH)
        if rows % parts:
            raise DataError(
                f"a batch of {rows} rows cannot be split over data x fsdp = {parts} of the mesh: "
                f"config.batch_size, and config.data.dynamic.multiple where batches differ in size,"
                f" must be multiples of {parts}"
            )

    def peek(self) -> dict[str, jax.Array]:
        """Returns the next batch without taking it."""
        self.prefetch()
        return self._ahead[0]

    def take(self) -> dict[str, jax.Array]:
        """Takes the next batch, [b * process_count, ...]."""
        self.prefetch()
        (batch, self.state, skipped), self._ahead = self._ahead, None
        if skipped is not None:
            self._skipped = (self._skipped or 0) + int(skipped.sum())
        return batch
