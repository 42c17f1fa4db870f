"""Discriminators: their layers against PyTorch's, their files, one compiled step."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import children
from compiling import FAST_TO_COMPILE
from detailflow_jax.convert import CheckpointError, mapping, published
from detailflow_jax.convert.tables import discriminator as names
from detailflow_jax.models import discriminator
from detailflow_jax.models.discriminator import DinoConfig, PatchGANConfig
from detailflow_jax.ops import adversarial, augment
from pixels import images

RNG = np.random.default_rng(0)
HEADS = DinoConfig(width=8, depth=2, num_heads=2, read_blocks=(0, 1), kernel_size=3)
SMALL_DINO = DinoConfig(
    width=8, depth=2, num_heads=2, patch_size=4, image_size=16, read_blocks=(1,), kernel_size=3
)


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


@pytest.mark.slow
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


@pytest.mark.full
def test_batch_statistics_are_of_the_whole_batch_on_every_mesh():
    """Half of the batch is bright, half dark: devices see one kind only."""
    errors = json.loads(children.run_on_eight_devices(__file__).splitlines()[-1])
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
