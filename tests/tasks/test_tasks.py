"""Training steps of both tasks on tiny networks, and what decides their batches and updates."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detailflow_jax import tasks
from detailflow_jax.models import layers
from detailflow_jax.models.layers import drop_labels
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks import generator as generator_task
from detailflow_jax.tasks import optim
from detailflow_jax.tasks import tokenizer as tokenizer_task
from small_tasks import generator_config, plan_with, step_function, tokenizer_config


def start(task):
    """A first state as `init` makes it, not that of `small_tasks`."""
    return nn.unbox(jax.jit(task.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def tokenizer():
    return tasks.make_task(tokenizer_config())


# -------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def trained_tokenizer(tokenizer, images):
    """(states, metrics, the compiled step) of 20 steps at full resolution on one batch."""
    step = step_function(tokenizer)
    variant, plan = plan_with(tokenizer, 8)
    assert variant == 16
    states, metrics = [start(tokenizer)], []
    for _ in range(20):
        state, found = step(states[-1], images, plan, variant=variant)
        states.append(state)
        metrics.append({name: float(value) for name, value in found.items()})
    return states, metrics, step


def test_tokenizer_learns_a_batch(trained_tokenizer):
    states, metrics, _ = trained_tokenizer
    terms = {"loss/mse", "loss/vq", "loss/commit", "loss/entropy", "loss/align"}
    assert set(metrics[0]) == terms | {"loss", "gradient_norm", "codebook_usage"}
    assert metrics[0]["loss"] == pytest.approx(sum(metrics[0][name] for name in terms), rel=1e-5)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
    assert metrics[-1]["loss/mse"] < 0.8 * metrics[0]["loss/mse"]
    assert [int(state.step) for state in states] == list(range(21))


def test_tokenizer_state_keeps_the_teacher_and_the_window(trained_tokenizer):
    states, metrics, _ = trained_tokenizer
    for a, b in zip(*(jax.tree.leaves(states[i].frozen) for i in (0, -1)), strict=True):
        np.testing.assert_array_equal(a, b)
    window = np.asarray(states[1].extra["window"])
    assert window.shape == (65_536,) and (window >= 0).sum() == 4 * 8
    assert metrics[0]["codebook_usage"] == len(np.unique(window[window >= 0])) / 32


def test_every_tokenizer_parameter_moves(trained_tokenizer):
    states, _, _ = trained_tokenizer
    paths = jax.tree_util.tree_leaves_with_path(states[0].params)
    for (path, a), b in zip(paths, jax.tree.leaves(states[-1].params), strict=True):
        assert (np.asarray(a) != np.asarray(b)).any(), jax.tree_util.keystr(path)


def test_a_step_is_a_function_of_state_and_batch(tokenizer, trained_tokenizer, images):
    states, metrics, step = trained_tokenizer
    variant, plan = plan_with(tokenizer, 8)
    again, found = step(states[3], images, plan, variant=variant)
    assert float(found["loss"]) == metrics[3]["loss"]
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(states[4].params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_token_count_is_data(tokenizer, trained_tokenizer, images):
    """Plans that decode to one size share a program, and do not give the same loss."""
    states, _, step = trained_tokenizer
    plans = [plan_with(tokenizer, count) for count in (6, 8)]
    assert [variant for variant, _ in plans] == [16, 16]
    before = step._cache_size()
    losses = [step(states[0], images, plan, variant=16)[1]["loss/mse"] for _, plan in plans]
    assert step._cache_size() == before
    assert abs(float(losses[0] - losses[1])) > 1e-4


def test_ema_follows_with_a_warm_up(trained_tokenizer):
    states, _, _ = trained_tokenizer
    leaf = lambda tree: np.asarray(tree["codebook"], np.float64)  # noqa: E731
    average = leaf(states[0].params)
    for n, state in enumerate(states[1:]):
        decay = min(0.99, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * leaf(state.params)
        np.testing.assert_allclose(leaf(state.ema), average, atol=1e-6)


def test_plan_is_a_function_of_the_step():
    first, same = (tasks.make_task(tokenizer_config()) for _ in range(2))
    config = tokenizer_config()
    config.seed = 1
    other = tasks.make_task(config)
    counts = []
    for step in range(300):
        (variant, plan), again = first.plan(step), same.plan(step)
        assert variant == again[0] and plan["token_count"] == again[1]["token_count"]
        np.testing.assert_array_equal(plan["degrade"], again[1]["degrade"])
        counts.append(int(plan["token_count"]))
        resolutions = tokenizer_task.model_config(config.model).resolutions
        assert variant == resolutions.decoded_size(counts[-1])
        assert plan["degrade"].shape == (variant, 16)
    assert counts != [int(other.plan(step)[1]["token_count"]) for step in range(300)]
    assert np.mean(np.array(counts) == 8) == pytest.approx(0.8, abs=0.07)
    assert set(counts) == {1, 2, 4, 6, 8}


def draw_noise(count=8, batch=300, **correction):
    config = tokenizer_config(**correction)
    c = tokenizer_task.model_config(config.model)
    key = jax.random.key(0)
    return tokenizer_task.draw_noise(key, c, config.correction, batch, jnp.int32(count))


def test_noise_per_sample_and_per_batch():
    span, choice = draw_noise(noise_top=50)
    assert len(np.unique(span.start)) > 2
    assert choice.shape == (300, 8) and np.unique(choice).tolist() == list(range(32))  # V < 50
    span, choice = draw_noise(noise_per_sample=False, noise_top=3)
    assert len(np.unique(span.start)) == len(np.unique(span.stop)) == 1
    assert np.unique(choice).tolist() == [0, 1, 2]


def test_no_noise_without_correction():
    span, choice = draw_noise(enabled=False)
    assert span is None and choice.shape == (300, 8)


def test_pictures(tokenizer, trained_tokenizer, images):
    states, _, _ = trained_tokenizer
    pictures = tokenizer.figures(states[-1], images)
    assert {name: picture.shape for name, picture in pictures.items()} == {
        "reconstructions": (2 * 16, 4 * 16, 3),
        "coarse_to_fine": (4 * 16, (4 + 1) * 16, 3),  # four groups and the original
    }
    assert all(picture.dtype == np.uint8 for picture in pictures.values())
    row = images["image"].transpose(1, 0, 2, 3).reshape(16, 64, 3)
    np.testing.assert_array_equal(pictures["reconstructions"][:16], row)
    column = images["image"].reshape(64, 16, 3)
    np.testing.assert_array_equal(pictures["coarse_to_fine"][:, -16:], column)
    whole = pictures["coarse_to_fine"][:16, -32:-16]  # the first image from all its tokens
    np.testing.assert_array_equal(whole, pictures["reconstructions"][16:, :16])


def test_group_counts():
    c = tokenizer_task.model_config(tokenizer_config().model)
    assert tokenizer_task.group_counts(c) == [2, 4, 6, 8]
    assert tokenizer_task.group_counts(c, most=3) == [2, 4, 8]


# -------------------------------------------------------------------------------------- generator


@pytest.fixture(scope="module")
def triplets():
    codes = np.random.default_rng(0).integers(0, 16, (8, 8, 3)).astype(np.int32)
    return {"codes": codes, "label": np.arange(8, dtype=np.int32) % 3}


def test_generator_learns_a_batch(triplets):
    task = tasks.make_task(generator_config())
    assert task.plan(0) == task.plan(7) == (None, {})
    step, state, metrics = step_function(task), start(task), []
    for _ in range(20):
        state, found = step(state, triplets, {}, variant=None)
        metrics.append({name: float(value) for name, value in found.items()})
    assert set(metrics[0]) == {"loss", "accuracy", "gradient_norm"}
    assert metrics[0]["loss"] == pytest.approx(np.log(16), rel=1e-5)  # the output starts at zero
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
    assert int(state.step) == 20 and state.ema is not None


def test_correction_pairs_are_mixed_by_example(triplets):
    codes = np.tile(triplets["codes"], (100, 1, 1))
    inputs, targets = generator_task.mix_corrections(jax.random.key(0), codes, 0.3)
    noisy = np.array([(row == codes[i, :, 1]).all() for i, row in enumerate(np.asarray(inputs))])
    want_inputs = np.where(noisy[:, None], codes[..., 1], codes[..., 0])
    want_targets = np.where(noisy[:, None], codes[..., 2], codes[..., 0])
    np.testing.assert_array_equal(inputs, want_inputs)
    np.testing.assert_array_equal(targets, want_targets)
    assert noisy.mean() == pytest.approx(0.3, abs=0.06)
    inputs, targets = generator_task.mix_corrections(jax.random.key(0), codes, 0.0)
    np.testing.assert_array_equal(inputs, codes[..., 0])
    np.testing.assert_array_equal(targets, codes[..., 0])


def test_labels_are_dropped_to_the_null_class():
    c = generator_task.model_config(generator_config().model)
    labels = jnp.arange(3000) % 3
    dropped = np.asarray(drop_labels(jax.random.key(0), labels, c))
    assert set(np.unique(dropped)) == {0, 1, 2, 3}
    assert (dropped == 3).mean() == pytest.approx(0.1, abs=0.03)
    np.testing.assert_array_equal(dropped[dropped != 3], labels[dropped != 3])


# ------------------------------------------------------------------------- optimizer and refusals


@pytest.mark.parametrize("unrolled", [False, True])
def test_weight_decay_is_for_matrices(unrolled):
    """Rank >= 2 as published; the layer axis of a scan makes no matrix of a bias or a norm."""
    for config in (tokenizer_config(), generator_config()):
        params = nn.unbox(jax.eval_shape(tasks.make_task(config).init, jax.random.key(0))).params
        if unrolled:
            params = jax.eval_shape(layers.unstack_layers, params)
        for path, decayed in jax.tree_util.tree_leaves_with_path(optim.decays(params)):
            assert decayed == (path[-1].key not in ("bias", "scale")), path


def test_decay_reaches_matrices_only():
    config = generator_config()
    config.optim.update(weight_decay=0.5, lr=0.1, warmup_steps=0)
    optimizer = optim.optimizer(config.optim, 100)
    params = {"layers": {"kernel": jnp.ones((2, 3, 3)), "bias": jnp.ones((2, 3))}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["layers"]["kernel"], -0.05, rtol=1e-6)
    assert not updates["layers"]["bias"].any()


@pytest.mark.parametrize("scanned", [False, True])
def test_muon_turns_the_matrices_of_blocks(scanned):
    """Their updates are near orthogonal, of the size of Adam's; everything else is Adam's."""
    config = generator_config()
    config.optim.update(kind="muon", lr=0.1, warmup_steps=0, weight_decay=0.0, clip=1e9)
    kernel = jnp.zeros((8, 4))
    block = {"layers": {"kernel": kernel[None]}} if scanned else {"layers_0": {"kernel": kernel}}
    params = {"blocks": block, "embed": {"kernel": kernel}}
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
    muon = optim.optimizer(config.optim, 100)
    update, _ = muon.update(grads, muon.init(params), params)
    made = jax.tree.leaves(update["blocks"])[0].reshape(8, 4)
    # 0.2 sqrt(8) lr times a matrix whose singular values are near 1
    singular = jnp.linalg.svd(made, compute_uv=False) / (0.1 * 0.2 * 8**0.5)
    assert 0.6 < singular.min() < singular.max() < 1.3
    first = jnp.abs(update["embed"]["kernel"])  # of Adam: as large for every gradient
    np.testing.assert_allclose(first, first[0, 0], rtol=1e-3)


def test_unknown_optimizer_is_refused():
    config = generator_config()
    config.optim.kind = "lion"
    with pytest.raises(ConfigError, match=r"optim\.kind='lion'"):
        optim.optimizer(config.optim, 100)


def test_schedule():
    config = generator_config()
    config.optim.update(lr=2.0, warmup_steps=10, warmup_start=0.1, final=0.05)
    schedule = optim.schedule(config.optim, 110)
    found = [float(schedule(step)) for step in (0, 5, 10, 60, 110, 500)]
    assert found == pytest.approx([0.2, 1.1, 2.0, 1.05, 0.1, 0.1], rel=1e-5)


def test_no_average_where_none_is_asked_for():
    config = generator_config()
    config.ema.decay = 0.0
    assert optim.start_average({"a": jnp.ones(2)}, config.ema) is None
    assert optim.average(None, {"a": jnp.ones(2)}, 0, config.ema) is None
    config.ema.update(decay=0.9, warmup=False)
    average = optim.average({"a": jnp.zeros(2)}, {"a": jnp.ones(2)}, 0, config.ema)
    np.testing.assert_allclose(average["a"], 0.1, rtol=1e-6)


def _without_teacher(config):
    del config["teacher"]


REFUSED = {
    "no such task": ("task", lambda c: c.update(task="flow"), "config.task='flow'"),
    "no teacher": ("tokenizer", _without_teacher, "config.teacher"),
    "no weights for it": ("tokenizer", lambda c: c.teacher.update(random=False), "teacher.path"),
    "another width": ("tokenizer", lambda c: c.teacher.update(width=32), "teacher_width=16"),
    "no such size": ("generator", lambda c: c.model.update(size="GPT-M"), "size='GPT-M'.*GPT-L"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_configurations_without_meaning_are_refused(case):
    kind, change, message = case
    config = generator_config() if kind == "generator" else tokenizer_config()
    with config.unlocked(), pytest.raises(ConfigError, match=message):
        change(config)
        tasks.make_task(config)
