"""Adversarial training: losses, weights, augmentation, batch statistics, one compiled step."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F

from detailflow_jax.convert import CheckpointError, mapping, published
from detailflow_jax.convert.tables import discriminator as names
from detailflow_jax.models import discriminator
from detailflow_jax.models.discriminator import DinoConfig, PatchGANConfig
from detailflow_jax.ops import adversarial, augment

RNG = np.random.default_rng(0)
REAL, FAKE = RNG.normal(0.5, 2, (2, 4, 30)).astype(np.float32)
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
HEADS = DinoConfig(width=8, depth=2, num_heads=2, read_blocks=(0, 1), kernel_size=3)
SMALL_DINO = DinoConfig(
    width=8, depth=2, num_heads=2, patch_size=4, image_size=16, read_blocks=(1,), kernel_size=3
)


def images(batch, height, width=None, seed=0):
    shape = (batch, height, width or height, 3)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


# ------------------------------------------------------------------------------ losses and weights


def test_losses_are_what_their_names_say():
    real, fake = torch.from_numpy(REAL), torch.from_numpy(FAKE)
    cross_entropy = F.binary_cross_entropy_with_logits
    logistic = 0.5 * (
        cross_entropy(real, torch.ones_like(real)) + cross_entropy(fake, torch.zeros_like(fake))
    )
    hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    for kind, want in {"hinge": hinge, "vanilla": logistic, "non_saturating": logistic}.items():
        got = adversarial.discriminator_loss(kind, REAL, FAKE)
        assert float(got) == pytest.approx(float(want), rel=1e-5)
    want = {
        "hinge": -fake.mean(),
        "vanilla": -fake.mean(),
        "non_saturating": cross_entropy(fake, torch.ones_like(fake)),
    }
    for kind, value in want.items():
        got = adversarial.generator_loss(kind, FAKE)
        assert float(got) == pytest.approx(float(value), rel=1e-5)
    with pytest.raises(ValueError, match=r"loss 'lsgan'; expected one of hinge, vanilla"):
        adversarial.generator_loss("lsgan", FAKE)


def test_lecam_in_the_published_order():
    """The averages are updated first, and no gradient passes through them."""

    def loss(real, fake):
        lecam = adversarial.LeCAM.start().update(real, fake, decay=0.9)
        return lecam.penalty(real, fake), lecam

    (got, lecam), gradient = jax.value_and_grad(loss, has_aux=True)(REAL, FAKE)
    real = torch.from_numpy(REAL).requires_grad_()
    fake = torch.from_numpy(FAKE)
    averages = 0.1 * REAL.mean(), 0.1 * FAKE.mean()
    np.testing.assert_allclose(lecam, averages, rtol=1e-5)
    want = F.relu(real - averages[1]).pow(2).mean() + F.relu(averages[0] - fake).pow(2).mean()
    want.backward()
    assert float(got) == pytest.approx(float(want.detach()), rel=1e-5)
    np.testing.assert_allclose(gradient, real.grad, rtol=1e-4, atol=1e-8)


def test_consistency_is_the_mean_over_both():
    weak, strong = (REAL, FAKE[:2]), (REAL + 1, FAKE[:2] - 2)
    assert float(adversarial.consistency_loss(weak, strong)) == pytest.approx((4 * 1 + 2 * 4) / 6)


def test_adaptive_weight():
    a, b = jnp.full((4, 4), 3.0), jnp.full((4, 4), 0.5)
    weight = float(adversarial.adaptive_weight(a, b))
    assert weight == pytest.approx(12 / (2 + 1e-4))
    assert float(adversarial.adaptive_weight(a, 0 * b)) == 1e4  # 12 / 1e-4 is clipped
    gradient = jax.grad(lambda a: adversarial.adaptive_weight(a, b))(a)
    assert not gradient.any()


def test_ramp():
    step = jax.jit(adversarial.ramp, static_argnums=(1, 2))
    got = [float(step(i, 10, 4)) for i in (0, 10, 11, 13, 14, 99)]
    assert got == [0, 0, 0.25, 0.75, 1, 1]
    assert [float(step(i, 10, 0)) for i in (0, 9, 10, 11)] == [0, 0, 1, 1]
    assert float(step(5000, 0, 10_000)) == 0.5


# ------------------------------------------------------------------------------------ augmentation


def test_shift_moves_whole_pixels_and_brings_zeros():
    x = images(3, 6, 5)
    down, right = np.array([0, 2, -1]), np.array([0, -1, 4])
    got = augment.shift(x, down, right)
    np.testing.assert_array_equal(got[0], x[0])
    want = np.zeros_like(x[1])
    want[2:, :-1] = x[1, :-2, 1:]
    np.testing.assert_array_equal(got[1], want)
    want = np.zeros_like(x[2])
    want[:-1, 4:] = x[2, 1:, :-4]
    np.testing.assert_array_equal(got[2], want)


def test_translations_are_whole_pixels_up_to_an_eighth():
    x = np.zeros((500, 32, 16, 3), np.float32)
    x[:, 16, 8] = 1
    moved = np.argwhere(augment.translate(jax.random.key(0), x)[..., 0])[:, 1:] - (16, 8)
    assert len(moved) == 500
    assert set(moved[:, 0]) == set(range(-4, 5)) and set(moved[:, 1]) == set(range(-2, 3))


@pytest.mark.parametrize(("share", "size"), [(0.2, 6), (0.5, 16)])
def test_cut_out(share, size):
    x = np.ones((400, 32, 32, 3), np.float32)
    got = np.asarray(augment.cut_out(jax.random.key(0), x, share))
    assert set(np.unique(got)) == {0, 1}
    heights = 32 - got[..., 0].max(axis=2).sum(axis=1)
    holes = (got[..., 0] == 0).any(axis=2).sum(axis=1)
    assert holes.max() == size and holes.min() >= size // 2  # it may lie half outside
    for axes in ((0, 1), (0, 2)):  # it reaches every row and column
        assert (got[..., 0] == 0).any(axis=axes).all()
    areas = (got[..., 0] == 0).sum(axis=(1, 2))
    assert areas.max() == size * size and heights.max() == 0
    gradient = jax.grad(lambda x: augment.cut_out(jax.random.key(0), x, share).sum())(x)
    np.testing.assert_array_equal(gradient, got)


def test_colour():
    """Whatever is drawn, grey stays grey, and order within a channel is kept."""
    x = images(64, 8)
    grey = np.repeat(x[..., :1], 3, axis=-1)
    out = np.asarray(augment.jitter_colour(jax.random.key(1), grey))
    np.testing.assert_allclose(out, np.repeat(out[..., :1], 3, axis=-1), atol=1e-6)
    slope = np.std(out, axis=(1, 2, 3)) / np.std(grey, axis=(1, 2, 3))
    assert 0.5 <= slope.min() < 0.6 and 1.4 < slope.max() <= 1.5
    level = out.mean(axis=(1, 2, 3)) - grey.mean(axis=(1, 2, 3))
    assert -0.5 <= level.min() < -0.4 and 0.4 < level.max() <= 0.5
    out = np.asarray(augment.jitter_colour(jax.random.key(1), x))
    spread = np.std(out - out.mean(-1, keepdims=True), axis=(1, 2, 3)) / slope
    spread /= np.std(x - x.mean(-1, keepdims=True), axis=(1, 2, 3))
    assert 0 <= spread.min() < 0.2 and 1.8 < spread.max() <= 2


def test_policies():
    """Each change is for the whole batch: half of the time when weak, always when strong."""
    x = images(2, 48)
    changed = jax.jit(lambda key, p: augment.diff_augment(key, x, p), static_argnums=1)
    draws = [np.asarray(changed(jax.random.key(i), augment.WEAK)) for i in range(64)]
    same = np.array([(y == x).reshape(2, -1).all(axis=1) for y in draws])
    assert (same[:, 0] == same[:, 1]).all()
    assert 1 <= same[:, 0].sum() <= 20  # an eighth is expected
    for i in range(8):
        assert (changed(jax.random.key(i), augment.STRONG) == 0).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(("size", "mode"), [((48, 40), "area"), ((17, 24), "bicubic")])
def test_view_without_a_key_resizes_as_published(size, mode):
    x = images(2, *size)
    want = F.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), (32, 32), mode=mode)
    got = augment.random_view(None, x, 32)
    if size == (17, 24):
        got_small = augment.random_view(jax.random.key(0), x, 32)
        np.testing.assert_array_equal(got, got_small)  # small images are never cropped
    np.testing.assert_allclose(got, want.permute(0, 2, 3, 1), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(augment.random_view(None, x[:, :16, :16], 16), x[:, :16, :16])


def test_views_of_large_images_are_crops_half_of_the_time():
    x = images(2, 12, 10)
    resized = np.asarray(augment.random_view(None, x, 8))
    view = jax.jit(lambda key: augment.random_view(key, x, 8))
    windows = {(i, j): x[:, i : i + 8, j : j + 8] for i in range(5) for j in range(3)}
    seen, cropped = set(), 0
    for i in range(120):
        got = np.asarray(view(jax.random.key(i)))
        at = [place for place, window in windows.items() if np.array_equal(window, got)]
        seen.update(at)
        cropped += bool(at)
        assert at or np.allclose(got, resized, atol=1e-6)
    assert 40 <= cropped <= 80
    assert {i for i, _ in seen} == set(range(5)) and {j for _, j in seen} == set(range(3))


# ---------------------------------------------------------------------------------- discriminators


def torch_patchgan(channels):
    layers = [torch.nn.Conv2d(3, channels, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
    for i, stride in ((1, 2), (2, 1)):
        layers += [
            torch.nn.Conv2d(channels * 2 ** (i - 1), channels * 2**i, 4, stride, 1, bias=False),
            torch.nn.BatchNorm2d(channels * 2**i),
            torch.nn.LeakyReLU(0.2),
        ]
    net = torch.nn.Sequential(*layers, torch.nn.Conv2d(channels * 4, 1, 4, 1, 1))
    return torch.nn.ModuleDict({"main": net})


def read_trained(path, config):
    """All variables of a discriminator's trained part from a file."""
    init = functools.partial(discriminator.make(config).init, image_size=32)
    params, state, _ = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    read = published.read("discriminator", path, params={"params": params, **state})
    assert read.notices == []
    return read.params


