"""What the published tokenizer can do and leaves off: REPA, dynamic input sizes, no causality."""

import contextlib
import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import small_tasks
from compiling import FAST_TO_COMPILE
from detailflow_jax import tasks
from detailflow_jax.convert import CheckpointError, mapping
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.convert.tables import tokenizer as names
from detailflow_jax.data import make_iterator
from detailflow_jax.models import layers, siglip, tokenizer
from detailflow_jax.ops.input_sizes import input_sizes
from detailflow_jax.pod import programs
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.runtime.feed import DataError, Feed
from detailflow_jax.tasks import tokenizer as tokenizer_task
from detailflow_jax.tasks.losses import compute

DYNAMIC = {"probability": 0.6, "sizes": (16, 32), "multiple": 2}
TOKENS = {16: 6, 24: 10, 32: 16}  # by the inverse map
IMAGES = {16: 8, 24: 8, 32: 4}  # 8 * (24 / 32)^2 = 4.5, down to a multiple of 2


def tiny(**fields):
    """At most 32 pixels, 16 tokens in groups of two; the input usually has 24 pixels."""
    config = small_tasks.tokenizer_config()
    config.model.update(image_size=32, num_tokens=16)
    config.data.update(image_size=24)
    config.batch_size = 8
    config.update_from_flattened_dict(fields)
    return config


def dynamic(fields=(), **others):
    """`fields` are of `config.data.dynamic`."""
    fields = DYNAMIC | dict(fields)
    return tiny(**{f"data.dynamic.{name}": value for name, value in fields.items()}, **others)


def network(**fields):
    return tokenizer.Tokenizer(tokenizer_task.model_config(tiny(**fields).model))


def jit(function, **options):
    return jax.jit(function, compiler_options=FAST_TO_COMPILE, **options)


