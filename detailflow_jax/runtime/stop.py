"""Leaves a run in good order after SIGTERM or Ctrl-C, and in time after SIGTERM."""

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from detailflow_jax.runtime.errors import ConfigError

PREEMPTED, INTERRUPTED = 143, 130
"""The exit codes after SIGTERM or Ctrl-C, and after a second Ctrl-C."""

GRACE, GRACE_SECONDS = "DETAILFLOW_GRACE_SECONDS", 25.0
"""Environment variable: the seconds between SIGTERM and the end; the launchers set it. Unset: 25,
for Kubernetes kills after 30."""

_NOTHING = 0  # No signal has this number: it ends the watch.


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
        self._asked = False
        self._grace = grace_seconds()
        self._restore = contextlib.ExitStack()
        self._seen = self._wakeup = -1  # A pipe, which gets the number of each signal.
        self._jax_asked: Callable[[int], None] = lambda number: None

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self
        self._seen, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._restore.callback(signal.set_wakeup_fd, before)
        if jax.process_count() > 1:
            self._take_over_from_jax()
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, self._ask)
            self._restore.callback(signal.signal, number, before)
        threading.Thread(target=self._watch, name="grace", daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._restore.close()
        if self._seen >= 0 and not self._asked:  # Else to the end of the process, which may hang.
            os.write(self._wakeup, bytes([_NOTHING]))

    def _take_over_from_jax(self) -> None:
        """Keeps JAX's own handler, which is in C, to call it: it makes the processes agree."""
        handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
        get, put = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
        get.restype = put.restype = handler
        put.argtypes = [ctypes.c_int, handler]
        self._jax_asked = get(signal.SIGTERM)
        self._restore.callback(put, signal.SIGTERM, self._jax_asked)

    def _ask(self, number, frame) -> None:
        self._asked = True

    def _watch(self) -> None:
        """Acts on signals, also while the main thread waits in a call that does not return."""
        interrupted, deadline = False, float("inf")
        while True:
            left = None if deadline == float("inf") else max(deadline - time.monotonic(), 0.0)
            if not select.select([self._seen], [], [], left)[0]:
                with contextlib.suppress(OSError, ValueError):
                    faulthandler.dump_traceback(sys.__stderr__)
                _tell(f"\nstill here {self._grace:g} s after SIGTERM ({GRACE}): leaving at once\n")
                os._exit(PREEMPTED)
            for number in os.read(self._seen, 100):
                if number == _NOTHING:
                    return
                if number == signal.SIGINT and interrupted:
                    os._exit(INTERRUPTED)
                interrupted = interrupted or number == signal.SIGINT
                if number == signal.SIGTERM:
                    deadline = min(deadline, time.monotonic() + self._grace)
                self._asked = True
                self._jax_asked(signal.SIGTERM)
                _tell("\nasked to leave: saving after this step (Ctrl-C again: leave at once)\n")

    def asked(self) -> bool:
        """Whether this process was asked; False where there are several, see `requested`."""
        return self._asked and jax.process_count() == 1

    def requested(self, step: int) -> bool:
        """Whether to leave after `step`; the same answer in every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked
