"""The Python doors: what they give, what they refuse, and loading a run."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

import detailflow_jax as df
from detailflow_jax import tasks
from detailflow_jax.convert.errors import CheckpointError
from detailflow_jax.inference import api, checks
from detailflow_jax.models import generator as generator_network
from detailflow_jax.models import layers, siglip
from detailflow_jax.models import tokenizer as tokenizer_network
from detailflow_jax.runtime.checkpoint import CheckpointError as RunError
from detailflow_jax.runtime.checkpoint import Checkpoints
from detailflow_jax.runtime.config import load_config, write_config
from detailflow_jax.runtime.errors import ConfigError
from random_weights import TRUNK, random_like

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
VIT = siglip.ViTConfig(**TRUNK)


@pytest.fixture(scope="module")
def tok():
    config = tokenizer_network.TokenizerConfig(
        image_size=16, num_tokens=8, group_size=2, codebook_size=32, encoder=VIT, decoder=VIT
    )
    init = tokenizer_network.Tokenizer(config).init
    abstract = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    return df.Tokenizer(config, random_like(abstract)["params"])


@pytest.fixture(scope="module")
def gen():
    config = generator_network.GeneratorConfig(
        width=16,
        depth=2,
        num_heads=2,
        multiple_of=8,
        num_tokens=8,
        group_size=2,
        causal_num=4,
        codebook_size=32,
        num_classes=3,
    )
    init = generator_network.Generator(config).init
    codes, labels = jnp.zeros((1, 8), jnp.int32), jnp.zeros((1,), jnp.int32)
    abstract = jax.eval_shape(init, jax.random.key(0), codes, labels)
    return df.Generator(config, random_like(abstract)["params"])


def pictures(count=3, size=16):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


# -------------------------------------------------------------------------------------- the doors


@pytest.fixture(scope="module")
def codes(tok):
    return tok.encode(pictures())


def test_encode(tok, codes):
    assert codes.shape == (3, 8) and codes.dtype == np.int32
    assert codes.min() >= 0 and codes.max() < 32 and len(np.unique(codes)) > 2
    np.testing.assert_array_equal(tok.encode(pictures() / np.float32(127.5) - 1), codes)
    # Padded batches give the same.
    np.testing.assert_array_equal(tok.encode(pictures(), batch_size=2), codes)


def test_decode(tok, codes):
    whole = tok.decode(codes)
    assert whole.shape == (3, 16, 16, 3) and whole.dtype == np.float32
    np.testing.assert_allclose(tok.decode(codes, batch_size=2), whole, atol=1e-5)
    few = tok.decode(codes[:, :1])
    assert few.shape == (3, 8, 8, 3)  # what one token maps to
    assert tok.decode(codes[:, :1], size=16).shape == whole.shape
    assert np.abs(whole - tok.decode((codes + 1) % 32)).max() > 1e-3


def test_logits(gen):
    codes = np.arange(16).reshape(2, 8)
    logits = gen.logits(codes, [0, 3])
    assert logits.shape == (2, 8, 32) and logits.dtype == np.float32
    np.testing.assert_array_equal(gen.logits(codes[:, :6], [0, 3]), logits)
    # Position p holds the logits of z_{p+1}: the last group is predicted, never read.
    assert np.abs(gen.logits(codes, [1, 3])[0] - logits[0]).max() > 1e-3


def test_samples_fit_their_tokenizer(tok, gen):
    codes = gen.sample([0, 1, 2, 2], seed=1)
    assert codes.shape == (4, 8) and codes.dtype == np.int32
    assert tok.decode(codes).shape == (4, 16, 16, 3)
    api.check_pair(tok, gen_like(gen, causal_num=2))
    with pytest.raises(ValueError, match="causal is 4 in the generator and 2 in the tokenizer"):
        api.check_pair(tok, gen)


def gen_like(gen, **fields):
    return df.Generator(dataclasses.replace(gen.config, **fields), gen.params)


def test_a_model_trained_without_classes_samples_the_null_class(gen):
    table = dict(gen.params["class_embedding"])
    (name, rows), *_ = table.items()
    null = {**gen.params, "class_embedding": {name: rows.at[:3].set(rows[3])}}
    unconditional = gen_like(gen, class_dropout=1.0)
    for labels in ([0, 1, 2, 2], [1, 0, 0, 1]):
        expected = df.Generator(gen.config, null).sample(labels, seed=1, cfg_scale=2.0)
        np.testing.assert_array_equal(unconditional.sample(labels, seed=1, cfg_scale=2.0), expected)


def test_layout_does_not_matter(gen):
    """Scanned or unrolled parameters make the same model, in the layout of this backend."""
    scanned = layers.stack_layers(gen.params)
    other = df.Generator(dataclasses.replace(gen.config, scan=True), scanned)
    assert other.config == gen.config and not gen.config.scan  # tests run on a CPU
    assert other.fingerprint == gen.fingerprint
    changed = jax.tree.map(lambda leaf: leaf, gen.params)
    changed["output"] = {"kernel": changed["output"]["kernel"].at[0, 0].add(1e-3)}
    assert df.Generator(gen.config, changed).fingerprint != gen.fingerprint
    assert "0.0M parameters from memory" in repr(gen)


# --------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": [0, 3]}, r"labels \[3\] are out of range, expected 0\.\.2"),
        ({"labels": [-1]}, r"labels \[-1\]"),
        ({"labels": []}, "labels are"),
        ({"labels": [0.5]}, "labels are float64"),
        ({"labels": [[0]]}, r"labels are int64 \(1, 1\)"),
        ({"cfg_scale": 0.9}, "cfg_scale=0.9, expected >= 1"),
        ({"cfg_scale": float("nan")}, "cfg_scale=nan"),
        ({"temperature": 0}, "temperature=0, expected > 0.*greedy=True"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"num_tokens": 5}, r"num_tokens=5 .* 1\.\.4, then multiples of 2 up to 8"),
        ({"num_tokens": 0}, "num_tokens=0"),
        ({"num_tokens": -2}, "num_tokens=-2"),
        ({"num_tokens": 10}, "num_tokens=10"),
        ({"num_tokens": 2.5}, "num_tokens=2.5, expected a whole number"),
        ({"cfg_scale": float("inf")}, "cfg_scale=inf, expected >= 1"),
        ({"cfg_scale": "2"}, "cfg_scale='2', expected >= 1"),
        ({"temperature": float("inf")}, "temperature=inf, expected > 0"),
        ({"temperature": "1"}, "temperature='1', expected > 0"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"top_k": 2.5}, "top_k=2.5, expected a whole number of at least 0"),
        ({"top_k": True}, "top_k=True, expected a whole number"),
        ({"seed": -1}, "seed=-1, expected a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed=4294967296, expected"),
        ({"seed": 0.5}, "seed=0.5, expected"),
        ({"seed": None}, "seed=None, expected"),
        ({"batch_size": 2.5}, "batch_size=2.5, expected a whole number of at least 1"),
        ({"batch_size": True}, "batch_size=True"),
        ({"first_index": -1}, "first_index=-1"),
        ({"first_index": 2**31}, "first_index=2147483648, expected a whole number from 0 to"),
    ],
)
def test_sample_refuses(gen, settings, unchecked, message):
    with pytest.raises(ValueError, match=message):
        gen.sample(**({"labels": [0]} | settings))


def test_images_in_lists_are_the_same(tok, codes, unchecked):
    np.testing.assert_array_equal(tok.encode(pictures().tolist()), codes)
    np.testing.assert_array_equal(tok.encode([*map(Image.fromarray, pictures())]), codes)
    np.testing.assert_array_equal(tok.encode(torch.from_numpy(pictures())), codes)
    assert tok.encode(pictures(0)).shape == (0, 8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([pictures()[0], pictures()[1][:8]], "images cannot become an array: .* inhomogeneous"),
        (torch.ones(1, 16, 16, 3, requires_grad=True), r"images cannot become .*detach\(\)"),
        (torch.ones(1, 16, 16, 3).bfloat16(), "images cannot become an array: .*BFloat16"),
        (pictures().astype(object), "images are object; expected uint8"),
        ((pictures().astype(int) * 1000).tolist(), "images are int64; expected uint8"),
        ("cat.png", "images have shape"),
    ],
)
def test_what_is_no_array_of_images_is_refused(tok, unchecked, images, message):
    with pytest.raises(df.InputError, match=message):
        tok.encode(images)


def test_whole_numbers_of_any_type_are_the_same(gen, unchecked):
    settings = {"num_tokens": np.int64(4), "top_k": np.uint8(3), "seed": 2.0, "first_index": 0.0}
    got = gen.sample([0], batch_size=np.int32(1), cfg_scale=np.float32(1.5), **settings)
    want = gen.sample([0], seed=2, num_tokens=4, top_k=3, batch_size=1)
    np.testing.assert_array_equal(got, want)
    with pytest.raises(df.InputError, match="seed=-1"):
        next(gen.stream([0], seed=-1))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((1, 5), int), r"num_tokens=5 .* 1\.\.2, then multiples of 2 up to 8"),
        (np.zeros((1, 0), int), "num_tokens=0"),
        (np.zeros((1, 10), int), "num_tokens=10"),
        (np.full((1, 8), 32), r"codes lie in \[32, 32\], expected \[0, 32\)"),
        (np.full((1, 8), -1), r"codes lie in \[-1, -1\]"),
        (np.zeros((1, 8)), "codes are float64"),
        (np.zeros(8, int), r"codes are int64 \(8,\)"),
    ],
)
def test_decode_refuses_codes(tok, codes, message):
    with pytest.raises(ValueError, match=message):
        tok.decode(codes)


@pytest.mark.parametrize("size", [0, -8, 12])
def test_decode_refuses_sizes(tok, size):
    with pytest.raises(ValueError, match=f"size={size} .*8 px"):
        tok.decode(np.zeros((1, 8), int), size=size)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (pictures()[0], ValueError, r"images have shape \(16, 16, 3\), expected \[B, H, W, 3\]"),
        (pictures()[..., :1], ValueError, r"shape \(3, 16, 16, 1\)"),
        (pictures(size=12), ValueError, "12 x 12, expected sides that are multiples of 8 px"),
        (pictures().astype(np.int32), TypeError, "images are int32; expected uint8"),
        (pictures() > 9, TypeError, "images are bool"),
    ],
)
def test_encode_refuses(tok, images, error, message):
    with pytest.raises(error, match=message):
        tok.encode(images)


@pytest.mark.parametrize(
    ("codes", "labels", "message"),
    [
        (np.zeros((1, 4), int), [0], "codes have 4 tokens, expected 8"),
        (np.full((1, 8), 99), [0], "codes lie in"),
        (np.zeros((1, 8), int), [4], r"labels \[4\] are out of range, expected 0\.\.3"),
        (np.zeros((2, 8), int), [0], "2 .* 1|1 .* 2"),
    ],
)
def test_logits_refuses(gen, codes, labels, message):
    with pytest.raises(ValueError, match=message):
        gen.logits(codes, labels)


# ------------------------------------------------------------------------------------------- runs


def save_run(config, workdir):
    """A workdir as training leaves it, with random parameters and another average."""
    state = jax.eval_shape(tasks.make_task(config).init, jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nn.unbox(state))
    state = zeros.replace(params=random_like(state.params), ema=random_like(state.ema, seed=1))
    write_config(config, workdir)
    with Checkpoints(workdir, keep=2) as checkpoints:
        checkpoints.save(3, state, {}, {"skipped": 0, "seconds": 0.0, "averages": {}})
    return state


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "tok"
    config = load_config(f"{CONFIGS / 'tokenizer.py'}:digits")
    config.model.update(image_size=16, num_tokens=8, group_size=2, codebook_size=32)
    for part in (config.model.encoder, config.model.decoder):
        part.update(**TRUNK)
    return str(workdir), save_run(config, workdir)


@pytest.fixture(scope="module")
def generator_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "gen"
    config = load_config(f"{CONFIGS / 'generator.py'}:digits")
    config.model.update(width=16, depth=2, num_heads=2, multiple_of=8, num_tokens=8, group_size=2)
    return str(workdir), save_run(config, workdir)


def assert_holds(model, params):
    want = layers.unstack_layers(params)
    assert jax.tree.structure(model.params) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_load_a_run(tokenizer_run, generator_run):
    for load, (workdir, state) in (
        (df.load_tokenizer, tokenizer_run),
        (df.load_generator, generator_run),
    ):
        assert_holds(load(workdir), state.ema)
        assert_holds(load(workdir, weights="model"), state.params)
        assert_holds(load(workdir, weights="ema", step=3), state.ema)
        assert load(workdir).source == workdir


def test_overrides(tokenizer_run, generator_run):
    tok = df.load_tokenizer(
        tokenizer_run[0], encoder_num_heads=4, decoder_num_heads=1, causal_num=4, image_size=32
    )
    found = tok.config
    assert (found.encoder.num_heads, found.decoder.num_heads) == (4, 1)
    assert (found.causal, found.image_size) == (4, 32)
    assert df.load_generator(generator_run[0], num_heads=4, group_size=2).config.num_heads == 4


def test_loading_refuses(tokenizer_run, generator_run, tmp_path):
    tok, gen = tokenizer_run[0], generator_run[0]
    with pytest.raises(ValueError, match=r"'num_head'.*num_heads"):
        df.load_generator(gen, num_head=4)
    with pytest.raises(ValueError, match=r"'encoder_heads'.*encoder_num_heads"):
        df.load_tokenizer(tok, encoder_heads=4)
    with pytest.raises(ValueError, match="causal_num=3"):
        df.load_generator(gen, causal_num=3)
    with pytest.raises(CheckpointError, match=r"holds a generator.*tokenizer"):
        df.load_tokenizer(gen)
    with pytest.raises(CheckpointError, match=r"holds a tokenizer.*generator"):
        df.load_generator(tok)
    with pytest.raises(ValueError, match="weights='best'"):
        df.load_tokenizer(tok, weights="best")
    with pytest.raises(RunError, match=r"no checkpoint of step 4 .* only \[3\]"):
        df.load_tokenizer(tok, step=4)


def test_loading_refuses_what_holds_no_model(tokenizer_run, tmp_path):
    with pytest.raises((CheckpointError, ConfigError), match=str(tmp_path / "nowhere")):
        df.load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises((CheckpointError, ConfigError), match=str(tmp_path / "empty")):
        df.load_generator(tmp_path / "empty")
    # Training that has not saved yet.
    (tmp_path / "young").mkdir()
    config = (pathlib.Path(tokenizer_run[0]) / "config.json").read_text()
    (tmp_path / "young" / "config.json").write_text(config)
    with pytest.raises(RunError, match=r"there are no checkpoints in .*young.*train there first"):
        df.load_tokenizer(tmp_path / "young")


def test_unknown_names_of_the_package():
    assert set(df.__all__) >= {"Generator", "Tokenizer", "load_generator", "load_tokenizer"}
    with pytest.raises(AttributeError, match="load_vqgan"):
        df.load_vqgan  # noqa: B018


def test_names_are_listed():
    assert set(df.__all__) <= set(dir(df))
    assert all(hasattr(df, name) for name in df.__all__)


@pytest.mark.parametrize("value", [200.0, -50.0, np.nan, np.inf])
def test_images_of_another_range_are_refused(value):
    images = np.zeros((2, 8, 8, 3), np.float32)
    images[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"expected floats about \[-1, 1\], or uint8"):
        checks.check_images(images, 3)
    checks.check_images(images[:1] - 1.5, 3)
    checks.check_images(np.full((1, 8, 8, 3), 200, np.uint8), 3)


def test_to_uint8_takes_the_floats_of_jax():
    images = jnp.full((1, 2, 2, 3), 0.5, jnp.bfloat16)
    np.testing.assert_array_equal(df.to_uint8(images), np.full((1, 2, 2, 3), 191, np.uint8))


def test_to_uint8():
    values = np.float32([-1.7, -1, -0.5, 0, 0.5, 1, 1.2]).reshape(1, 1, 7, 1)
    got = df.to_uint8(values)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got.ravel(), [0, 0, 64, 128, 191, 255, 255])
    for wrong, message in ((values * np.nan, "NaN"), (got, "uint8"), (values[0, 0, 0], "shape")):
        with pytest.raises(df.InputError, match=message if message != "shape" else r"\(1,\)"):
            df.to_uint8(wrong)
