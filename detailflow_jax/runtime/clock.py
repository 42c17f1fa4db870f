"""Where the wall time of a run goes: into steps, or into what the host did meanwhile.

A thread waits for the loss of each step, so that the loop need not. A step takes from when the
devices could begin it, that is the end of the step before or its own dispatch, to its end. Between
steps the devices are idle, and that time belongs to what the host is doing then:

    with clock.doing("input"):
        batch = feed.take()
    with clock.dispatch(step):
        state, metrics = program(state, batch, plan)
    clock.watch(metrics["loss"], flops)

Reading the next batch while a step runs therefore takes no time; waiting for a batch does. `watch`
waits while the loop is `AHEAD` steps ahead of the devices: a run that is asked to leave has to
finish all steps that were dispatched before it can save, within its grace period.

The seconds add up over all parts of a run. Steps that a killed run did after its last checkpoint
are "lost", for they are done again, and the time from its last log line to the next start is
"restart". The file WORKDIR/clock.json keeps them.
"""

import collections
import contextlib
import json
import pathlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from absl import logging

from detailflow_jax.runtime import memory, sharding
from detailflow_jax.runtime.files import write_atomically
from detailflow_jax.runtime.flops import peak

FILE = "clock.json"
AHEAD = 3  # Steps dispatched and not done.
STEPS, LOST, RESTART, START, OTHER = "steps", "lost", "restart", "start", "other"
PREFIX = "perf/"
"""Names of the figures in metrics.jsonl begin with it: they differ from run to run."""