def test_patchgan_is_that_of_pytorch(tmp_path):
    reference = torch_patchgan(6)
    config = PatchGANConfig(channels=6, num_layers=2)
    torch.save(reference.state_dict(), tmp_path / "patchgan.pt")
    variables = read_trained(tmp_path / "patchgan.pt", config)
    disc = discriminator.make(config)
    params = variables.pop("params")
    for seed in range(2):
        x = images(3, 24, 32, seed)
        want = reference["main"](torch.from_numpy(x).permute(0, 3, 1, 2)).flatten(1)
        logits, variables = disc.logits(params, variables, {}, x, train=True)
        np.testing.assert_allclose(logits, want.detach(), rtol=0, atol=1e-5)
    state = mapping.to_published(names.patchgan(config.num_layers), {"params": params, **variables})
    for name, value in state.items():
        np.testing.assert_allclose(value, reference.state_dict()[name], rtol=0, atol=1e-5)
    assert len(state) + len(names.counters(names.patchgan(config.num_layers))) == len(
        reference.state_dict()
    )
    reference.eval()
    want = reference["main"](torch.from_numpy(x).permute(0, 3, 1, 2)).flatten(1)
    logits, same = disc.logits(params, variables, {}, x, train=False)
    np.testing.assert_allclose(logits, want.detach(), rtol=0, atol=1e-5)
    assert same is variables


