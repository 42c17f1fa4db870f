"""Published autoencoders through `df.load_vae`, the command and `init_from`; what they refuse."""

import jax
import numpy as np
import pytest
import torch

import detailflow_jax as df
import golden_files
from convert_models import published
from detailflow_jax.convert import CheckpointError, mapping, start
from detailflow_jax.convert.__main__ import main
from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.models.vae import VAEConfig
from detailflow_jax.runtime.config import load_config
from detailflow_jax.tasks import TrainState


def small_state():
    """The recorded small autoencoder, its float16 weights as float32."""
    _, _, state = golden_files.read("vae_kl16")
    return {name: np.asarray(x, np.float32) for name, x in state.items()}


def write(path, change=(), **beside):
    """A file as KL-16 is published; `change` replaces tensors, None drops them."""
    state = {k: x for k, x in (small_state() | dict(change)).items() if x is not None}
    state = {k: torch.from_numpy(np.array(x)) for k, x in state.items()}
    torch.save({"model": state, **beside}, path)
    return path


@pytest.fixture(scope="module")
def kl16(tmp_path_factory):
    return write(tmp_path_factory.mktemp("kl16") / "kl16.ckpt")


@pytest.fixture(scope="module")
def vae(kl16):
    return df.load_vae(kl16)


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(
        "detailflow_jax.inference.api.logging.warning", lambda text, *args: said.append(text % args)
    )
    return said


# -------------------------------------------------------------------------------------- the doors


def test_recorded_numbers(vae):
    arrays, _, _ = golden_files.read("vae_kl16")
    images = golden_files.nhwc(arrays["x"])
    mean, logvar = vae.encode(images)
    assert mean.dtype == logvar.dtype == np.float32
    assert golden_files.error(mean, golden_files.nhwc(arrays["mean"])) <= golden_files.VAE
    assert golden_files.error(logvar, golden_files.nhwc(arrays["logvar"])) <= golden_files.VAE
    reconstruction = vae.decode(mean * 0.2325)
    want = golden_files.nhwc(arrays["recon"])
    assert golden_files.error(reconstruction, want) <= golden_files.VAE


def test_the_scale_is_the_usual_one_or_the_one_told(kl16, warnings):
    assert df.load_vae(kl16).config.scale_factor == 0.2325
    assert "nothing tells scale_factor; 0.2325 taken, the usual one of 16 latent" in warnings[0]
    told = df.load_vae(kl16, scale_factor=0.5, shift_factor=-1.0).config
    assert (told.scale_factor, told.shift_factor) == (0.5, -1.0)
    assert len(warnings) == 1


def test_samples_do_not_depend_on_the_batch(vae):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    images[3] = images[1]
    whole = vae.sample(images, seed=3)
    assert whole.shape == (5, 2, 2, 16) and whole.dtype == np.float32
    np.testing.assert_allclose(vae.sample(images, seed=3, batch_size=2), whole, atol=1e-5)
    np.testing.assert_allclose(
        vae.sample(images[2:], seed=3, first_index=2, batch_size=2), whole[2:], atol=1e-5
    )
    assert np.abs(whole[3] - whole[1]).max() > 1e-2  # the same image, another draw
    assert np.abs(vae.sample(images, seed=4) - whole).max() > 1e-2
    mean, logvar = vae.encode(images)
    noise = (whole / vae.config.scale_factor - mean) / np.exp(0.5 * logvar)
    assert abs(noise.mean()) < 0.2 and noise.std() == pytest.approx(1, abs=0.2)


def test_arrays_of_another_shape_are_refused(vae):
    with pytest.raises(ValueError, match=r"shape \(32, 32, 3\), expected \[B, H, W, 3\]"):
        vae.encode(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"shape \(1, 32, 32, 1\)"):
        vae.sample(np.zeros((1, 32, 32, 1), np.uint8))
    with pytest.raises(ValueError, match=r"32 x 40, expected sides that are multiples .* 16"):
        vae.encode(np.zeros((1, 32, 40, 3), np.uint8))
    with pytest.raises(TypeError, match="images are int32"):
        vae.encode(np.zeros((1, 32, 32, 3), np.int32))
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 4\), expected \[B, h, w, 16\].*has 16 lat"):
        vae.decode(np.zeros((1, 2, 2, 4), np.float32))
    with pytest.raises(ValueError, match="latents are int64"):
        vae.decode(np.zeros((1, 2, 2, 16), np.int64))


# ------------------------------------------------------------------------------------ conversion


