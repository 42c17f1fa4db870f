"""One program for several decoded sizes gives the numbers of a program for each."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import small_tasks
from compiling import FAST_TO_COMPILE
from detailflow_jax import tasks
from detailflow_jax.models import lpips, tokenizer
from detailflow_jax.ops import augment, padded
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks.losses import Step, mse

SIZES = (16, 24, 32)
POLICY = augment.Policy(cutout=0.5, probability=0.5)
VIEW = 24  # of DINO: one size is enlarged, one stays, one is reduced or cropped
FIELDS = {
    "model.image_size": 32,
    "model.num_tokens": 16,
    "model.group_size": 4,
    "model.causal_num": 0,
    "model.repa_layer": 1,
    "data.image_size": 32,
    "losses.repa.weight": 0.5,
    "losses.perceptual.weight": 1.0,
    "losses.perceptual.ramp": 0,
    "losses.perceptual.random": True,
    "decode_buckets": 1,
}
ADVERSARIAL = {
    "losses.adversarial.weight": 0.2,
    "discriminator.kind": "dino",
    "discriminator.random": True,
    "discriminator.start_step": 0,
    "discriminator.consistency": 4.0,
    "discriminator.augment": True,
    "discriminator.dino.width": 16,
    "discriminator.dino.depth": 2,
    "discriminator.dino.num_heads": 2,
    "discriminator.dino.patch_size": 8,
    "discriminator.dino.image_size": VIEW,
    "discriminator.dino.read_blocks": (0, 1),
    "discriminator.dino.kernel_size": 3,
}

rng = np.random.default_rng(0)
PHOTOS = rng.integers(0, 256, (2, 32, 32, 3), np.uint8)
jit = functools.partial(jax.jit, compiler_options=FAST_TO_COMPILE)


def make(**fields):
    config = small_tasks.tokenizer_config()
    config.update_from_flattened_dict(FIELDS | fields)
    return tasks.make_task(config)


def plan_of(task, size):
    """The variant and plan of a step that decodes to a size."""
    plans = (task.plan(step) for step in range(1000))
    return next(p for p in plans if p[1]["degrade"].any(axis=1).sum() == size)


def cut(x, size):
    return None if x is None else x[..., :size, :size, :]


def assert_close(got, want, whole):
    """Equal within 1e-5 of the largest number of `whole`."""
    most = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(whole))
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        error = float(np.abs(np.asarray(x) - np.asarray(y)).max())
        assert error <= 1e-5 * most, (jax.tree_util.keystr(path), error, most)


@pytest.fixture(scope="module")
def small():
    """The hidden width of REPA's projection and those of VGG16 are constants, much for a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "REPA_WIDTH", 24)
        patch.setattr(lpips, "STAGES", ((4, 4), (4, 4), (4, 4, 4), (4, 4, 4), (4, 4, 4)))
        yield


@pytest.fixture(scope="module")
def measured(small):
    """(size, part or None) -> the terms of what is decoded and their gradient; and the programs."""
    task = make()
    trainer, state = task.train_step.__self__, small_tasks.start(task)
    latents = jnp.asarray(rng.normal(size=(4, 16, 4)), jnp.float32)
    features = {"teacher": jnp.asarray(rng.normal(size=(2, 16, 16)), jnp.float32)}
    target = jnp.asarray(rng.uniform(-1, 1, (2, 32, 32, 3)), jnp.float32)

    @functools.partial(jit, static_argnums=0)
    def terms(size, part):
        def total(params):
            made, tapped = trainer.model.apply(
                {"params": params}, latents, size, 9, part, method="decode_tapped"
            )
            goal = padded.zeroed(target[:, :size, :size], part)
            step = Step(goal, goal, made, latents, tapped=tapped, part=part, state=state)
            step = dataclasses.replace(step, features=features)
            found = {name: trainer.losses[name](step) for name in ("mse", "repa", "perceptual")}
            return sum(found.values()), (found, made)

        return jax.grad(total, has_aux=True)(state.params)

    return terms


@pytest.mark.parametrize("size", [16, 24])
def test_terms_and_their_gradient(measured, size):
    """VGG16 halves 24 px to 12, 6, 3 and 1: an odd side too."""
    want, (terms, image) = measured(size, None)
    got, (part_terms, in_part) = measured(32, padded.Part(np.int32(SIZES.index(size)), SIZES))
    for name, value in terms.items():
        assert float(part_terms[name]) == pytest.approx(float(value), rel=1e-5), name
    assert_close(got, want, want)
    np.testing.assert_allclose(cut(in_part, size), image, atol=1e-5)
    assert not in_part[:, size:].any() and not in_part[:, :, size:].any()


