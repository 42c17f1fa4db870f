"""The cached sampler: exactness of the cache, independence of the batch, what compiles, chances."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detailflow_jax.inference import api
from detailflow_jax.inference.rules import Greedy, published_rules
from detailflow_jax.models import layers, sampler
from detailflow_jax.models.generator import Generator, GeneratorConfig
from detailflow_jax.ops import logits as filters

CODES, CLASSES = 32, 5
TINY = GeneratorConfig(
    width=32,
    depth=2,
    num_heads=4,
    multiple_of=16,
    num_tokens=16,
    group_size=4,
    codebook_size=CODES,
    num_classes=CLASSES,
)


def random_params(config, seed=0):
    """Weights large enough that codes and labels change the logits by much, scanned layout."""
    scanned = dataclasses.replace(config, scan=True)
    codes, labels = jnp.zeros((1, config.num_tokens), int), jnp.zeros((1,), int)
    init = jax.eval_shape(Generator(scanned).init, jax.random.key(0), codes, labels)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        std = 1.0 if path[-1].key in ("embedding", "scale") else leaf.shape[-2] ** -0.5
        return jnp.asarray(std * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(init)["params"])


def run_sampler(config, params, labels, options, *rules, scale=2.0, seed=0):
    scales = filters.guidance_scales(scale, config.num_tokens, config.group_size, config.causal)
    return np.asarray(
        sampler.sample(
            Generator(config),
            params if config.scan else layers.unstack_layers(params),
            jnp.asarray(labels, jnp.int32),
            sampler.sample_keys(seed, jnp.arange(len(labels))),
            scales,
            rules,
            options=options,
        )
    )


# ------------------------------------------------------------------------------------- exactness


@functools.cache
def teacher_forcing(config):
    return jax.jit(Generator(config).apply)


def recompute(config, params, labels, *, guided, scale=2.0):
    """Greedy decoding without a cache: teacher forcing over everything, once per step."""
    logits_of = teacher_forcing(dataclasses.replace(config, scan=True))
    classes = np.concatenate([labels, np.full_like(labels, CLASSES)]) if guided else labels
    codes = np.zeros((len(labels), config.num_tokens), np.int32)
    start = 0
    while start < config.num_tokens:
        stop = start + (1 if start < config.causal else config.group_size)
        rows = np.concatenate([codes, codes]) if guided else codes
        logits = np.asarray(logits_of({"params": params}, rows, classes))[:, start:stop]
        if guided:
            conditional, null = np.split(logits, 2)
            logits = null + (conditional - null) * scale
        codes[:, start:stop] = logits.argmax(-1)
        start = stop
    return codes


CASES = {
    # name: changed fields of the network, guided, further token counts to ask for
    "one group causal": ({}, True, []),
    "two groups causal": ({"causal_num": 8}, False, [3, 12]),
    "none causal": ({"causal_num": 0}, True, [4, 12]),
    "none causal, no groups either": (
        {"num_tokens": 6, "group_size": 1, "causal_num": 0},
        True,
        [],
    ),
    "none causal, one group": ({"num_tokens": 4, "causal_num": 0, "scan": False}, False, []),
    "all causal": ({"causal_num": 16}, True, []),
    "groups of one": ({"num_tokens": 6, "group_size": 1}, True, []),
    "one kv head": ({"num_kv_heads": 1, "group_size": 2, "causal_num": 4}, True, []),
    "unrolled, two kv heads": ({"num_kv_heads": 2, "scan": False}, False, []),
}


QUICK = ("two groups causal", "none causal", "groups of one", "one kv head")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.full)
        for name, case in CASES.items()
    ],
)
def test_cache_equals_recomputation(case):
    fields, guided, counts = case
    config = dataclasses.replace(TINY, **fields)
    params, labels = random_params(config), np.array([0, 3, 4], np.int32)
    want = recompute(config, params, labels, guided=guided)
    assert len(np.unique(want)) > 2  # the network does not repeat itself
    for count in [config.num_tokens, *counts]:
        options = sampler.SamplingOptions(count, guided=guided)
        got = run_sampler(config, params, labels, options, Greedy())
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, want[:, :count])


def test_groups_of_one_have_no_table_without_rows():
    """They read no special embedding, and a checkpoint refuses an array of no rows."""
    params = random_params(dataclasses.replace(TINY, group_size=1))
    assert "special_embedding" not in params
    assert all(leaf.size for leaf in jax.tree.leaves(params))


# --------------------------------------------------------------------- what a sample depends on


@pytest.fixture(scope="module")
def gen():
    return api.Generator(TINY, random_params(TINY))


LABELS = np.arange(7) % CLASSES


@pytest.fixture(scope="module")
def samples(gen):
    return gen.sample(LABELS, seed=3)


@pytest.mark.slow
# With 3 the last batch is padded.
@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.full), 3])
def test_batch_size_does_not_matter(gen, samples, batch_size):
    np.testing.assert_array_equal(gen.sample(LABELS, seed=3, batch_size=batch_size), samples)


def test_parts_of_a_set_equal_the_whole(gen, samples):
    rest = gen.sample(LABELS[4:], seed=3, first_index=4, batch_size=3)
    np.testing.assert_array_equal(rest, samples[4:])


def test_seed_and_index_matter(gen, samples):
    np.testing.assert_array_equal(gen.sample(LABELS, seed=3), samples)
    assert (gen.sample(LABELS, seed=4) != samples).mean() > 0.5
    assert LABELS[0] == LABELS[5] and (samples[0] != samples[5]).any()


def test_one_program_for_a_sweep(gen, samples):
    def programs():
        return sampler.sample._cache_size()

    before = programs()
    first = gen.sample(LABELS, seed=3, top_p=0.8)  # the filter is another program
    assert programs() == before + 1
    assert (first != samples).any()
    for changed in (
        {"cfg_scale": 4.0},
        {"temperature": 0.5},
        {"top_p": 0.3},
        {"gradual_cfg": True, "cfg_scale": 6.0},
    ):
        other = gen.sample(LABELS, **({"seed": 3, "top_p": 0.8} | changed))
        assert (other != first).any(), changed
    assert programs() == before + 1


def test_guidance_of_one_computes_no_null_half(gen, monkeypatch):
    """The programs that `api` asks for, by the number of rows in them."""
    doubled = []
    real = sampler.sample

    def spy(network, *args, options):
        program = jax.make_jaxpr(functools.partial(real, network, options=options))(*args)
        doubled.append(bool(re.search(r"f32\[14,", str(program))))
        return jnp.zeros((7, 16), jnp.int32)

    monkeypatch.setattr(sampler, "sample", spy)
    for scale in (1.0, 1.01):
        gen.sample(LABELS, cfg_scale=scale)
    assert doubled == [False, True]


# -------------------------------------------------------------------------------- group by group

STREAMED = {  # fields of the network, settings, programs
    "one group causal": ({}, {"temperature": 0.7}, 3),
    "two groups causal": ({"causal_num": 8}, {"cfg_scale": 1.0}, 4),
    "none causal": ({"causal_num": 0, "num_tokens": 12}, {"gradual_cfg": True}, 2),
    "all causal": ({"causal_num": 16}, {"num_tokens": 14}, 2),
    "groups of one": ({"num_tokens": 6, "group_size": 1}, {}, 3),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if "groups causal" in name else pytest.mark.full)
        for name, case in STREAMED.items()
    ],
)
def test_streamed_codes_are_those_of_one_program(case, monkeypatch):
    fields, settings, programs = case
    config = dataclasses.replace(TINY, **fields)
    gen = api.Generator(config, random_params(config))
    calls, real = [], sampler._stage
    before = real._cache_size()

    def spy(*args, **options):
        calls.append(options["kind"])
        return real(*args, **options)

    monkeypatch.setattr(sampler, "_stage", spy)
    want = gen.sample(LABELS, seed=3, **settings)
    ends = *range(config.group_size, want.shape[1], config.group_size), want.shape[1]
    for group, (codes, end) in enumerate(
        zip(gen.stream(LABELS, seed=3, **settings), ends, strict=True)
    ):
        assert len(calls) == group + 1  # no later group is drawn before this one is given
        np.testing.assert_array_equal(codes, want[:, :end])
    assert real._cache_size() == before + programs
    # The other kinds of group are no other programs with another seed and guidance.
    if "cfg_scale" not in settings:
        *_, last = gen.stream(LABELS, seed=4, cfg_scale=1.7, **settings)
        assert real._cache_size() == before + programs and (last != want).any()


def test_a_stream_says_at_once_what_is_wrong(gen):
    with pytest.raises(ValueError, match="5"):
        gen.stream([CLASSES])
    with pytest.raises(ValueError, match="temperature"):
        gen.stream([0], temperature=0.0)


# ----------------------------------------------------------------------------------------- chances


def probabilities(logits, temperature, top_k, top_p):
    """The published order, written out: temperature, top-k, top-p (the crossing code stays)."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    p[np.argsort(-p)[top_k:]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    keep = np.cumsum(p[order]) - p[order] <= top_p
    p[order[~keep]] = 0
    return p / p.sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [pytest.param(0.7, 4, 1.0, marks=pytest.mark.full), (1.5, 6, 0.8)],
)
def test_first_token_has_the_chances_of_its_logits(temperature, top_k, top_p):
    config = dataclasses.replace(TINY, num_tokens=1, group_size=1, codebook_size=8)
    params, count, scale = random_params(config, seed=1), 4000, 1.5
    rules = published_rules(temperature, top_k, top_p)
    options = sampler.SamplingOptions(1)
    codes = run_sampler(config, params, np.full(count, 2), options, *rules, scale=scale)
    logits = Generator(config).apply(
        {"params": params}, np.zeros((2, 1), int), np.array([2, CLASSES])
    )
    conditional, null = np.asarray(logits, np.float64)[:, 0]
    want = probabilities(null + (conditional - null) * scale, temperature, top_k, top_p)
    got = np.bincount(codes[:, 0], minlength=8) / count
    assert (got[want == 0] == 0).all()
    assert (np.abs(got - want) <= 5 * np.sqrt(want * (1 - want) / count) + 1e-9).all()


@pytest.mark.slow
def test_positions_and_steps_draw_independently():
    config = dataclasses.replace(TINY, num_tokens=8, codebook_size=4)
    params = random_params(config)
    params["output"]["kernel"] = jnp.zeros_like(params["output"]["kernel"])  # all codes alike
    count = 2000
    codes = run_sampler(
        config, params, np.zeros(count), sampler.SamplingOptions(8, guided=False), seed=5
    )
    margin = 5 * np.sqrt(0.25 * 0.75 / count)
    for code in range(4):
        assert np.abs((codes == code).mean(0) - 0.25).max() < margin
    equal = (codes[:, :, None] == codes[:, None, :]).mean(0)[~np.eye(8, dtype=bool)]
    assert np.abs(equal - 0.25).max() < margin
    neighbours = (codes[1:] == codes[:-1]).mean(0)
    assert np.abs(neighbours - 0.25).max() < margin
