"""The generator with a flow head: its cached sampler, training, runs, and what does not apply."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import detailflow_jax as df
import scored_models
import toy_images
from detailflow_jax import data, tasks
from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.inference import api, extract_codes
from detailflow_jax.models import layers, sampler
from detailflow_jax.models.flow_generator import FlowGenerator, example
from detailflow_jax.models.generator import GeneratorConfig
from detailflow_jax.ops import flow
from detailflow_jax.ops import logits as filters
from detailflow_jax.runtime.checkpoint import restore_params
from detailflow_jax.runtime.config import load_config
from detailflow_jax.runtime.errors import ConfigError, NotFoundError
from detailflow_jax.tasks import generator as generator_task
from detailflow_jax.train import Run, train
from random_weights import random_like
from small_tasks import CONFIGS, start, step_function

CLASSES, DIM = 5, 4
TINY = GeneratorConfig(
    width=32,
    depth=1,
    num_heads=4,
    multiple_of=16,
    num_tokens=8,
    group_size=2,
    codebook_size=32,
    num_classes=CLASSES,
    head="flow",
    code_dim=DIM,
    flow_width=32,
    flow_depth=1,
    flow_head_dim=8,
)
TIMES = tuple(flow.published_times(4))
LABELS = np.array([0, 3, 4], np.int32)


def random_params(config, seed=0):
    scanned = dataclasses.replace(config, scan=True)
    abstract = jax.eval_shape(FlowGenerator(scanned).init, jax.random.key(0), *example(config))
    return random_like(abstract, seed)["params"]


@pytest.fixture(scope="module")
def gen():
    return api.Generator(TINY, random_params(TINY))


# ----------------------------------------------------------------------------------------- sampling


@functools.cache
def teacher_forcing(config):
    """(semantics, velocities at all tokens) as functions of parameters."""
    model = FlowGenerator(dataclasses.replace(config, scan=True))

    def semantics(params, codes, labels):
        return layers.apply(model, params, method=lambda m: m.read_out(m.run(codes, labels)))

    def velocity(params, *arguments):
        return layers.apply(model, params, *arguments, method="velocity")

    return jax.jit(semantics), jax.jit(velocity)


def recompute(config, params, seed, *, guided, scale=2.0, gradual=False):
    """Vectors and codes without a cache: everything anew, masked, at each step; the same noise."""
    semantics_of, velocity_of = teacher_forcing(config)
    rows = np.concatenate([LABELS, np.full_like(LABELS, CLASSES)]) if guided else LABELS
    n, draws = config.num_tokens, config.draws()
    sizes = n, config.group_size, config.causal
    scales = filters.guidance_scales(scale, *sizes, gradual=gradual)[:, None]
    keys = sampler.sample_keys(seed, jnp.arange(len(LABELS)))
    codebook = np.asarray(params["codebook"])
    codebook = codebook / np.linalg.norm(codebook, axis=1, keepdims=True)
    codes, vectors = np.zeros((len(LABELS), n), np.int32), np.zeros((len(LABELS), n, DIM))
    for draw in range(draws[-1] + 1):
        own = np.flatnonzero(draws == draw)
        noise = np.stack(
            [jax.random.normal(jax.random.fold_in(key, own[0]), (len(own), DIM)) for key in keys]
        )
        x = np.random.default_rng(draw).standard_normal((len(LABELS), n, DIM)).astype(np.float32)
        x[:, own] = noise  # the others hold anything: draws do not see each other
        both = lambda x: np.concatenate([x, x]) if guided else x  # noqa: E731
        semantics = semantics_of(params, both(codes), rows)
        for time, following in itertools.pairwise(TIMES):
            v = np.asarray(velocity_of(params, both(x), np.full(len(rows), time, np.float32),
                                       semantics))  # fmt: skip
            if guided:
                conditional, null = np.split(v, 2)
                v = null + (conditional - null) * scales
            x = x + v * np.float32(following - time)
        unit = x[:, own] / np.linalg.norm(x[:, own], axis=-1, keepdims=True)
        vectors[:, own] = unit * np.sqrt(DIM)
        codes[:, own] = np.argmax(unit @ codebook.T, axis=-1)
    return codes, vectors


CASES = {
    "one group causal": ({}, {"guided": True}, []),
    "none causal, gradual": ({"causal_num": 0}, {"guided": True, "gradual": True}, []),
    "two groups causal, two layers": ({"causal_num": 4, "depth": 2}, {"guided": False}, [3, 6]),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=pytest.mark.full if "two" in name else ())
        for name, case in CASES.items()
    ],
)
def test_cache_equals_recomputation(case):
    fields, how, counts = case
    config = dataclasses.replace(TINY, **fields)
    params = random_params(config)
    want, _ = recompute(config, params, 7, **how)
    assert len(np.unique(want)) > 5  # the network does not repeat itself
    model = api.Generator(config, params)
    scale = 2.0 if how["guided"] else 1.0
    for count in (config.num_tokens, *counts):
        settings = {"num_steps": 4, "num_tokens": count, "gradual_cfg": how.get("gradual", False)}
        got = model.sample(LABELS, 7, scale, **settings)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want[:, :count])


@pytest.mark.parametrize("continuous", [False, pytest.param(True, marks=pytest.mark.full)])
def test_streamed_codes_are_those_of_one_program(gen, continuous):
    settings = {"num_steps": 4, "continuous": continuous}
    want = gen.sample(LABELS, 7, 2.0, **settings)
    for count, made in zip((2, 4, 6, 8), gen.stream(LABELS, 7, 2.0, **settings), strict=True):
        np.testing.assert_allclose(made, want[:, :count], rtol=0, atol=1e-5 * continuous)


def test_continuous_vectors_are_those_before_the_codes(gen):
    """The first token of both is from the same noise and the same past, which is none."""
    nothing = np.zeros((len(LABELS), 0), np.int32)
    settings = {"num_steps": 4, "continuous": True}
    vectors = gen.sample(LABELS, 7, 2.0, prefix=nothing, **settings)
    assert vectors.shape == (3, 8, DIM) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), np.sqrt(DIM), rtol=1e-5)
    codes, want = recompute(TINY, random_params(TINY), 7, guided=True)
    np.testing.assert_allclose(vectors[:, 0], want[:, 0], atol=1e-4)
    assert np.abs(vectors[:, 1] - want[:, 1]).max() > 1e-2  # it read vectors, not codes
    kept = gen.sample(LABELS, 7, 2.0, prefix=codes[:, :6], **settings)
    rows = np.asarray(gen.params["codebook"])[codes[:, :6]]
    rows = rows * np.sqrt(DIM) / np.linalg.norm(rows, axis=-1, keepdims=True)
    np.testing.assert_allclose(kept[:, :6], rows, atol=1e-5)
    # After the same codes, a group is what the codes were nearest to.
    np.testing.assert_allclose(kept[:, 6:], want[:, 6:], atol=1e-4)


def test_what_a_sample_depends_on_and_one_program_for_it_all(gen):
    codes = gen.sample(LABELS, 7, num_steps=4)
    before = sampler.sample._cache_size()
    for changed in ({"cfg_scale": 4.0}, {"seed": 1}, {"gradual_cfg": True, "cfg_scale": 6.0}):
        other = gen.sample(LABELS, **({"seed": 7, "num_steps": 4} | changed))
        assert (other != codes).any(), changed
    moved = gen.sample(LABELS[[2, 0, 1]], 7, num_steps=4, first_index=2)
    np.testing.assert_array_equal(moved[0], codes[2])
    assert sampler.sample._cache_size() == before
    again = gen.sample(LABELS, 7, num_steps=4, prefix=codes[:, :5])
    np.testing.assert_array_equal(again, codes)
    changed = (codes[:, :5] + 1) % 32
    other = gen.sample(LABELS, 7, num_steps=4, prefix=changed)
    np.testing.assert_array_equal(other[:, :5], changed)
    assert (other[:, 5:] != codes[:, 5:]).any()
    assert sampler.sample._cache_size() == before + 1


def test_tokens_of_a_draw_see_each_other_and_no_others():
    _, velocity_of = teacher_forcing(TINY)
    params, rng = random_params(TINY), np.random.default_rng(0)
    x = rng.standard_normal((1, 8, DIM)).astype(np.float32)
    semantics = rng.standard_normal((1, 8, 32)).astype(np.float32)
    before = np.asarray(velocity_of(params, x, np.ones(1, np.float32), semantics))
    for token, reached in ((1, [1]), (5, [4, 5]), (6, [6, 7])):
        moved = x.copy()
        moved[:, token] += 1.0
        after = np.asarray(velocity_of(params, moved, np.ones(1, np.float32), semantics))
        changed = np.abs(after - before).max((0, 2)) > 1e-6
        assert np.flatnonzero(changed).tolist() == reached


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "settings",
    [{"top_k": 5}, {"temperature": 0.9}, {"top_p": 0.5}, {"greedy": True},
     {"rules": df.rules.TopK(5)}],
)  # fmt: skip
def test_rules_do_not_apply(gen, settings):
    with pytest.raises(ValueError, match="has a flow head, which gives no logits"):
        gen.sample(LABELS, **settings)


def test_settings_of_the_other_head_are_refused(gen):
    with pytest.raises(ValueError, match="num_steps=1"):
        gen.sample(LABELS, num_steps=1)
    with pytest.raises(ValueError, match="flow head, which gives no logits"):
        gen.logits(np.zeros((1, 8), int), [0])
    categorical = scored_models.generator()
    for settings in ({"num_steps": 4}, {"continuous": True}):
        with pytest.raises(ValueError, match="this one draws codes from logits"):
            categorical.sample([0], **settings)
    with pytest.raises(ValueError, match=r"head='both' is not one of categorical, flow"):
        dataclasses.replace(TINY, head="both")


def test_nothing_is_written_in_the_published_layout(gen, tmp_path):
    with pytest.raises(CheckpointError, match="flow head has no published counterpart"):
        df.save_pytorch(gen, tmp_path / "gen.safetensors")
    assert not list(tmp_path.iterdir())


def test_vectors_are_decoded_as_they_are():
    tokenizer = scored_models.tokenizer()
    codes = np.arange(16).reshape(2, 8)
    rows = np.asarray(tokenizer.params["codebook"])[codes]
    np.testing.assert_allclose(tokenizer.decode(3 * rows), tokenizer.decode(codes), atol=1e-5)
    for vectors, message in (
        (rows[..., :-1], r"expected floats \[B, n, 8\]"),
        (codes[..., None].repeat(8, -1), r"expected floats \[B, n, 8\]"),
        (np.full_like(rows, np.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizer.decode(vectors)


# ----------------------------------------------------------------------------------------- training


def task_config(*overrides):
    config = load_config(f"{CONFIGS / 'generator.py'}:digits:head=flow", list(overrides))
    config.model.update(width=16, depth=1, num_heads=2, multiple_of=8, code_dim=DIM)
    config.model.update(flow_width=16, flow_depth=1, flow_head_dim=8)
    config.model.update(num_tokens=8, group_size=2, codebook_size=16, num_classes=3)
    config.optim.update(lr=1e-2, warmup_steps=2)
    return config


def batch_of(correct=True):
    codes = np.random.default_rng(0).integers(0, 16, (8, 8, 3)).astype(np.int32)
    codes = codes if correct else codes[..., :1].repeat(3, axis=-1)
    return {"codes": codes, "label": np.arange(8, dtype=np.int32) % 3}


@pytest.fixture(scope="module")
def trained():
    """(states, losses) of 40 steps on one batch, without correction pairs."""
    task = tasks.make_task(task_config("--config.loss.correction=0.0"))
    step, states, losses = step_function(task), [start(task)], []
    for _ in range(40):
        state, metrics = step(states[-1], batch_of(), {})
        states.append(state)
        losses.append(float(metrics["loss"]))
    return states, losses


def test_a_batch_is_learnt(trained):
    _, losses = trained
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_the_codebook_is_never_trained(trained):
    states, _ = trained
    first, last = states[0], states[-1]
    np.testing.assert_array_equal(first.params["codebook"], last.params["codebook"])
    np.testing.assert_array_equal(first.params["codebook"], last.ema["codebook"])
    paths = jax.tree_util.tree_leaves_with_path(first.params)
    for (path, a), b in zip(paths, jax.tree.leaves(last.params), strict=True):
        name = jax.tree_util.keystr(path)
        assert "codebook" in name or (np.asarray(a) != np.asarray(b)).any(), name
    assert not any(
        "codebook" in jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(first.opt_state)
    )


def test_correction_pairs_are_inputs_and_targets():
    """With the pairs alone, a step's loss is that of (input, label) and not of the clean codes."""
    config, batch = task_config("--config.loss.correction=1.0"), batch_of()
    task = tasks.make_task(config)
    state = start(task)
    _, metrics = step_function(task)(state, batch, {})
    # The same by hand, from the key of the step.
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    _, label_key, dropout_key = jax.random.split(key, 3)
    c = generator_task.model_config(config.model)
    labels = layers.drop_labels(label_key, batch["label"], c)
    drawn = generator_task.draw(jax.random.fold_in(key, 3), c, 8)
    loss = jax.jit(functools.partial(generator_task.flow_loss, FlowGenerator(c)))

    def by_hand(given, target):
        rows = batch["codes"][..., given], batch["codes"][..., target]
        return float(loss(state.params, *rows, labels, *drawn, dropout_key))

    assert float(metrics["loss"]) == pytest.approx(by_hand(1, 2), rel=1e-5)
    assert float(metrics["loss"]) != pytest.approx(by_hand(0, 0), rel=1e-3)
    assert float(metrics["loss"]) != pytest.approx(by_hand(2, 2), rel=1e-3)


