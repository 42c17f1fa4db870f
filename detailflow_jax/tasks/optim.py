"""Optimizer, schedule and averaging, from the `optim` part of a config."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def schedule(optim, total_steps: int) -> optax.Schedule:
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


def optimizer(optim, total_steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (plain Adam where `weight_decay` is 0)."""
    return optax.chain(
        optax.clip_by_global_norm(optim.clip),
        optax.adamw(
            schedule(optim, total_steps),
            b1=optim.b1,
            b2=optim.b2,
            weight_decay=optim.weight_decay,
            mask=decays,
        ),
    )


def start_average(params: Any, ema) -> Any:
    """The average before the first step: the parameters, or None where `ema.decay` is 0."""
    return jax.tree.map(jnp.copy, params) if ema.decay else None


def average(average: Any, params: Any, step: jax.Array, ema) -> Any:
    """Exponential moving average with decay `ema.decay`; None stays None.

    With `ema.warmup` the decay of step n is at most (1 + n) / (10 + n), so that a short run
    forgets its random start; without it the decay is constant, as published.
    """
    if average is None:
        return None
    decay = jnp.minimum(ema.decay, (1.0 + step) / (10.0 + step)) if ema.warmup else ema.decay
    return jax.tree.map(lambda old, new: old * decay + new * (1.0 - decay), average, params)
