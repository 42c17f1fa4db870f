"""The generator against recorded numbers, and the resolution map against the published tables."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_files
from detailflow_jax.convert import mapping
from detailflow_jax.convert.tables import generator as names
from detailflow_jax.inference import rules
from detailflow_jax.models import layers, sampler
from detailflow_jax.models.generator import Generator, GeneratorConfig
from detailflow_jax.ops import logits as filters
from detailflow_jax.ops import masks, resolution, rotary
from detailflow_jax.tasks import generator as task

TOLERANCE = golden_files.GENERATOR


class Golden:
    """The recorded arrays, and the network with the recorded weights."""

    def __init__(self, name):
        self.arrays, self.settings, self.state_dict = golden_files.read(name)
        sizes = self.settings["gpt"]
        self.config = GeneratorConfig(
            width=sizes["dim"],
            depth=sizes["n_layer"],
            num_heads=sizes["n_head"],
            num_tokens=sizes["block_size"],
            group_size=sizes["group_size"],
            causal_num=sizes.get("causal_num"),
            codebook_size=sizes["vocab_size"],
            num_classes=sizes["num_classes"],
        )
        self.model = Generator(self.config)
        self.codes = self.arrays["idx"].astype(np.int32)
        self.labels = self.arrays["cond"].astype(np.int32)
        init = jax.eval_shape(self.model.init, jax.random.key(0), self.codes, self.labels)
        self.params, self.report = mapping.from_published(
            names.TABLE, self.state_dict, nn.unbox(init)["params"], skip=names.SKIPPED
        )

    @functools.cached_property
    def loss_and_gradients(self):
        loss = functools.partial(task.cross_entropy, self.model)
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))
        targets = self.arrays["tgt"].astype(np.int32)
        return compiled(self.params, self.codes, targets, self.labels)


@pytest.fixture(scope="module", params=["generator_a", "generator_causal8"])
def golden(request):
    return Golden(request.param)


def assert_near(got, want):
    assert golden_files.error(got, want) <= TOLERANCE


def test_every_recorded_weight_is_used(golden):
    assert not golden.report.missing and not golden.report.unused


def test_logits(golden):
    logits = jax.jit(golden.model.apply)({"params": golden.params}, golden.codes, golden.labels)
    assert logits.dtype == jnp.float32
    assert_near(logits, golden.arrays["logits"])


def test_loss_and_accuracy(golden):
    (loss, accuracy), _ = golden.loss_and_gradients
    assert_near(loss, golden.arrays["loss"])
    best = golden.arrays["logits"].argmax(-1)
    assert float(accuracy) == pytest.approx(np.mean(best == golden.arrays["tgt"]))


def test_gradients(golden):
    got = mapping.to_published(names.TABLE, golden.loss_and_gradients[1])
    want = {k.removeprefix("grad/"): v for k, v in golden.arrays.items() if k.startswith("grad/")}
    assert set(got) == set(want)
    for name, value in want.items():
        assert golden_files.error(got[name], value) <= TOLERANCE, name


@pytest.mark.parametrize("decoding", ["greedy", "greedy_gradual"])
def test_greedy_decoding(golden, decoding):
    scan = golden.config.causal == 4  # one file in each layout
    c = dataclasses.replace(golden.config, scan=scan)
    scales = filters.guidance_scales(
        golden.settings["cfg_scale"],
        c.num_tokens,
        c.group_size,
        c.causal,
        gradual=decoding == "greedy_gradual",
    )
    codes = sampler.sample(
        Generator(c),
        golden.params if scan else layers.unstack_layers(golden.params),
        golden.labels,
        sampler.sample_keys(0, jnp.arange(2)),
        scales,
        (rules.Greedy(),),
        options=sampler.SamplingOptions(c.num_tokens),
    )
    np.testing.assert_array_equal(codes, golden.arrays[decoding])


@pytest.mark.parametrize(("k", "p"), [(10, 1.0), (0, 0.9), (20, 0.8)])
def test_filters(golden, k, p):
    want = golden.arrays[f"filter/k{k}_p{f'{p:g}'.replace('.', '')}"]
    got = filters.top_k_filter(jnp.asarray(golden.arrays["filter/logits"]), k)
    if p < 1:
        got = filters.top_p_filter(got, p)
    assert 0 < np.isinf(want).sum() < want.size
    np.testing.assert_array_equal(got, want)  # the kept logits unchanged, the others -inf


def test_rotary_table(golden):
    c = golden.config
    table = rotary.group_rotary_table(c.num_tokens, c.group_size, c.head_dim)
    assert_near(table, golden.arrays["freqs_cis"])
    assert not table[0].any()
    np.testing.assert_array_equal(c.rope(), table[: c.num_tokens])


def test_mask(golden):
    c = golden.config
    mask = masks.group_mask(c.num_tokens, c.group_size, c.causal)
    np.testing.assert_array_equal(mask, golden.arrays["mask"])


# --------------------------------------------------------------------------------- resolution map

TABLES = json.loads((golden_files.FOLDER / "resolution_map.json").read_text())


@pytest.mark.parametrize("table", TABLES, ids=lambda t: f"{t['max_img_size']}-{t['max_token_num']}")
def test_resolution_map(table):
    found = resolution.ResolutionMap(
        image_size=table["max_img_size"],
        num_tokens=table["max_token_num"],
        group_size=table["group_size"],
        causal_num=table["causal_num"] or table["group_size"],
        patch_size=16,
        power=table["p"],
    )
    counts, sizes = found.token_counts, table["decres2besttoken"]
    assert {str(n): found.resolution(n) for n in counts} == table["token2res"]
    assert {str(n): found.decoded_size(n) for n in counts} == table["token2dec_out_res"]
    assert {size: found.best_count(int(size)) for size in sizes} == sizes
    assert {str(found.decoded_size(n)) for n in counts} == set(sizes)


def test_there_are_six_resolution_maps():
    assert len(TABLES) == 6
