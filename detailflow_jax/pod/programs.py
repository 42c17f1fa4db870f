"""The programs of a pod, the train step and the sampler, with abstract arguments; compiling them.

Nothing is allocated and no weights are read: the compiler needs shapes, types and placements only.
"""

import collections
import dataclasses
import re
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from detailflow_jax.inference.programs import network_of
from detailflow_jax.inference.sampling import DECODERS, sampling_of
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.errors import ConfigError, UserError
from detailflow_jax.tasks import Task, TrainState, make_task


class DoesNotFit(Exception):
    """The compiler needs more memory than a chip has.

    Attributes:
      used: bytes that the program needs on a chip, None where the compiler does not say.
      state: bytes of it that its arguments take.
    """

    def __init__(self, message: str, used: int | None, state: int):
        super().__init__(message)
        self.used, self.state = used, state


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile for a mesh.

    Attributes:
      name: "train" or "sampler".
      function: jitted, with its placements and donations.
      arguments: trees of `jax.ShapeDtypeStruct` with shardings.
      options: static keyword arguments.
      mesh: what it is compiled for.
      images: how many images one run takes or makes.
      note: what else to know about it.
    """

    name: str
    function: Callable
    arguments: tuple
    options: dict[str, Any]
    mesh: Mesh
    images: int
    note: str

    @property
    def state_bytes(self) -> int:
        """Bytes that the arguments take on each chip."""
        return bytes_a_chip(self.arguments)

    @property
    def whole(self) -> dict[str, int]:
        """{name: bytes} of large arrays of its state that fsdp does not split."""
        return sharding.left_whole(self.arguments[0])


def bytes_a_chip(tree: Any) -> int:
    """Bytes that abstract arrays with shardings take on each chip."""
    return sum(sharding.bytes_a_device(leaf) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program, and what compiling it took on this machine.

    `cpu_seconds` are of all cores together, `host_memory` is the peak memory of this process.
    """

    program: Program
    traced: Any
    executable: Any
    seconds: float
    cpu_seconds: float
    host_memory: int


def state(config: ConfigDict, what: str, mesh: Mesh | AbstractMesh) -> Any:
    """What a program of `train_program` or `sampler_program` keeps, abstract.

    That is the whole training state, or for a sampler the parameters alone.
    """
    found = sharding.abstract_state(_task(config).init, jax.random.key(0), mesh)
    return found if what == "train" else found.params


# ------------------------------------------------------------------------------------- the programs


def train_program(config: ConfigDict, mesh: Mesh) -> Program:
    """The train step of a configuration, as the training loop runs it.

    Raises:
      ConfigError: the configuration and the mesh do not go together.
    """
    sharding.check_batch_size(config.batch_size, mesh)
    task, batch = _task(config), _abstract_batch(config, mesh)
    task.check(batch)
    state = _abstract_state(task, mesh)
    variant, plan, note = _usual_plan(task)
    step = sharding.jit_step(task.train_step, state)
    whole = NamedSharding(mesh, PartitionSpec())
    plan = jax.tree.map(lambda x: _abstract(np.shape(x), np.asarray(x).dtype, whole), plan)
    options = {"variant": variant}
    return Program("train", step, (state, batch, plan), options, mesh, config.batch_size, note)


def sampler_program(config: ConfigDict, mesh: Mesh, batch_size: int, cfg_scale: float) -> Program:
    """The sampler of a configuration, for `batch_size` images over the whole mesh.

    Raises:
      ConfigError: the task has no sampler, or the batch and the mesh do not go together.
    """
    if config.task not in DECODERS:
        raise ConfigError(
            f"config.task={config.task!r} has no sampler: expected one of {', '.join(DECODERS)}"
        )
    sharding.check_batch_size(batch_size, mesh)
    sampling = sampling_of(config, cfg_scale)
    params = _abstract_state(_task(config), mesh).params
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    labels = _abstract((batch_size,), jnp.int32, rows)
    keys = _abstract((batch_size,), jax.random.key(0).dtype, rows)
    whole = NamedSharding(mesh, PartitionSpec())
    guidance = _abstract(sampling.guidance.shape, jnp.float32, whole)
    note = f"{sampling.note}, guidance {cfg_scale:g}"
    arguments, step = (params, labels, keys, guidance), jax.jit(sampling.run)
    return Program("sampler", step, arguments, {}, mesh, batch_size, note)


def _task(config: ConfigDict) -> Task:
    try:
        return make_task(config)
    except UserError:
        # It may lack the weights of a frozen network, which are not needed here.
        config = config.copy_and_resolve_references()
        for part in config.values():
            if isinstance(part, ConfigDict) and "random" in part:
                part.random = True
    return make_task(config)


def _abstract(shape: tuple, dtype: Any, placement: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placement)


def _abstract_state(task: Task, mesh: Mesh) -> TrainState:
    key = jax.random.key(0)  # Outside of the mesh: its devices can compute nothing.
    with sharding.use(mesh):
        return sharding.abstract_state(task.init, key, mesh)


def _abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch that `data.make_iterator` and `feed` give to the step."""
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    size = config.batch_size
    batch = {"label": _abstract((size,), jnp.int32, rows)}
    if config.data.source.startswith("codes:"):
        shape = (size, config.model.num_tokens, 3)
        return batch | {"codes": _abstract(shape, jnp.int32, rows)}
    if config.data.source.startswith("latents:"):
        c = network_of(config).config
        side = c.latent_side
        shape = (size, side, side, 2 * c.channels)  # mean and log variance
        return batch | {"moments": _abstract(shape, jnp.float32, rows)}
    if "image_size" in config.data:
        side = config.data.image_size
        return batch | {"image": _abstract((size, side, side, 3), jnp.uint8, rows)}
    raise ConfigError(
        f"config.data.source={config.data.source!r}: expected codes:DIR, latents:DIR, or images "
        "with config.data.image_size, to know the shapes of a batch"
    )


def _usual_plan(task: Task) -> tuple[Any, dict[str, np.ndarray], str]:
    """The static variant that most steps have, a plan of it, and a note on its share."""
    plans = [task.plan(step) for step in range(200)]
    counts = collections.Counter(variant for variant, _ in plans)
    [(usual, count)] = counts.most_common(1)
    plan = next(plan for variant, plan in plans if variant == usual)
    note = f"variant {usual}, of {count / 200:.0%} of the steps" if len(counts) > 1 else ""
    return usual, plan, note


# --------------------------------------------------------------------------------------- compiling


def compile_program(program: Program) -> Compiled:
    """Compiles a program for its mesh with the TPU's compiler.

    Raises:
      DoesNotFit: the chip's memory is too small.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    with sharding.use(program.mesh):
        traced = program.function.trace(*program.arguments, **program.options)
        lowered = traced.lower(lowering_platforms=("tpu",))
        try:
            executable = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "hbm capacity" not in str(error):
                raise
            raise DoesNotFit(str(error), needed(str(error)), program.state_bytes) from None
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return Compiled(program, traced, executable, seconds, cpu_seconds, memory)


def needed(message: str) -> int | None:
    """Bytes that a program needs on a chip, from the compiler's message that it has not as many."""
    found = re.search(r"(?:Used |\()([\d.]+)([KMGT])\)? (?:of|exceeds)", message)
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1)) if found else None
