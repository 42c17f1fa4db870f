"""Reads batches and places them on the devices, one ahead of the running step.

The reading is done in a thread, so that a run that waits for a batch can still be told to leave.
"""

import contextlib
import copy
import functools
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import jax
import numpy as np

from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.errors import DataError, ReadError
from detailflow_jax.runtime.retry import is_passing

_LOOK = 0.1  # Seconds between two looks at the wish to leave, while waiting for a batch.
_CLOSING = 2.0  # Seconds that the iterator has to close: a disk that hangs may keep it for ever.


class Leaving(Exception):
    """The run shall leave, and no batch has come yet."""


class _Read(NamedTuple):
    """A batch on the devices, the iterator's state after it, and its counts of skipped images."""

    batch: dict[str, jax.Array]
    state: dict
    skipped: np.ndarray | None


class Feed(contextlib.AbstractContextManager):
    """The batches of a run, placed on its mesh; a context manager that closes the iterator.

    `state` is the state of the iterator after the batches that were taken, although one more has
    been read. Saved with the model's state, it makes a resumed run continue with the next batch.
    """

    def __init__(
        self, iterator: Any, mesh: jax.sharding.Mesh, leave: Callable[[], bool] = lambda: False
    ):
        """Wraps a Grain `DatasetIterator` of dicts of numpy arrays, this process's rows [b, ...].

        An entry "skipped", int [b], stays on the host and is summed by `skipped`. While `leave` is
        true, there is no waiting for a batch.
        """
        self._iterator, self._mesh, self._leave = iterator, mesh, leave
        self._ahead: Future[_Read] | None = None
        self.state: dict | None = None
        self._skipped: int | None = None  # By this process, in this part of the run.
        self._skipped_before = 0

    @functools.cached_property
    def _blocks(self) -> int:
        """The number of processes that read different rows."""
        return sharding.batch_share(self._mesh)[1]

    def __exit__(self, *exception) -> None:
        closing = [_in_a_thread(self._iterator.close)]
        wait(closing if self._ahead is None else [*closing, self._ahead], timeout=_CLOSING)

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
        """Starts to read the next batch and to place it on the devices, unless that has begun."""
        if self._ahead is None:
            self._ahead = _in_a_thread(self._read)

    def _read(self) -> _Read:
        try:
            batch = dict(next(self._iterator))
        except StopIteration as error:
            raise DataError("the data have ended: expected an endless stream") from error
        except Exception as error:  # A reader can raise anything.
            kind = ReadError if is_passing(error) else DataError
            raise kind(f"cannot read the next batch: {error}") from error
        skipped = batch.pop("skipped", None)
        self._check_rows(batch)
        state = copy.deepcopy(self._iterator.get_state())
        return _Read(sharding.global_batch(batch, self._mesh), state, skipped)

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
        """Returns the next batch without taking it; raises what `take` raises."""
        self.prefetch()
        while not wait([self._ahead], timeout=_LOOK).done:
            if self._leave():
                raise Leaving
        return self._ahead.result().batch

    def take(self) -> dict[str, jax.Array]:
        """Takes the next batch, [b * process_count, ...].

        Raises:
            Leaving: it has not come yet, and `leave` is true.
            ReadError: it cannot be read now.
            DataError: the iterator cannot give another batch.
        """
        self.peek()
        (batch, self.state, skipped), self._ahead = self._ahead.result(), None
        if skipped is not None:
            self._skipped = (self._skipped or 0) + int(skipped.sum())
        return batch


def _in_a_thread(function: Callable[[], Any]) -> Future:
    """Runs a function in a daemon thread, for which the program does not wait at its exit."""
    future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="feed", daemon=True).start()
    return future
