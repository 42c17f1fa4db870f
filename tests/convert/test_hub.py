"""Reading from the Hugging Face hub: from its cache offline, and from a server."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import detailflow_jax as df
from convert_models import random_params
from hub_server import COMMIT, Hub, served
from scored_models import SIZE, generator, tokenizer

READ = """
import json, sys
from detailflow_jax.convert import CheckpointError, read_checkpoint
out = {}
for path in sys.argv[1:]:
    try:
        read = read_checkpoint(path)
        out[path] = [read.source, read.tensors["w"].tolist(), read.config]
    except CheckpointError as error:
        out[path] = str(error)
print(json.dumps(out))
"""


def read_in_fresh_process(*paths, **env):
    """The hub's settings are read at import, so each case has its own interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths],
        env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **env},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "repository"
    (root / "checkpoints").mkdir(parents=True)
    (root / "config.json").write_text('{"dim": 8}')
    torch.save({"model": {"w": torch.tensor([1.0])}}, root / "checkpoints" / "128.pt")
    torch.save({"w": torch.tensor([2.0])}, root / "checkpoints" / "other.bin")
    return root


def test_cache_offline(tmp_path, repository):
    home = tmp_path / "cache" / "models--Owner--Name"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    (repository / "checkpoints" / "other.bin").unlink()
    # The cache holds links to blobs, as the library lays it out.
    (home / "blobs").mkdir()
    snapshot = home / "snapshots" / COMMIT
    (snapshot / "checkpoints").mkdir(parents=True)
    for i, name in enumerate(("config.json", "checkpoints/128.pt")):
        (repository / name).rename(home / "blobs" / str(i))
        (snapshot / name).symlink_to(home / "blobs" / str(i))
    paths = ("hf:Owner/Name", f"hf:Owner/Name@{COMMIT}", "hf:Owner/Name/checkpoints/128.pt")
    absent = ("hf:Owner/Other", "hf:Owner/Name@v2", "hf:Owner/Name/checkpoints/256.pt")
    got = read_in_fresh_process(
        *paths, *absent, HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="1"
    )
    for path in paths:
        source, tensor, config = got[path]
        assert source.endswith("checkpoints/128.pt") and source.startswith("hf:Owner/Name")
        assert (tensor, config) == ([1.0], {"dim": 8})
    assert "offline mode" in got[absent[0]]
    assert f"{tmp_path}/cache/models--Owner--Other" in got[absent[0]]
    assert "hf download Owner/Other" in got[absent[0]]
    assert "hf:Owner/Name@v2" in got[absent[1]]
    assert "has no file checkpoints/256.pt" in got[absent[2]]


def test_from_a_server_only_what_is_needed(tmp_path, repository):
    (repository / "vae").mkdir()
    (repository / "vae" / "config.json").write_text('{"dim": 16}')
    torch.save({"w": torch.tensor([3.0])}, repository / "vae" / "diffusion_pytorch_model.bin")
    with served(tmp_path / "cache", **{"Owner/Name": repository}) as hub:
        got = read_in_fresh_process(
            *("hf:Owner/Name", "hf:Owner/Name@main/checkpoints/128.pt", "hf:Owner/None"),
            "hf:Owner/Name/vae",
            **hub,
        )
        offline = read_in_fresh_process("hf:Owner/Name/vae", **hub | {"HF_HUB_OFFLINE": "1"})
    part = ["hf:Owner/Name/vae/diffusion_pytorch_model.bin", [3.0], {"dim": 16}]
    assert got["hf:Owner/Name/vae"] == offline["hf:Owner/Name/vae"] == part
    assert "several checkpoints" in got["hf:Owner/Name"]
    assert got["hf:Owner/Name@main/checkpoints/128.pt"] == [
        "hf:Owner/Name@main/checkpoints/128.pt", [1.0], {"dim": 8},
    ]  # fmt: skip
    assert "models--Owner--None" in got["hf:Owner/None"]
    files = ["config.json", "diffusion_pytorch_model.bin"]
    assert sorted(Hub.fetched) == [
        "checkpoints/128.pt",
        "config.json",
        *(f"vae/{x}" for x in files),
    ]


@pytest.mark.full
def test_published_weights_to_a_picture_in_four_lines(tmp_path):
    """The first block of the README as it stands, with small files in the published layout."""
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    assert len([line for line in block.splitlines() if line]) == 1 + 4  # the import
    config = dataclasses.replace(generator().config, num_classes=1000)
    params = random_params("generator", config, scan=False)
    models = {
        "ByteFlow-AI/DetailFlow-16": tokenizer(),
        "ByteFlow-AI/DetailFlow-16-GPT-L": df.Generator(config, params),
    }
    for name, model in models.items():
        df.save_pytorch(model, tmp_path / name)
    with served(tmp_path / "cache", **{name: tmp_path / name for name in models}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", block],
            env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **hub},
            cwd=tmp_path, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    image = np.asarray(Image.open(tmp_path / "retriever.png"))
    assert image.shape == (SIZE, SIZE, 3)
    codes = models["ByteFlow-AI/DetailFlow-16-GPT-L"].sample([207, 360], cfg_scale=1.45)
    want = df.to_uint8(tokenizer().decode(codes))[0]
    np.testing.assert_allclose(image.astype(int), want, atol=1)
