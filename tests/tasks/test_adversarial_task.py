"""Perceptual and adversarial terms inside the tokenizer's step; training a part of it."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import small_tasks
from compiling import FAST_TO_COMPILE
from detailflow_jax import tasks, train
from detailflow_jax.convert import CheckpointError, mapping, start
from detailflow_jax.convert.tables import discriminator as disc_names
from detailflow_jax.convert.tables import lpips as lpips_names
from detailflow_jax.models.lpips import LPIPS
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.checkpoint import Checkpoints
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.runtime.weights import WEIGHTS, WeightsError
from detailflow_jax.tasks import tokenizer as tokenizer_task
from detailflow_jax.tasks.losses import Setting, Step, adversarial, make_losses, perceptual
from detailflow_jax.tasks.trainer import Trainer

START = 3
DINO = {"width": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 16}
D_METRICS = {"loss", "lecam", "consistency", "real", "fake", "gradient_norm"}


def tiny(**fields):
    """Sixteen pixels, no teacher, PatchGAN from step 3 on, every term of the discriminator."""
    config = small_tasks.tokenizer_config()
    with config.unlocked():
        config.model.teacher_width = 0
        del config["teacher"]
    # One token decodes to 8 px, which is enough for PatchGAN of one layer.
    config.discriminator.patchgan.update(channels=4, num_layers=1)
    config.discriminator.update(start_step=START, consistency=4.0, augment=True)
    config.discriminator.optim.lr = 1e-2
    config.losses.align.weight = 0.0
    config.losses.adversarial.weight = 0.2
    config.update_from_flattened_dict(fields)
    return config


def dino_fields(**fields):
    new = {f"discriminator.dino.{k}": v for k, v in DINO.items()}
    more = {"read_blocks": (0, 1), "kernel_size": 3}
    new |= {f"discriminator.dino.{k}": v for k, v in more.items()}
    return new | {"discriminator.kind": "dino", **fields}


def differing(a, b):
    """Paths at which two trees differ."""
    a, b = (jax.tree_util.tree_leaves_with_path(jax.device_get(tree)) for tree in (a, b))
    return {
        jax.tree_util.keystr(path)
        for (path, x), (_, y) in zip(a, b, strict=True)
        if not np.array_equal(x, y)
    }


def run(config, images, steps):
    """(states, metrics, jitted step) of some steps at full resolution."""
    task = tasks.make_task(config)
    options = {"compiler_options": FAST_TO_COMPILE}
    step = jax.jit(task.train_step, static_argnames="variant", **options)
    variant, plan = small_tasks.plan_with(task, 8)
    states, metrics = [small_tasks.start(task)], []
    for _ in range(steps):
        state, found = step(states[-1], images, plan, variant=variant)
        states.append(state)
        metrics.append({name: float(value) for name, value in found.items()})
    return states, metrics, step


@pytest.fixture(scope="module")
def trained(images):
    return run(tiny(), images, START + 3)


@pytest.fixture(scope="module")
def without(images):
    return run(tiny(**{"losses.adversarial.weight": 0.0}), images, START + 1)


# --------------------------------------------------------------------------------- adversarial


def test_the_start_does_not_recompile(trained):
    states, metrics, step = trained
    assert step._cache_size() == 1
    held = [state.extra["discriminator"] for state in states]
    for i in range(START):
        assert not differing(held[i], held[i + 1])
        assert metrics[i]["loss/adversarial"] == metrics[i]["discriminator/loss"] == 0
    for i in range(START, START + 3):
        moved = differing(held[i], held[i + 1])
        assert {path.split("'")[1] for path in moved} == {"params", "opt_state", "state", "lecam"}
        assert metrics[i]["loss/adversarial"] != 0 and metrics[i]["discriminator/loss"] > 0
    assert set(metrics[0]) >= {f"discriminator/{name}" for name in D_METRICS}
    assert all(np.isfinite(list(found.values())).all() for found in metrics)


def test_before_the_start_training_is_that_without(trained, without):
    for a, b in zip(trained[1][:START], without[1], strict=False):
        for name in b:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name
    # The first step of the term changes the gradient of what makes pixels, not the loss before it.
    a, b = trained[1][START], without[1][START]
    assert a["loss/mse"] == pytest.approx(b["loss/mse"], rel=1e-4)
    assert abs(a["gradient_norm"] - b["gradient_norm"]) > 1e-3 * b["gradient_norm"]


NOISE, TARGET = (
    np.random.default_rng(n).uniform(-1, 1, (n, 8, 8, 3)).astype(np.float32) for n in (4, 2)
)
KERNEL = ("decoder", "to_pixels", "kernel")


class Linear(nn.Module):
    """A generator that mixes the colours of noise."""

    @nn.compact
    def __call__(self, noise):
        decoder = self.param("decoder", lambda key: {"to_pixels": {"kernel": START_KERNEL}})
        return noise @ decoder["to_pixels"]["kernel"]


START_KERNEL = np.eye(3, dtype=np.float32) / 2


class LinearTrainer(Trainer):
    last_kernel = KERNEL
    keys = ("teacher", "lpips", "adversarial")

    def init(self, key):
        return self.start(key, NOISE)

    def train_step(self, state, batch, plan, *, variant=None):
        key = jax.random.fold_in(jax.random.key(0), state.step)
        return self.step(state, batch, key, forward)[:2]


def trainer_of(config):
    """A linear generator against the discriminator of a config, and the state it starts from."""
    config.model.image_size = 8
    made = make_losses(Setting(config, tokenizer_task.model_config(config.model), 8))
    trainer = LinearTrainer(
        config=config,
        model=Linear(),
        losses={name: made[name] for name in ("mse", "adversarial")},
        optimizer=optax.sgd(0.0),
    )
    return trainer, small_tasks.start(trainer)


def forward(model, rows, key):
    del key
    return Step(images=TARGET, target=TARGET, reconstruction=model(rows), latents=rows)


@pytest.mark.parametrize("adaptive", [False, True])
def test_gradient_of_the_generator(adaptive):
    """Both gradients by themselves, and VQGAN's equation for the weight between them."""
    plain = {"discriminator.augment": False, "discriminator.consistency": 0.0}
    trainer, state = trainer_of(tiny(**plain, **{"discriminator.adaptive": adaptive}))
    # Of plain descent with rate 1 the update is the gradient.
    trainer = dataclasses.replace(trainer, optimizer=optax.sgd(1.0))
    state = state.replace(step=jnp.int32(START), opt_state=optax.sgd(1.0).init(state.params))
    step = jax.jit(functools.partial(trainer.step, forward=forward))
    new, metrics, _ = step(state, NOISE, jax.random.key(START))
    kernel = lambda params: np.asarray(params["decoder"]["to_pixels"]["kernel"])  # noqa: E731
    disc_state, network = state.extra["discriminator"], trainer.losses["adversarial"].network

    def error(params):
        return jnp.mean(jnp.square(NOISE @ kernel_of(params) - np.concatenate([TARGET] * 2)))

    def kernel_of(params):
        return params["decoder"]["to_pixels"]["kernel"]

    def judged(params):
        fakes = NOISE @ kernel_of(params)
        held = disc_state["params"], disc_state["state"]
        return -jnp.mean(network.logits(*held, {}, fakes, train=True)[0])

    others, ours = (kernel(jax.grad(f)(state.params)) for f in (error, judged))
    factor = np.linalg.norm(others) / (np.linalg.norm(ours) + 1e-4) if adaptive else 1.0
    grads = kernel(state.params) - kernel(new.params)
    np.testing.assert_allclose(grads, others + 0.2 * factor * ours, rtol=0, atol=1e-5)
    want = 0.2 * factor * float(judged(state.params))
    assert float(metrics["loss/adversarial"]) == pytest.approx(want, rel=1e-4)
    assert ("adversarial_weight" in metrics) == adaptive
    if adaptive:
        assert float(metrics["adversarial_weight"]) == pytest.approx(0.2 * factor, rel=1e-4)


