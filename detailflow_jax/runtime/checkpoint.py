"""Checkpoints: {state, data, clock} saved together, asynchronously, by Orbax.

    WORKDIR/checkpoints/STEP/state   the task's state, an array store that any mesh can read
                             data    the data iterator's position, JSON
                             clock   the loop's own numbers and a checksum for each state field

A checkpoint gets its final name only when it is complete, so a killed run leaves nothing that
looks complete. Damage that happens later is found on reading, by Orbax or by the checksum; then
the newest readable checkpoint is used instead.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from detailflow_jax.runtime import files, sharding
from detailflow_jax.runtime.errors import BucketError, CheckpointError, Diverged, WriteError

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint as read back: `step` updates done, the state, and the two JSON parts."""

    step: int
    state: PyTree
    data: dict
    clock: dict


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints of one run; a context manager that waits for the last save on exit."""

    def __init__(self, workdir: str | os.PathLike, keep: int):
        """Opens WORKDIR/checkpoints, clearing what an interrupted save left.

        Raises:
            CheckpointError: the directory cannot be made.
        """
        self.directory = _directory(workdir)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(n=keep),
            cleanup_tmp_directories=True,
        )
        with self._writing():
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        # To read with: the manager's own `restore` ends at a barrier, where a process that found
        # its part damaged would never come.
        self._reader = ocp.CompositeCheckpointHandler(
            state=ocp.StandardCheckpointHandler(),
            data=ocp.JsonCheckpointHandler(),
            clock=ocp.JsonCheckpointHandler(),
        )

    def __exit__(self, *exception) -> None:
        with self._writing():
            self._manager.close()
        self._reader.close()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint on the disk."""
        with self._writing():
            self._manager.wait_until_finished()
        return self._manager.latest_step()

    def last_good(self) -> str:
        """What an error says of the newest complete checkpoint."""
        step = self.latest()
        if step is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is step {step}, in {self.directory}"

    def save(self, step: int, state: PyTree, data: dict, clock: dict) -> None:
        """Saves the state after `step` updates; returns as soon as the arrays are copied.

        Args:
            state: a dataclass of arrays. Its buffers may be donated as soon as this returns.
            data: JSON-like state of the data iterator, after the batches used so far.
            clock: JSON-like numbers of the loop.

        Raises:
            Diverged: a NaN or Inf anywhere in the state; nothing is written.
            CheckpointError: this save, or the one before it, could not be written.
        """
        finite, checksums = _audit(_fields(state))
        if not finite:
            raise Diverged(f"the state holds NaN or Inf after step {step}")
        # Through JSON at once: the iterator goes on changing its state while this is written.
        data, clock = json.loads(json.dumps([data, clock | {"checksums": checksums}]))
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(data),
                    clock=ocp.args.JsonSave(clock),
                ),
                force=True,
            )

    def restore(self, abstract_state: PyTree) -> Restored | None:
        """Returns the newest readable checkpoint, or None if there is no checkpoint.

        An unreadable one is named in a warning. Once an older one has been read instead, it is
        renamed to STEP.damaged, so that the step can be saved again.

        Args:
            abstract_state: `jax.ShapeDtypeStruct` with the shardings to restore onto.

        Raises:
            CheckpointError: the arrays are not those of this state, or none can be read.
            BucketError: the bucket does not answer; nothing was passed over.
        """
        damaged = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            restored, error = self._read(step, abstract_state)
            if error:
                logging.warning(
                    "checkpoint %s is damaged and passed over: %s",
                    self.directory / str(step),
                    _reason(error),
                )
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return restored
        if damaged:
            raise CheckpointError(
                f"none of the checkpoints {damaged} in {self.directory} can be read; "
                "repair one, or move the directory away to start anew"
            )
        return None

    def _read(self, step: int, abstract_state: PyTree) -> tuple[Restored | None, Exception | None]:
        """A checkpoint, or why it cannot be read, in any process: each reads its own part."""
        directory, items, error = self.directory / str(step), None, None
        try:
            _check_layout(directory, abstract_state)
            items = self._reader.restore(
                directory,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract_state),
                    data=ocp.args.JsonRestore(),
                    clock=ocp.args.JsonRestore(),
                ),
            )
            checksums = items.clock.pop("checksums")
        except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
            raise  # The checkpoint is not to blame.
        except Exception as broken:  # Each broken file has an exception type of its own.
            _check_reached(directory, broken)
            error = broken
        # Before the checksums, which are made by all processes together.
        if not sharding.in_all_processes(error is None):
            return None, error or ValueError("another process cannot read its part")
        for name, value in _audit(_fields(items.state))[1].items():
            if value != checksums.get(name):
                return None, ValueError(f"the checksum of {name} is wrong")
        return Restored(step, items.state, items.data, items.clock), None

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                aside = self.directory / f"{step}.damaged"
                if aside.exists():
                    aside.rmtree()
                (self.directory / str(step)).rename(aside)
        sharding.sync_processes("set aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the exceptions of a failed write, now or in the background, into WriteError."""
        try:
            yield
        except Exception as error:
            cause = "is the disk full or read-only, or can its files not be synced or replaced"
            if files.is_remote(self.directory):
                cause = "does the bucket answer, and may this account write there"
            if jax.process_count() > 1:
                cause += ", or is another process gone"
            raise WriteError(
                f"cannot write checkpoints to {self.directory}: {_reason(error)} ({cause}? The "
                "checkpoints already complete are whole: run again to resume)"
            ) from error


def save_params(workdir: str | os.PathLike, params: dict) -> None:
    """Saves parameters alone, as a checkpoint of step 0 that `restore_params` reads.

    Args:
        workdir: gets a folder `checkpoints`; make it under a temporary name for atomicity.
        params: nested dict of arrays; NaN or Inf are saved too.

    Raises:
        CheckpointError, OSError: the disk does not take it.
    """
    state = {"params": params}
    clock = {"checksums": {name: _checksum(tree) for name, tree in state.items()}}
    handler = ocp.CompositeCheckpointHandler(
        # Weights hardly compress, and trying takes as much memory again as they do.
        state=ocp.PyTreeCheckpointHandler(use_compression=False),
        clock=ocp.JsonCheckpointHandler(),
    )
    whole = ocp.args.Composite(state=ocp.args.PyTreeSave(state), clock=ocp.args.JsonSave(clock))
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            checkpointer.save(_directory(workdir) / "0", whole)
        except ValueError as error:  # TensorStore's, of any kind.
            raise CheckpointError(
                f"cannot write a checkpoint to {workdir}: {_reason(error)} (is the disk full, or "
                "can its files not be synced or replaced?)"
            ) from error


def restore_params(
    workdir: str | os.PathLike, *, ema: bool = True, step: int | None = None
) -> dict:
    """The parameters of a run for inference; the optimizer's state is neither read nor needed.

    Args:
        workdir: of the training run; it is only read, also while the run goes on.
        ema: take the moving average of the parameters, where the run keeps one.
        step: which checkpoint; default the newest that can be read.

    Returns:
        Nested dict of numpy arrays, as the network's `apply` takes under "params".

    Raises:
        CheckpointError: no checkpoint, no such step, or none that can be read.
    """
    return restore_field(workdir, ("ema", "params") if ema else ("params",), step)


def restore_field(
    workdir: str | os.PathLike, names: tuple[str, ...], step: int | None = None
) -> dict:
    """The first of the state's fields `names` that holds arrays; see `restore_params`."""
    directory = _directory(workdir)
    steps = sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []
    if not steps:
        raise CheckpointError(f"there are no checkpoints in {directory}: train there first")
    if step is not None and step not in steps:
        raise CheckpointError(f"there is no checkpoint of step {step} in {directory}, only {steps}")
    for candidate in reversed(steps) if step is None else [step]:
        path = directory / str(candidate)
        try:
            found = _read_field(path, names)
        except Exception as error:  # As in `Checkpoints.restore`.
            _check_reached(path, error)
            logging.warning("checkpoint %s cannot be read: %s", path, _reason(error))
        else:
            logging.info("%s of step %d from %s", names[-1], candidate, directory)
            return found
    raise CheckpointError(f"no checkpoint in {directory} can be read")


def _directory(workdir: str | os.PathLike) -> epath.Path:
    place = files.path(workdir)
    # Orbax wants absolute paths; an address is one, and would become a local path.
    return epath.Path(place if files.is_remote(place) else place.resolve()) / "checkpoints"


def _read_field(directory: epath.Path, names: tuple[str, ...]) -> dict:
    """The first of the state's fields `names` that holds arrays, as numpy."""
    handler = ocp.PyTreeCheckpointHandler()
    stored = handler.metadata(directory / "state").tree
    name = next(name for name in names if jax.tree.leaves(stored.get(name)))
    item = {name: stored[name]}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
    tree = handler.restore(directory / "state", args=args)[name]
    clock = json.loads((directory / "clock" / "metadata").read_text())
    if _checksum(tree) != clock["checksums"][name]:
        raise ValueError(f"the checksum of {name} is wrong")
    return tree


def _check_reached(directory: epath.Path, error: Exception) -> None:
    """Raises BucketError if a bucket did not answer: its checkpoint is whole all the same."""
    if files.is_remote(directory) and files.is_unreachable(error):
        raise BucketError(f"cannot read {directory}: {_reason(error)}; try again") from error


def _check_layout(directory: epath.Path, abstract_state: PyTree) -> None:
    """Tells another model's checkpoint from a damaged one; only the latter may be passed over."""

    def layout(tree):
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
        return {name(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}

    stored = layout(ocp.PyTreeCheckpointHandler().metadata(directory / "state").tree)
    expected = layout(abstract_state)
    for name in dict.fromkeys([*expected, *stored]):
        there, here = stored.get(name, "absent"), expected.get(name, "absent")
        if there != here:
            raise CheckpointError(
                f"checkpoint {directory} is not of this model: {name} is {there} there, {here} "
                "here; use the code and the configuration it was written with, or another workdir"
            )


# ---------------------------------------------------------------------------------- state as bits


def _fields(state: PyTree) -> dict[str, PyTree]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _audit(fields: dict[str, PyTree]) -> tuple[bool, dict[str, int]]:
    """(whether every number is finite, {field: uint32 checksum}); the devices read the arrays.

    A program for each shape of an array is small. One for all arrays would take as long to
    compile as a training step.
    """
    # One after another: where processes run several programs at once, each with sums over all
    # devices, they may take them up in different orders and wait for each other for ever.
    found = {
        name: [jax.device_get(_examine(x)) for x in jax.tree.leaves(tree)]
        for name, tree in fields.items()
    }
    finite = all(ok for arrays in found.values() for ok, _ in arrays)
    return finite, {name: _combine([bits for _, bits in found[name]]) for name in found}


def fingerprint(tree: PyTree) -> str:
    """Returns a hash of arrays on the devices, the same on every mesh; "" if there are none."""
    return f"{_audit({'': tree})[1]['']:08x}" if jax.tree.leaves(tree) else ""


@jax.jit
def _examine(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(whether all of an array is finite, uint32 sum of its bits)."""
    return jnp.isfinite(x).all(), _sum_of_bits(x)


def _checksum(tree: PyTree) -> int:
    """uint32: sums of the arrays' bits, weighted by the arrays' order.

    Integer sums are exact in any order, so the placement of the arrays does not matter.
    """
    return _combine([_sum_of_bits(x) for x in jax.tree.leaves(tree)])


def _sum_of_bits(x: Any) -> Any:
    return x.view(f"uint{8 * x.dtype.itemsize}").astype(np.uint32).sum(dtype=np.uint32)


def _combine(sums: list) -> int:
    sums = np.array([0, *sums], np.uint32)
    weights = 2 * np.arange(len(sums), dtype=np.uint32) + 1  # Odd: no bit of a sum is lost.
    return int((sums * weights).sum(dtype=np.uint32))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
