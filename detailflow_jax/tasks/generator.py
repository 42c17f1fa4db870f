"""Training of the generator on extracted codes.

Shapes: B batch, N tokens, V codes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from detailflow_jax.models.generator import SIZES, Generator, GeneratorConfig
from detailflow_jax.models.layers import drop_labels
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks import Task, TrainState, optim


def model_config(model) -> GeneratorConfig:
    """The `model` part of a config as the network's own dataclass.

    `size` names a published size (GPT-B ... GPT-7B); None takes width, depth and heads as given.

    Raises:
      ConfigError: an unknown size.
    """
    fields = model.to_dict()
    size = fields.pop("size", None)
    if size is not None:
        if size not in SIZES:
            raise ConfigError(f"config.model.size={size!r} is not one of {', '.join(SIZES)}")
        fields |= SIZES[size]
    return GeneratorConfig(**fields)


def mix_corrections(key: jax.Array, triplets: jax.Array, probability: float):
    """The pair (input, label) with a probability, else (clean, clean): two int32 [B, N].

    Args:
      key: PRNG key.
      triplets: int32 [B, N, 3]: clean, input, label.
      probability: of taking the correction pair.
    """
    noisy = jax.random.bernoulli(key, probability, (len(triplets), 1))
    clean = triplets[..., 0]
    return jnp.where(noisy, triplets[..., 1], clean), jnp.where(noisy, triplets[..., 2], clean)


def cross_entropy(model: Generator, params: Any, inputs, targets, labels, dropout_key=None):
    """Mean cross-entropy of the targets int32 [B, N] under teacher forcing, float32.

    Returns:
      the scalar, and the share of targets that are the most likely code.
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    logits = model.apply({"params": params}, inputs, labels, rngs=rngs)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(loss), jnp.mean(jnp.argmax(logits, axis=-1) == targets)


def make(config) -> Task:
    """The generator task of a config (see `configs/generator.py` for its fields)."""
    c = model_config(config.model)
    model = Generator(c)
    optimizer = optim.optimizer(config.optim, config.total_steps)

    def init(key: jax.Array) -> TrainState:
        codes = jnp.zeros((1, c.num_tokens), jnp.int32)
        params = model.init(key, codes, jnp.zeros((1,), jnp.int32))["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            ema=optim.start_average(params, config.ema),
        )

    def plan(step: int) -> tuple[None, dict[str, np.ndarray]]:
        del step  # nothing is decided on the host: one program for every step
        return None, {}

    def train_step(state: TrainState, batch, plan, *, variant=None):
        del plan, variant
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        mix_key, label_key, dropout_key = jax.random.split(key, 3)
        inputs, targets = mix_corrections(mix_key, batch["codes"], config.loss.correction)
        labels = drop_labels(label_key, batch["label"], c)

        def mean_loss(params, rows, key):
            loss, accuracy = cross_entropy(model, params, *rows, dropout_key=key)
            return loss, {"accuracy": accuracy}

        (loss, means), grads = optim.gradients(
            mean_loss, state.params, (inputs, targets, labels), dropout_key, config.accumulate
        )
        new = optim.updated(state, optimizer, grads, config.ema)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.global_norm(grads),
        }
        return new, metrics | means

    return Task(init, plan, train_step, lambda state, batch: {})
