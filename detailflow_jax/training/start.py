"""The start of a run: what is checked, opened, restored or made before its first step."""

import contextlib
import functools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from detailflow_jax.convert.complete import complete
from detailflow_jax.convert.load import reading_once
from detailflow_jax.convert.start import check_encoder, load_into
from detailflow_jax.data import make_iterator
from detailflow_jax.data.classes import check_same_classes, shown, warn_of_other_names
from detailflow_jax.data.lengths import follow_images
from detailflow_jax.data.pipeline import batch_sizes
from detailflow_jax.evaluate.training import make_scorer
from detailflow_jax.inference.drawing import make_drawer
from detailflow_jax.runtime import memory, sharding
from detailflow_jax.runtime.checkpoint import Checkpoints, fingerprint
from detailflow_jax.runtime.clock import Clock
from detailflow_jax.runtime.config import (
    check_fields,
    check_moved,
    check_same,
    flatten,
    write_config,
)
from detailflow_jax.runtime.errors import MOST_SEED, ConfigError
from detailflow_jax.runtime.feed import Feed, Leaving
from detailflow_jax.runtime.metrics import Averages, MetricWriter, Progress, log_start, run_log
from detailflow_jax.runtime.profiler import Profiler
from detailflow_jax.runtime.programs import Programs
from detailflow_jax.runtime.stop import StopRequest
from detailflow_jax.runtime.watchdog import Watchdog
from detailflow_jax.runtime.workdir import open_workdir
from detailflow_jax.tasks import Task, TrainState, make_task
from detailflow_jax.training.run import Preempted, Run, say_try_out, to_save

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


class Begun(NamedTuple):
    """A run before its next step.

    Attributes:
      state: after `step` updates.
      task: what is trained.
      run: what the loop uses; None where no step is left.
    """

    step: int
    state: TrainState
    task: Task
    run: Run | None


@reading_once()  # The weights of other networks, which several of the steps ask for.
def begin(
    stack: contextlib.ExitStack, config: ConfigDict, workdir: str, task: Task | None, iterator: Any
) -> Begun:
    """Begins or resumes a run; the arguments and errors are those of `train.train`.

    Args:
      stack: closes at the end of the run what this opens.
    """
    started = time.perf_counter()
    clock = stack.enter_context(Clock())
    stack.enter_context(memory.explained(config))
    lengths = ""
    if task is None and iterator is None:
        config, lengths = follow_images(config, workdir)
        config = complete(config)
    check_run(config, workdir)
    # --------------------------------------------------------------- log, devices, task, data
    held = stack.enter_context(open_workdir(workdir))
    stack.enter_context(run_log(held.folder))
    stop = stack.enter_context(StopRequest())
    watchdog = stack.enter_context(Watchdog(config.stall_seconds))
    mesh = stack.enter_context(_devices(config))
    task, iterator = _task_and_data(config, task, iterator, mesh)
    feed = stack.enter_context(Feed(iterator, mesh, stop.asked))
    origin = _check_origin(config, iterator, workdir)

    # ------------------------------------------------- state: the newest checkpoint's or new
    checkpoints = stack.enter_context(Checkpoints(workdir, config.keep_checkpoints))
    step, state, saved = _restore_or_create(task, config.seed, mesh, checkpoints, feed, clock)
    log_start(config, mesh, state)
    _log_data(lengths, origin.class_names, getattr(iterator, "num_examples", 0), config.batch_size)
    if _is_finished(config, step, workdir):
        return Begun(step, state, task, None)
    if step == 0 and "num_classes" in config.get("model", {}):
        warn_of_other_names(origin.class_names, config.get("init_from") or {})
    state = load_into(config, state, task.frozen, fresh=step == 0)
    origin.found["weights"] = fingerprint(state.frozen)
    check_moved(config, workdir, "weights", origin.found["weights"])
    task.check(_first_batch(feed, step))  # Data of other shapes than the network's.

    # ------------------------------------------------------------------- what the loop uses
    clock.go_on(held.folder, saved.get("spent"))
    options = {"tensorboard": config.tensorboard, "wandb": _wandb(config, workdir)}
    writer = MetricWriter(held.folder, step=step, **options)
    train_step = sharding.jit_step(task.train_step, state)
    programs = Programs(train_step, task.plan, mesh, config, ahead=task.steady)
    progress = Progress(config.total_steps, step, config.batch_size, saved["seconds"])
    run = Run(
        config=config,
        feed=feed,
        checkpoints=checkpoints,
        workdir=held,
        writer=stack.enter_context(writer),
        averages=Averages(saved["averages"]),
        progress=stack.enter_context(progress),
        stop=stop,
        watchdog=watchdog,
        clock=clock,
        profiler=stack.enter_context(Profiler(held.folder, **config.get("profile", {}))),
        scorer=make_scorer(config, mesh, workdir),
        drawer=make_drawer(config, mesh, origin.encoded_by, origin.class_names),
        started=started,
        record=functools.partial(write_config, config, workdir, *origin),
        saved=step,
        programs=stack.enter_context(programs),
    )
    return Begun(step, state, task, run)


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
    if config.seed > MOST_SEED:
        raise ConfigError(f"config.seed={config.seed}: expected at most {MOST_SEED}")
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


class _Origin(NamedTuple):
    """Identifies a run's data and frozen weights; fields in the order of `write_config`."""

    class_names: Sequence[str]
    encoded_by: str
    found: dict[str, str]  # fingerprints of data and weights


def _check_origin(config: ConfigDict, iterator: Any, workdir: str) -> _Origin:
    """Checks that the data are those with which the workdir's run began."""
    names = tuple(getattr(iterator, "class_names", ()))
    check_same_classes(names, workdir)
    found = {"data": getattr(iterator, "fingerprint", "")}
    check_moved(config, workdir, "data", found["data"])
    encoded_by = check_encoder(config, getattr(iterator, "encoded_by", ""), workdir)
    return _Origin(names, encoded_by, found)


class _Restored(NamedTuple):
    """The state after `step` updates, and the clock of its checkpoint."""

    step: int
    state: TrainState
    clock: Mapping[str, Any]


def _restore_or_create(
    task: Task, seed: int, mesh: Mesh, checkpoints: Checkpoints, feed: Feed, clock: Clock
) -> _Restored:
    """Restores the newest checkpoint, with its place in the data; without one, starts at step 0."""
    key = jax.random.key(seed)
    abstract_state = sharding.abstract_state(task.init, key, mesh)
    with clock.doing("restore"):
        restored = checkpoints.restore(to_save(abstract_state))
    if restored is None:
        state = sharding.create_sharded(task.init, key, mesh)
        return _Restored(0, state, {"seconds": 0.0, "averages": {}})
    frozen = sharding.create_sharded(lambda key: task.init(key).frozen, key, mesh)
    feed.set_state(restored.data, restored.clock["skipped"])
    return _Restored(restored.step, restored.state.replace(frozen=frozen), restored.clock)


def _is_finished(config: ConfigDict, step: int, workdir: str) -> bool:
    """Whether no step is left; the log says so, or where the run is resumed."""
    if step:
        logging.info("resuming after step %d of %d", step, config.total_steps)
    finished = step >= config.total_steps
    if finished:
        logging.info("this run is finished: nothing is left to do in %s", workdir)
        say_try_out(config)
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
