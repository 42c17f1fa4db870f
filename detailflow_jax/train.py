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

import argparse
import contextlib
import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from detailflow_jax.convert.complete import complete
from detailflow_jax.convert.load import reading_once
from detailflow_jax.convert.start import check_encoder, load_into
from detailflow_jax.data import make_iterator
from detailflow_jax.data.classes import check_same_classes, shown
from detailflow_jax.data.lengths import follow_images
from detailflow_jax.data.pipeline import batch_sizes
from detailflow_jax.evaluate.training import Scorer, make_scorer
from detailflow_jax.inference.drawing import make_drawer
from detailflow_jax.runtime import distributed, files, flops, memory, platforms, sharding
from detailflow_jax.runtime.checkpoint import Checkpoints, fingerprint
from detailflow_jax.runtime.clock import Clock, describe
from detailflow_jax.runtime.command import program_name
from detailflow_jax.runtime.config import (
    check_fields,
    check_moved,
    check_same,
    flatten,
    load_config,
    write_config,
)
from detailflow_jax.runtime.errors import ConfigError, DataError, Diverged, UserError
from detailflow_jax.runtime.feed import Feed, Leaving
from detailflow_jax.runtime.metrics import Averages, MetricWriter, Progress, log_start, run_log
from detailflow_jax.runtime.profiler import Profiler
from detailflow_jax.runtime.stop import PREEMPTED, StopRequest
from detailflow_jax.runtime.watchdog import Watchdog
from detailflow_jax.runtime.workdir import Workdir, open_workdir
from detailflow_jax.tasks import Task, TrainState, make_task

FINISHED, FAILED, UNUSABLE = 0, 1, 2

# What the loop itself reads, all integers, with the least value; `task`, `data`, `model` and the
# rest belong to the task and the data.
LOOP_FIELDS = {
    "seed": 0,
    "total_steps": 1,
    "batch_size": 1,  # over all devices of all processes
    "log_every": 1,
    "figures_every": 0,  # 0: at the end only
    "checkpoint_every": 0,  # 0: at the end only
    "keep_checkpoints": 1,
    "accumulate": 1,  # parts of a batch, one after another
    "stall_seconds": 0,  # 0: no warning
    "score.every": 0,  # 0: never
    "score.num_samples": 0,  # 0: as many as the reference
    "score.batch_size": 1,
    **dict.fromkeys(("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.slices"), -1),
}
# The same, where the configuration has them; those of older runs do not.
NEWER_FIELDS = dict.fromkeys(("profile.start", "profile.steps", "profile.port"), 0)


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


