"""The FlowAR task: it learns, resumes, accumulates, refuses; its pictures; its configs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small_tasks
from detailflow_jax.models.vae import VAE, VAEConfig
from detailflow_jax.runtime.checkpoint import Checkpoints
from detailflow_jax.runtime.config import load_config
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks import flowar as flowar_task
from detailflow_jax.tasks import make_task
from detailflow_jax.train import train

TINY = [
    "--config.model.width=16", "--config.model.num_heads=2", "--config.model.first_depth=1",
    "--config.model.second_depth=1", "--config.model.head_width=16", "--config.model.head_depth=1",
    "--config.model.head_dim=8", "--config.model.scales=(1,2,4)", "--config.model.channels=2",
    "--config.model.num_classes=10",
    "--config.batch_size=8", "--config.total_steps=30", "--config.optim.warmup_steps=1",
    "--config.optim.lr=1e-2", "--config.tensorboard=False",
]  # fmt: skip
IMAGES = [
    "--config.vae.random=True", "--config.vae.channels=8", "--config.vae.multipliers=(1,1)",
    "--config.vae.latent_channels=2", "--config.data.image_size=8", "--config.data.source=digits",
    "--config.vae.res_blocks=1", "--config.vae.norm_groups=8",
]  # fmt: skip


def tiny(*overrides):
    return load_config("configs/flowar.py:digits", [*TINY, *overrides])


def moments(seed=0, batch=8, side=4, channels=2):
    """Latents that a model can learn: a constant a class, and almost no variance."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, batch).astype(np.int32)
    mean = np.broadcast_to(labels[:, None, None, None] / 5.0 - 1, (batch, side, side, channels))
    both = np.concatenate([mean, np.full_like(mean, -8.0)], axis=-1)
    return {"moments": both.astype(np.float32), "label": labels}


@functools.cache
def first_state(*overrides):
    return small_tasks.start(make_task(tiny(*overrides)))


@functools.cache
def stepped(*overrides):
    """(task, compiled step, first state)."""
    task = make_task(tiny(*overrides))
    state = first_state(*(x for x in overrides if x in IMAGES))  # the others do not change it
    return task, jax.jit(functools.partial(task.train_step, variant=None)), state


def run(step, state, first, last):
    losses = []
    for i in range(first, last):
        state, metrics = step(state, moments(i), {})
        losses.append(float(metrics["loss"]))
    return state, losses, metrics


def test_the_loss_falls_and_every_scale_is_reported():
    _, step, state = stepped()
    _, losses, metrics = run(step, state, 0, 30)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    scales = {name for name in metrics if name.startswith("loss/")}
    assert scales == {"loss/scale_1", "loss/scale_2", "loss/scale_4"}
    weights = np.square(np.array([1, 2, 4])) / 16
    total = sum(
        w * float(metrics[f"loss/scale_{s}"]) for w, s in zip(weights, (1, 2, 4), strict=True)
    )
    assert float(metrics["loss"]) == pytest.approx(total, rel=1e-5)
    assert float(metrics["latent_std"]) > 0.1


@pytest.mark.full
def test_noise_prediction_learns_too():
    _, step, state = stepped("--config.model.objective=diffusion")
    _, losses, _ = run(step, state, 0, 30)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_every_scale_is_the_latent_of_the_reduced_image():
    task = make_task(tiny(*IMAGES, "--config.scales_from=image"))
    state = first_state(*IMAGES)
    sizes = {"channels": 8, "multipliers": (1, 1), "res_blocks": 1, "norm_groups": 8}
    vae = VAE(VAEConfig(latent_channels=2, **sizes))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    key, params = jax.random.key(0), state.frozen["vae"]

    @jax.jit
    def both(params, images):
        expected = []
        for scale, side in enumerate((1, 2, 4)):
            block = 4 // side
            small = images.reshape(2, 2 * side, block, 2 * side, block, 3).mean((2, 4))
            posterior = vae.apply({"params": params}, small, method="encode")
            expected.append(vae.scale(posterior.sample(jax.random.fold_in(key, scale))))
        return flowar_task.reduced_images(vae, params, images, (1, 2, 4), key), expected

    for level, expected in zip(*both(params, images), strict=True):
        np.testing.assert_allclose(level.reshape(expected.shape), expected, atol=1e-5)
    batch = {"image": np.zeros((8, 8, 8, 3), np.uint8), "label": np.zeros(8, np.int32)}
    step = functools.partial(task.train_step, variant=None)
    _, metrics = jax.eval_shape(step, state, batch, {})
    assert metrics["loss/scale_4"].shape == ()