@pytest.mark.full
def test_dino_discriminator_learns_over_frozen_features():
    plain = {"discriminator.augment": False, "discriminator.consistency": 0.0}
    trainer, state = trainer_of(tiny(**dino_fields(**plain, **{"discriminator.start_step": 0})))
    step = jax.jit(
        functools.partial(trainer.step, forward=forward), compiler_options=FAST_TO_COMPILE
    )
    first, gap = state, []
    for _ in range(40):
        new, found, _ = step(state, NOISE, jax.random.key(0))
        state = state.replace(extra=new.extra)
        gap.append(float(found["discriminator/real"] - found["discriminator/fake"]))
    before, after = (x.extra["discriminator"]["state"] for x in (first, state))
    assert set(after) == {"batch_stats", "spectral"} and differing(before, after)
    assert np.mean(gap[-3:]) > np.mean(gap[:3]) + 0.1 and np.isfinite(gap).all()


# ------------------------------------------------------------------------- perceptual, decoder only


def test_perceptual_loss_is_lpips():
    network, rng = LPIPS(), np.random.default_rng(0)
    x, y = (rng.uniform(-1, 1, (n, 16, 16, 3)).astype(np.float32) for n in (4, 2))
    shapes = jax.eval_shape(lambda key: perceptual.init(network, key), jax.random.key(0))
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float32) / np.prod(x.shape[:-1]) ** 0.5,
        sharding.unboxed(shapes),
    )
    params |= {name: np.abs(x) for name, x in params.items() if name.startswith("linear")}

    @functools.partial(jax.jit, compiler_options=FAST_TO_COMPILE)
    def both(params):
        whole = network.apply({"params": params}, x, np.concatenate([y, y])).mean()
        return perceptual.distance(network, params, x, y), whole

    got, want = both(params)
    assert float(got) == pytest.approx(float(want), rel=1e-5) and got > 0


