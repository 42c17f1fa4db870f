"""Reading from the Hugging Face hub: from its cache offline, and from a server."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

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

    root = None
    fetched: list = []  # noqa: RUF012

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        kind, _, name = path.partition("/main")
        if kind == "/api/models/Owner/Name/tree":
            files = [p for p in self.root.rglob("*") if p.is_file()]
            listing = [
                {"type": "file", "path": str(p.relative_to(self.root)), "oid": "0" * 40,
                 "size": p.stat().st_size}
                for p in files
            ]  # fmt: skip
            self.send(200, json.dumps(listing).encode(), body)
        elif kind == "/Owner/Name/resolve" and (self.root / name[1:]).is_file():
            if body:
                self.fetched.append(name[1:])
            self.send(200, (self.root / name[1:]).read_bytes(), body)
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


def test_from_a_server_only_what_is_needed(tmp_path, repository):
    Hub.root, Hub.fetched = repository, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        got = read_in_fresh_process(
            "hf:Owner/Name", "hf:Owner/Name@main/checkpoints/128.pt", "hf:Owner/None",
            HF_HUB_CACHE=str(tmp_path / "cache"), HF_HUB_OFFLINE="0",
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
        )  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()
    assert "several checkpoints" in got["hf:Owner/Name"]
    assert got["hf:Owner/Name@main/checkpoints/128.pt"] == [
        "hf:Owner/Name@main/checkpoints/128.pt", [1.0], {"dim": 8},
    ]  # fmt: skip
    assert "models--Owner--None" in got["hf:Owner/None"]
    assert sorted(Hub.fetched) == ["checkpoints/128.pt", "config.json"]
