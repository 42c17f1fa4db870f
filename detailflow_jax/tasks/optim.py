"""Optimizer, schedule and averaging, from the sections `optim` and `ema` of a config.

Shapes: B batch.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int, PRNGKeyArray

from detailflow_jax.ops import Array
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks import Metrics, TrainState


def schedule(optim: Any, total_steps: int) -> optax.Schedule:
    """Linear warm-up from `warmup_start` x lr, then cosine to `final` x lr."""
    return optax.warmup_cosine_decay_schedule(
        init_value=optim.lr * optim.warmup_start,
        peak_value=optim.lr,
        warmup_steps=optim.warmup_steps,
        decay_steps=max(total_steps, optim.warmup_steps + 1),
        end_value=optim.lr * optim.final,
    )


def decays(params: Any) -> Any:
    """True for tensors of rank >= 2 (published rule); the layer axis of a scan does not count."""

    def is_matrix(path, leaf) -> bool:
        names = {getattr(part, "key", None) for part in path}
        return leaf.ndim - ("layers" in names) >= 2

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def optimizer(optim: Any, total_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then `optim.kind`: "adamw" (plain Adam without decay) or "muon".

    Muon (Jordan et al.) orthogonalises the updates of the matrices of the blocks; everything else
    is updated by AdamW. Its updates are scaled to the size of Adam's, so that one `lr` suits both.

    Raises:
      ConfigError: an unknown `optim.kind`.
    """
    kind = optim.get("kind", "adamw")  # which a configuration of an older run leaves out
    rate = schedule(optim, total_steps)
    if kind == "adamw":
        betas = {"b1": optim.b1, "b2": optim.b2}
        update = optax.adamw(rate, **betas, weight_decay=optim.weight_decay, mask=decays)
    elif kind == "muon":
        update = optax.contrib.muon(
            rate,
            weight_decay=optim.weight_decay,
            weight_decay_mask=decays,
            adam_b1=optim.b1,
            adam_b2=optim.b2,
            muon_weight_dimension_numbers=_block_matrices,
            consistent_rms=0.2,
        )
    else:
        raise ConfigError(f"config.optim.kind={kind!r} is not one of adamw, muon")
    return optax.chain(optax.clip_by_global_norm(optim.clip), update)


def _block_matrices(params: Any) -> Any:
    """Which axes of a kernel of a block are its input and output; None for what is no such."""

    def axes(path, leaf) -> Any:
        names = [name for part in path if isinstance(name := getattr(part, "key", None), str)]
        of_block = any(name.startswith("layers") for name in names)
        matrix = leaf.ndim - ("layers" in names) == 2
        if not (of_block and matrix and names[-1] == "kernel"):
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


Loss = Callable[[Any, Any, Any], tuple[jax.Array, Any]]
"""(params, rows, key) -> (mean loss over the rows, tree of means or of one value per row)."""


def gradients(
    loss: Loss, params: Any, rows: Any, key: PRNGKeyArray, parts: int = 1
) -> tuple[tuple[jax.Array, Any], Any]:
    """Gradient of a mean loss, over `parts` equal parts of the rows one after another.

    With several parts, only one part's activations are kept at a time. Means over rows are the
    same as without parts. A loss that is no mean over rows, such as the entropy of the code usage,
    is computed within each part.

    Args:
      loss: called with a part of the rows and a key of its own.
      params: nested parameters.
      rows: arrays [B, ...].
      key: for dropout and the like.
      parts: divides B.

    Returns:
      ((loss, auxiliary values), gradients), the auxiliary values per row put together again.

    Raises:
      ConfigError: the parts do not divide the rows.
    """
    with_grad = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return with_grad(params, rows, key)
    batch = len(jax.tree.leaves(rows)[0])
    if batch % parts:
        raise ConfigError(f"a batch of {batch} is no multiple of config.accumulate={parts}")

    # Part i takes every parts-th row: a device's rows, which follow each other, stay with it.
    split = jax.tree.map(
        lambda x: x.reshape(batch // parts, parts, *x.shape[1:]).swapaxes(0, 1), rows
    )

    def add(total, part):
        index, some = part
        (value, aux), grads = with_grad(params, some, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, (value, grads)), aux

    zeros = jax.tree.map(jnp.zeros_like, params)
    total = (jnp.zeros(()), zeros)
    total, aux = jax.lax.scan(add, total, (jnp.arange(parts), split))
    value, grads = jax.tree.map(lambda x: x / parts, total)
    return (value, jax.tree.map(functools.partial(_together, batch), aux)), grads


def _together(batch: int, x: Array) -> Array:
    """[parts] means -> their mean; [parts, B / parts, ...] rows -> [B, ...] in their old order."""
    return jnp.mean(x) if x.ndim == 1 else x.swapaxes(0, 1).reshape(batch, *x.shape[2:])


def new_state(params: Any, opt_state: Any, ema: Any, **fields: Any) -> TrainState:
    """The state of a new run; `ema` is the section, `fields` are others of `TrainState`."""
    step, average = jnp.zeros((), jnp.int32), start_average(params, ema)
    return TrainState(step=step, params=params, opt_state=opt_state, ema=average, **fields)


def update(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    rows: Any,
    key: PRNGKeyArray,
    config: Any,
    fixed: Collection[str] = (),
) -> tuple[TrainState, Metrics]:
    """The state after one step on a mean loss, and the step's metrics.

    Args:
      state: before the step.
      optimizer: of the trained parameters.
      loss: gives metrics beside the loss.
      rows: arrays [B, ...].
      key: for dropout and the like.
      config: of the task: `accumulate` and `ema`.
      fixed: names of parameters that are not trained.
    """

    def whole(params, rows, key):
        return loss(state.params | params, rows, key)

    parts = {name: x for name, x in state.params.items() if name not in fixed}
    (value, metrics), grads = gradients(whole, parts, rows, key, config.accumulate)
    new = updated(state, optimizer, grads, config.ema)
    return new, {"loss": value, "gradient_norm": optax.global_norm(grads)} | metrics


def updated(
    state: TrainState, optimizer: optax.GradientTransformation, grads: Any, ema: Any
) -> TrainState:
    """The state after one update: step, params, opt_state and average.

    `grads` has the parts of the network that are trained; the others stay as they are.
    """
    trained = {name: state.params[name] for name in grads}
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    averaged = state.ema
    if averaged is not None:  # Of what is not trained, an average would differ by roundings.
        parts = {name: averaged[name] for name in grads}
        averaged = averaged | average(parts, trained, state.step, ema)
    return state.replace(
        step=state.step + 1, params=state.params | trained, opt_state=opt_state, ema=averaged
    )


def start_average(params: Any, ema: Any) -> Any:
    """The average before the first step: the parameters, or None where `ema.decay` is 0."""
    return jax.tree.map(jnp.copy, params) if ema.decay else None


def average(average: Any, params: Any, step: int | Int[Array, ""], ema: Any) -> Any:
    """Exponential moving average with decay `ema.decay`; None stays None.

    With `ema.warmup` the decay of step n is at most (1 + n) / (10 + n), so that a short run
    forgets its random start; without it the decay is constant, as published.
    """
    if average is None:
        return None
    decay = jnp.minimum(ema.decay, (1.0 + step) / (10.0 + step)) if ema.warmup else ema.decay
    return jax.tree.map(lambda old, new: old * decay + new * (1.0 - decay), average, params)