def test_resumed_equals_uninterrupted(tmp_path):
    _, step, state = stepped()
    straight, losses, _ = run(step, state, 0, 6)
    half, _, _ = run(step, state, 0, 3)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(3, half, {}, {})
        checkpoints.latest()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), half
        )
        restored = jax.device_get(checkpoints.restore(abstract).state)  # placed as before
    resumed, again, _ = run(step, restored, 3, 6)
    assert again == losses[3:]
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.full
def test_accumulated_parts_give_the_same_step():
    quiet = ("--config.model.attention_dropout=0.0", "--config.model.projection_dropout=0.0")
    _, whole, state = stepped(*quiet)
    _, parts, _ = stepped(*quiet, "--config.accumulate=4")
    a, first = whole(state, moments(), {})
    b, second = parts(state, moments(), {})
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5, err_msg=name)
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.full
def test_images_go_through_the_frozen_autoencoder_and_samples_are_drawn():
    task, step, state = stepped(*IMAGES)
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    batch = {"image": images, "label": np.arange(8, dtype=np.int32)}
    task.check(batch)
    new, metrics = step(state, batch, {})
    assert np.isfinite(metrics["loss"])
    for a, b in zip(jax.tree.leaves(state.frozen), jax.tree.leaves(new.frozen), strict=True):
        np.testing.assert_array_equal(a, b)
    drawn = task.figures(new, batch)["samples"]
    assert drawn.shape == (4 * 8, 8 * 8, 3) and drawn.dtype == jnp.uint8


def test_without_an_autoencoder_nothing_is_drawn():
    task, _, state = stepped()
    assert task.figures(state, moments()) == {}


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["--config.data.source=digits"], "config.vae.path is not set"),
        (["--config.vae.random=True"], "latents of 16 channels, this FlowAR of 2"),
        (["--config.model.scales=(4,2)"], "no scale schedule"),
        (["--config.scales_from=pixels"], "scales_from='pixels', expected 'latent' or 'image'"),
        (["--config.scales_from=image"], "needs images, but config.data.source=latents:"),
        (["--config.loss.scale_weights=(1.0,)"], "1 values, expected one for each of the 3"),
    ],
)
def test_what_cannot_be_trained_is_refused(overrides, text):
    with pytest.raises(ConfigError, match=text):
        make_task(tiny(*overrides))


def test_latents_of_another_size_stop_the_run_before_it_starts(tmp_path):
    class Wrong:
        def __next__(self):
            return moments(side=8)

        def get_state(self):
            return {}

        def close(self):
            pass

    with pytest.raises(ConfigError, match=r"8 x 8 x 2; config.model.scales=\(1, 2, 4\)"):
        train(tiny(), str(tmp_path), iterator=Wrong())


def test_an_unknown_size_is_refused():
    config = load_config("configs/flowar.py:flowar_s", ["--config.model.size=FlowAR-XL"])
    with pytest.raises(ConfigError, match="'FlowAR-XL' is not one of FlowAR-S"):
        make_task(config)


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [("flowar_s", 171.7), ("flowar_b", 300), ("flowar_l", 586.9), ("flowar_h", 1913)],
)
def test_published_sizes(variant, parameters):
    config = flowar_task.model_config(load_config(f"configs/flowar.py:{variant}").model)
    model = flowar_task.FlowAR(config)
    abstract = jax.eval_shape(model.init, jax.random.key(0), *flowar_task.example(config))
    count = sum(x.size for x in jax.tree.leaves(abstract)) / 1e6
    assert count == pytest.approx(parameters, rel=0.002 if variant != "flowar_b" else 0.05)


def test_the_papers_huge_head_is_one_field():
    config = load_config("configs/flowar.py:flowar_h", ["--config.model.head_depth=18"])
    assert flowar_task.model_config(config.model).head_depth == 18
    assert dataclasses.replace(flowar_task.model_config(config.model), scan=False).width == 1536