def test_times_are_one_per_draw():
    c = generator_task.model_config(task_config().model)
    assert c.draws().tolist() == [0, 1, 2, 2, 3, 3, 4, 4]
    times, noise = generator_task.draw(jax.random.key(0), c, 3)
    assert times.shape == (3, 5) and noise.shape == (3, 8, DIM)


# --------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """Codes of a few images by a random tokenizer: (tokenizer, folder)."""
    root, tokenizer = tmp_path_factory.mktemp("codes"), scored_models.tokenizer()
    toy_images.make_folder(root / "images", 24)
    source = data.make_source(f"folder:{root / 'images'}")
    extract_codes.extract(tokenizer, source, str(root / "codes"), crops="center")
    return tokenizer, root / "codes"


def run_config(folder, steps):
    config = task_config(f"--config.data.source=codes:{folder}", "--config.tensorboard=False")
    config.model.update(num_classes=None, codebook_size=None, code_dim=None, num_tokens=8)
    config.update(batch_size=8, total_steps=steps, log_every=2, checkpoint_every=0)
    config.optim.warmup_steps = 1
    config.score.decoder = "none"  # no pictures
    return config


def test_a_run_takes_the_codebook_and_samples(codes, tmp_path):
    tokenizer, folder = codes
    train(run_config(folder, 2), str(tmp_path / "run"))
    gen = df.load_generator(tmp_path / "run")
    assert gen.config.head == "flow" and gen.config.code_dim == 8
    np.testing.assert_array_equal(gen.params["codebook"], tokenizer.params["codebook"])
    api.check_pair(tokenizer, gen)
    made = gen.sample([0, 1], num_steps=4)
    assert tokenizer.decode(made).shape == (2, 16, 16, 3)


