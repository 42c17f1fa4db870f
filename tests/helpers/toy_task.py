"""A small task with every feature of a real one, for tests of the loop.

Also a configuration file (`--config tests/helpers/toy_task.py`) and a program that trains it:
`python tests/helpers/toy_task.py --config tests/helpers/toy_task.py --workdir DIR`.
"""

import json
import time

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from detailflow_jax import train
from detailflow_jax.runtime import distributed, sharding
from detailflow_jax.runtime.checkpoint import Checkpoints
from detailflow_jax.tasks import Task, TrainState

WIDTH, HIDDEN, CLASSES = 16, 64, 8
FILE = __file__
TIMES = ("images_per_second", "seconds", "perf/")


def get_config(arg: str = "") -> ConfigDict:
    return ConfigDict(
        {
            "task": "toy",
            "seed": 0,
            "total_steps": 20,
            "batch_size": 8,
            "log_every": 5,
            "figures_every": 0,
            "checkpoint_every": 6,
            "keep_checkpoints": 2,
            "tensorboard": False,
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "slices": 1},
            "accumulate": 1,
            "stall_seconds": 0,
            "score": {"every": 0, "num_samples": 1, "batch_size": 1},
            "model": {"dropout": 0.1},
            "optim": {"lr": 1e-2},
            "nan_at": -1,  # The step whose loss is NaN.
            "compile_delay": 0.0,  # Seconds that the second program takes.
            "delay": 0.0,  # Seconds a batch, to leave time for a signal.
        }
    )


class Network(nn.Module):
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        def dense(features, axes, name):
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
            return nn.Dense(features, kernel_init=init, name=name)

        x = nn.relu(dense(HIDDEN, ("embed", "mlp"), "up")(x))
        x = nn.with_logical_constraint(x, ("batch", "mlp"))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return dense(CLASSES, ("mlp", "vocab"), "down")(x)


def make_task(config: ConfigDict, traced: list | None = None) -> Task:
    """`traced` collects the variant of each trace of `train_step`."""
    network = Network(config.model.dropout)
    optimizer = optax.adamw(optax.cosine_decay_schedule(config.optim.lr, config.total_steps))

    def init(key):
        params = network.init(key, jnp.zeros((1, WIDTH)), train=False)["params"]
        mix = jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=optimizer.init(params),
            ema=params,
            extra={"seen": jnp.int32(0)},
            frozen={"mix": nn.LogicallyPartitioned(mix, ("embed", None))},
        )

    def plan(step):
        scale = np.random.default_rng((config.seed, step)).uniform(0.5, 1.5)
        return step % 2, {"scale": np.float32(scale), "bad": np.bool_(step + 1 == config.nan_at)}

    def train_step(state, batch, plan, *, variant):
        if traced is not None:
            traced.append(variant)
        time.sleep(config.compile_delay * variant)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def loss_fn(params):
            x = batch["x"] @ state.frozen["mix"] * plan["scale"]
            logits = network.apply({"params": params}, x, train=True, rngs={"dropout": key})
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return losses.mean() * (1.0 if variant == 0 else 0.5)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        loss = jnp.where(plan["bad"], jnp.nan, loss)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = optax.incremental_update(params, state.ema, 0.1)
        extra = {"seen": state.extra["seen"] + len(batch["x"])}
        state = state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, ema=ema, extra=extra
        )
        return state, {"loss": loss, f"variant_{variant}": loss}

    def figures(state, batch):
        return {"inputs": np.zeros((4, 4, 3), np.uint8) + np.uint8(int(state.step) % 256)}

    return Task(init, plan, train_step, figures)


def make_iterator(config: ConfigDict) -> grain.DatasetIterator:
    """{"x": float32 [b, WIDTH], "label": int32 [b], "skipped": int32 [b]}, endless, shuffled."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(100, WIDTH)).astype(np.float32)
    labels = (inputs @ rng.normal(size=(WIDTH, CLASSES))).argmax(-1).astype(np.int32)

    def example(i):
        return {"x": inputs[i], "label": labels[i], "skipped": np.int32(i == 7)}

    def wait(batch):
        time.sleep(config.delay)
        return batch

    data = grain.MapDataset.range(len(inputs)).seed(config.seed).shuffle().map(example).repeat()
    data = data.batch(config.batch_size, drop_remainder=True).map(wait)
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


class Stops:
    """Rows of which only the first `count` can be read."""

    def __init__(self, rows, count: int, error: Exception):
        self._rows, self._left, self._error = rows, count, error

    def __next__(self):
        if not self._left:
            raise self._error
        self._left -= 1
        return next(self._rows)

    def __getattr__(self, name):
        return getattr(self._rows, name)


def run(config: ConfigDict, workdir: str) -> TrainState:
    return train.train(config, workdir, make_task(config), make_iterator(config))


def train_for(workdir: str, fields: dict) -> None:
    """A whole run with some fields of the configuration changed."""
    config = get_config()
    config.update(fields)
    run(config, workdir)


def config_of(**fields):
    config = get_config()
    config.update(fields)
    return config


def metrics_of(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_times(lines: list[dict]) -> list[dict]:
    return [{name: line[name] for name in line if not name.startswith(TIMES)} for line in lines]


def state_of(workdir, config) -> TrainState:
    """The newest checkpoint, whole."""
    task, mesh = make_task(config), sharding.make_mesh(config.mesh)
    abstract = sharding.abstract_state(task.init, jax.random.key(0), mesh)
    with Checkpoints(workdir, 2) as checkpoints:
        return checkpoints.restore(abstract.replace(frozen={})).state


def assert_same_bits(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


if __name__ == "__main__":
    distributed.leave(train.main(run=run))
