"""Models to the hub and back, against a stand-in for the hub on this machine."""

import json

import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from PIL import Image

import detailflow_jax as df
from detailflow_jax.convert import CheckpointError
from detailflow_jax.inference import hub
from detailflow_jax.runtime.errors import ConfigError
from hub_server import Hub, served
from scored_models import generator, vae


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The folder in which the hub makes its repositories."""
    with served(tmp_path / "cache", tmp_path / "hub") as environment:
        endpoint = environment["HF_ENDPOINT"]
        # The library reads its environment when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Large files by Git LFS.
        monkeypatch.setenv("HF_TOKEN", Hub.token)
        yield tmp_path / "hub"


@pytest.fixture
def run(tmp_path):
    """What a workdir has for a card: scores and pictures."""
    folder = tmp_path / "run"
    (folder / "figures").mkdir(parents=True)
    lines = [{"step": 10, "loss": 1.0}, {"step": 20, "score/ema/psnr_of_64": 21.5}, {"step": 30}]
    killed = '\n{"step": 4'  # While it wrote.
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + killed)
    for step in (10, 200):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / "figures" / f"samples_{step:06d}.png")
    return folder


def test_there_and_back(there, run, tmp_path):
    results = tmp_path / "results.json"
    rows = [{"cfg_scale": 1.5, "seed": 0, "fid": 3.25}, {"cfg_scale": 2.0, "seed": 0, "fid": None}]
    results.write_text(json.dumps({"reference": {"name": "digits:test"}, "rows": rows}))
    model = vae()
    url = model.push_to_hub(
        "owner/vae",
        workdir=str(run),
        results=[str(results)],
        licence="apache-2.0",
        pytorch=True,
        private=True,
    )
    assert url.startswith("http://127.0.0.1") and "/owner/vae/commit/" in url
    assert Hub.created == [("owner/vae", "private")]
    names = sorted(str(x.relative_to(there)) for x in there.rglob("*") if x.is_file())
    own = {"README.md", "config.json", "model.safetensors", "picture.png"}
    assert own <= {name.removeprefix("owner/vae/") for name in names}

    _, head, card = (there / "owner/vae/README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["license"] == "apache-2.0" and {"jax", "flowar", "vae"} <= {*head["tags"]}
    assert 'df.load("hf:owner/vae")' in card and "![What it makes](picture.png)" in card
    assert "Against digits:test:" in card and "| 1.5000 | 0 | 3.2500 |" in card
    assert "| 2.0000 | 0 | - |" in card and "| ema/psnr_of_64 | 21.5000 |" in card
    assert '"latent_channels"' in card
    assert Image.open(there / "owner/vae/picture.png").getpixel((0, 0)) == (200, 0, 0)

    for loaded in (df.load("hf:owner/vae"), df.load_vae("hf:owner/vae@main")):
        assert type(loaded) is df.VAE and loaded.source.startswith("hf:owner/vae")
        assert loaded.config == model.config and loaded.fingerprint == model.fingerprint
    assert df.load("hf:owner/vae/pytorch").fingerprint == model.fingerprint
    with pytest.raises(CheckpointError, match="holds a vae; expected a flowar"):
        df.load_flowar("hf:owner/vae")


def test_the_command(there, tmp_path, capsys):
    source = df.save_pytorch(generator(), tmp_path / "gen")
    look = tmp_path / "look"
    assert hub.main([str(source), "owner/gen", "--folder", str(look)]) == 0
    assert not there.exists() or not any(there.iterdir())
    model, read = df.load(source), df.load(look)
    assert type(read) is df.Generator and read.fingerprint == model.fingerprint
    np.testing.assert_array_equal(read.sample([1, 0], seed=3), model.sample([1, 0], seed=3))
    assert hub.main([str(source), "owner/gen", "--folder", str(look)]) == 2
    assert "look exists already" in capsys.readouterr().err
    assert hub.main([str(source), "owner/gen", "--message", "first"]) == 0
    assert "/owner/gen/commit/" in capsys.readouterr().out
    assert df.load("hf:owner/gen").fingerprint == model.fingerprint


def test_what_cannot_be_sent(there, tmp_path, monkeypatch):
    model = vae()
    for name in ("vae", "hf:owner/vae", "owner/a/b", "owner/ä"):
        with pytest.raises(ConfigError, match="is no name of a repository; expected OWNER/NAME"):
            model.push_to_hub(name)
    for content in (
        "",
        "[]",
        "{}",
        '{"rows": []}',
        '{"rows": [5]}',
        '{"rows": [{}], "reference": 5}',
    ):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ConfigError, match=r"x\.json.* expected (a results\.json|.*JSON)"):
            model.push_to_hub("owner/vae", results=[str(tmp_path / "x.json")])
    with pytest.raises(ConfigError, match=r"x\.json: expected a PNG"):
        model.push_to_hub("owner/vae", picture=str(tmp_path / "x.json"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(df.HubError, match=r"hf:owner/vae: the hub did not take .*401.*HF_TOKEN"):
        model.push_to_hub("owner/vae")
    assert not there.exists() or not any(there.iterdir())
