"""What can be trained: one file a task, each a few pure functions over an explicit state."""

import dataclasses
import importlib
from collections.abc import Callable, Hashable
from typing import Any

import flax
import jax
import numpy as np

from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.runtime.upgrade import check_names


@flax.struct.dataclass
class TrainState:
    """Everything a run needs to go on; a plain pytree.

    Attributes:
      step: int32 scalar, updates done so far. Randomness comes from it and the config's seed.
      params: trained parameters, float32.
      opt_state: of optax.
      ema: exponential moving average of the parameters, or None.
      extra: arrays of the task's own, such as the window of recent codes.
      frozen: parameters that are used but never trained (a teacher); not part of a checkpoint,
        `init` makes them anew.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any = None
    extra: Any = dataclasses.field(default_factory=dict)
    frozen: Any = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """The functions the loop needs; none knows of devices, files or loops.

    Attributes:
      init: PRNG key -> TrainState, its parameters boxed with logical axis names.
      plan: step -> (static variant, small NumPy arrays): what the host decides for a step, a pure
        function of the step. There is one compiled program a variant.
      train_step: (state, batch, plan arrays, *, variant) -> (state, {name: scalar}).
      figures: (state, batch) -> {name: uint8 [H, W, 3]}, pictures to look at; on the devices, as
        the processes of a run draw them together.
      check: raises ConfigError if a batch is not of the shapes that the task was made for.
      frozen: `losses.Frozen` of each network whose weights are read when a run starts.
    """

    init: Callable[[jax.Array], TrainState]
    plan: Callable[[int], tuple[Hashable, dict[str, np.ndarray]]]
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    figures: Callable[[TrainState, Any], dict[str, jax.Array]]
    check: Callable[[Any], None] = lambda batch: None
    frozen: tuple[Any, ...] = ()


TASKS = ("tokenizer", "generator", "vae", "flowar")


def make_task(config) -> Task:
    """The task that `config.task` names.

    Raises:
      ConfigError: there is no such task, or a field has its old name.
    """
    check_names(config)
    if config.task not in TASKS:
        raise ConfigError(f"config.task={config.task!r} is not one of {', '.join(TASKS)}")
    return importlib.import_module(f"detailflow_jax.tasks.{config.task}").make(config)
