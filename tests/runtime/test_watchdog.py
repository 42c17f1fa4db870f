"""The watchdog: what stands still is named, with the stacks; what goes on is left in peace."""

import threading
import time

import pytest
from absl import logging

import toy_task
from detailflow_jax.runtime.watchdog import Watchdog


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    messages = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: messages.append(text % args))
    return messages


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_standstill_is_named_and_shown_once_then_only_named(warnings):
    with Watchdog(0.1) as watchdog:
        watchdog.beat("step 7")
        wait_for(lambda: len(warnings) >= 2)
        watchdog.beat("step 8")
        wait_for(lambda: any("step 8" in text for text in warnings))
    first, second = warnings[:2]
    assert first.startswith("step 7 has not ended for 0 s; all threads:\n")
    assert "test_a_standstill_is_named" in first  # What this thread waits in.
    assert second.startswith("step 7") and "threads" not in second
    assert "all threads" in next(text for text in warnings if text.startswith("step 8"))


def test_steps_that_end_are_no_standstill(warnings):
    with Watchdog(3.0) as watchdog:
        for step in range(30):
            watchdog.beat(f"step {step}")
            time.sleep(0.01)
    assert warnings == []


def test_it_leaves_no_thread_and_zero_starts_none():
    before = threading.active_count()
    with Watchdog(0):
        assert threading.active_count() == before
    with Watchdog(100):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


@pytest.mark.slow
def test_a_run_names_the_step_whose_data_hang(tmp_path, warnings):
    config = toy_task.get_config()
    config.update(total_steps=4, checkpoint_every=0, stall_seconds=1)
    task, rows = toy_task.make_task(config), toy_task.make_iterator(config)

    def told() -> bool:
        return any("step 4 has not ended" in text and "__next__" in text for text in warnings)

    class Hangs:
        """The fourth batch comes late."""

        given = 0

        def __next__(self):
            self.given += 1
            if self.given == 4:
                wait_for(told)
            return next(rows)

        def __getattr__(self, name):
            return getattr(rows, name)

    toy_task.train.train(config, tmp_path, task, Hangs())
    assert told()