def pictures(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def filled(init, key):
    """Numbers of a usual size in the shapes of `init(key)`: faster than to compile it."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape).astype(x.dtype)),
        sharding.unboxed(jax.eval_shape(init, key)),
    )


def at_start(state):
    """With the optimizer as new."""
    zeros = jax.tree.map(jnp.zeros_like, state.opt_state)
    return state.replace(step=jnp.int32(0), opt_state=zeros)


def params_of(model):
    size = model.config.image_size
    return filled(lambda key: model.init(key, jnp.zeros((1, size, size, 3))), jax.random.key(0))[
        "params"
    ]


# ----------------------------------------------------------------------- overlapping patches


def test_overlapping_patches_travel_with_the_weights():
    """Their kernel has four times the columns; another patch size must not be read from it."""
    model = network(**{"model.overlap": True})
    params = params_of(model)
    side = model.config.image_size
    tensors = mapping.to_published(names.TABLE, params)
    both, extra, notices = names.describe(model.config)
    assert any("overlap" in notice for notice in notices)
    told = {"encoder_num_heads": 2, "decoder_num_heads": 2}
    config, _ = NETWORKS["tokenizer"].infer(tensors, both | extra, told, "here")
    assert config.overlap and config.decoder.patch_size == model.config.decoder.patch_size
    codes = jnp.zeros((1, model.config.num_tokens), jnp.int32)
    decode = {"method": model.decode_codes}
    picture = model.apply({"params": params}, codes, side, **decode)
    assert picture.shape == (1, side, side, 3) and np.ptp(picture) > 0
    with pytest.raises(ConfigError, match=r"overlap=True needs an even patch_size.*not 5"):
        tasks.make_task(
            tiny(**{"model.overlap": True, "model.decoder.patch_size": 5, "model.image_size": 40})
        )


# ----------------------------------------------------------------------------------- plain encoder


@pytest.mark.parametrize("causal", [True, False])
def test_queries_that_see_each_other(causal):
    """The last query reaches the first code without causality only."""
    model = network(**{"model.causal_encoder": causal})
    params, images = params_of(model), np.float32(pictures(2, 32)) / 127.5 - 1
    z = jit(lambda params: model.apply({"params": params}, images, method=latents))
    first = z(params)
    params["encoder"]["latent_tokens"] = params["encoder"]["latent_tokens"].at[-1, 0].add(3.0)
    moved = np.abs(np.asarray(z(params) - first)).max(axis=(0, 2)) > 1e-5
    assert moved[-2:].all() and moved[:-2].all() == (not causal)
    assert moved[:-2].any() == (not causal)


def latents(model, images, num_tokens=None):
    return model.first_pass(model.encode_patches(images), num_tokens)


def test_correction_needs_causality():
    tasks.make_task(tiny(**{"model.causal_encoder": False, "correction.enabled": False}))
    with pytest.raises(ConfigError, match=r"causal_encoder=False.*correction\.enabled=False"):
        tasks.make_task(tiny(**{"model.causal_encoder": False}))


def test_no_causal_tokens():
    assert network(**{"model.causal_num": 0}).config.causal == 0
    assert network().config.causal == 2


# -------------------------------------------------------------------------------------------- REPA

REPA = {
    "losses.repa.weight": 0.5,
    "model.repa_layer": 2,
    "model.decoder.depth": 3,
    "model.scan": False,
}


@pytest.fixture(scope="module")
def narrow():
    """The projection's hidden width is a constant of 2048, much for a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "REPA_WIDTH", 24)
        yield


@pytest.fixture(scope="module")
def repa(narrow):
    """A state, a batch, and the loss of both halves of it by NumPy, decoded to 24 px."""
    config = tiny(**REPA)
    task = tasks.make_task(config)
    model = network(**REPA)
    state = at_start(filled(task.init, jax.random.key(0)))
    images = pictures(4, 32)
    floats = jnp.float32(images) / 127.5 - 1
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    span, choice = tokenizer_task.draw_noise(key, model.config, config.correction, 4, jnp.int32(10))

    def run(model, images):
        _, latents, _ = tokenizer_task.two_passes(model, images, span, choice)
        return model.decode(latents, 24, jnp.int32(10))

    @jit
    def captured(state):
        is_block = lambda module, name: type(module) is siglip.TappedBlock  # noqa: E731
        _, found = model.apply(
            {"params": state.params}, floats, method=run, capture_intermediates=is_block
        )
        features = task.frozen[0].features(state.frozen["teacher"], floats)
        # To the 3 x 3 patches of 24 px by another implementation.
        grid = jax.image.resize(features.reshape(4, 4, 4, -1), (4, 3, 3, 16), "linear")
        blocks = found["intermediates"]["decoder"]["trunk"]["blocks"]
        (tokens, _), _ = blocks["layers_1"]["__call__"]  # of the plain block, of the tapped one
        return tokens, grid

    tokens, grid = map(np.asarray, captured(state))
    x = tokens[:, :9].astype(np.float64)
    for i in range(3):
        layer = state.params[f"repa_layers_{i}"]
        x = x / (1 + np.exp(-x)) if i else x
        x = x @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
    y = np.concatenate([grid.reshape(4, 9, 16)] * 2)
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    assert cosine.shape == (8, 9) and np.ptp(cosine) > 0.1
    return state, images, -0.5 * cosine.mean()


def terms_of(config, state, images, target, count):
    """Parameters -> the loss terms of the first step, from `count` tokens."""
    trainer = tokenizer_task.make(config).train_step.__self__
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    draws = trainer.model.config, config.correction, len(images), jnp.int32(count)
    rows = jnp.float32(images) / 127.5 - 1, target, *tokenizer_task.draw_noise(key, *draws)
    made = functools.partial(
        tokenizer_task.forward, size=target.shape[1], token_count=jnp.int32(count)
    )

    def terms(params):
        step = trainer.model.apply({"params": params}, rows, key, method=made)
        features = {
            name: x.features(state.frozen[name], rows[0]) for name, x in trainer.frozen.items()
        }
        step = dataclasses.replace(step, state=state, key=key, features=features)
        return compute(trainer.losses, step)

    return terms


def stacked(state):
    return state.replace(
        params=layers.stack_layers(state.params),
        frozen=layers.stack_layers(state.frozen),
    )


def test_repa_by_numpy_and_how_far_its_gradient_reaches(repa):
    """Over scanned, rematerialised blocks; the test of several parts has unrolled ones."""
    state, images, want = repa
    config = tiny(**REPA | {"model.scan": True, "model.remat": "full"})
    state = stacked(state)
    terms = terms_of(config, state, images, jnp.zeros((4, 24, 24, 3)), 10)
    value, grads = jit(jax.value_and_grad(lambda params: terms(params)["repa"]))(state.params)
    assert float(value) == pytest.approx(want, rel=1e-4)
    grads = layers.unstack_layers(grads)
    size = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))  # noqa: E731
    blocks = grads["decoder"]["trunk"]["blocks"]
    assert [size(blocks[f"layers_{i}"]) > 0 for i in range(3)] == [True, True, False]
    assert size(grads["decoder"]["to_pixels"]) == size(grads["decoder"]["trunk"]["final_norm"]) == 0
    assert all(size(grads[f"repa_layers_{i}"]) > 0 for i in range(3))
    assert size(grads["encoder"]["latent_tokens"]) > 0


