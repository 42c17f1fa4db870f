"""Fingerprints travel with models, so that a decoder of another training is refused."""

import json
import types

import ml_collections
import numpy as np
import pytest

import detailflow_jax as df
from convert_models import TOKENIZER_HEADS, published, recorded
from detailflow_jax.convert import CheckpointError, start
from detailflow_jax.convert.__main__ import main
from detailflow_jax.convert.fingerprint import encoder_fingerprint
from detailflow_jax.runtime.config import read_config, write_config

CODEBOOK, PIXELS = "quantize.embedding.weight", "decoder.to_pixel.model.bias"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A tokenizer; one of other codes; one of the same codes whose decoder was trained on."""
    root, state = tmp_path_factory.mktemp("tok"), recorded("tokenizer_a")[0]
    changes = {
        "own": {},
        "other": {CODEBOOK: state[CODEBOOK] + np.float32(0.01)},
        "decoder": {PIXELS: state[PIXELS] + np.float32(0.01)},
    }
    paths = {name: published(root / name, "tokenizer_a", x) for name, x in changes.items()}
    return {name: df.load_tokenizer(path, **TOKENIZER_HEADS) for name, path in paths.items()}


def test_only_the_right_tokenizer_goes_with_a_generator(tmp_path, tokenizers):
    generator = df.load_generator(published(tmp_path / "gen", "generator_a"))
    assert generator.encoded_by == ""
    for tokenizer in tokenizers.values():  # Nothing is known: sizes alone are compared.
        df.check_pair(tokenizer, generator)

    generator.encoded_by = tokenizers["own"].encoder_fingerprint
    back = df.save_pytorch(generator, tmp_path / "published")
    assert "encoded_by" not in json.loads((back / "config.json").read_text())
    ours = str(tmp_path / "ours")
    assert main(["--to", "jax", "--src", str(back), "--dst", ours]) == 0
    for path in (back, ours):
        again = df.load_generator(path)
        assert again.encoded_by == generator.encoded_by
        df.check_pair(tokenizers["own"], again)
        df.check_pair(tokenizers["decoder"], again)
        with pytest.raises(df.InputError, match=r"was trained on the codes of an encoder with"):
            df.check_pair(tokenizers["other"], again)
    assert tokenizers["own"].fingerprint != tokenizers["decoder"].fingerprint


def test_a_run_keeps_to_its_encoder(tmp_path, monkeypatch):
    config = ml_collections.ConfigDict({"task": "flowar", "vae": {"path": None}, "data": {}})
    config.data.source = "latents:here"
    assert start.check_encoder(config, "", tmp_path / "new") == ""
    assert start.check_encoder(config, "a" * 32, tmp_path / "new") == "a" * 32
    write_config(config, tmp_path / "run", encoded_by="a" * 32)
    assert read_config(tmp_path / "run").encoded_by == "a" * 32
    assert start.check_encoder(config, "a" * 32, tmp_path / "run") == "a" * 32
    with pytest.raises(CheckpointError, match=r"started on the codes or latents of another enc"):
        start.check_encoder(config, "b" * 32, tmp_path / "run")

    params = {"encoder": {"w": np.ones(2)}, "quant_conv": {"w": np.ones(1)}, "decoder": {}}
    vae = types.SimpleNamespace(kind="vae", params=params)
    monkeypatch.setattr(start, "load_autoencoder", lambda fields: vae)
    monkeypatch.setattr(start, "load", lambda kind, path: vae)
    own = encoder_fingerprint("vae", params)
    config.vae.path = "runs/vae"
    assert start.check_encoder(config, "", tmp_path / "new") == own
    assert start.check_encoder(config, own, tmp_path / "new") == own
    with pytest.raises(
        CheckpointError, match=r"runs/vae is not the latent autoencoder that made the"
    ):
        start.check_encoder(config, "c" * 32, tmp_path / "new")
    config.vae.path, config.score = None, {"every": 10, "decoder": "runs/other"}
    assert start.check_encoder(config, own, tmp_path / "new") == own
    with pytest.raises(CheckpointError, match=r"config\.score\.decoder=runs/other is not the lat"):
        start.check_encoder(config, "c" * 32, tmp_path / "new")


def test_the_fingerprint_of_an_encoder():
    params = {"encoder": {"w": np.ones(2)}, "quant_conv": {"w": np.ones(1)}, "decoder": {"w": 1.0}}
    whole = encoder_fingerprint("vae", params)
    assert encoder_fingerprint("vae", params | {"decoder": {"w": 2.0}}) == whole
    assert encoder_fingerprint("vae", params | {"encoder": {"w": np.zeros(2)}}) != whole