class Clock:
    """The clock of one process; a context manager, whose time begins when it is made.

    Attributes:
      seconds: {what: seconds} of the run so far, earlier parts included, up to the last `settle`.
    """

    def __init__(self) -> None:
        self.seconds: collections.Counter = collections.Counter()
        self._began = self._settled = self._dispatched = time.perf_counter()
        # What the host does from a time on; the first of them covers `_settled`.
        self._changes = collections.deque([(self._began, START)])
        self._running: queue.Queue = queue.Queue(AHEAD - 1)  # Besides the one waited for.
        self._thread = threading.Thread(target=self._wait, name="clock", daemon=True)
        self._durations: list[float] = []  # of the steps since the last report
        self._flops = 0
        self._reported: collections.Counter = collections.Counter()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(queue.Full):  # The devices may hang.
            self._running.put(None, timeout=1)
            self._thread.join(timeout=1)

    # ------------------------------------------------------------------------- from the loop

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """While the devices are idle, the time of the block belongs to `what`."""
        before = self._changes[-1][1]
        self._change(what)
        try:
            yield
        finally:
            self._change(before)

    @contextlib.contextmanager
    def dispatch(self, step: int) -> Iterator[None]:
        """Around the call of a step's program; gives the step its name in profiles."""
        self._change(OTHER)  # The start is over.
        self._dispatched = time.perf_counter()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def watch(self, loss: jax.Array, flops: int) -> None:
        """Notes when the dispatched step ends, which is when its loss is there.

        Waits while `AHEAD` steps are not done yet.

        Args:
          loss: of the step; it must not be donated.
          flops: of the step on all devices.
        """
        self._running.put((self._dispatched, loss, flops))

    # ------------------------------------------------------------------------------ the account

    def settle(self) -> collections.Counter:
        """Accounts for the time until now, once all steps are done, and returns `seconds`."""
        self._running.join()
        self._spend(time.perf_counter())
        return self.seconds

    def report(self) -> dict[str, float]:
        """Figures of the steps since the last report, and the shares of the whole run.

        Waits for the steps. Collective: every process must call it.

        Returns:
          perf/step_p50, step_p95, step_max: seconds of the steps since the last report;
          perf/input_wait: share of the time since then in which devices waited for input, of the
            process that waited most;
          perf/tflops: 10^12 floating-point operations per second of a device, in its steps;
          perf/mfu: the same as a share of what the device can do, where that is known;
          perf/memory_gib, memory_peak_gib: of the device that has most, where it tells;
          perf/goodput: share of the wall time of the whole run that went into steps, lost ones
            left out; perf/time/WHAT: shares of the rest.
        """
        seconds = self.settle().copy()
        passed, self._reported = seconds - self._reported, seconds
        durations, self._durations = self._durations, []
        flops, self._flops = self._flops, 0
        here = [passed["input"] / max(passed.total(), 1e-9), *memory.in_use()]
        input_wait, used, most = sharding.gather_processes(np.array([here])).max(axis=0)
        found = {"input_wait": input_wait}
        if durations:
            p50, p95 = np.percentile(durations, (50, 95))
            rate = flops / max(sum(durations), 1e-9) / jax.device_count()
            found |= {"step_p50": p50, "step_p95": p95, "step_max": max(durations)}
            found |= {"tflops": rate / 1e12}
            if possible := peak(jax.local_devices()[0]):
                found["mfu"] = rate / possible
        if most:
            found |= {"memory_gib": used / 2**30, "memory_peak_gib": most / 2**30}
        shares = self._shares()
        found["goodput"] = shares.pop(STEPS, 0.0)
        found |= {f"time/{name}": share for name, share in shares.items()}
        return {PREFIX + name: float(value) for name, value in found.items()}

    def shares_shown(self) -> str:
        """Where the time of the whole run went, up to the last `settle`, for people."""
        shares = self._shares()
        texts = [f"{shares.pop(STEPS, 0.0):.0%} in steps"]
        most = sorted(shares.items(), key=lambda item: -item[1])
        return ", ".join([*texts, *(f"{k} {v:.0%}" for k, v in most if v >= 0.005)])

    def _shares(self) -> dict[str, float]:
        return {name: value / self.seconds.total() for name, value in self.seconds.items()}

    # ------------------------------------------------------------------------ across restarts

    def go_on(self, folder: pathlib.Path, saved: Mapping[str, float] | None) -> None:
        """Adds what earlier parts of the run took.

        Args:
          folder: where `write` wrote.
          saved: `seconds` as the checkpoint holds them from which the run goes on; None: it starts
            anew. What was done after the checkpoint is lost.
        """
        if jax.process_index() > 0:
            return
        before = collections.Counter(saved)
        kept = before[STEPS]
        if written := _read(folder / FILE):
            # It goes further than the checkpoint, if it was uploaded in time.
            before = max(collections.Counter(written["seconds"]), before, key=lambda x: x.total())
            if not written["finished"]:
                began = time.time() - (time.perf_counter() - self._began)
                before[RESTART] += max(began - written["at"], 0.0)
        before[STEPS], before[LOST] = kept, before[LOST] + before[STEPS] - kept
        self._reported = +before  # Only what is above zero.
        self.seconds.update(self._reported)

    def write(self, folder: pathlib.Path, finished: bool) -> None:
        """Writes the account up to the last `settle` to FOLDER/clock.json.

        Args:
          folder: of the run.
          finished: all steps are done, so that the time until a next start does not count.
        """
        if jax.process_index() > 0:
            return
        fields = {"seconds": self.seconds, "at": time.time(), "finished": finished}
        write_atomically(folder / FILE, json.dumps(fields).encode())

    # ---------------------------------------------------------------------------------- inside

    def _change(self, what: str) -> None:
        self._changes.append((time.perf_counter(), what))

    def _wait(self) -> None:
        while (running := self._running.get()) is not None:
            dispatched, loss, flops = running
            with contextlib.suppress(Exception):  # The loop meets the same error itself.
                loss.block_until_ready()
            ended = time.perf_counter()
            self._spend(dispatched)
            self._durations.append(ended - self._settled)
            self._flops += flops
            self._spend(ended, STEPS)
            del running, loss
            self._running.task_done()

    def _spend(self, until: float, what: str | None = None) -> None:
        """Gives the time since `_settled` to `what`, or else to what the host was doing."""
        while len(self._changes) > 1 and self._changes[1][0] <= until:
            _, was = self._changes.popleft()
            self._add(what or was, self._changes[0][0])
        self._add(what or self._changes[0][1], until)

    def _add(self, what: str, until: float) -> None:
        if until > self._settled:
            self.seconds[what] += until - self._settled
            self._settled = until


def _read(path: pathlib.Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        logging.warning("%s is damaged, the goodput starts anew: %s", path, error)
        return None


def describe(figures: Mapping[str, float]) -> str:
    """What a log line says of the figures of `Clock.report`."""
    value = {name.removeprefix(PREFIX): figure for name, figure in figures.items()}
    texts = []
    if "step_p50" in value:
        texts.append(f"step {value['step_p50']:.3g} s, p95 {value['step_p95']:.3g}")
        texts.append(f"{value['tflops']:.3g} TFLOP/s a device")
    if "mfu" in value:
        texts.append(f"MFU {value['mfu']:.0%}")
    if "memory_gib" in value:
        texts.append(f"{value['memory_peak_gib']:.1f} GiB")
    texts.append(f"input wait {value['input_wait']:.0%}")
    return "  ".join([*texts, f"goodput {value['goodput']:.0%}"])