def test_initial_discriminator_of_the_published_size():
    disc = discriminator.make(DinoConfig())
    params, state, frozen = jax.eval_shape(lambda key: disc.init(key, 256), jax.random.key(0))
    assert set(params) == {f"head_{i}" for i in range(5)} and set(state) == set(discriminator.STATE)
    assert sum(x.size for x in jax.tree.leaves(params)) == 7_386_245
    x = jax.ShapeDtypeStruct((2, 256, 256, 3), jnp.float32)
    forward = lambda p, s, f, x: disc.logits(p, s, f, x, train=True, key=jax.random.key(0))  # noqa: E731
    logits, _ = jax.eval_shape(forward, params, state, frozen, x)
    assert logits.shape == (2, 5 * 196)


def test_spectral_norm_is_that_of_pytorch():
    """Output, state and gradient of the kernel: none passes through u and v."""
    reference = torch.nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular")
    reference = torch.nn.utils.spectral_norm(reference)
    table = tuple(names._spectral_conv("conv", "conv"))
    read = {f"conv.{name}": x.numpy().copy() for name, x in reference.state_dict().items()}
    network = discriminator.SpectralConv(6, 3)
    x = RNG.standard_normal((2, 8, 4)).astype(np.float32)
    init = functools.partial(network.init, train=True)
    shapes = {k: {"conv": v} for k, v in jax.eval_shape(init, jax.random.key(0), x).items()}
    variables, _ = mapping.from_published(table, read, shapes)
    variables = {name: leaves["conv"] for name, leaves in variables.items()}

    def loss(params):
        inputs = {"params": params, "spectral": variables["spectral"]}
        y, new = network.apply(inputs, x, train=True, mutable=["spectral"])
        return jnp.mean(y**3), new

    gradient, new = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    reference(torch.from_numpy(x).transpose(1, 2)).pow(3).mean().backward()
    want = reference.weight_orig.grad
    got = gradient["kernel"].transpose(2, 1, 0)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * want.abs().max())
    for name, value in new["spectral"].items():
        np.testing.assert_allclose(value, getattr(reference, f"weight_{name}"), atol=1e-6)