@pytest.mark.full
def test_repa_in_a_step_of_several_parts(repa):
    state, images, want = repa
    config = tiny(**REPA, accumulate=2)
    task = tasks.make_task(config)
    variant, plan = small_tasks.plan_with(task, 10)
    assert variant == 24
    step = jit(task.train_step, static_argnames="variant")
    after, metrics = step(state, {"image": images}, plan, variant=variant)
    assert float(metrics["loss/repa"]) == pytest.approx(want, rel=1e-4)
    terms = [float(value) for name, value in metrics.items() if name.startswith("loss/")]
    assert float(metrics["loss"]) == pytest.approx(sum(terms), rel=1e-5)
    assert np.all(after.opt_state[1][0].mu["repa_layers_0"]["kernel"] != 0)


def test_repa_has_parameters_only_where_asked(narrow):
    def shapes(**fields):
        state = jax.eval_shape(tasks.make_task(tiny(**fields)).init, jax.random.key(0))
        flat = mapping.flatten(sharding.unboxed(state.params))
        return {name: x.shape for name, x in flat.items()}

    without = shapes(**{"model.decoder.depth": 3, "model.scan": False})
    assert not [name for name in without if "repa" in name]
    more = shapes(**REPA)
    added = {name: more.pop(name) for name in set(more) - set(without)}
    assert more == without
    assert {name: shape for name, shape in added.items() if "kernel" in name} == {
        "repa_layers_0/kernel": (16, 24),
        "repa_layers_1/kernel": (24, 24),
        "repa_layers_2/kernel": (24, 16),
    }
    assert len(added) == 6


REPA_ALONE = {"losses.repa.weight": 0.5, "losses.align.weight": 0.0}
REPA_REFUSED = {
    "no layer": (
        {"losses.repa.weight": 0.5},
        "repa.weight > 0 needs .*repa_layer.*1 to 1",
    ),
    "too deep": ({"model.repa_layer": 2}, "repa_layer=2 is not one of the 1 decoder blocks"),
    "no width": ({"model.repa_layer": 1, "model.teacher_width": 0}, "repa_layer=1 needs teacher_w"),
    "no teacher's weights": (
        {"model.repa_layer": 1, **REPA_ALONE, "teacher.random": False},
        r"teacher\.path is not set.*config\.losses\.repa\.weight=0",
    ),
}


@pytest.mark.parametrize("case", REPA_REFUSED.values(), ids=REPA_REFUSED)
def test_repa_refusals(case):
    fields, message = case
    with pytest.raises(ConfigError, match=message):
        tasks.make_task(tiny(**fields))


# ----------------------------------------------------------------------------- dynamic input sizes


def stream(steps, start=0, process_index=0, process_count=1, state=None, **data):
    """(batches, the iterator's state after the first `start`) of the digits."""
    config = dynamic()
    with contextlib.closing(
        make_iterator(
            config.data.to_dict() | data,
            batch_size=config.batch_size,
            seed=config.seed,
            process_index=process_index,
            process_count=process_count,
        )
    ) as iterator:
        if state is not None:
            iterator.set_state(state)
        batches = []
        for step in range(steps):
            if step == start:
                at_start = json.loads(json.dumps(iterator.get_state()))
            batches.append(next(iterator))
    return batches, at_start


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key], err_msg=key)


@pytest.fixture(scope="module")
def whole():
    return stream(50, start=20)


def test_data_and_plan_agree_about_sizes(whole):
    batches, task = whole[0], tasks.make_task(dynamic())
    found = [batch["image"].shape for batch in batches]
    sides = [task.plan(step)[0][0] for step in range(50)]
    assert found == [(IMAGES[side], side, side, 3) for side in sides]
    assert [batch["label"].shape for batch in batches] == [(IMAGES[side],) for side in sides]
    shares = [sides.count(side) / 50 for side in TOKENS]
    assert shares == pytest.approx([0.3, 0.4, 0.3], abs=0.15)
    sizes = input_sizes(dynamic().data, 8, 0)
    assert {side: sizes.images(side) for side in sizes.possible} == IMAGES


