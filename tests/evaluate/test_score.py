"""Scores during training: raw and averaged weights, in the metrics of a run, on any mesh."""

import jax
import numpy as np
import pytest

import detailflow_jax as df
import scored_models
from detailflow_jax.evaluate import generation, report, training
from detailflow_jax.evaluate.features import FeatureExtractor
from detailflow_jax.evaluate.references import load_reference
from detailflow_jax.ops import images as pixels
from detailflow_jax.runtime import sharding
from detailflow_jax.runtime.config import load_config
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks import TrainState
from detailflow_jax.train import train
from scored_models import SIZE, network


@pytest.fixture(autouse=True)
def features(monkeypatch):
    """Random projections in Inception's place."""
    monkeypatch.setattr(
        training, "load_extractor", lambda path, size, **_: FeatureExtractor(network())
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    df.save_pytorch(scored_models.tokenizer(), folder / "tok.safetensors")
    np.savez(folder / "reference.npz", scored_models.images())
    return folder


def generator_config(folder):
    """A configuration of `scored_models.generator`."""
    config = load_config("configs/generator.py:digits")
    with config.unlocked():
        config.model = dict(scored_models.generator().config.__dict__)
    config.score.update(every=2, num_samples=21, batch_size=8, cfg_scale=1.5)
    config.score.update(
        reference=str(folder / "reference.npz"), decoder=str(folder / "tok.safetensors")
    )
    return config


def test_samples_are_those_of_the_doors_on_any_mesh(folder, tmp_path):
    generator, tokenizer = scored_models.generator(), scored_models.tokenizer()
    config = generator_config(folder)
    average = jax.tree.map(lambda x: x * 1.1, generator.params)
    state = TrainState(step=2, params=generator.params, opt_state=None, ema=average)
    labels = np.arange(21) % 3
    extractor = FeatureExtractor(network())
    reference = load_reference(
        folder / "reference.npz", extractor, image_size=SIZE, cache=tmp_path / "cache"
    )
    want = {}
    for kind, params in (("raw", generator.params), ("ema", average)):
        codes = df.Generator(generator.config, params).sample(labels, cfg_scale=1.5)
        images = np.asarray(pixels.to_uint8(tokenizer.decode(codes)))
        features = {name: [rows] for name, rows in extractor(images).items()}
        scores = generation.score(features.get, reference, extractor.mesh)
        for name, value in scores.items():
            want[f"score/{kind}/{name}_of_21"] = value
    for devices in (1, len(jax.devices())):
        mesh = sharding.make_mesh({}, jax.devices()[:devices])
        found = training.make_scorer(config, mesh, tmp_path)(state)
        assert found == pytest.approx(want, rel=1e-4) and len(found) == 10
        assert found["score/raw/fid_of_21"] != found["score/ema/fid_of_21"]


@pytest.mark.full
def test_a_run_scores_its_tokenizer(tmp_path):
    """Real training on digits: reconstructions of held-out images get better, in metrics.jsonl."""
    overrides = {
        "total_steps": 6, "log_every": 4, "figures_every": 0, "tensorboard": False,
        "score.every": 3, "score.reference": "digits:test", "score.num_samples": 20,
        "score.features": False, "full_probability": 1.0, "correction.enabled": False,
    }  # fmt: skip
    config = load_config(
        "configs/tokenizer.py:digits:runlocal", [f"--config.{k}={v}" for k, v in overrides.items()]
    )
    train(config, str(tmp_path))
    lines = report.read_metrics(tmp_path)
    scored = [line for line in lines if "score/ema/psnr_of_20" in line]
    assert [line["step"] for line in lines] == [3, 4, 6]
    assert [line["step"] for line in scored] == [3, 6]
    names = {name for name in scored[0] if name.startswith("score/")}
    kinds = {f"score/{kind}/{name}_of_20" for kind in ("raw", "ema") for name in ("psnr", "ssim")}
    assert names == kinds
    assert scored[1]["score/raw/psnr_of_20"] > scored[0]["score/raw/psnr_of_20"]


@pytest.mark.parametrize(("network", "name"), [("pixels", "pixels"), ("encoder", "tokenizer")])
def test_samples_are_scored_without_a_download(folder, tmp_path, network, name):
    config, generator = generator_config(folder), scored_models.generator()
    config.score.network = network
    state = TrainState(step=2, params=generator.params, opt_state=None, ema=None)
    found = training.make_scorer(config, sharding.make_mesh({}), tmp_path)(state)
    kinds = ("fd", "precision", "recall")
    assert set(found) == {f"score/raw/{kind}_{name}_of_21" for kind in kinds}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"network": "pixel"}, r"unknown config.score.network 'pixel'; closest names: pixels"),
        ({"reference": ""}, r"config\.score\.reference is empty.*config\.score\.every=0"),
        ({"decoder": ""}, r"config\.score\.decoder is empty: name the tokenizer"),
        ({"features": False}, r"config\.score\.features=False leaves no score"),
        ({"reference": "nowhere.npz"}, "nowhere.npz"),
        ({"num_samples": 3}, r"num_samples=3 with 60 images.*more than 3"),
    ],
)
def test_what_cannot_be_scored(folder, tmp_path, fields, message):
    config = generator_config(folder)
    config.score.update(fields)
    with pytest.raises(ConfigError, match=message):
        training.make_scorer(config, sharding.make_mesh({}), tmp_path)


def test_no_scores_by_default(folder, tmp_path):
    config = load_config("configs/generator.py:digits")
    assert training.make_scorer(config, sharding.make_mesh({}), tmp_path) is None
