"""Reading from the Hugging Face hub: from its cache offline, and from a server."""

import contextlib
import dataclasses
import http.server
import json
import os
import pathlib
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import detailflow_jax as df
from convert_models import random_params
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
COMMIT = "0123456789abcdef0123456789abcdef01234567"


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


class Hub(http.server.BaseHTTPRequestHandler):
    """The three requests of the hub's protocol that a download makes."""

    repositories: dict = {}  # noqa: RUF012
    fetched: list = []  # noqa: RUF012

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        kind, _, name = path.partition("/main")
        api, resolve = re.match("/api/models/(.+)/tree", kind), re.match("/(.+)/resolve", kind)
        root = self.repositories.get((api or resolve or [""] * 2)[1])
        if api and root:
            files = [p for p in root.rglob("*") if p.is_file()]
            listing = [
                {"type": "file", "path": str(p.relative_to(root)), "oid": "0" * 40,
                 "size": p.stat().st_size}
                for p in files
            ]  # fmt: skip
            self.send(200, json.dumps(listing).encode(), body)
        elif resolve and root and (root / name[1:]).is_file():
            if body:
                self.fetched.append(name[1:])
            self.send(200, (root / name[1:]).read_bytes(), body)
        else:
            self.send(404, b"{}", body, **{"X-Error-Code": "RepoNotFound"})

    def send(self, code, data, body, **headers):
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{len(data):040x}"')
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(cache, **repositories):
    """The environment in which the hub is a server on this machine."""
    Hub.repositories, Hub.fetched = repositories, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        yield {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
    finally:
        server.shutdown()
        server.server_close()


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