def test_spectral_norm_approaches_the_largest_singular_value():
    conv = discriminator.SpectralConv(6, 3)
    x = jnp.zeros((1, 8, 4))
    variables = jax.jit(functools.partial(conv.init, train=True))(jax.random.key(0), x)
    kernel = variables["params"]["kernel"]
    sigma = np.linalg.svd(kernel.transpose(2, 1, 0).reshape(6, -1), compute_uv=False)[0]
    forward = jax.jit(functools.partial(conv.apply, train=True, mutable=["spectral"]))
    for _ in range(60):
        variables = variables | forward(variables, x)[1]
    row = jnp.zeros((1, 8, 4)).at[0, 0, 0].set(1)  # an impulse shows the divided kernel
    got = conv.apply(variables, row, train=False) - variables["params"]["bias"]
    np.testing.assert_allclose(got[0, 1], kernel[0, 0] / sigma, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got[0, -1], kernel[2, 0] / sigma, rtol=0, atol=1e-5)  # it wraps


def test_wrong_sizes_are_refused(tmp_path):
    disc = discriminator.make(PatchGANConfig())
    with pytest.raises(ValueError, match=r"images of \(16, 16\); expected sides of 24 at least"):
        disc.init(jax.random.key(0), 16)
    dino = discriminator.Dino(SMALL_DINO)
    with pytest.raises(ValueError, match=r"images of \(20, 20\); expected 16 x 16"):
        dino.init(jax.random.key(0), jnp.zeros((1, 20, 20, 3)))
    with pytest.raises(ValueError, match=r"read_blocks=\(2,\); expected 0 to 1"):
        DinoConfig(depth=2, read_blocks=[2])
    torch.save({"main.0.weight": torch.zeros(4, 3, 4, 4)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="tensors are missing: heads"):
        read_trained(tmp_path / "x.pt", HEADS)
    with pytest.raises(CheckpointError, match=r"looks like a trained discriminator.*DINO"):
        published.read("dino", tmp_path / "x.pt")


def test_dino_files_are_read(tmp_path):
    """Both parts through files, as another program would have written them."""
    disc = discriminator.make(SMALL_DINO)
    shapes = nn.unbox(jax.eval_shape(lambda key: disc.init(key, 16), jax.random.key(0)))
    params, state, frozen = jax.tree.map(
        lambda x: RNG.standard_normal(x.shape).astype(np.float32), shapes
    )
    dino = mapping.to_published(names.DINO, frozen)
    dino |= {"norm.weight": np.ones(8, np.float32), "norm.bias": np.zeros(8, np.float32)}
    save(tmp_path / "dino.pth", dino)
    read_blocks = SMALL_DINO.read_blocks
    told = {"num_heads": 2, "read_blocks": read_blocks, "kernel_size": 3}
    read = published.read("dino", tmp_path / "dino.pth", overrides=told)
    config = read.config
    assert config == SMALL_DINO and read.notices == []
    jax.tree.map(np.testing.assert_array_equal, read.params, frozen)
    for prefix in ("", "heads."):
        table = names.heads(config.read_points, prefix)
        tensors = mapping.to_published(table, {"params": params, **state})
        save(tmp_path / "heads.pt", tensors | {k: np.zeros(()) for k in names.counters(table)})
        variables = read_trained(tmp_path / "heads.pt", config)
        jax.tree.map(np.testing.assert_array_equal, variables, {"params": params, **state})
    inside = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    whole = {"model": {"x": torch.zeros(1)}, "discriminator": inside}
    torch.save(whole, tmp_path / "128.pt")
    variables = read_trained(tmp_path / "128.pt", config)
    jax.tree.map(np.testing.assert_array_equal, variables, {"params": params, **state})


def save(path, tensors):
    torch.save({name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}, path)


# ------------------------------------------------------------------------ one step, compiled once


def test_the_start_of_the_adversarial_term_does_not_recompile():
    """A generator of one colour against a discriminator, across the start, in one program."""
    start, size = 3, 24
    disc = discriminator.make(PatchGANConfig(channels=4, num_layers=1))
    params, state, frozen = nn.unbox(jax.jit(disc.init, static_argnums=1)(jax.random.key(0), size))
    optimizer = optax.adam(1e-2)
    generator = jnp.zeros((3,))
    real = images(4, size)
    compiled = []

    def draw(generator):
        return jnp.broadcast_to(jnp.tanh(generator), real.shape)

    def logits(params, state, x, key, policy=augment.WEAK):
        keys = jax.random.split(key)
        x = augment.diff_augment(keys[0], x, policy)
        return disc.logits(params, state, frozen, x, train=True, key=keys[1])

    @functools.partial(jax.jit, compiler_options=FAST_TO_COMPILE)
    def train_step(step, generator, params, state, lecam, opt_state):
        compiled.append(step)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), step), 5)
        weight = adversarial.ramp(step, start)

        def generator_loss(generator):
            fake, _ = logits(params, state, draw(generator), keys[0])
            mse = jnp.mean(jnp.square(draw(generator) - real))
            return mse + weight * 0.2 * adversarial.generator_loss("hinge", fake)

        gradient = jax.grad(generator_loss)(generator)
        fakes = draw(generator)

        def discriminator_loss(params):
            new, both, strong = state, [], []
            for x, i in ((real, 1), (fakes, 2)):
                one, new = logits(params, new, x, keys[i])
                both.append(one)
            for x, i in ((real, 3), (fakes, 4)):
                one, new = logits(params, new, x, keys[i], augment.STRONG)
                strong.append(one)
            after = lecam.update(*both)
            loss = adversarial.discriminator_loss("hinge", *both)
            loss = 0.2 * (loss + 0.001 * after.penalty(*both))
            loss += 4.0 * adversarial.consistency_loss(both, strong)
            return weight * loss, (new, after, both)

        grads, (new, after, both) = jax.grad(discriminator_loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        stepped = optax.apply_updates(params, updates)
        generator = generator - 0.1 * gradient
        return generator, stepped, new, after, opt_state, both

    lecam, opt_state = adversarial.LeCAM.start(), optimizer.init(params)
    first = jax.device_get(params)
    for step in range(6):
        generator, params, state, lecam, opt_state, both = train_step(
            jnp.int32(step), generator, params, state, lecam, opt_state
        )
        assert np.isfinite(jax.device_get(both)).all()
        moved = jax.tree.map(lambda a, b: np.any(a != b), first, jax.device_get(params))
        assert any(jax.tree.leaves(moved)) == (step >= start)
    assert len(compiled) == 1
    assert float(lecam.real) and float(lecam.fake)


# ------------------------------------------------------------------------------------ eight devices


def test_batch_statistics_are_of_the_whole_batch_on_every_mesh():
    """Half of the batch is bright, half dark: devices see one kind only."""
    child = subprocess.run(
        [sys.executable, __file__],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    errors = json.loads(child.stdout.splitlines()[-1])
    assert max(errors.values()) < 1e-5, errors


def _compare_meshes() -> dict[str, float]:
    from detailflow_jax.runtime import sharding

    features = tuple(
        np.concatenate([RNG.normal(sign, 1, (4, 6, HEADS.width)) for sign in (-2, 2)])
        .astype(np.float32) for _ in range(3)
    )  # fmt: skip
    network = discriminator.DinoHeads(HEADS)
    init = jax.jit(functools.partial(network.init, train=True))
    variables = dict(init(jax.random.key(0), features))
    params = variables.pop("params")

    @jax.jit
    def forward(params, state, features):
        def mean(params, features):
            logits, new = network.apply(
                {"params": params, **state}, features, train=True, mutable=list(state)
            )
            return jnp.mean(jnp.square(logits)), (logits, new)

        return jax.grad(mean, argnums=(0, 1), has_aux=True)(params, features)

    want = jax.device_get(forward(params, variables, features))
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    with sharding.use(mesh):
        got = jax.device_get(forward(params, variables, sharding.global_batch(features, mesh)))
    got, want = map(jax.tree_util.tree_leaves_with_path, (got, want))
    return {
        jax.tree_util.keystr(path): float(np.max(np.abs(a - b)))
        for (path, a), (_, b) in zip(got, want, strict=True)
    }


if __name__ == "__main__":
    print(json.dumps(_compare_meshes()))