@pytest.mark.full
def test_an_interrupted_run_ends_with_the_same_bits(codes, tmp_path):
    train(run_config(codes[1], 4), str(tmp_path / "whole"))
    config = run_config(codes[1], 4)
    config.checkpoint_every = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detailflow_jax.train.Run.next_batch", ends_after(2))
        with pytest.raises(KeyboardInterrupt):
            train(config, str(tmp_path / "parts"))
    train(config, str(tmp_path / "parts"))
    for ema in (False, True):
        whole, resumed = (restore_params(tmp_path / x, ema=ema) for x in ("whole", "parts"))
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
            np.testing.assert_array_equal(a, b)


def ends_after(steps):
    real = Run.next_batch

    def next_batch(self, step, state):
        if step == steps:
            raise KeyboardInterrupt
        return real(self, step, state)

    return next_batch


def test_a_folder_without_a_codebook_says_what_to_do(codes, tmp_path):
    tokenizer, _folder = codes
    toy_images.make_folder(tmp_path / "images", 24)
    source = data.make_source(f"folder:{tmp_path / 'images'}")
    out = tmp_path / "codes"
    extract_codes.extract(tokenizer, source, str(out), crops="center")
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / data.CODEBOOK).unlink()
    with pytest.raises(NotFoundError, match="run the same extraction again, it adds the file"):
        train(run_config(out, 2), str(tmp_path / "run"))
    extract_codes.extract(tokenizer, source, str(out), crops="center")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept
    np.save(out / data.CODEBOOK, np.zeros((3, 8), np.float32))
    with pytest.raises(ConfigError, match=r"expected finite float32 \[64, d\]"):
        train(run_config(out, 2), str(tmp_path / "run"))


def test_a_run_does_not_start_from_a_published_model(codes, tmp_path):
    config = run_config(codes[1], 2)
    config.init_from.model = str(tmp_path)
    with pytest.raises(CheckpointError, match="a flow head starts from scratch"):
        train(config, str(tmp_path / "run"))