def train(
    config: ConfigDict, workdir: str, task: Task | None = None, iterator: Any = None
) -> TrainState:
    """Trains until `config.total_steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
        config: see `LOOP_FIELDS`; the task and the data read the rest.
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
    started = time.perf_counter()
    workdir = os.fspath(files.path(workdir))
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as start_up:
        clock = stack.enter_context(Clock())
        start_up.enter_context(reading_once())  # The weights of other networks.
        stack.enter_context(memory.explained(config))
        lengths = ""
        if task is None and iterator is None:
            config, lengths = follow_images(config, workdir)
            config = complete(config)
        check_run(config, workdir)
        # ------------------------------------------------------------- log, devices, task, data
        held = stack.enter_context(open_workdir(workdir))
        stack.enter_context(run_log(held.folder))
        stop = stack.enter_context(StopRequest())
        watchdog = stack.enter_context(Watchdog(config.stall_seconds))
        mesh = stack.enter_context(_devices(config))
        task, iterator = _task_and_data(config, task, iterator, mesh)
        feed = stack.enter_context(Feed(iterator, mesh, stop.asked))
        names = tuple(getattr(iterator, "class_names", ()))
        check_same_classes(names, workdir)
        found = {"data": getattr(iterator, "fingerprint", "")}
        check_moved(config, workdir, "data", found["data"])
        encoded_by = check_encoder(config, getattr(iterator, "encoded_by", ""), workdir)

        # ------------------------------------------------- state: the newest checkpoint's or new
        checkpoints = stack.enter_context(Checkpoints(workdir, config.keep_checkpoints))
        begun = _restore_or_create(task, config.seed, mesh, checkpoints, feed, clock)
        log_start(config, mesh, begun.state)
        _log_data(lengths, names, getattr(iterator, "num_examples", 0), config.batch_size)
        if _is_finished(config, begun.step, workdir):
            return begun.state
        state = load_into(config, begun.state, task.frozen, fresh=begun.step == 0)
        found["weights"] = fingerprint(state.frozen)
        check_moved(config, workdir, "weights", found["weights"])
        task.check(_first_batch(feed, begun.step))  # Data of other shapes than the network's.

        # -------------------------------------------------------------------------------- steps
        clock.go_on(held.folder, begun.clock.get("spent"))
        writer = MetricWriter(
            held.folder,
            tensorboard=config.tensorboard,
            wandb=_wandb(config, workdir),
            step=begun.step,
        )
        profiler = Profiler(held.folder, **config.get("profile", {}))
        spent = begun.clock["seconds"]
        progress = Progress(config.total_steps, begun.step, config.batch_size, spent)
        run = Run(
            config=config,
            feed=feed,
            checkpoints=checkpoints,
            workdir=held,
            writer=stack.enter_context(writer),
            averages=Averages(begun.clock["averages"]),
            progress=stack.enter_context(progress),
            stop=stop,
            watchdog=watchdog,
            clock=clock,
            profiler=stack.enter_context(profiler),
            scorer=make_scorer(config, mesh, workdir),
            drawer=make_drawer(config, mesh, encoded_by, names),
            started=started,
            record=functools.partial(write_config, config, workdir, names, encoded_by, found),
            saved=begun.step,
        )
        start_up.close()
        train_step = sharding.jit_step(task.train_step, state)
        try:
            state = run_steps(run, task, train_step, state, begun.step)
        except Diverged as error:
            raise Diverged(f"{error}; {checkpoints.last_good()}") from error
        _log_end(config, progress.seconds, clock, feed.skipped)
    return state


class _Begun(NamedTuple):
    """Where a run begins: the state after `step` updates, and the clock of its checkpoint."""

    step: int
    state: TrainState
    clock: Mapping[str, Any]


def _restore_or_create(
    task: Task, seed: int, mesh: Mesh, checkpoints: Checkpoints, feed: Feed, clock: Clock
) -> _Begun:
    """Restores the newest checkpoint, with its place in the data; without one, starts at step 0."""
    key = jax.random.key(seed)
    abstract_state = sharding.abstract_state(task.init, key, mesh)
    with clock.doing("restore"):
        restored = checkpoints.restore(_to_save(abstract_state))
    if restored is None:
        state = sharding.create_sharded(task.init, key, mesh)
        return _Begun(0, state, {"seconds": 0.0, "averages": {}})
    frozen = sharding.create_sharded(lambda key: task.init(key).frozen, key, mesh)
    feed.set_state(restored.data, restored.clock["skipped"])
    return _Begun(restored.step, restored.state.replace(frozen=frozen), restored.clock)


def _is_finished(config: ConfigDict, step: int, workdir: str) -> bool:
    """Whether no step is left; the log says so, or where the run is resumed."""
    if step:
        logging.info("resuming after step %d of %d", step, config.total_steps)
    finished = step >= config.total_steps
    if finished:
        logging.info("this run is finished: nothing is left to do in %s", workdir)
        _say_try_out(config)
    return finished


def _first_batch(feed: Feed, step: int) -> Mapping[str, jax.Array]:
    try:
        return feed.peek()
    except Leaving:
        raise Preempted(step) from None


def _log_data(lengths: str, class_names: Sequence[str], num_examples: int, batch_size: int) -> None:
    if lengths:
        logging.info("%s", lengths)
    if 0 < num_examples < batch_size:
        logging.warning(
            "a batch of %d is larger than the data set of %d: each of its images is in every "
            "batch; lower --config.batch_size",
            batch_size,
            num_examples,
        )
    if class_names:
        logging.info("classes: %s", shown(class_names))
        logging.debug("all classes: %s", shown(class_names, len(class_names)))


def _wandb(config: ConfigDict, workdir: str) -> dict[str, Any] | None:
    """What a run on Weights & Biases is called; None where there is to be none."""
    project = config.get("wandb", {}).get("project", "")
    name = os.path.basename(workdir.rstrip("/"))
    return {"project": project, "name": name, "config": config.to_dict()} if project else None


def _log_end(config: ConfigDict, seconds: float, clock: Clock, skipped: int | None) -> None:
    shares = clock.shares_shown()
    logging.info("finished %d steps in %.0f s: %s", config.total_steps, seconds, shares)
    if skipped:
        logging.warning("unreadable images were skipped %d times, named above", skipped)
    _say_try_out(config)


def _say_try_out(config: ConfigDict) -> None:
    if config.get("try_out"):
        logging.warning(
            "this was a try-out of the code (runlocal): the networks and the run are too small for "
            "useful weights; leave runlocal out to train"
        )


def run_steps(
    run: "Run", task: Task, train_step: Callable, state: TrainState, step: int
) -> TrainState:
    """Runs the steps. The host waits for the devices only to log, draw or save."""
    config, first = run.config, step + 1
    while step < config.total_steps:
        run.watchdog.beat(f"step {step + 1}")
        batch = run.next_batch(step, state)
        variant, plan = task.plan(step)
        program, work = run.compiled(train_step, variant, state, batch, plan)
        with run.clock.dispatch(step + 1):
            state, step_metrics = program(state, batch, plan)
        run.clock.watch(step_metrics["loss"], work)
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
    programs: dict[Hashable, tuple[Callable, int]] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """The time of the block is not in the rate; if the devices are idle, `what` took it."""
        with self.progress.pause(), self.clock.doing(what):
            yield

    def compiled(self, train_step, variant: Hashable, *args: Any) -> tuple[Callable, int]:
        """Returns the program of a variant, and its FLOPs without recomputation."""
        if variant not in self.programs:
            start = time.perf_counter()
            with self.pause("compile"):
                traced = train_step.trace(*args, variant=variant)
                program = traced.lower().compile()
                needed = memory.check(program, self.config)
                self.programs[variant] = program, flops.written(traced, recomputed=False)
                # Processes compile at different speed, and a collective waits only so long.
                sharding.sync_processes("compiled")
            seconds, name = time.perf_counter() - start, "" if variant is None else f" {variant}"
            logging.info("compiled the step%s in %.1f s%s", name, seconds, needed)
        return self.programs[variant]

    def next_batch(self, step: int, state: TrainState) -> dict[str, jax.Array]:
        """Returns the next batch; saves the state of `step` where none comes.

        Raises:
            Preempted: asked to leave while waiting for it.
            DataError: it cannot be read.
        """
        try:
            with self.clock.doing("input"):
                return self.feed.take()
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
        self.checkpoints.save(step, _to_save(state), self.feed.state, clock)
        self.saved = step


# -------------------------------------------------------------------------------- around the loop


def check_run(config: ConfigDict, workdir: str) -> None:
    """Checks the fields of the loop, and that the workdir belongs to this configuration."""
    check_fields(config, dict.fromkeys(LOOP_FIELDS, int) | {"tensorboard": bool})
    values = flatten(config)
    newer = {name: least for name, least in NEWER_FIELDS.items() if name in values}
    check_fields(config, dict.fromkeys(newer, int))
    if "wandb.project" in values:
        check_fields(config, {"wandb.project": str})
    for name, least in (LOOP_FIELDS | newer).items():
        if values[name] < least:
            raise ConfigError(f"config.{name}={values[name]}: expected at least {least}")
    check_same(config, workdir)


@contextlib.contextmanager
def _devices(config: ConfigDict) -> Iterator[Mesh]:
    """The mesh of a run, in use, which can split every batch; all processes begin together."""
    mesh = sharding.make_mesh(config.mesh)
    sizes = batch_sizes(config.get("data", {}), config.batch_size, config.seed)
    other = [sizes.images(side) for side in sizes.possible] if sizes else []
    for batch_size in (config.batch_size, *other):
        sharding.check_batch_size(batch_size, mesh)
    sharding.sync_processes("started")
    with sharding.use(mesh):
        yield mesh


def _task_and_data(
    config: ConfigDict, task: Task | None, iterator: Any, mesh: Mesh
) -> tuple[Task, Any]:
    block, blocks = sharding.batch_share(mesh)
    if task is None:
        task = make_task(config)
    if iterator is None:
        iterator = make_iterator(
            config.data,
            batch_size=config.batch_size,
            seed=config.seed,
            process_index=block,
            process_count=blocks,
        )
    return task, iterator


def _to_save(state: TrainState) -> TrainState:
    return state.replace(frozen={})  # `task.init` makes these again.


# ------------------------------------------------------------------------------- the command line


def parse_command_line(argv: Sequence[str] | None = None) -> tuple[ConfigDict, str]:
    """(configuration, workdir) from the arguments; leaves with UNUSABLE on an unknown option.

    Joins the other processes of the run, where there are any.
    """
    parser = argparse.ArgumentParser(
        prog=program_name("train"),
        description="Train a tokenizer, generator, autoencoder or FlowAR. The same command again "
        "resumes the run.",
        epilog="""\
any field of the configuration can be set from here, with a value of its own type:
  --config.batch_size=64 --config.optim.lr=3e-4 --config.data.source=folder:photos

exit codes: 0 finished; 1 diverged or failed, such as by a full disk; 2 unusable command line,
configuration, workdir or data; 143 asked to leave by SIGTERM or Ctrl-C, state saved, run again to
resume.""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py[:VARIANT]",
        help="the configuration, such as configs/tokenizer.py:digits",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="where the run keeps its configuration, log, metrics, figures and checkpoints; a "
        "folder or gs://BUCKET/...",
    )
    distributed.add_arguments(parser)
    args, overrides = parser.parse_known_args(argv)
    for override in overrides:
        if not re.match(r"--config\.[^=]+=", override):
            parser.error(
                f"unknown option {override!r}: expected --config, --workdir or --config.NAME=VALUE"
            )
    config = load_config(args.config, overrides)
    distributed.start(args.coordinator_address, args.num_processes, args.process_id)
    return config, args.workdir


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
