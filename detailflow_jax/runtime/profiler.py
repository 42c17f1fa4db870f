"""Profiles of a run on request: of some steps into the workdir, and over a port at any time.

The files are those of xprof: `pip install xprof tensorboard`, then `tensorboard --logdir WORKDIR`.
"""

import contextlib
import pathlib
import socket
from typing import Any

import jax
from absl import logging

from detailflow_jax.runtime.errors import ConfigError


class Profiler(contextlib.AbstractContextManager):
    """Traces some steps, and serves traces on request; a context manager."""

    def __init__(self, folder: pathlib.Path, *, start: int = 0, steps: int = 0, port: int = 0):
        """Serves from the start; traces where the loop calls `switch`.

        Args:
          folder: traces of process 0 go to FOLDER/profile; other processes write none.
          start: trace from the step after this one on, or from the second step of this part of the
            run if it begins later.
          steps: how many; 0: none.
          port: where process 0 answers requests, each other process one higher; 0: nowhere.

        Raises:
          ConfigError: the port cannot be used.
        """
        self._folder = folder / "profile"
        self._start, self._steps = start, steps if jax.process_index() == 0 else 0
        self._last: int | None = None  # the last step of the trace that is running
        self._server = port > 0
        if self._server:
            _serve(port + jax.process_index())

    def __exit__(self, *exception) -> None:
        self._stop()
        if self._server:
            jax.profiler.stop_server()

    def is_due(self, step: int) -> bool:
        """Whether the trace starts or ends after `step`; a trace starts once."""
        if self._last is None:
            return self._steps > 0 and step >= self._start
        return step >= self._last

    def switch(self, step: int, results: Any) -> None:
        """Starts or ends the trace after `step`, once its `results` are there."""
        jax.block_until_ready(results)
        if self._last is None:
            self._last, self._steps = step + self._steps, 0
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Every call of Python would slow the steps.
            jax.profiler.start_trace(self._folder, profiler_options=options)
        else:
            self._stop()

    def _stop(self) -> None:
        if self._last is not None:
            jax.profiler.stop_trace()
            logging.info("a profile up to step %d is in %s", self._last, self._folder)
            self._last = None


def _serve(port: int) -> None:
    try:
        with socket.socket() as trial:  # JAX itself only prints that the port is taken.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(("", port))
    except OSError as error:
        raise ConfigError(
            f"config.profile.port: the profiler cannot listen on port {port}: {error}"
        ) from error
    jax.profiler.start_server(port)
    logging.info("the profiler answers on port %d", port)
