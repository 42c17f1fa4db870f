"""Leaves a run in good order after SIGTERM or Ctrl-C, and in time after SIGTERM."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils

from detailflow_jax.runtime.errors import ConfigError

PREEMPTED, INTERRUPTED = 143, 130
"""The exit codes after SIGTERM or Ctrl-C, and after a second Ctrl-C."""

GRACE, GRACE_SECONDS = "DETAILFLOW_GRACE_SECONDS", 25.0
"""Environment variable: the seconds between SIGTERM and the end; the launchers set it. Unset: 25,
for Kubernetes kills after 30."""


def grace_seconds() -> float:
    """Returns the seconds that a run has after SIGTERM; raises ConfigError if it is no number."""
    text = os.environ.get(GRACE, "") or str(GRACE_SECONDS)
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{GRACE}={text!r} in the environment: expected seconds") from error


def _tell(text: str) -> None:
    """Writes to stderr, unless nobody reads it: Ctrl-C ends `tee` before the run behind it."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into a request that the loop checks; a context manager.

    A run that has not ended within the grace period after SIGTERM, such as for a disk that does not
    answer, is ended: what it has not saved by then would be lost to SIGKILL soon after.
    """

    def __init__(self):
        self._asked = self._interrupted = False
        self._deadline = float("inf")
        self._grace = grace_seconds()
        self._before = {}

    def __enter__(self):
        # With several processes JAX handles SIGTERM and makes them agree on a step.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
            self._left = threading.Event()
            threading.Thread(target=self._watch, name="grace", daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before and not self._asked:  # Else to the end of the process, which may hang too.
            self._left.set()

    def _ask(self, number, frame) -> None:
        if number == signal.SIGINT and self._interrupted:
            os._exit(INTERRUPTED)
        self._asked, self._interrupted = True, self._interrupted or number == signal.SIGINT
        if number == signal.SIGTERM:
            self._deadline = min(self._deadline, time.monotonic() + self._grace)
        # Not the log: the signal may have come while it was being written.
        _tell("\nasked to leave: saving after this step (Ctrl-C again: leave at once)\n")

    def _watch(self) -> None:
        # Polls, for a signal handler must not wait for the lock of an event.
        while not self._left.wait(0.1):
            if time.monotonic() > self._deadline:
                with contextlib.suppress(OSError, ValueError):
                    faulthandler.dump_traceback(sys.__stderr__)
                _tell(f"\nstill here {self._grace:g} s after SIGTERM ({GRACE}): leaving at once\n")
                os._exit(PREEMPTED)

    def asked(self) -> bool:
        """Whether this process was asked; False where there are several, see `requested`."""
        return self._asked

    def requested(self, step: int) -> bool:
        """Whether to leave after `step`; the same answer in every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
