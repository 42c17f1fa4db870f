"""Batches made by worker processes, which leave only with the run and leave nothing behind.

Grain starts and feeds the processes. What this module adds:

- A signal to the whole group (Ctrl-C, Slurm, Kubernetes) does not reach them: the run ends them
  when it has saved. They end with their parent, however that ends.
- A worker that is killed costs time only: all are started again where the batches had come to.
- Their shared memory has names by which it is found and removed when they cannot do it themselves.
- They do not import the program's main module, so it needs no `if __name__ == "__main__":`.
"""

import atexit
import contextlib
import functools
import itertools
import multiprocessing
import os
import pathlib
import re
import secrets
import shutil
import signal
import threading
import weakref
from collections.abc import Iterator
from multiprocessing import resource_tracker, shared_memory, spawn
from typing import Any

import grain
from absl import flags, logging

from detailflow_jax.runtime.errors import ConfigError, ReadError

RESTARTS = 5
"""How often in a run workers that ended by themselves are started again."""

_MEMORY = pathlib.Path("/dev/shm")  # Linux; elsewhere shared memory cannot be listed.
_NAME = "grain-process-prefetch"  # How Grain names its processes,
_ENDED = "Worker process was terminated"  # and what it says when one is gone.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_loaders = itertools.count()
_claimed: weakref.WeakSet = weakref.WeakSet()  # Processes that belong to an iterator.


def check_memory(batch_bytes: int, options: grain.MultiprocessingOptions) -> None:
    """Raises ConfigError if the batches of all workers do not fit into shared memory."""
    if not _MEMORY.is_dir():
        return
    # Of each worker: one that it makes, those of its buffer, and as many and one that Grain opens.
    batches = options.num_workers * (2 * options.per_worker_buffer_size + 2) + 2
    needed, free = batches * batch_bytes, shutil.disk_usage(_MEMORY).free
    if needed > free:
        raise ConfigError(
            f"{_MEMORY} has {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} MiB are needed, for "
            f"{batches} batches of {batch_bytes / 2**20:.1f} MiB on their way from the worker "
            f"processes: lower config.data.num_workers={options.num_workers} or config.data."
            f"worker_buffer={options.per_worker_buffer_size}, or make it larger (docker run "
            "--shm-size; in Kubernetes an emptyDir of medium Memory, as in launch/jobset.yaml)"
        )


class WorkerIterator(grain.DatasetIterator):
    """Batches made by worker processes, with the index of the next one as the whole state.

    Grain's own state depends on the number of workers. A batch is a function of its index, so this
    state can be resumed with any number of workers, or none; new workers are started for that.
    Skipped images are named here, for the log of a run is that of this process.
    """

    def __init__(
        self,
        source: Any,
        batches: grain.MapDataset,
        read_options: grain.ReadOptions,
        options: grain.MultiprocessingOptions,
    ):
        super().__init__()
        self._source = source
        self._batches, self._read_options, self._options = batches, read_options, options
        self._next_index = self._restarts = 0
        self._running: grain.DatasetIterator | None = None
        self._workers: list[multiprocessing.process.BaseProcess] = []
        self._prefix = _memory_prefix()
        self._shut = False
        atexit.register(_close_if_alive, weakref.ref(self))  # Before Grain asks its processes.

    def __next__(self) -> dict:
        """Returns the next batch.

        Raises:
            ReadError: the workers were started again too often.
        """
        while True:
            try:
                batch = self._next()
                break
            except RuntimeError as error:
                if self._shut or _ENDED not in str(error):
                    raise
                self._start_again(error)
        self._next_index += 1
        if "record" in batch:
            self._source.report(batch.pop("record"), batch["skipped"])
        return batch

    def _next(self) -> dict:
        if self._running is not None:
            return next(self._running)
        if not flags.FLAGS.is_parsed():  # Grain's workers read absl flags; a library has none.
            flags.FLAGS.mark_as_parsed()
        _spare_main()
        shared_memory.SharedMemory = _NamedMemory  # Batches outlive the workers, see `_stop`.
        rest = self._batches[self._next_index :].to_iter_dataset(self._read_options)
        begin = functools.partial(_begin, self._prefix)
        with _signals_blocked():
            self._running = iter(rest.mp_prefetch(self._options, worker_init_fn=begin))
            return next(self._running)

    def _start_again(self, error: Exception) -> None:
        self._stop()
        if self._restarts == RESTARTS:
            raise ReadError(
                f"the worker processes of the data ended {RESTARTS + 1} times: {error} If "
                "memory or /dev/shm is too small, lower --config.data.num_workers"
            ) from error
        self._restarts += 1
        logging.warning(
            "a worker process of the data has ended: all are started again, %d of %d times (%s)",
            self._restarts,
            RESTARTS,
            error,
        )

    def get_state(self) -> dict:
        return {"next_index": self._next_index}

    def set_state(self, state: dict) -> None:
        self._stop()
        self._next_index = state["next_index"]

    def close(self) -> None:
        """Ends the workers at once, also while another thread waits for a batch."""
        if not self._shut:
            self._shut = True
            self._stop()

    def _stop(self) -> None:
        self._kill_workers()
        if self._running is not None:
            running, self._running = self._running, None
            running.close()
            self._kill_workers()  # Some may have been about to start.
        _unlink(self._prefix)

    def _kill_workers(self) -> None:
        # Killed rather than asked: one that waits for a slow disk would not answer in time, and
        # none has anything to save.
        for process in multiprocessing.active_children():
            if process.name.startswith(_NAME) and process not in _claimed:
                _claimed.add(process)
                self._workers.append(process)
        for process in self._workers:
            process.kill()
        for process in self._workers:
            process.join(timeout=5)
        self._workers.clear()


