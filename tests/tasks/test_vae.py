"""Training of the autoencoder: its terms, its steps, going on from a checkpoint, refusals."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import detailflow_jax as df
import small_tasks
from compiling import FAST_TO_COMPILE
from detailflow_jax import tasks
from detailflow_jax.convert import CheckpointError
from detailflow_jax.models.vae import VAEConfig
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.checkpoint import Checkpoints
from detailflow_jax.runtime.config import load_config, write_config
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks import vae as vae_task
from detailflow_jax.tasks.losses import perceptual


def tiny(**fields):
    """Sixteen pixels, stride 2, one block a level."""
    config = load_config("configs/vae.py:digits:runlocal")
    config.model.update(channels=4, multipliers=(1, 2), norm_groups=2, latent_channels=3)
    config.data.image_size = 16
    config.optim.update(lr=3e-3, warmup_steps=2)
    config.tensorboard = False
    config.update_from_flattened_dict(fields)
    return config


@pytest.fixture(scope="module")
def images():
    pictures = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), np.uint8)
    return {"image": pictures.repeat(4, axis=1).repeat(4, axis=2)}


@pytest.fixture(scope="module")
def trained(images):
    """(task, compiled step, states, metrics) of 20 steps on one batch."""
    task = tasks.make_task(tiny())
    assert task.plan(0) == task.plan(7) == (None, {})
    step = jax.jit(task.train_step, static_argnames="variant")
    states, metrics = [small_tasks.start(task)], []
    for _ in range(20):
        state, found = step(states[-1], images, {}, variant=None)
        states.append(state)
        metrics.append({name: float(value) for name, value in found.items()})
    return task, step, states, metrics


def test_it_learns_a_batch(trained):
    _, _, states, metrics = trained
    assert set(metrics[0]) == {
        "loss", "loss/mse", "loss/kl", "kl", "psnr", "latent_std", "gradient_norm",
    }  # fmt: skip
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    assert metrics[-1]["psnr"] > metrics[0]["psnr"]
    assert [int(state.step) for state in states] == list(range(21))
    pairs = zip(jax.tree.leaves(states[0].params), jax.tree.leaves(states[-1].params), strict=True)
    # A bias of keys moves no attention weight, but for rounding.
    assert (
        sum((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)
        >= len(jax.tree.leaves(states[0].params)) - 3
    )


def test_terms(trained):
    _, _, _, metrics = trained
    for found in metrics:
        assert found["loss"] == pytest.approx(found["loss/mse"] + found["loss/kl"], rel=1e-5)
        assert found["loss/kl"] == pytest.approx(5e-3 * found["kl"] / (16 * 16 * 3), rel=1e-5)


def test_a_step_is_a_function_of_state_and_batch(trained, images):
    _, step, states, metrics = trained
    again, found = step(states[3], images, {}, variant=None)
    assert float(found["loss"]) == metrics[3]["loss"]
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(states[4]), strict=True):
        np.testing.assert_array_equal(a, b)
    later = states[3].replace(step=states[3].step + 1)  # another draw of the posterior
    assert float(step(later, images, {}, variant=None)[1]["loss"]) != metrics[3]["loss"]


def test_pictures(trained, images):
    task, _, states, _ = trained
    pictures = task.figures(states[-1], images)
    assert {name: picture.shape for name, picture in pictures.items()} == {
        "reconstructions": (2 * 16, 4 * 16, 3),
        "posterior_samples": (4 * 16, (4 + 1) * 16, 3),  # four draws and the original
    }
    row = images["image"].transpose(1, 0, 2, 3).reshape(16, 64, 3)
    np.testing.assert_array_equal(pictures["reconstructions"][:16], row)
    column = images["image"].reshape(64, 16, 3)
    np.testing.assert_array_equal(pictures["posterior_samples"][:, -16:], column)
    draws = pictures["posterior_samples"].reshape(64, 5, 16, 3).swapaxes(0, 1)
    assert (draws[0] != draws[1]).any()


@pytest.mark.full
def test_restored_from_a_checkpoint_it_ends_with_the_same_bits(trained, images, tmp_path):
    task, step, states, _ = trained
    mesh = sharding.make_mesh({})
    abstract = sharding.abstract_state(task.init, jax.random.key(0), mesh)
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), states[17], abstract)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(17, placed, {}, {})
    with Checkpoints(tmp_path, 1) as checkpoints:
        state = jax.device_get(checkpoints.restore(abstract).state)
    for _ in range(3):
        state, _ = step(state, images, {}, variant=None)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(states[20]), strict=True):
        np.testing.assert_array_equal(a, b)

    config = tiny()  # and what was saved is a run that loads
    write_config(config, tmp_path)
    vae = df.load_vae(tmp_path)
    assert vae.config == vae_task.model_config(config.model)
    average = states[17].ema["quant_conv"]["kernel"]
    np.testing.assert_array_equal(vae.params["quant_conv"]["kernel"], average)
    assert vae.decode(np.zeros((2, 4, 4, 3), np.float32)).shape == (2, 8, 8, 3)
    with pytest.raises(CheckpointError, match=r"holds a vae; expected a tokenizer.*df\.load_vae"):
        df.load_tokenizer(tmp_path)


@pytest.mark.full
def test_perceptual_and_adversarial_terms(images, monkeypatch):
    """A ramp, a start that compiles nothing anew, and the adaptive weight of the family."""

    def distance(network, params, reconstruction, target, part=None):
        assert reconstruction.shape == target.shape == (4, 16, 16, 3)
        return jnp.mean(jnp.abs(reconstruction - target))

    monkeypatch.setattr(perceptual, "distance", distance)
    monkeypatch.setattr(perceptual, "init", lambda network, key: {})
    config = tiny()
    config.losses.perceptual.update(weight=2.0, ramp=2)
    config.losses.adversarial.weight = 0.5
    config.discriminator.start_step = 3
    config.discriminator.patchgan.update(channels=4, num_layers=1)
    config.discriminator.optim.lr = 1e-3
    task = tasks.make_task(config)
    step = jax.jit(task.train_step, static_argnames="variant", compiler_options=FAST_TO_COMPILE)
    state, metrics, held = small_tasks.start(task), [], []
    for _ in range(6):
        held.append(jax.device_get(state.extra["discriminator"]["params"]))
        state, found = step(state, images, {}, variant=None)
        metrics.append({name: float(value) for name, value in found.items()})
    assert step._cache_size() == 1 and np.isfinite([list(m.values()) for m in metrics]).all()
    assert metrics[0]["loss/perceptual"] == 0
    assert 1.5 < metrics[2]["loss/perceptual"] / metrics[1]["loss/perceptual"] < 2.5
    moved = [
        any((x != y).any() for x, y in zip(*map(jax.tree.leaves, pair), strict=True))
        for pair in itertools.pairwise(held)
    ]
    assert moved == [False, False, False, True, True]
    assert [m["loss/adversarial"] != 0 for m in metrics] == [False] * 3 + [True] * 3
    assert metrics[4]["adversarial_weight"] not in (0, 0.5)
    for found in metrics:
        terms = sum(value for name, value in found.items() if name.startswith("loss/"))
        assert found["loss"] == pytest.approx(terms, rel=1e-5)


def test_the_published_network_is_the_default_one():
    config = load_config("configs/vae.py:kl16")
    assert vae_task.model_config(config.model) == VAEConfig(dtype="bfloat16")


@pytest.mark.parametrize("variant", ["kl16", "digits"])
def test_runlocal(variant):
    config = load_config(f"configs/vae.py:{variant}:runlocal,batch_size=4")
    assert config.batch_size == 4
    state = jax.eval_shape(tasks.make_task(config).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(state.params))) < 1e6


JUDGED = {"losses.adversarial.weight": 0.5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.image_size": 8, "losses.perceptual.weight": 1.0}, "are of 8 px, LPIPS needs 16"),
        ({"discriminator.patchgan.num_layers": 3, **JUDGED}, "16 px.*24 at least"),
        ({**JUDGED, "accumulate": 2}, r"accumulate=2.*config\.losses\.adversarial\.weight=0"),
        ({"data.image_size": 15}, r"image_size=15 is no multiple of the autoencoder's stride 2"),
        ({"model.scale_factor": 0.0}, r"scale_factor=0\.0; expected more than 0"),
        ({"model.norm_groups": 3}, "4 channels wide, not a multiple of norm_groups=3"),
        ({"model.latent_channels": 0}, "latent_channels=0; expected at least 1"),
        ({"model.encoder_attention": (2,)}, r"attention at levels \[2\], but levels are 0\.\.1"),
    ],
)
def test_configurations_without_meaning_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        tasks.make_task(tiny(**fields))