@jit
def views(images, part, pull):
    """What DINO sees of images for 24 keys, the gradient of `pull` times it, what it looks at."""

    def seen(images):
        def one(key):
            keys = jax.random.split(key)
            changed = augment.diff_augment(keys[0], images, POLICY, part)
            return augment.random_view(keys[1], changed, VIEW, part), changed

        return jax.vmap(one)(jax.random.split(jax.random.key(0), 24))

    found, back, changed = jax.vjp(seen, images, has_aux=True)
    return found, back(pull)[0], changed


@pytest.mark.parametrize("size", SIZES)
def test_views_of_the_discriminator(size):
    """The same draws, whatever they change; nothing of what lies outside is seen."""
    images = jnp.asarray(rng.uniform(-1, 1, (2, size, size, 3)), jnp.float32)
    pull = jnp.asarray(rng.normal(size=(24, 2, VIEW, VIEW, 3)), jnp.float32)
    want, gradient, _ = views(images, None, pull)
    part = padded.Part(np.int32(SIZES.index(size)), SIZES)
    wide = jnp.pad(images, [(0, 0), *[(0, 32 - size)] * 2, (0, 0)])
    got, part_gradient, changed = views(wide, part, pull)
    assert not changed[..., size:, :, :].any() and not changed[..., size:, :].any()
    assert_close(got, want, want)
    assert_close(cut(part_gradient, size), gradient, gradient)


@pytest.mark.full
def test_a_step_is_that_of_a_program_of_this_size(small, size=16):
    """Every term in the training step itself; plain descent with rate 1 shows the gradient."""
    found = []
    for number in (0, 1):
        task = make(decode_buckets=number, **ADVERSARIAL)
        trainer = task.train_step.__self__
        judge = dataclasses.replace(trainer.losses["adversarial"], optimizer=optax.sgd(1.0))
        terms = trainer.losses | {"adversarial": judge}
        trainer = dataclasses.replace(trainer, losses=terms, optimizer=optax.sgd(1.0))
        state, (variant, plan) = small_tasks.start(trainer), plan_of(task, size)
        assert variant == (32 if number else size) and (plan["part"] is None) == (not number)
        step = jit(trainer.train_step, static_argnames="variant")
        for count in range(4):  # Gates of the augmentation change with the step.
            state = state.replace(step=jnp.int32(count))
            new, metrics = step(state, {"image": PHOTOS}, plan, variant=variant)
            judged = state.extra["discriminator"]["params"], new.extra["discriminator"]["params"]
            moved = jax.tree.map(jnp.subtract, (state.params, judged[0]), (new.params, judged[1]))
            found.append((metrics, moved))
    for (want, gradient), (got, part_gradient) in zip(found[:4], found[4:], strict=True):
        for name in want:
            assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-5, abs=1e-6), name
        for a, b in zip(part_gradient, gradient, strict=True):
            assert_close(a, b, b)


def test_as_many_programs_as_buckets():
    """Each of its own side; one whose images have all the same size knows of no part."""
    sizes = {n: sorted({task.plan(i)[0] for i in range(300)}) for n, task in BUCKETS.items()}
    assert sizes == {0: [16, 24, 32], 1: [32], 2: [16, 32], 4: [16, 24, 32]}
    for number, task in BUCKETS.items():
        shapes = {}
        for step in range(300):
            variant, plan = task.plan(step)
            described = jax.tree.map(np.shape, plan)
            assert shapes.setdefault(variant, described) == described
            assert plan["degrade"].shape == (variant, 32)
            if part := plan["part"]:
                side = part.sides[part.index]
                assert plan["degrade"][:side].any(axis=1).all()
                assert not plan["degrade"][side:].any()
        parts = {variant for variant, described in shapes.items() if described["part"] is not None}
        assert parts == {0: set(), 1: {32}, 2: {32}, 4: set()}[number]


BUCKETS = {number: make(decode_buckets=number) for number in (0, 1, 2, 4)}


def test_small_inputs_are_not_decoded_in_a_larger_program():
    dynamic = {"probability": 0.5, "sizes": (16,), "multiple": 2}
    fields = {f"data.dynamic.{name}": value for name, value in dynamic.items()}
    task = make(**{"decode_buckets": 1, "batch_size": 4, **fields})
    assert {task.plan(step)[0] for step in range(100)} == {(16, 16), (32, 32)}


class Own(mse.MSE):
    """Of whole images, for all that its author knows."""


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"decode_buckets=-1; expected 0 or more"):
        make(decode_buckets=-1)
    patchgan = ADVERSARIAL | {"discriminator.kind": "patchgan"}
    with pytest.raises(ConfigError, match=r"decode_buckets=1: .* config\.discriminator\.kind=dino"):
        make(**patchgan)
    config = small_tasks.tokenizer_config()
    with config.unlocked():
        config.losses.own = {"weight": 1.0, "module": f"{__name__}:Own"}
    tasks.make_task(config)
    config.decode_buckets = 1
    with pytest.raises(ConfigError, match=r"losses\.own.*Own.*decode_buckets=0 or .*weight=0"):
        tasks.make_task(config)