def _close_if_alive(reference: weakref.ref) -> None:
    if (iterator := reference()) is not None:
        iterator.close()


# ----------------------------------------------------------------------------------- in the workers


def _begin(prefix: str, index: int, count: int) -> None:
    """Runs first in every worker; `prefix` begins the names of its shared memory."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, args=(prefix,), daemon=True).start()
    _NamedMemory.prefix = prefix
    shared_memory.SharedMemory = _NamedMemory


def _leave_with_parent(prefix: str) -> None:
    multiprocessing.parent_process().join()
    _unlink(prefix)
    os._exit(1)


_unlinking = threading.Lock()  # Grain's threads remove batches too.


class _NamedMemory(shared_memory.SharedMemory):
    """Shared memory whose name tells who made it, so that others can remove it first."""

    prefix = ""

    def __init__(self, name: str | None = None, create: bool = False, size: int = 0):
        if create and name is None and self.prefix:
            name = f"{self.prefix}{secrets.token_hex(8)}"
        super().__init__(name, create, size)

    def unlink(self) -> None:
        with _unlinking:
            try:
                super().unlink()
            except FileNotFoundError:
                # The tracker, which is told of every opening, may have heard of this one after it
                # heard of the removal: at the end it would warn of a leak.
                resource_tracker.register(self._name, "shared_memory")
                resource_tracker.unregister(self._name, "shared_memory")


# ------------------------------------------------------------------------------------ in the parent


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that are started within never see the signals of the group, not even at first.

    A process inherits the mask of the thread that starts it, and a thread that of its maker.
    """
    resource_tracker.ensure_running()  # Its start would lift the block.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@functools.cache
def _spare_main() -> None:
    """Makes Grain's processes leave out the main module, which they do not use.

    Without a main guard it would train in every worker, and that of `python -` is no file.
    """
    prepare = spawn.get_preparation_data

    def without_main(name: str) -> dict:
        data = prepare(name)
        if name.startswith(_NAME):
            data.pop("init_main_from_name", None)
            data.pop("init_main_from_path", None)
        return data

    spawn.get_preparation_data = without_main


def _memory_prefix() -> str:
    """What the names of one iterator's shared memory begin with; empty where it is not listed.

    Removes what runs left behind that were killed together with all their helpers.
    """
    if not _MEMORY.is_dir():
        return ""
    namespace = os.stat("/proc/self/ns/pid").st_ino  # Containers may share the memory.
    for file in _MEMORY.glob(f"detailflow-{namespace}-*"):
        made_by = re.match(rf"detailflow-{namespace}-(\d+)-", file.name)
        if made_by and not os.path.exists(f"/proc/{made_by[1]}"):
            file.unlink(missing_ok=True)
    return f"detailflow-{namespace}-{os.getpid()}-{next(_loaders)}-"


def _unlink(prefix: str) -> None:
    """Removes shared memory by the beginning of its name; who still uses it may go on."""
    for file in _MEMORY.glob(f"{prefix}*") if prefix else ():
        try:
            memory = shared_memory.SharedMemory(file.name)
            memory.close()
            memory.unlink()
        except FileNotFoundError:
            continue
        except ValueError:  # Its maker was killed before it had a size.
            file.unlink(missing_ok=True)
