"""The train step of tokenizer and autoencoder: forward, record, terms, gradient, update.

Shapes: B batch.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from detailflow_jax.models.layers import apply
from detailflow_jax.ops import Array
from detailflow_jax.tasks import Metrics, Plan, Task, TrainState, losses, no_plan, optim
from detailflow_jax.tasks.losses import Frozen, Loss, Setting, Step

Forward = Callable[..., Step]
"""(bound network, rows, PRNG key) -> what the step made."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trainer(abc.ABC):
    """A network, its loss terms and its optimizer. A subclass has the functions of a `Task`.

    Attributes:
      config: of the task.
      model: the network.
      losses: the terms by name.
      optimizer: of the trained parts of the network.
      parts: names of the parts of the network that are trained; None: all.
      last_kernel: path of the last decoder layer's kernel, for the adaptive weight.
      keys: names of what is initialised beside the network, each from a key of its own.
    """

    config: Any
    model: Any
    losses: Mapping[str, Loss]
    optimizer: optax.GradientTransformation
    parts: tuple[str, ...] | None = None

    last_kernel: ClassVar[tuple[str, ...]]
    keys: ClassVar[tuple[str, ...]]

    @classmethod
    def task(
        cls, config: Any, model: Any, smallest: int, *, steady: bool = True, **fields: Any
    ) -> Task:
        """The task of a network.

        Args:
          config: of the task.
          model: the network.
          smallest: the smallest side of a reconstruction in pixels.
          steady: see `Task`.
          fields: further ones of the class.

        Raises:
          ConfigError: loss terms that contradict each other.
        """
        made = losses.make_losses(Setting(config, model.config, smallest))
        optimizer = optim.optimizer(config.optim, config.total_steps)
        self = cls(config=config, model=model, losses=made, optimizer=optimizer, **fields)
        frozen = tuple(self.frozen.values())
        return Task(
            self.init, self.plan, self.train_step, self.figures, steady=steady, frozen=frozen
        )

    @abc.abstractmethod
    def init(self, key: PRNGKeyArray) -> TrainState:
        """See `Task`."""

    def plan(self, step: int) -> Plan:
        """See `Task`."""
        return no_plan(step)

    @abc.abstractmethod
    def train_step(
        self, state: TrainState, batch: Any, plan: Mapping[str, Any], *, variant: Any
    ) -> tuple[TrainState, Metrics]:
        """See `Task`."""

    def figures(self, state: TrainState, batch: Any) -> Mapping[str, Array]:
        """See `Task`."""
        del state, batch
        return {}

    @property
    def frozen(self) -> dict[str, Frozen]:
        """The frozen networks that the terms need; two terms may share one."""
        found = [loss.frozen for loss in self.losses.values() if loss.frozen]
        return {frozen.name: frozen for frozen in found}

    def start(self, key: PRNGKeyArray, example: Array, **extra: Any) -> TrainState:
        """The state of a new run, its parameters boxed with logical axis names."""
        names = list(dict.fromkeys([*self.keys, *self.frozen, *self.losses]))
        own = lambda name: jax.random.fold_in(key, 1 + names.index(name))  # noqa: E731
        params = self.model.init(key, example)["params"]
        for name, loss in self.losses.items():
            extra |= loss.init(own(name))
        frozen = {
            # DINO shares the key of the discriminator's trained part.
            name: x.start(own("adversarial" if name == "dino" else name))
            for name, x in self.frozen.items()
        }
        opt_state = self.optimizer.init(self._trained(params))
        return optim.new_state(params, opt_state, self.config.ema, extra=extra, frozen=frozen)

    def _trained(self, params: Any) -> Any:
        return {name: params[name] for name in self.parts or params}

    def step(
        self, state: TrainState, rows: Any, key: PRNGKeyArray, forward: Forward
    ) -> tuple[TrainState, Metrics, Any]:
        """One update.

        Args:
          state: before it.
          rows: arrays [B, ...], what `forward` needs of the batch.
          key: of the step.
          forward: makes the record of some rows.

        Returns:
          (new state, {metric: scalar}, clean codes of the batch or None).
        """

        def total(params, rows, key):
            # No gradient is computed for the parts that are not trained.
            step = apply(self.model, state.params | params, rows, key, method=forward)
            features = {
                name: x.features(state.frozen[name], step.images)
                for name, x in self.frozen.items()
                if x.features
            }
            step = dataclasses.replace(step, state=state, key=key, features=features)
            terms = losses.compute(self.losses, step)
            found = {"terms": terms, "watched": dict(step.watched)}
            return sum(terms.values()), found | {"codes": step.codes, "kept": step.kept}

        trained = self._trained(state.params)
        balanced = [name for name, loss in self.losses.items() if loss.balanced]
        if balanced:
            grads, found = self._balanced(balanced[0], total, trained, rows, key, state.step)
        else:
            (_, found), grads = optim.gradients(total, trained, rows, key, self.config.accumulate)
        new = optim.updated(state, self.optimizer, grads, self.config.ema)
        metrics: Metrics = {f"loss/{name}": value for name, value in found["terms"].items()}
        metrics |= found["watched"]
        metrics["loss"] = sum(found["terms"].values())
        metrics["gradient_norm"] = optax.global_norm(grads)
        extra = state.extra
        for loss in self.losses.values():
            changed, more = loss.update(state, found["kept"], key)
            extra, metrics = extra | changed, metrics | more
        return new.replace(extra=extra), metrics, found["codes"]

    def _balanced(
        self, name: str, total: Callable, trained: Any, rows: Any, key: Array, number: Array
    ) -> tuple[Any, dict[str, Any]]:
        """The gradient with the term `name` as large as the others at the last kernel."""
        loss = self.losses[name]

        def both(params):
            _, found = total(params, rows, key)
            others = sum(value for other, value in found["terms"].items() if other != name)
            return (others, found["terms"][name]), found

        def last(grads):
            for part in self.last_kernel:
                grads = grads[part]
            return grads

        _, pull, found = jax.vjp(both, trained, has_aux=True)
        one, zero = jnp.ones(()), jnp.zeros(())
        # Only the last kernel's gradient is used: the compiler drops the rest of these two.
        (others,), (ours,) = pull((one, zero)), pull((zero, one))
        factor = loss.balance(last(others), last(ours), number)
        (grads,) = pull((one, factor))
        terms = found["terms"] | {name: factor * found["terms"][name]}
        watched = found["watched"] | {f"{name}_weight": loss.weight * factor}
        return grads, found | {"terms": terms, "watched": watched}