def test_images_are_cropped_to_their_size_from_the_positions_of_their_batch(whole):
    """As in a stream of that size alone: real pixels, and no image moves to another step."""
    off = {**DYNAMIC, "probability": 0.0}
    alone = {side: stream(50, image_size=side, dynamic=off)[0] for side in TOKENS}
    for step, batch in enumerate(whole[0]):
        rows, side = batch["image"].shape[:2]
        assert_same([batch], [{k: x[:rows] for k, x in alone[side][step].items()}])


@pytest.mark.full
def test_processes_and_workers_see_the_same_batches(whole):
    batches, state = whole
    halves = [stream(50, process_index=i, process_count=2)[0] for i in range(2)]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves, strict=True)]
    assert_same(joined, batches)
    found, state_of_workers = stream(50, start=20, num_workers=2)
    assert_same(found, batches)
    assert_same(stream(30, state=state)[0], batches[20:])
    assert_same(stream(10, state=state_of_workers)[0], batches[20:30])
    assert_same(stream(10, state=state, num_workers=2)[0], batches[20:30])


def test_plans_of_a_size():
    """No more tokens than the input has; with all of them the target is the input itself."""
    config = dynamic()
    task, resolutions = tasks.make_task(config), network().config.resolutions
    full = []
    for step in range(400):
        (side, size), plan = task.plan(step)
        count = int(plan["token_count"])
        assert count <= TOKENS[side] and size == resolutions.decoded_size(count) <= side
        assert plan["degrade"].shape == (size, side)
        full.append(count == TOKENS[side])
        if full[-1]:
            np.testing.assert_array_equal(plan["degrade"], np.eye(side))
        else:
            low = np.linalg.matrix_rank(plan["degrade"].astype(np.float64), tol=1e-4)
            assert low <= resolutions.resolution(count) < side
    assert np.mean(full) == pytest.approx(config.full_probability, abs=0.07)
    again = tasks.make_task(dynamic())
    assert [task.plan(step)[0] for step in range(9)] == [again.plan(step)[0] for step in range(9)]
    fixed = tasks.make_task(tiny())
    assert {fixed.plan(step)[0] for step in range(100)} == {8, 16, 24, 32}


def of_size(task, side):
    """The variant and plan of a step at full resolution of a size."""
    plans = map(task.plan, range(1000))
    return next(p for p in plans if p[0] == (side, side) and p[1]["token_count"] == TOKENS[side])


def test_a_small_step_is_that_of_a_small_network():
    """Six tokens of 16 px: every term is that of a network which has no more."""
    big = tasks.make_task(dynamic())
    state, images = at_start(filled(big.init, jax.random.key(0))), pictures(8, 16)
    variant, plan = of_size(big, 16)
    step = jit(big.train_step, static_argnames="variant")
    after, found = step(state, {"image": images}, plan, variant=variant)
    few = lambda name, x: x[:6] if name.endswith("_tokens") or "latent_" in name else x  # noqa: E731
    params = state.params | {
        part: {name: few(name, x) for name, x in state.params[part].items()}
        for part in ("encoder", "decoder")
    }
    small = tiny(**{"model.image_size": 16, "model.num_tokens": 6})
    target = jnp.float32(images) / 127.5 - 1
    want = jit(terms_of(small, state, images, target, 6))(params)
    assert set(want) == {"mse", "vq", "commit", "entropy", "align"}
    for name in want:
        assert float(found[f"loss/{name}"]) == pytest.approx(float(want[name]), rel=1e-5), name
    for name, moment in after.opt_state[1][0].mu["encoder"].items():
        if name != "trunk":
            used = np.any(moment != 0, axis=1)
            assert used[5] and not used[6:].any(), name
    with pytest.raises(ValueError, match="expects images of 16 x 16 px, the batch has 24 x 24"):
        big.train_step(state, {"image": pictures(8, 24)}, plan, variant=variant)


def test_pictures_of_a_small_batch():
    task = tasks.make_task(dynamic())
    state = tasks.TrainState(step=0, params=params_of(network()), opt_state={})
    pair = {name: x.shape for name, x in task.figures(state, {"image": pictures(2, 16)}).items()}
    assert pair == {"reconstructions": (2 * 16, 2 * 16, 3), "coarse_to_fine": (2 * 16, 4 * 16, 3)}


def test_the_first_tokens_do_not_depend_on_how_many_there_are():
    model = network()
    params, images = params_of(model), np.float32(pictures(3, 24)) / 127.5 - 1
    read = lambda n: model.apply({"params": params}, images, n, method=latents)  # noqa: E731
    encode = jit(read, static_argnums=0)
    some, z = np.asarray(encode(10)), np.asarray(encode(None))
    assert some.shape == (3, 10, 4) and z.shape == (3, 16, 4) and np.ptp(z, axis=1).min() > 0.1
    np.testing.assert_allclose(some, z[:, :10], atol=1e-5)


