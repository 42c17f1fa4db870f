"""FlowAR's whole chain through its command lines: image -> latents -> FlowAR -> image."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import children
import detailflow_jax as df
from detailflow_jax.inference import generate
from detailflow_jax.runtime.checkpoint import restore_params

QUICK = ["--config.tensorboard=False", "--config.checkpoint_every=4", "--config.log_every=4"]


def finish(module, *args, code=0):
    return children.run("-m", f"detailflow_jax.{module}", *args, code=code)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An autoencoder, its latents and a FlowAR trained on them."""
    root = tmp_path_factory.mktemp("flowar")
    vae = ["--config=configs/vae.py:digits:runlocal", *QUICK]
    finish("train", *vae, "--config.total_steps=8", "--workdir", root / "vae")
    latents = ["--source", "digits:test", "--shard_size", "100"]
    finish("extract_latents", "--vae", root / "vae", "--out", root / "latents", *latents)
    return root


def train_flowar(runs, workdir, *overrides, code=0):
    config = f"configs/flowar.py:digits:runlocal,latents={runs / 'latents'},vae={runs / 'vae'}"
    quick = [*QUICK, "--config.total_steps=8", *overrides]
    return finish("train", f"--config={config}", *quick, "--workdir", workdir, code=code)


@pytest.fixture(scope="module")
def flowar(runs):
    train_flowar(runs, runs / "flowar")
    return runs / "flowar"


def test_the_run_draws_samples_and_resumes_to_the_same_bits(runs, flowar, tmp_path):
    drawn = np.asarray(Image.open(flowar / "figures" / "samples_000008.png"))
    assert drawn.shape == (4 * 32, 8 * 32, 3)
    resumed = tmp_path / "flowar"
    shutil.copytree(flowar, resumed)
    shutil.rmtree(resumed / "checkpoints" / "8")
    train_flowar(runs, resumed)
    for ema in (False, True):
        first = restore_params(flowar, ema=ema, step=8)
        again = restore_params(resumed, ema=ema, step=8)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(a, b)


def test_generate_makes_pictures_of_the_doors_numbers(runs, flowar, tmp_path):
    models = ["--vae", str(runs / "vae"), "--flowar", str(flowar)]
    asked = ["--labels", "0-2", "--per_class", "2", "--num_steps", "4,4,3,2", "--cfg_scale", "2"]
    assert generate.main([*models, *asked, "--out", str(tmp_path), "--single"]) == 0
    samples = np.load(tmp_path / "samples.npz")
    assert samples["arr_0"].shape == (6, 32, 32, 3) and samples["labels"].tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    assert len(list((tmp_path / "images").glob("*.png"))) == 6
    model, vae = df.load_flowar(flowar), df.load_vae(runs / "vae")
    assert model.encoded_by == vae.encoder_fingerprint
    latents = model.sample([1], first_index=2, cfg_scale=2.0, num_steps=[4, 4, 3, 2])
    assert latents.shape == (1, 8, 8, 4) and latents.dtype == np.float32
    image = np.clip(127.5 * vae.decode(latents)[0] + 128, 0, 255)
    assert np.abs(image - samples["arr_0"][2]).max() <= 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"cfg_scale": 0.5}, "cfg_scale=0.5, expected >= 1"),
        ({"num_steps": [4, 4]}, "2 counts, expected 4, one per scale"),
        ({"solver": "rk4"}, "solver='rk4' is not one of"),
        ({"guidance_high": 2.0}, "0 <= low <= high <= 1"),
        ({"grid": "cosine"}, "grid='cosine' is not one of"),
        ({"noise": [np.zeros((1, 1, 4))]}, "noise has shapes"),
        ({"labels": [10]}, r"labels \[10\] are out of range, expected 0..9"),
    ],
)
def test_settings_that_cannot_be_are_refused(flowar, change, text):
    with pytest.raises(ValueError, match=text):
        df.load_flowar(flowar).sample(**({"labels": [1]} | change))


def test_models_that_do_not_belong_together(runs, flowar, capsys):
    arguments = ["--vae", str(flowar), "--flowar", str(flowar), "--labels", "1", "--out", "x"]
    assert generate.main(arguments) == 2
    assert "holds a flowar" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main(["--vae", str(runs / "vae"), "--labels", "1", "--out", "x"])
    with pytest.raises(ValueError, match="a vae and a vae do not belong together"):
        df.check_pair(df.load_vae(runs / "vae"), df.load_vae(runs / "vae"))
    error = train_flowar(runs, runs / "wrong", "--config.vae.scale_factor=0.5", code=2)
    assert "config.vae.scale_factor is 0.5 in the configuration, but 0.95 of" in error
    error = train_flowar(runs, runs / "small", "--config.model.scales=(1,2,4)", code=2)
    assert "config.model.scales is (1, 2, 4)" in error and "(8 x 8 x 4)" in error
