"""Pictures of samples while a generator trains, through the tokenizer that made its codes."""

import jax
import numpy as np
import pytest

import detailflow_jax as df
import scored_models
from detailflow_jax import data
from detailflow_jax.inference import extract_codes
from detailflow_jax.inference.drawing import make_drawer
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.config import load_config
from detailflow_jax.tasks import TrainState


@pytest.fixture
def codes(tmp_path):
    df.save_pytorch(scored_models.tokenizer(), tmp_path / "tok.safetensors")
    tokenizer = df.load_tokenizer(tmp_path / "tok.safetensors")
    images = tmp_path / "images"
    scored_models.save_pictures(images, scored_models.images(6, seed=1), "{}/x.png")
    source = data.make_source(f"folder:{images}")
    manifest = extract_codes.extract(tokenizer, source, str(tmp_path / "codes"), crops="center")
    assert manifest["network"] == str(tmp_path / "tok.safetensors")
    return tmp_path


def drawer_of(folder, encoded_by, names=("a", "b", "c"), **overrides):
    config = load_config(f"configs/generator.py:digits:codes={folder / 'codes'}")
    with config.unlocked():
        config.model = dict(scored_models.generator().config.__dict__)
    config.score.update(overrides)
    mesh = sharding.make_mesh({}, jax.devices())
    with sharding.use(mesh):
        return make_drawer(config, mesh, encoded_by, names)


@pytest.mark.full
def test_samples_are_those_of_the_doors(codes):
    generator = scored_models.generator()
    tokenizer = df.load_tokenizer(codes / "tok.safetensors")
    drawer = drawer_of(codes, tokenizer.encoder_fingerprint)
    state = TrainState(step=2, params=generator.params, opt_state=None, ema=None)
    picture = drawer(state)["samples"]
    labels = np.tile([0, 1, 2], 4)
    want = df.to_uint8(tokenizer.decode(generator.sample(labels, cfg_scale=1.5)))
    side, padding = scored_models.SIZE, 2
    top = picture.shape[0] - 4 * (side + padding)  # below the names of the classes
    for i, image in enumerate(want):
        row, column = divmod(i, 3)
        y, x = top + row * (side + padding), padding + column * (side + padding)
        found = picture[y : y + side, x : x + side]
        assert np.abs(found.astype(int) - image).max() <= 1, i


def test_without_its_tokenizer_there_are_no_pictures_and_the_log_says_so(codes, caplog):
    (codes / "tok.safetensors").rename(codes / "moved.safetensors")
    assert drawer_of(codes, "") is None
    assert "tok.safetensors cannot be read" in caplog.text
    moved = str(codes / "moved.safetensors")
    assert drawer_of(codes, "", decoder=moved) is not None
    assert drawer_of(codes, "f" * 32, decoder=moved) is None
    assert "is not what encoded the data any more" in caplog.text
    digits = load_config("configs/tokenizer.py:digits")
    assert make_drawer(digits, sharding.make_mesh({}), "", ()) is None
