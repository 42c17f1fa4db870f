"""What the training loop uses beside the task and the state, and what it does between steps."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from detailflow_jax.evaluate.training import Scorer
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.checkpoint import Checkpoints
from detailflow_jax.runtime.clock import Clock, describe
from detailflow_jax.runtime.errors import DataError, UserError
from detailflow_jax.runtime.feed import Feed, Leaving
from detailflow_jax.runtime.metrics import Averages, MetricWriter, Progress
from detailflow_jax.runtime.profiler import Profiler
from detailflow_jax.runtime.programs import Program, Programs
from detailflow_jax.runtime.stop import PREEMPTED, StopRequest
from detailflow_jax.runtime.watchdog import Watchdog
from detailflow_jax.runtime.workdir import Workdir
from detailflow_jax.tasks import TrainState

_LOOK = 0.1  # Seconds between two looks at the wish to leave, while waiting for the compiler.


class Preempted(UserError, SystemExit):
    """The run was asked to leave and has saved its state; uncaught, it exits with PREEMPTED."""

    exit_code = PREEMPTED
    label = "preempted"

    def __init__(self, step: int):
        SystemExit.__init__(self, PREEMPTED)
        self.step = step

    def __str__(self) -> str:
        done = f"saved step {self.step}" if self.step else "no step was done"
        return f"{done}; run the same command to resume"


@dataclasses.dataclass
class Run:
    """What the loop uses beside the task and the state."""

    config: ConfigDict
    feed: Feed
    checkpoints: Checkpoints
    workdir: Workdir
    writer: MetricWriter
    averages: Averages
    progress: Progress
    stop: StopRequest
    watchdog: Watchdog
    clock: Clock
    profiler: Profiler
    scorer: Scorer | None
    drawer: Callable[[TrainState], Mapping[str, Any]] | None
    started: float
    record: Callable[[], None]  # writes the configuration
    saved: int  # the step of the newest checkpoint, 0 for none
    programs: Programs
    used: set[Future] = dataclasses.field(default_factory=set)  # of its programs

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """The time of the block is not in the rate; if the devices are idle, `what` took it."""
        with self.progress.pause(), self.clock.doing(what):
            yield

    def program(self, step: int, planned: Any, state: TrainState, batch: Any) -> Program:
        """Returns the program of the step after `step`; waits for it, where it is not made yet.

        Raises:
            Preempted: asked to leave while waiting for it; the state of `step` was saved.
        """
        future = self.programs.ask(step, planned, state, batch)
        if not future.done():
            with self.pause("compile"):
                while not wait([future], timeout=_LOOK).done:
                    # Others may be in the middle of the next step.
                    if jax.process_count() == 1 and self.stop.asked():
                        self.save(step, state)
                        raise Preempted(step)
        program = future.result()
        if future not in self.used:
            # Processes compile at different speed, and a collective waits only so long.
            with self.pause("compile"):
                sharding.sync_processes("compiled")
            self.used.add(future)
        return program

    def next_batch(self, step: int, state: TrainState) -> dict[str, jax.Array]:
        """Returns the next batch and leaves it in the queue; saves the state if there is none.

        Raises:
            Preempted: asked to leave while waiting for it.
            DataError: it cannot be read.
        """
        try:
            with self.clock.doing("input"):
                return self.feed.peek()
        except (Leaving, DataError) as error:
            if jax.process_count() == 1:  # The others may be in the middle of the next step.
                self.save(step, state)
            if isinstance(error, Leaving):
                raise Preempted(step) from None
            raise

    def score(self, step: int, state: TrainState) -> dict[str, float]:
        """Returns scores of a few images; the rate leaves this time out."""
        self.watchdog.beat(f"the scores of step {step}")
        with self.pause("score"):
            scores = self.scorer(state)
        logging.info("step %d  %s", step, "  ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        return scores

    def log(self, step: int, scores: dict[str, float]) -> None:
        """Waits for the steps so far, then logs their means and the scores of this step."""
        means = self.averages.take_means()
        if (skipped := self.feed.skipped) is not None:
            means["skipped"] = skipped
        perf = self.clock.report()
        rate = self.progress.report(step, means["loss"], describe(perf))
        self.writer.scalars(step, means | scores | rate | perf)
        self.clock.write(self.workdir.folder, finished=False)

    def draw(self, step: int, state: TrainState, figures: Mapping[str, Any]) -> None:
        """Writes the figures of the task, and samples of what has a decoder."""
        on_host = jax.tree.map(sharding.to_host, dict(figures))
        if self.drawer:
            on_host |= self.drawer(state)
        self.writer.figures(step, on_host)

    def save(self, step: int, state: TrainState) -> None:
        """Saves the state; raises Diverged if a loss so far or the state is not finite."""
        spent = dict(self.clock.settle())
        self.clock.write(self.workdir.folder, finished=step == self.config.total_steps)
        # Before the checkpoint: resumed from it, a run does not write these lines again.
        self.workdir.upload()
        if step == self.saved:
            return
        self.averages.fetch()
        clock = {
            "spent": spent,
            "seconds": self.progress.seconds,
            "skipped": self.feed.skipped,
            "averages": self.averages.totals,
        }
        self.checkpoints.save(step, to_save(state), self.feed.state, clock)
        self.saved = step

    def finish(self) -> None:
        """Logs the end of the run."""
        total, seconds = self.config.total_steps, self.clock.seconds.total()
        logging.info("finished %d steps in %.0f s: %s", total, seconds, self.clock.shares_shown())
        if self.feed.skipped:
            logging.warning(
                "unreadable images were skipped %d times, named above", self.feed.skipped
            )
        say_try_out(self.config)


def to_save(state: TrainState) -> TrainState:
    """Returns the part of the state that a checkpoint holds; `task.init` makes the rest again."""
    return state.replace(frozen={})


def say_try_out(config: ConfigDict) -> None:
    """Warns that the weights of a try-out are of no use."""
    if config.get("try_out"):
        logging.warning(
            "this was a try-out of the code (runlocal): the networks and the run are too small for "
            "useful weights; leave runlocal out to train"
        )