def test_the_pod_compiler_takes_the_usual_variant():
    config = dynamic({"probability": 0.3})
    program = programs.train_program(config, sharding.make_mesh({}, jax.devices()[:1]))
    assert program.options == {"variant": (24, 24)} and "(24, 24)" in program.note
    with sharding.use(program.mesh):
        program.function.trace(*program.arguments, **program.options)


# --------------------------------------------------------------------------------------- refusals

SIZES_REFUSED = {
    "probability": ({"probability": 1.5}, r"probability=1\.5 is not between"),
    "sizes": ({"sizes": ()}, r"dynamic\.sizes=\(\): expected one or more"),
    "a multiple": ({"multiple": 9}, r"multiple=9: expected 1 to config\.batch_size=8"),
}
TASK_REFUSED = {
    "too large": ({"sizes": (40,)}, r"dynamic\.sizes: 40 px is above config\.model\.image_size=32"),
    "off the patch": ({"sizes": (20,)}, "20 px is not a multiple of the encoder's patch, 8 px"),
    "no count": ({"sizes": (16,)}, r"sizes: 16 px: no token count decodes to 16 px; possible.*\[8"),
}


@pytest.mark.parametrize("case", SIZES_REFUSED.values(), ids=SIZES_REFUSED)
def test_sizes_without_meaning_are_refused(case):
    fields, message = case
    config = dynamic(fields)
    for make in (tasks.make_task, lambda c: make_iterator(c.data, batch_size=8, seed=0)):
        with pytest.raises(ConfigError, match=message):
            make(config)


@pytest.mark.parametrize("case", TASK_REFUSED.values(), ids=TASK_REFUSED)
def test_sizes_that_the_network_does_not_have_are_refused(case):
    fields, message = case
    config = dynamic(fields)
    if fields["sizes"] == (16,):
        config.model.num_tokens = 8
    with pytest.raises(ConfigError, match=message):
        tasks.make_task(config)


def test_batches_that_cannot_be_split_are_refused():
    with pytest.raises(ConfigError, match=r"batches of 4, not a multiple of config\.accumulate=8"):
        tasks.make_task(dynamic(accumulate=8))
    config = dynamic({"multiple": 3})
    with pytest.raises(ValueError, match=r"dynamic\.multiple=3 must be a multiple of the 2 proc"):
        make_iterator(config.data, batch_size=8, seed=0, process_index=0, process_count=2)
    assert input_sizes(config.data, 8, 0).images(32) == 3
    feed = Feed(iter([{"image": pictures(3, 32)}]), sharding.make_mesh({}, jax.devices()[:1]))
    feed._blocks, feed._mesh = 1, types.SimpleNamespace(shape={"data": 2, "fsdp": 1})
    with pytest.raises(DataError, match=r"3 rows.*data x fsdp = 2.*data\.dynamic\.multiple"):
        feed.take()


# --------------------------------------------------------------------------------- published form


def test_published_form_of_the_options(narrow):
    model = network(**REPA | {"model.causal_encoder": False})
    params = params_of(model)
    tensors = mapping.to_published(names.TABLE, params)
    projection = [name for name in tensors if name.startswith(names.REPA)]
    assert len(projection) == 6 and all(name.startswith(names.SKIPPED) for name in projection)
    both, extra, _ = names.describe(model.config)
    assert both["causal_encoder"] is False
    told = {"encoder_num_heads": 2, "decoder_num_heads": 2}
    config, _ = NETWORKS["tokenizer"].infer(tensors, both | extra, dict(told), "here")
    assert not config.causal_encoder and config.repa_layer == config.teacher_width == 0
    again = {"repa_layer": 2, "teacher_width": 16, "scan": False, "causal_encoder": True}
    config, _ = NETWORKS["tokenizer"].infer(tensors, both | extra, told | again, "here")
    assert config.causal_encoder
    found, report = mapping.from_published(names.TABLE, tensors, params, skip=names.SKIPPED)
    assert not report.missing and not report.unused
    jax.tree.map(np.testing.assert_array_equal, found, params)
    with pytest.raises(CheckpointError, match=r"causal_encoder='yes'.*true or false"):
        NETWORKS["tokenizer"].infer(tensors, both | {"causal_encoder": "yes"}, dict(told), "here")
