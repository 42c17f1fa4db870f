"""FlowAR's whole chain through its command lines: image -> latents -> FlowAR -> image."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import detailflow_jax as df
from detailflow_jax import train
from detailflow_jax.inference import extract_latents, generate
from detailflow_jax.runtime.checkpoint import restore_params

QUICK = ["--config.tensorboard=False", "--config.checkpoint_every=4", "--config.log_every=4"]
QUICK += ["--config.total_steps=8"]
SIDE = 16

pytestmark = pytest.mark.full  # Each stage has quick tests of its own.

VAE = ["--config=configs/vae.py:digits:runlocal", *QUICK, f"--config.data.image_size={SIDE}"]
VAE += ["--config.model.multipliers=(1,2)"]
SMALL = ["--config.model.width=32", "--config.model.num_heads=2", "--config.model.head_width=32"]
SMALL += ["--config.model.head_dim=16", "--config.model.scales=(2,8)"]
SMALL += [f"--config.data.image_size={SIDE}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An autoencoder, its latents and a FlowAR trained on them."""
    root = tmp_path_factory.mktemp("flowar")
    assert train.main([*VAE, f"--workdir={root}/vae"]) == 0
    latents = [f"--vae={root}/vae", f"--out={root}/latents"]
    assert extract_latents.main([*latents, "--source=digits:test", "--shard_size=100"]) == 0
    return root


def train_flowar(runs, workdir, *overrides):
    config = f"configs/flowar.py:digits:runlocal,latents={runs / 'latents'},vae={runs / 'vae'}"
    arguments = [f"--config={config}", *QUICK, *SMALL, *overrides]
    return train.main([*arguments, f"--workdir={workdir}"])


@pytest.fixture(scope="module")
def flowar(runs):
    assert train_flowar(runs, runs / "flowar") == 0
    return runs / "flowar"


def test_the_run_draws_samples_and_resumes_to_the_same_bits(runs, flowar, tmp_path):
    drawn = np.asarray(Image.open(flowar / "figures" / "samples_000008.png"))
    assert drawn.shape == (4 * SIDE, 8 * SIDE, 3)
    resumed = tmp_path / "flowar"
    shutil.copytree(flowar, resumed)
    shutil.rmtree(resumed / "checkpoints" / "8")
    assert train_flowar(runs, resumed) == 0
    for ema in (False, True):
        first = restore_params(flowar, ema=ema, step=8)
        again = restore_params(resumed, ema=ema, step=8)
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(a, b)


def test_generate_makes_pictures_of_the_doors_numbers(runs, flowar, tmp_path):
    models = ["--vae", str(runs / "vae"), "--flowar", str(flowar)]
    asked = ["--labels", "0-2", "--per_class", "2", "--num_steps", "4,2", "--cfg_scale", "2"]
    assert generate.main([*models, *asked, "--out", str(tmp_path), "--single"]) == 0
    samples = np.load(tmp_path / "samples.npz")
    assert samples["arr_0"].shape == (6, SIDE, SIDE, 3)
    assert samples["labels"].tolist() == [0, 0, 1, 1, 2, 2]
    assert len(list((tmp_path / "images").glob("*.png"))) == 6
    model, vae = df.load_flowar(flowar), df.load_vae(runs / "vae")
    assert model.encoded_by == vae.encoder_fingerprint
    latents = model.sample([1], first_index=2, cfg_scale=2.0, num_steps=[4, 2])
    assert latents.shape == (1, 8, 8, 4) and latents.dtype == np.float32
    image = np.clip(127.5 * vae.decode(latents)[0] + 128, 0, 255)
    assert np.abs(image - samples["arr_0"][2]).max() <= 2


def test_models_that_do_not_belong_together(runs, flowar, capsys):
    arguments = ["--vae", str(flowar), "--flowar", str(flowar), "--labels", "1", "--out", "x"]
    assert generate.main(arguments) == 2
    assert "holds a flowar" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main(["--vae", str(runs / "vae"), "--labels", "1", "--out", "x"])
    with pytest.raises(ValueError, match="a vae and a vae do not belong together"):
        df.check_pair(df.load_vae(runs / "vae"), df.load_vae(runs / "vae"))
    assert train_flowar(runs, runs / "wrong", "--config.vae.scale_factor=0.5") == 2
    error = capsys.readouterr().err
    assert "config.vae.scale_factor is 0.5 in the configuration, but 0.95 according to" in error
    assert train_flowar(runs, runs / "small", "--config.model.scales=(1,2,4)") == 2
    error = capsys.readouterr().err
    assert "config.model.scales is (1, 2, 4)" in error and "(8 x 8 x 4)" in error
