"""Requests to leave, where nobody reads what the run says."""

import os
import signal

from detailflow_jax.runtime.stop import StopRequest


def test_a_reader_that_is_gone_does_not_end_the_run(monkeypatch):
    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", broken)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested(1)
