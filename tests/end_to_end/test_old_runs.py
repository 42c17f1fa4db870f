"""Runs and shards that version 0.1 wrote, before the house was rebuilt, load and resume.

`fixtures/old_runs/runs.tar.xz` holds a tokenizer with a PatchGAN discriminator, a generator, an
autoencoder and a FlowAR, each stopped after step 3 of 6, and the shards that they train on. What
version 0.1 computed from them, and the metrics of its steps 4 to 6, are beside it.
"""

import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest

import detailflow_jax as df
from detailflow_jax.runtime.config import read_config
from detailflow_jax.train import train

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "old_runs"
RUNS = ["generator"]  # Its step compiles fastest.
RUNS += [pytest.param(x, marks=pytest.mark.full) for x in ("tokenizer", "vae", "flowar")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old_runs")
    with tarfile.open(FIXTURES / "runs.tar.xz") as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def expected():
    with np.load(FIXTURES / "expected.npz") as arrays:
        return dict(arrays)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_tokenizer_and_generator_give_what_they_gave(runs, expected):
    tokenizer = df.load_tokenizer(runs / "tokenizer")
    np.testing.assert_array_equal(tokenizer.encode(expected["images"]), expected["codes"])
    close(tokenizer.decode(expected["codes"])[:, ::4, ::4], expected["decoded"])
    codes = df.load_generator(runs / "generator").sample([3, 1, 4], seed=0, cfg_scale=1.5)
    np.testing.assert_array_equal(codes, expected["sampled_codes"])


@pytest.mark.full
def test_autoencoder_and_flowar_give_what_they_gave(runs, expected):
    vae = df.load_vae(runs / "vae")
    mean, logvar = vae.encode(expected["images"])
    close(mean, expected["mean"])
    close(logvar, expected["logvar"])
    close(vae.decode(mean * vae.config.scale_factor)[:, ::4, ::4], expected["vae_decoded"])
    flowar = df.load_flowar(runs / "flowar")
    latents = flowar.sample([3, 1, 4], seed=0, cfg_scale=2.4, num_steps=4)
    close(latents, expected["sampled_latents"])


@pytest.mark.parametrize("name", RUNS)
def test_run_resumes_as_if_never_stopped(runs, name, monkeypatch):
    monkeypatch.chdir(runs)  # its source is codes:codes or latents:latents
    state = train(read_config(name), name)
    assert int(jax.device_get(state.step)) == 6
    lines = [
        json.loads(line)
        for line in pathlib.Path(name, "metrics.jsonl").read_text().split("\n")
        if line
    ]
    found = {line["step"]: line for line in lines}
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    for wanted in json.loads((FIXTURES / "expected.json").read_text())[name]:
        for metric, value in wanted.items():
            assert found[wanted["step"]][metric] == pytest.approx(value, rel=2e-4, abs=1e-6), metric
