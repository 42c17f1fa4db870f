"""Latent shards: what they hold, how they are read, and that a killed extraction goes on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import detailflow_jax as df
from convert_models import random_params
from detailflow_jax import data
from detailflow_jax.inference import extract_latents
from detailflow_jax.models.vae import VAEConfig
from detailflow_jax.runtime.errors import ConfigError

CONFIG = VAEConfig(
    channels=4, multipliers=(1, 2), res_blocks=1, latent_channels=3, norm_groups=2,
    scale_factor=0.5, shift_factor=-0.25,
)  # fmt: skip


@pytest.fixture(scope="module")
def vae():
    params = random_params("vae", CONFIG, scan=False)
    params = {name: _smaller(x) for name, x in params.items()}
    return df.VAE(CONFIG, params)


def _smaller(x):
    return {k: _smaller(v) for k, v in x.items()} if isinstance(x, dict) else np.float32(0.2) * x


@pytest.fixture(scope="module")
def saved(vae, tmp_path_factory):
    return str(df.save_pytorch(vae, tmp_path_factory.mktemp("vae") / "vae.safetensors"))


@pytest.fixture(scope="module")
def source():
    return data.make_source("digits:train")


def command(saved, out, *rest):
    options = ["--source", "digits", "--image_size", "16", "--shard_size", "20"]
    return ["--vae", saved, "--out", str(out), *options, *rest]


@pytest.fixture(scope="module")
def finished(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents")
    assert extract_latents.main(command(saved, out)) == 0
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_moments_are_those_of_the_image_and_of_its_mirror(vae, source, finished):
    latents = data.LatentSource(str(finished))
    assert len(latents) == len(source) == 1438
    assert latents.manifest["vae"] == vae.fingerprint
    assert latents.encoded_by == latents.manifest["encoded_by"] == vae.encoder_fingerprint
    assert latents.manifest["latent_shape"] == [8, 8, 3]
    assert (latents.manifest["scale_factor"], latents.manifest["shift_factor"]) == (0.5, -0.25)
    places = [0, 19, 20, 1437]
    for flip in (0, 1):
        views = [data.encoding_crops(source[i]["image"], 16, "center")[0] for i in places]
        views = np.stack([view[:, ::-1] if flip else view for view in views])
        want = np.concatenate(vae.encode(views), axis=-1)
        got = np.stack([latents[i]["moments"][flip] for i in places])
        assert got.dtype == np.float32
        # Another batch size may order sums differently.
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert [latents[i]["label"] for i in places] == [source[i]["label"] for i in places]
    both = latents[0]["moments"]
    assert np.abs(both[0] - both[1]).max() > 1e-2
    assert np.abs(both[0] - both[1][:, ::-1]).max() > 1e-3  # stride 2 pads one side only


def test_latents_that_are_no_numbers_are_refused_and_none_give_none(vae):
    c = vae.config
    latents = np.zeros((1, 2, 2, c.latent_channels), np.float32)
    with pytest.raises(ValueError, match="latents hold NaN"):
        vae.decode(latents * np.nan)
    assert len(vae.decode(latents[:0])) == 0
    assert len(vae.moments(np.zeros((0, 8, 8, c.image_channels), np.uint8))) == 0


@pytest.mark.slow
def test_encoding_and_decoding_is_a_round_trip(vae):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    posterior = vae.encode(images)
    mean, logvar = posterior
    np.testing.assert_array_equal(posterior.moments, np.concatenate([mean, logvar], -1))
    np.testing.assert_array_equal(posterior.moments, vae.moments(images))
    # Whoever takes the moments has to know the scale; whoever takes the posterior has not.
    by_hand = vae.decode((mean - CONFIG.shift_factor) * CONFIG.scale_factor)
    np.testing.assert_array_equal(vae.decode(posterior), by_hand)
    np.testing.assert_array_equal(vae.decode(posterior.mode()), by_hand)
    assert np.abs(vae.decode(mean) - by_hand).max() > 1e-3
    network_way, _ = vae.network.apply({"params": vae.params}, images / np.float32(127.5) - 1)
    np.testing.assert_allclose(by_hand, network_way, atol=1e-5)
    sample = posterior.sample(seed=3)
    np.testing.assert_array_equal(sample, vae.sample(images, seed=3))
    noise = (sample / CONFIG.scale_factor + CONFIG.shift_factor - mean) / np.exp(0.5 * logvar)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    rest = vae.encode(images[1:]).sample(seed=3, first_index=1)
    np.testing.assert_allclose(rest, sample[1:], atol=1e-5)


@pytest.mark.slow
def test_a_killed_extraction_ends_with_the_same_files(saved, finished, tmp_path):
    out = tmp_path / "latents"
    process = subprocess.Popen(
        [sys.executable, "-m", "detailflow_jax.extract_latents", *command(saved, out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    while len(list(out.glob("*.array_record"))) < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    assert 2 <= len(list(out.glob("*.array_record"))) < 72
    assert extract_latents.main(command(saved, out)) == 0
    assert contents(out) == contents(finished)


def test_half_precision_is_half_the_size(vae, source, finished, tmp_path):
    some = Some(source)
    for dtype in ("float32", "float16"):
        folder = str(tmp_path / dtype)
        extract_latents.extract(vae, some, folder, image_size=16, dtype=dtype, shard_size=8)
    whole, half = (data.LatentSource(str(tmp_path / d)) for d in ("float32", "float16"))
    assert half.layout.record_dtype.itemsize - 12 == (whole.layout.record_dtype.itemsize - 12) / 2
    for i in range(12):
        assert half[i]["moments"].dtype == np.float32
        np.testing.assert_allclose(half[i]["moments"], whole[i]["moments"], rtol=1e-3, atol=1e-4)


class Some(data.Source):
    """The first twelve images of a source."""

    name = fingerprint = "some"

    def __init__(self, source):
        self.source, self.class_names = source, source.class_names

    def __len__(self):
        return 12

    def read(self, index, reduce_to=None):
        return self.source.read(index, reduce_to)


def stream(folder, **options):
    config = {"source": f"latents:{folder}", "num_workers": 0, "prefetch": 2, **options}
    return data.make_iterator(config, batch_size=200, seed=0)


def test_training_draws_the_image_or_its_mirror(finished):
    latents = data.LatentSource(str(finished))
    factor = np.float32(latents.manifest["scale_factor"])
    shift = np.float32(latents.manifest["shift_factor"])

    def scaled(view):
        mean, logvar = np.split(view, 2, axis=-1)
        return np.concatenate(
            [(mean - shift) * factor, logvar + np.float32(2 * np.log(factor))], -1
        )

    views = {
        scaled(view).tobytes(): (latents[i]["label"], flip)
        for i in range(len(latents))
        for flip, view in enumerate(latents[i]["moments"])
    }
    shares = {}
    for options in ({}, {"flip": True}, {"flip": False}):
        batch = next(stream(finished, **options))
        assert batch["moments"].shape == (200, 8, 8, 6) and batch["moments"].dtype == np.float32
        assert batch["label"].dtype == np.int32 and set(batch) == {"moments", "label"}
        found = [views[moments.tobytes()] for moments in batch["moments"]]
        assert [label for label, _ in found] == batch["label"].tolist()
        shares[options.get("flip", "default")] = np.mean([flip for _, flip in found])
    assert 0.4 < shares[True] == shares["default"] < 0.6
    assert shares[False] == 0.0


# -------------------------------------------------------------------------------------- refusals


LAYOUT = data.LatentLayout(4, 2, (2, 2, 3), "float16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:1], r"moments of 7: float32 \(1, 2, 2, 6\), not float32 \(2, 2, 2, 6\)"),
        (lambda x: x.astype(np.float64), "float64"),
        (lambda x: x * np.nan, "moments of 7 are NaN or infinite"),
        (lambda x: x * np.float32(1e6), "moments of 7 are too large for float16"),
    ],
)
def test_moments_that_cannot_be_stored(change, message):
    good = np.ones(LAYOUT.value_dtype.shape, np.float32)
    assert len(LAYOUT.encode(7, 1, good)) == LAYOUT.record_dtype.itemsize
    with pytest.raises(ValueError, match=message):
        LAYOUT.encode(7, 1, change(good))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_shape": (2, 2)}, r"latent_shape=\(2, 2\): expected \(h, w, C\)"),
        ({"latent_shape": (2, 0, 3)}, r"latent_shape=\(2, 0, 3\)"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16': expected float32 or float16"),
        ({"shard_size": 0}, r"LatentLayout\.shard_size=0"),
    ],
)
def test_layouts_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LAYOUT, **fields)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("latent_shape", 5, "expected .h, w, C"),
        ("latent_shape", ["2", 2, 3], "expected .h, w, C"),
        ("latent_shape", [2.0, 2, 3], "expected .h, w, C"),
        ("dtype", ["float16"], "expected float32 or float16"),
        ("scale_factor", "1", "is '1', expected a number above 0 or "),
        ("scale_factor", 0, "is 0, expected a number above 0"),
        ("scale_factor", [1.0], r"is \[1\.0\], expected a number above 0"),
        ("scale_factor", float("nan"), "is nan, expected"),
        ("shift_factor", None, "is None, expected a number or "),
        ("shift_factor", float("inf"), "is inf, expected"),
    ],
)
def test_manifests_that_cannot_be(name, value, message, tmp_path):
    fields = {
        **{"format_version": 1, "num_records": 0, "shards": [], "source": "x", "vae": "y"},
        **{"scale_factor": 1.0, "shift_factor": 0.0, "image_size": 4, "crop": "center"},
        **{"class_names": [], "num_classes": 2, **dataclasses.asdict(LAYOUT)},
    }
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(fields))
    assert data.LatentSource.read_manifest(str(tmp_path)) == json.loads(path.read_text())
    path.write_text(json.dumps(fields | {name: value}))
    with pytest.raises(ConfigError, match=message):
        data.LatentSource.read_manifest(str(tmp_path))


def test_other_folders_are_refused(finished, tmp_path):
    with pytest.raises(ValueError, match=r"holds no codes: .*lacks num_crops, num_tokens"):
        data.CodeSource(str(finished))
    with pytest.raises(FileNotFoundError, match=r"no folder of latents .*: expected latents:DIR"):
        data.LatentSource(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="extraction of latents has not finished"):
        data.LatentSource(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--image_size", "15"], "image_size=15 is no positive multiple of the stride 2"),
        (["--dtype", "float16"], "dtype: 'float32' there, 'float16' asked"),
        (["--source", "digits:test"], "source: 'digits:train"),
        (["--vae", "nowhere"], "nowhere: there is no such file or folder"),
    ],
)
def test_commands_that_cannot_be(saved, finished, capsys, change, message):
    assert extract_latents.main(command(saved, finished, *change)) == 2
    assert message in capsys.readouterr().err
