"""The training loop: the only one, for every task.

    detailflow train --config configs/tokenizer.py:digits --workdir runs/tok

A task (`detailflow_jax.tasks`) is a few pure functions over an explicit state. The batch, the plan
and the random numbers of a step depend on the configuration and the step alone, and a checkpoint
holds {state, position in the data, clock}. So the same command run again resumes from the last
checkpoint and ends with the same bits as a run that was never stopped.

`step` counts finished updates. The first step to run is 0; its results are logged, drawn and saved
as step 1.

Exit codes:
    0    FINISHED   all steps are done (also when they were done before)
    1    FAILED     the loss or the state became NaN or Inf; a checkpoint could not be written; the
                    data could not be read for a while; or an unforeseen error (a traceback)
    2    UNUSABLE   the command line, configuration, workdir, data or checkpoints cannot be used
    143  PREEMPTED  SIGTERM, or Ctrl-C: the state was saved, run the command again to resume
    130             a second Ctrl-C: left at once, without saving
"""

import contextlib
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from detailflow_jax.runtime import distributed, files, platforms
from detailflow_jax.runtime.errors import Diverged, UserError
from detailflow_jax.runtime.stop import PREEMPTED as PREEMPTED
from detailflow_jax.tasks import Task, TrainState
from detailflow_jax.training.command import parse_command_line
from detailflow_jax.training.run import Preempted, Run
from detailflow_jax.training.start import begin

FINISHED, FAILED, UNUSABLE = 0, 1, 2


def train(
    config: ConfigDict, workdir: str, task: Task | None = None, iterator: Any = None
) -> TrainState:
    """Trains until `config.total_steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
        config: see `training.start.LOOP_FIELDS`; the task and the data read the rest.
        workdir: on a disk or gs://; written: config.json, log.txt, metrics.jsonl, checkpoints,
            figures, tensorboard, clock.json; on request profile, wandb.
        task: what to train; default, the task that `config.task` names.
        iterator: a Grain `DatasetIterator` of dicts of numpy arrays, this process's rows of each
            batch; default, made from `config.data`. It is closed at the end.

    Returns:
        The final state.

    Raises:
        ConfigError, DataError, CheckpointError: what cannot be used; no checkpoint was lost.
        ReadError: data that cannot be read now; the state was saved.
        Diverged: the loss or the state is no longer finite; it was not saved.
        Preempted: SIGTERM or Ctrl-C; the state was saved.
    """
    workdir = os.fspath(files.path(workdir))
    with contextlib.ExitStack() as stack:
        step, state, task, run = begin(stack, config, workdir, task, iterator)
        if run is None:
            return state
        try:
            state = run_steps(run, task, state, step)
        except Diverged as error:
            raise Diverged(f"{error}; {run.checkpoints.last_good()}") from error
        run.finish()
    return state


def run_steps(run: Run, task: Task, state: TrainState, step: int) -> TrainState:
    """Runs the steps. The host waits for the devices only to log, draw or save."""
    config, first = run.config, step + 1
    while step < config.total_steps:
        run.watchdog.beat(f"step {step + 1}")
        batch = run.next_batch(step, state)
        planned = task.plan(step)
        program = run.program(step, planned, state, batch)
        run.feed.take()  # Not before: what is saved until here goes on with this batch.
        with run.clock.dispatch(step + 1):
            state, step_metrics = program.run(state, batch, planned[1])
        run.clock.watch(step_metrics["loss"], program.flops)
        step += 1
        # The call returns before the devices are done: meanwhile the next batch is read.
        run.averages.add(step, step_metrics)
        if step < config.total_steps:
            with run.clock.doing("input"):
                run.feed.prefetch()
        if step == first:
            jax.block_until_ready(step_metrics)
            logging.info("first step done after %.1f s", time.perf_counter() - run.started)
            run.progress.restart(step)
            if jax.process_index() == 0:  # Not before: a start that failed can be corrected.
                run.record()

        last = step == config.total_steps
        leave = run.stop.requested(step) and not last
        scores = run.score(step, state) if _due(config.score.every, step) else {}
        if last or scores or _due(config.log_every, step):
            run.log(step, scores)
        if last or _due(config.figures_every, step):
            with run.pause("figures"):
                run.draw(step, state, task.figures(state, batch))
        if last or leave or _due(config.checkpoint_every, step):
            with run.pause("save"):
                run.save(step, state)
        if run.profiler.is_due(step):
            with run.pause("profile"):
                run.profiler.switch(step, step_metrics)
        if leave:
            raise Preempted(step)
    return state


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def main(argv: Sequence[str] | None = None, run=train) -> int:
    """Runs the command line and returns the exit code; `run(config, workdir)` does the work."""
    try:
        config, workdir = parse_command_line(argv)
        run(config, workdir)
    except UserError as error:
        return error.report()
    return FINISHED


if __name__ == "__main__":
    platforms.choose(tell=True)
    distributed.leave(main())
