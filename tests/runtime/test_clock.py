"""Where the wall time of a run goes."""

import collections
import json
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from detailflow_jax.runtime import clock as clocks
from detailflow_jax.runtime.clock import Clock

FLOPS = 10**9


@jax.jit
def multiply(x, times):
    return jax.lax.fori_loop(0, times, lambda _, y: jnp.tanh(y @ x), x).sum()


def seconds_of(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def run():
    """(clock, its report, {what: seconds}) after two steps, a save between them, readings."""
    x = jnp.eye(256)
    multiply(x, 1).block_until_ready()
    times = int(100 * 0.4 / seconds_of(lambda: multiply(x, 100).block_until_ready()))
    took = collections.Counter()
    begun = time.perf_counter()
    with Clock() as clock:
        with clock.doing("compile"):
            took["compile"] += seconds_of(lambda: time.sleep(0.05))
        for step in (1, 2):
            start = time.perf_counter()
            with clock.dispatch(step):
                loss = multiply(x, times)
            clock.watch(loss, FLOPS)
            with clock.doing("input"):
                took["hidden input"] += seconds_of(lambda: time.sleep(0.1))
            loss.block_until_ready()
            took["steps"] += time.perf_counter() - start
            with clock.doing("save"):
                took["save"] += seconds_of(lambda: time.sleep(0.1))
        with clock.doing("input"):
            took["input"] += seconds_of(lambda: time.sleep(0.2))
        report = clock.report()
        took["all"] = time.perf_counter() - begun
        yield clock, report, took


def test_every_second_belongs_to_something(run):
    clock, report, took = run
    assert clock.seconds.total() == pytest.approx(took["all"], abs=0.05)
    shares = [v for k, v in report.items() if k.startswith("perf/time/")]
    assert report["perf/goodput"] + sum(shares) == pytest.approx(1)
    assert clock.seconds.keys() <= {"start", "compile", "steps", "save", "input", "other"}


def test_work_of_the_host_while_a_step_runs_takes_no_time(run):
    clock, _, took = run
    for what in ("steps", "compile", "save", "input"):
        assert clock.seconds[what] == pytest.approx(took[what], abs=took["hidden input"] / 2)


def test_report_is_of_the_steps(run):
    clock, report, took = run
    assert (
        took["steps"] / 4
        < report["perf/step_p50"]
        <= report["perf/step_p95"]
        <= report["perf/step_max"]
    )
    rate = 2 * FLOPS / clock.seconds["steps"] / jax.device_count() / 1e12
    assert report["perf/tflops"] == pytest.approx(rate)
    assert "perf/mfu" not in report and "perf/memory_gib" not in report  # A CPU tells neither.
    assert report["perf/input_wait"] == pytest.approx(report["perf/time/input"])
    text = clocks.describe(report)
    assert text.startswith("step 0.") and "goodput" in text and "MFU" not in text
    assert "% in steps, " in clock.shares_shown()
    # The next report is of what comes after: no step.
    assert clock.report().keys() & {"perf/step_p50", "perf/tflops"} == set()


def write(folder, at: float, finished: bool, **seconds: float) -> None:
    fields = {"seconds": seconds, "at": at, "finished": finished}
    (folder / clocks.FILE).write_text(json.dumps(fields))


def test_a_restart_and_what_the_kill_lost_are_accounted_for(tmp_path):
    clock = Clock()
    write(tmp_path, time.time() - 60, False, steps=10.0, save=3.0, lost=1.0)
    clock.go_on(tmp_path, {"steps": 8.0, "save": 2.0, "lost": 1.0})
    assert clock.seconds.pop("restart") == pytest.approx(60, abs=5)
    assert clock.seconds == {"steps": 8.0, "save": 3.0, "lost": 3.0}


@pytest.mark.parametrize(
    ("written", "saved", "expected"),
    [
        (None, None, {}),  # A new run.
        (None, {"steps": 8.0}, {"steps": 8.0}),
        ({"steps": 5.0, "save": 2.0}, None, {"lost": 5.0, "save": 2.0}),  # Nothing was saved.
        ({"steps": 5.0}, {"steps": 8.0, "save": 1.0}, {"steps": 8.0, "save": 1.0}),  # An old file.
    ],
)
def test_what_a_run_goes_on_from(tmp_path, written, saved, expected):
    clock = Clock()
    if written:
        write(tmp_path, time.time() - 60, True, **written)
    clock.go_on(tmp_path, saved)
    assert clock.seconds == expected


def test_an_account_is_read_as_it_was_written(tmp_path):
    clock = Clock()
    clock.go_on(tmp_path, {"steps": 8.0, "save": 0.5})
    clock.write(tmp_path, finished=True)
    again = Clock()
    again.go_on(tmp_path, {"steps": 8.0, "save": 0.5})
    assert again.seconds == clock.seconds


def test_a_damaged_account_stops_no_run(tmp_path, caplog):
    (tmp_path / clocks.FILE).write_text("{")
    clock = Clock()
    clock.go_on(tmp_path, {"steps": 8.0})
    assert clock.seconds == {"steps": 8.0}
    assert clocks.FILE in caplog.text


class Hanging:
    """The loss of a step that ends when it is told to."""

    def __init__(self, done: threading.Event):
        self.block_until_ready = done.wait


def test_the_loop_does_not_run_far_ahead_of_the_devices():
    done, dispatched = threading.Event(), []
    with Clock() as clock:

        def loop():
            for step in range(10):
                clock.watch(Hanging(done), FLOPS)
                dispatched.append(step)

        thread = threading.Thread(target=loop)
        thread.start()
        thread.join(0.5)
        assert len(dispatched) == clocks.AHEAD
        done.set()
        thread.join(10)
        assert len(dispatched) == 10


def test_a_clock_ends_where_the_devices_hang():
    never = threading.Event()
    with Clock() as clock:
        for _ in range(clocks.AHEAD):
            clock.watch(Hanging(never), FLOPS)
    assert not never.is_set()