def test_the_command_goes_both_ways(kl16, vae, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back.ckpt"
    arguments = ["--to", "jax", "--src", str(kl16), "--dst", str(ours), "--scale_factor", "0.5"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert "vae, 4.2M parameters" in capsys.readouterr().out
    read = df.load_vae(ours)
    assert read.fingerprint == vae.fingerprint and read.config.scale_factor == 0.5
    assert main(["--to", "pytorch", "--src", str(ours), "--dst", str(back)]) == 0
    want, got = (torch.load(path, weights_only=True) for path in (kl16, back))
    assert list(got) == ["model"] and got["model"].keys() == want["model"].keys()
    assert all(torch.equal(got["model"][name], x) for name, x in want["model"].items())
    again = df.load_vae(back)
    assert again.config == read.config and again.fingerprint == vae.fingerprint
    folder = df.save_pytorch(again, tmp_path / "folder")
    assert (folder / "checkpoints" / "kl16.pt").is_file()
    assert df.load_vae(folder).config == read.config


@pytest.mark.parametrize(
    "change", [{"channels": 64}, {"res_blocks": 1}, {"multipliers": (1, 2, 4)}, {"scale_factor": 1}]
)
def test_what_the_published_code_does_not_build_is_said(change):
    describe = NETWORKS["vae"].describe
    assert describe(VAEConfig())[2] == []
    (notice,) = describe(VAEConfig(**change))[2]
    ((name, value),) = change.items()
    assert f"{name}={value} (not " in notice and "its results are wrong" in notice


def test_a_run_starts_from_it(kl16, vae):
    config = load_config("configs/vae.py:kl16:runlocal")
    config.init_from.model = str(kl16)
    params = jax.tree.map(np.zeros_like, vae.params)
    placed = jax.device_put(params)
    state = TrainState(np.int32(0), placed, {}, ema=jax.device_put(params))
    state = start.load_into(config, state, (), fresh=True)
    for got in (state.params, state.ema):
        got, want = mapping.flatten(got), mapping.flatten(vae.params)
        assert got.keys() == want.keys()
        for name, x in want.items():
            np.testing.assert_array_equal(got[name], x)


def test_its_trainings_other_networks_are_left_aside(tmp_path, vae):
    path = write(tmp_path / "x.ckpt", {"loss.logvar": np.zeros(1, np.float32)})
    assert df.load_vae(path).fingerprint == vae.fingerprint


def test_a_whole_latent_diffusion_checkpoint(tmp_path, vae):
    """As Stable Diffusion was published: the autoencoder is a part of it, under its prefix."""
    state = {f"first_stage_model.{name}": torch.from_numpy(x) for name, x in small_state().items()}
    others = ("model.diffusion_model.out.2.weight", "model_ema.decay", "model_ema.outweight")
    state |= {name: torch.ones(1) for name in others}
    state |= {"cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.ones(1)}
    torch.save({"state_dict": state, "global_step": 1}, tmp_path / "sd.ckpt")
    assert df.load_vae(tmp_path / "sd.ckpt").fingerprint == vae.fingerprint


# -------------------------------------------------------------------------------------- refusals


def test_the_wrong_door(kl16, tmp_path):
    with pytest.raises(CheckpointError, match=r"looks like a latent autoencoder.*df\.load_vae"):
        df.load_generator(kl16)
    generator = published(tmp_path / "gen", "generator_a")
    message = r"looks like a DetailFlow generator.*expected a latent autoencoder"
    with pytest.raises(CheckpointError, match=message):
        df.load_vae(generator)


CONV = "encoder.down.1.block.0.conv1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({CONV: None}, rf"tensor '{CONV}' is missing"),
        ({"decoder.up.0.block.2.conv2.bias": None}, r"1 of 312 tensors are missing"),
        ({CONV: np.zeros((64, 32), np.float32)}, "shape.*expected 4 dimensions"),
        (
            {CONV: np.zeros((32, 32, 1, 1), np.float32)},
            r"\(32, 32, 1, 1\); expected \(32, 32, 3, 3\)",
        ),
        ({"extra.weight": np.zeros(1, np.float32)}, r"belong to no parameter: extra\.weight"),
        ({"encoder.down.9.x": np.zeros(1, np.float32)}, r"down\.0 to encoder\.down\.9; expected 1"),
        ({"encoder.down.0.block.99.x": np.zeros(1, np.float32)}, r"block\.99; expected 1 to 7"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        df.load_vae(write(tmp_path / "x.ckpt", change))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"channels": 64}, "channels=64 contradicts the weights.*channels=32"),
        ({"multipliers": (1, 2)}, r"multipliers=\(1, 2\) contradicts"),
        ({"scale_factor": 0.0}, r"scale_factor=0\.0; expected float above 0"),
        ({"scale_factor": float("nan")}, "scale_factor=nan; expected float"),
        ({"shift_factor": "1"}, "shift_factor='1'; expected float above -16384"),
        ({"norm_groups": 5}, "not a multiple of norm_groups=5"),
        ({"norm_groups": 0}, "norm_groups=0; expected int from 1"),
        ({"image_size": 256}, "unknown override 'image_size'"),
    ],
)
def test_overrides_that_cannot_be(kl16, overrides, message):
    with pytest.raises(CheckpointError, match=message):
        df.load_vae(kl16, **overrides)


def test_the_scale_of_other_widths_must_be_told():
    shapes = small_state()
    with pytest.raises(CheckpointError, match="a level is 24 channels wide; expected multiples"):
        odd = {"encoder.down.4.block.0.conv1.weight": np.zeros((24, 64, 3, 3))}
        NETWORKS["vae"].infer(shapes | odd, {}, {}, "x")
    for name, axis in (("decoder.conv_in.weight", 1), ("post_quant_conv.weight", 0)):
        shapes[name] = np.take(shapes[name], range(8), axis=axis)
    with pytest.raises(CheckpointError, match=r"x: nothing tells scale_factor; expected scale_"):
        NETWORKS["vae"].infer(shapes, {}, {}, "x")
    config, notices = NETWORKS["vae"].infer(shapes, {"scaling_factor": 0.3}, {}, "x")
    assert isinstance(config, VAEConfig) and config.scale_factor == 0.3 and notices == []