def test_decoder_only_with_a_ramped_perceptual_term(images, monkeypatch):
    def distance(network, params, reconstruction, target, part):
        assert part is None
        assert reconstruction.shape == (8, 16, 16, 3) and target.shape == (4, 16, 16, 3)
        return 1.0 + 0 * jnp.mean(reconstruction)

    monkeypatch.setattr(perceptual, "distance", distance)
    monkeypatch.setattr(perceptual, "init", lambda network, key: {})
    config = tiny(**{"losses.adversarial.weight": 0.0, "train_only": "decoder"})
    config.losses.perceptual.update(weight=2.0, ramp=4)
    config.model.decoder.update(patch_size=16, table_side=1)
    config.optim.weight_decay = 0.1  # must not reach what is not trained
    states, metrics, step = run(config, images, 6)
    found = [one["loss/perceptual"] for one in metrics]
    assert found == pytest.approx([0, 0.5, 1, 1.5, 2, 2]) and step._cache_size() == 1
    moved = differing(states[0].params, states[-1].params)
    assert {path.split("'")[1] for path in moved} == {"decoder", "post_quant_conv"}
    assert set(states[0].opt_state[1][0].mu) == {"decoder", "post_quant_conv"}
    assert metrics[-1]["loss/mse"] < metrics[0]["loss/mse"]


# --------------------------------------------------------------------------------------- refusals

