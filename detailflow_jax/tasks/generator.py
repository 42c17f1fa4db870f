"""Training of the generator on extracted codes.

Shapes: B batch, N tokens, V codes, d code dimension, S draws (`GeneratorConfig.draws`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int, PRNGKeyArray

from detailflow_jax.models import flow_generator
from detailflow_jax.models.generator import SIZES, Generator, GeneratorConfig
from detailflow_jax.models.layers import apply, drop_labels
from detailflow_jax.ops import Array, flow
from detailflow_jax.tasks import Task, TrainState, from_section, no_plan, optim, with_size


def model_config(model: Any) -> GeneratorConfig:
    """The `model` section of a config as the network's own dataclass.

    `size` names a published size (GPT-B ... GPT-7B); None takes width, depth and heads as given.

    Raises:
      ConfigError: an unknown size, or values that contradict each other.
    """
    return from_section(GeneratorConfig, with_size(model.to_dict(), SIZES), "config.model")


def mix_corrections(
    key: PRNGKeyArray, triplets: Int[Array, "B N 3"], probability: float
) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """Inputs and targets: the pair (input, label) with a probability, else (clean, clean).

    Args:
      key: PRNG key.
      triplets: (clean, input, label).
      probability: of taking the correction pair.
    """
    noisy = jax.random.bernoulli(key, probability, (len(triplets), 1))
    clean = triplets[..., 0]
    return jnp.where(noisy, triplets[..., 1], clean), jnp.where(noisy, triplets[..., 2], clean)


def cross_entropy(
    model: Generator,
    params: Any,
    inputs: Int[Array, "B n"],
    targets: Int[Array, "B N"],
    labels: Int[Array, " B"],
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean cross-entropy of the targets under teacher forcing; `inputs` as the network takes them.

    Returns:
      the scalar, and the share of targets that are the most likely code.
    """
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    logits = apply(model, params, inputs, labels, rngs=rngs)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(loss), jnp.mean(jnp.argmax(logits, axis=-1) == targets)


def flow_loss(
    model: flow_generator.FlowGenerator,
    params: Any,
    inputs: Int[Array, "B n"],
    targets: Int[Array, "B N"],
    labels: Int[Array, " B"],
    times: Float[Array, "B S"],
    noise: Float[Array, "B N d"],
    dropout_key: PRNGKeyArray | None = None,
) -> Float[Array, ""]:
    """Mean squared error of the velocity at the vectors of the targets, under teacher forcing."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    data = apply(model, params, targets, method="vectors")
    time = jnp.take(times, model.config.draws(), axis=1)
    noisy = flow.interpolate(data, noise, time[..., None])
    velocity = apply(model, params, inputs, labels, noisy, time, rngs=rngs)
    return jnp.mean(jnp.square(velocity - flow.target_velocity(data, noise)))


def draw(
    key: PRNGKeyArray, config: GeneratorConfig, batch: int
) -> tuple[Float[Array, "{batch} S"], Float[Array, "{batch} N d"]]:
    """Times U[0, 1), one per sample and draw, and standard normal noise."""
    time_key, noise_key = jax.random.split(key)
    times = jax.random.uniform(time_key, (batch, int(config.draws()[-1]) + 1))
    return times, jax.random.normal(noise_key, (batch, config.num_tokens, config.code_dim))


def make(config: Any) -> Task:
    """The generator task of a config (see `configs/generator.py` for its fields)."""
    c = model_config(config.model)
    model = flow_generator.make_generator(c)
    optimizer = optim.optimizer(config.optim, config.total_steps)
    fixed = flow_generator.FIXED if c.head == "flow" else ()

    def init(key: jax.Array) -> TrainState:
        params = model.init(key, *flow_generator.example(c))["params"]
        trained = {name: x for name, x in params.items() if name not in fixed}
        return optim.new_state(params, optimizer.init(trained), config.ema)

    def train_step(state: TrainState, batch, plan, *, variant=None):
        del plan, variant
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        mix_key, label_key, dropout_key = jax.random.split(key, 3)
        inputs, targets = mix_corrections(mix_key, batch["codes"], config.loss.correction)
        labels = drop_labels(label_key, batch["label"], c)

        rows = inputs, targets, labels
        if c.head == "flow":
            rows += draw(jax.random.fold_in(key, 3), c, len(labels))

        def mean_loss(params, rows, key):
            if isinstance(model, flow_generator.FlowGenerator):
                return flow_loss(model, params, *rows, dropout_key=key), {}
            loss, accuracy = cross_entropy(model, params, *rows, dropout_key=key)
            return loss, {"accuracy": accuracy}

        return optim.update(state, optimizer, mean_loss, rows, dropout_key, config, fixed)

    return Task(init, no_plan, train_step)
