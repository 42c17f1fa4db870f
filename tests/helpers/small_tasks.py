"""Tasks of both systems on tiny networks."""

import pathlib

import flax.linen as nn
import jax
import numpy as np

from detailflow_jax.runtime.config import load_config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def tokenizer_config(**correction):
    """Sixteen pixels, eight tokens, two layers in all; every loss term is on."""
    config = load_config(f"{CONFIGS / 'tokenizer.py'}:digits")
    trunk = {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32, "patch_size": 8}
    with config.unlocked():
        config.model.update(image_size=16, num_tokens=8, group_size=2, codebook_size=32)
        for part in (config.model.encoder, config.model.decoder):
            part.update(**trunk, table_side=2)
        config.model.teacher_width = 16
        config.teacher = {**trunk, "table_side": 2, "random": True}
    config.losses.align.weight = 1.0
    config.losses.entropy.weight = 0.01
    config.correction.update(**correction)
    config.optim.update(lr=3e-3, warmup_steps=2)
    return config


def generator_config():
    config = load_config(f"{CONFIGS / 'generator.py'}:digits")
    config.model.update(width=16, depth=2, num_heads=2, multiple_of=8)
    config.model.update(num_tokens=8, group_size=2, codebook_size=16, num_classes=3)
    config.optim.update(lr=1e-2, warmup_steps=2)
    return config


def start(task):
    """A first state of numbers of a usual size: to compile the initialisation takes seconds."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = getattr(path[-1], "key", None)
        if "opt_state" in jax.tree_util.keystr(path) or leaf.ndim == 0 or name in ("bias", "mean"):
            return np.zeros(leaf.shape, leaf.dtype)
        if name in ("scale", "var"):
            return np.ones(leaf.shape, leaf.dtype)
        size = np.prod(leaf.shape[:-1]) ** -0.5
        return np.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype)

    shapes = nn.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    state = jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))
    return state if state.ema is None else state.replace(ema=state.params)


def step_function(task):
    return jax.jit(task.train_step, static_argnames="variant")


def plan_with(task, count):
    plans = (task.plan(step) for step in range(10_000))
    return next(plan for plan in plans if plan[1]["token_count"] == count)
