"""Warns when a run hangs: a lost host or a hung reader raises nothing by itself."""

import faulthandler
import pathlib
import tempfile
import threading
import time

from absl import logging


class Watchdog:
    """Warns, from a thread of its own, when no step has begun for a while; a context manager.

    The first warning of a hang holds the stacks of all threads, which show what the run waits for.
    It never ends the run, because a checkpoint or a compilation may just be slow.
    """

    def __init__(self, seconds: float):
        """Warns after `seconds` without a `beat`; 0 never warns."""
        self._seconds = seconds
        self._last = time.monotonic()
        self._doing = "the start"
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self):
        self.beat("the start")
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._leave.set()
        if self._seconds:
            self._thread.join()

    def beat(self, doing: str) -> None:
        """Notes what begins now, such as "step 12"."""
        self._last, self._doing = time.monotonic(), doing

    def _watch(self) -> None:
        warned_at = None
        while not self._leave.wait(self._seconds / 4):
            last, silent = self._last, time.monotonic() - self._last
            if silent < self._seconds:
                continue
            stacks = "" if warned_at == last else f"; all threads:\n{_stacks()}"
            logging.warning("%s has not ended for %.0f s%s", self._doing, silent, stacks)
            warned_at = last


def _stacks() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "stacks"
        with path.open("w") as file:  # Needs a real file.
            faulthandler.dump_traceback(file, all_threads=True)
        return path.read_text()
