"""The variants for own images on one machine, and those of the embedded photographs."""

import jax
import numpy as np
import pytest

import small_tasks
from detailflow_jax import data, tasks
from detailflow_jax.models.tokenizer import TokenizerConfig
from detailflow_jax.runtime.config import load_config
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks import tokenizer as tokenizer_task
from detailflow_jax.tasks import vae as vae_task


def parameters(config):
    """The number of parameters of a run's network; nothing is computed."""
    state = jax.eval_shape(tasks.make_task(config).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(state.params)), state.frozen


@pytest.mark.parametrize(
    "side",
    [pytest.param(32, marks=pytest.mark.full), 64, pytest.param(128, marks=pytest.mark.full)],
)
def test_they_fit_together(side):
    tokenizer = load_config(f"configs/tokenizer.py:small:image_size={side}")
    vae = load_config(f"configs/vae.py:small:image_size={side}")
    size: TokenizerConfig = tokenizer_task.model_config(tokenizer.model)
    assert size.encoder.patch_size == size.decoder.patch_size == 8
    assert size.num_tokens == side // 2 and size.num_tokens // size.group_size == 8
    assert vae_task.model_config(vae.model).stride == 8

    generator = load_config("configs/generator.py:small")
    generator.model.update(num_tokens=size.num_tokens, group_size=size.group_size)
    generator.model.update(codebook_size=size.codebook_size, num_classes=2)
    flowar = load_config("configs/flowar.py:small")
    flowar.model.update(channels=8, scales=(1, 2, side // 8), num_classes=2)
    for config in (tokenizer, vae, generator, flowar):
        count, frozen = parameters(config)
        assert 1e6 < count < 2e7 and not frozen, config.task  # Of no other network.
        assert config.schedule.images == 1000 and not config.try_out


@pytest.mark.parametrize("name", ["tokenizer", "vae"])
def test_sizes_that_cannot_be(name):
    with pytest.raises(ConfigError, match="image_size=100: expected a multiple of 16 from 32 to"):
        load_config(f"configs/{name}.py:small:image_size=100")
    published = {"tokenizer": "detailflow_16", "vae": "kl16"}[name]
    with pytest.raises(ConfigError, match="is an option of the variant small, not of"):
        load_config(f"configs/{name}.py:{published}:image_size=64")


@pytest.mark.parametrize("name", ["tokenizer", "vae", "generator", "flowar"])
def test_a_try_out_says_so(name):
    assert load_config(f"configs/{name}.py:small:runlocal").try_out
    assert not load_config(f"configs/{name}.py:digits").try_out


TRUNK = {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32}


@pytest.mark.parametrize(
    ("name", "narrow"),
    [
        ("tokenizer", {"encoder": TRUNK, "decoder": TRUNK}),
        pytest.param(
            "vae",
            {"channels": 4, "multipliers": (1, 2), "norm_groups": 2},
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_step_on_patches_of_photographs(name, narrow):
    config = load_config(f"configs/{name}.py:photos")
    config.model.update(narrow)
    config.optim.warmup_steps = 0  # Its first step has no rate.
    source = data.make_source(config.data.source)
    images = np.stack([source[i]["image"] for i in range(4)])
    assert images.shape == (4, config.data.image_size, config.data.image_size, 3)
    task = tasks.make_task(config)
    step, state = jax.jit(task.train_step, static_argnames="variant"), small_tasks.start(task)
    variant, plan = task.plan(0)
    after, metrics = step(state, {"image": images}, plan, variant=variant)
    assert np.isfinite(metrics["loss"]) and metrics["loss/mse"] > 0
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, after.params)
    assert all(any(jax.tree.leaves(moved[part])) for part in ("encoder", "decoder"))
