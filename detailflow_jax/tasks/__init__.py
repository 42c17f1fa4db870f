"""What can be trained: one file per task, each a few pure functions over an explicit state."""

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import flax.struct
import jax

from detailflow_jax.ops import Array
from detailflow_jax.runtime.errors import ConfigError, near_names, raised_as
from detailflow_jax.runtime.upgrade import check_names

T = TypeVar("T")
_MOST = 1 << 24  # of a size; what is made from larger ones only fills the memory
Plan = tuple[Hashable, Mapping[str, Any]]
"""(static variant of a step, its small NumPy arrays)."""
Metrics = dict[str, Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a run needs to continue; a plain pytree, also of shapes or of placements.

    Attributes:
      step: int32 scalar, updates done so far. Randomness comes from it and the config's seed.
      params: trained parameters, float32.
      opt_state: of optax.
      ema: exponential moving average of the parameters, or None.
      extra: arrays of the task's own, such as the window of recent codes.
      frozen: parameters that are used but never trained (a teacher). They are not part of a
        checkpoint: `init` makes them again.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any = None
    extra: Any = dataclasses.field(default_factory=dict)
    frozen: Any = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """The functions that the loop needs; none knows of devices, files or loops.

    Attributes:
      init: PRNG key -> TrainState, its parameters boxed with logical axis names.
      plan: step -> (static variant, small NumPy arrays): what the host decides for a step, a pure
        function of the step. There is one compiled program per variant.
      train_step: (state, batch, plan arrays, *, variant) -> (state, {name: scalar}).
      figures: (state, batch) -> {name: uint8 [H, W, 3]}, pictures to look at; on the devices, as
        the processes of a run draw them together.
      check: raises ConfigError if a batch is not of the shapes that the task was made for.
      steady: whether the batches of all steps have the same shapes.
      frozen: `losses.Frozen` of each network whose weights are read when a run starts.
    """

    init: Callable[[jax.Array], TrainState]
    plan: Callable[[int], Plan]
    train_step: Callable[..., tuple[TrainState, Metrics]]
    figures: Callable[[TrainState, Any], Mapping[str, Array]] = lambda state, batch: {}
    check: Callable[[Any], None] = lambda batch: None
    steady: bool = True
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


def no_plan(step: int) -> Plan:
    """The plan of a task for which the host decides nothing: one program for every step."""
    del step
    return None, {}


def from_section(kind: Callable[..., T], fields: Mapping[str, Any], section: str) -> T:
    """The dataclass that a section of the configuration describes.

    Args:
      kind: a dataclass that checks its values with ValueError.
      fields: of the section, as a mapping. None stands for the dataclass's default.
      section: its name, for messages.

    Raises:
      ConfigError: an unknown field, or values that cannot be. Only this conversion is guarded, so
        that a ValueError of a network or of a formula keeps its traceback.
    """
    if not isinstance(fields, Mapping):
        raise ConfigError(f"{section} is {fields!r:.99}, expected the fields of a section")
    known, hints = inspect.signature(kind).parameters, typing.get_type_hints(kind)
    for name, value in fields.items():
        if name not in known:
            raise ConfigError(
                f"{section}.{name} is no field of this network; expected "
                f"{', '.join(near_names(name, known) or known)}"
            )
        if value is not None and not _fits(value, hints[name], known[name].default):
            expected = getattr(hints[name], "__name__", hints[name])
            if hints[name] is int:
                expected = f"at least {_least(known[name].default)}, a whole number up to {_MOST}"
            raise ConfigError(f"{section}.{name}={value!r:.99}; expected {expected}")
    with raised_as(ConfigError, f"{section}: "):
        return kind(**{name: value for name, value in fields.items() if value is not None})


def _fits(value: Any, hint: Any, usual: Any = None) -> bool:
    """Whether a value is of an annotated type; sizes, which are usually above 0, have to be so."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple) and all(_fits(x, options[0]) for x in value)
    if hint is int:
        return type(value) is int and _least(usual) <= value <= _MOST
    kind = (int, float) if hint is float else hint
    return not isinstance(hint, type) or isinstance(value, kind)


def _least(usual: Any) -> int:
    """The least value of a size; 0 only where that is the default, or None is."""
    return int(type(usual) is int and usual > 0)


def with_size(model: Mapping[str, Any], sizes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The `model` section with the fields of the published size that its `size` names.

    Fields that are given beside the size stay. Without a size all are taken as given.

    Raises:
      ConfigError: an unknown size.
    """
    fields = dict(model)
    size = fields.pop("size", None)
    if size is None:
        return fields
    if size not in sizes:
        raise ConfigError(f"config.model.size={size!r} is not one of {', '.join(sizes)}")
    return fields | {name: x for name, x in sizes[size].items() if fields.get(name) is None}
