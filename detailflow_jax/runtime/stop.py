"""Leaves a run in good order after SIGTERM or Ctrl-C."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

INTERRUPTED = 130
"""The exit code after a second Ctrl-C."""


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a request that the loop checks; a context manager."""

    def __init__(self):
        self._asked = self._interrupted = False
        self._before = {}

    def __enter__(self):
        # With several processes JAX handles SIGTERM and makes them agree on a step.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame) -> None:
        if number == signal.SIGINT and self._interrupted:
            os._exit(INTERRUPTED)
        self._asked, self._interrupted = True, self._interrupted or number == signal.SIGINT
        # Not the log: the signal may have come while it was being written.
        os.write(2, b"\nasked to leave: saving after this step (Ctrl-C again: leave at once)\n")

    def requested(self, step: int) -> bool:
        """Whether to leave after `step`; the same answer in every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