REFUSED = {
    "accumulate": (
        {"accumulate": 2},
        r"accumulate=2.*losses\.adversarial\.weight=0",
    ),
    "kind": ({"discriminator.kind": "stylegan"}, "kind='stylegan'.*dino, patchgan"),
    "loss": ({"discriminator.loss": "wgan"}, "loss='wgan'.*hinge, vanilla, non_saturating"),
    "consistency": ({"discriminator.augment": False}, "consistency=4.0.*augment=True"),
    "patchgan": ({"discriminator.patchgan.num_layers": 2}, "are of 8 px.*12 at least"),
    "perceptual": ({"losses.perceptual.weight": 1.0}, "are of 8 px, LPIPS needs 16"),
    "part": ({"train_only": "encoder"}, "train_only='encoder'.*all, decoder"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(case):
    fields, message = case
    with pytest.raises(ConfigError, match=message):
        tasks.make_task(tiny(**fields))


def filled(init, key, mesh):
    """As `sharding.create_sharded`, with any numbers: faster than to compile the initialisation."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jax.device_put(rng.standard_normal(x.shape).astype(x.dtype), x.sharding),
        sharding.abstract_state(init, key, mesh),
    )


def state_of(config):
    mesh = sharding.make_mesh(config.mesh)
    return filled(tasks.make_task(config).init, jax.random.key(0), mesh)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DETAILFLOW_WEIGHTS", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def test_missing_weights_stop_a_run(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sharding, "create_sharded", filled)
    argv = ["--config", "configs/tokenizer.py:digits:runlocal", "--workdir", str(tmp_path / "run")]
    argv += ["--config.losses.adversarial.weight=0.2", "--config.discriminator.random=False"]
    argv += ["--config.discriminator.kind=dino", "--config.tensorboard=False"]
    assert train.main(argv) == train.UNUSABLE
    error = capsys.readouterr().err
    for part in (
        "config.losses.adversarial.weight=0",
        "kind=patchgan",
        "dino_deitsmall16_pretrain.pth",
    ):
        assert part in error
    assert "`detailflow weights`" in error and "Traceback" not in error


# ------------------------------------------------------------------------------ weights, resuming


def save(path, tensors):
    torch.save({name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}, path)


def test_frozen_networks_come_from_their_files(folder, tmp_path):
    config = tiny(
        **dino_fields(**{"losses.perceptual.weight": 1.0, "losses.perceptual.random": False})
    )
    config.model.decoder.update(patch_size=16, table_side=1)
    rng = np.random.default_rng(0)
    before = state_of(config)
    draw = lambda x: rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    dino, lpips = (jax.tree.map(draw, before.frozen[name]) for name in ("dino", "lpips"))
    with pytest.raises(WeightsError, match=r"VGG16.*config\.losses\.perceptual\.weight=0"):
        start.load_into(config, before, tasks.make_task(config).frozen, fresh=True)
    tensors = mapping.to_published(lpips_names.table("torchvision"), lpips)
    linear = {name: x for name, x in tensors.items() if name.startswith("lin")}
    save(folder / WEIGHTS["lpips"].file, linear)
    save(folder / WEIGHTS["vgg16"].file, {k: x for k, x in tensors.items() if k not in linear})
    with pytest.raises(WeightsError, match=r"DINO.*config\.losses\.adversarial\.weight=0"):
        start.load_into(config, before, tasks.make_task(config).frozen, fresh=True)
    save(folder / WEIGHTS["dino"].file, mapping.to_published(disc_names.DINO, dino))
    network = adversarial.network_config(config, config.model)
    held = before.extra["discriminator"]
    new = {"params": jax.tree.map(draw, held["params"]), **jax.tree.map(draw, held["state"])}
    table = disc_names.heads(network.read_points)
    counters = {name: np.zeros(()) for name in disc_names.counters(table)}
    save(tmp_path / "heads.pt", mapping.to_published(table, new) | counters)
    config.init_from.discriminator = str(tmp_path / "heads.pt")
    after = start.load_into(config, before, tasks.make_task(config).frozen, fresh=True)
    assert not differing(after.frozen["lpips"], lpips)
    want = mapping.to_published(disc_names.DINO, dino)
    assert not differing(mapping.to_published(disc_names.DINO, after.frozen["dino"]), want)
    held = after.extra["discriminator"]
    assert not differing({"params": held["params"], **held["state"]}, new)
    resumed = start.load_into(config, before, tasks.make_task(config).frozen, fresh=False)
    assert not differing(resumed.extra, before.extra)
    config.discriminator.dino.update(depth=1, read_blocks=(0,))
    with pytest.raises(CheckpointError, match=r"depth is 2, config\.discriminator\.dino\.depth is"):
        start.load_into(config, before, tasks.make_task(config).frozen, fresh=False)


def test_a_checkpoint_holds_the_discriminator(trained, images, tmp_path):
    """Saved after the start and read back, the next step gives the same bits."""
    states, _, step = trained
    saved, want = (dataclasses.replace(state, frozen={}) for state in states[-2:])
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(5, saved, {}, {})
        assert checkpoints.latest() == 5
        sharded = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved
        )
        restored = checkpoints.restore(sharded).state
    assert not differing(saved, restored)
    variant, plan = small_tasks.plan_with(tasks.make_task(tiny()), 8)
    restored = jax.tree.map(jnp.asarray, jax.device_get(restored))
    again, _ = step(
        dataclasses.replace(restored, frozen=states[-1].frozen), images, plan, variant=variant
    )
    assert not differing(dataclasses.replace(again, frozen={}), want)
    assert float(again.extra["discriminator"]["lecam"].real) != 0
