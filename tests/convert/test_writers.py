"""Written checkpoints are what PyTorch and safetensors read, whole or not there at all."""

import json
import os
import stat
import sys

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from detailflow_jax.convert import CheckpointError, read_checkpoint, write_pytorch
from detailflow_jax.runtime.extras import MissingExtra

TENSORS = {
    "float32": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "transposed": (np.arange(12, dtype=np.float32).reshape(3, 4) / 3).T,
    "slice": np.arange(24, dtype=np.float32).reshape(2, 3, 4)[1],
    "bfloat16": np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16),
    "float16": np.arange(3, dtype=np.float16),
    "int64": np.arange(3),
    "bool": np.array([True, False]),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}
CONFIG = {"dim": np.int64(8), "causal_num": None, "sizes": (1, 2), "rate": np.float32(0.5)}


def same(tensors, expected):
    assert set(tensors) == set(expected)
    for name, x in expected.items():
        got = tensors[name]
        assert (got.dtype, got.shape) == (x.dtype, x.shape), name
        np.testing.assert_array_equal(got, x)


def from_torch(state):
    return {
        name: x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        if x.dtype == torch.bfloat16
        else x.numpy()
        for name, x in state.items()
    }


def names_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_published_layout(tmp_path):
    path = write_pytorch(
        TENSORS, tmp_path / "out", CONFIG, extra_yaml={"gpt_model": "GPT-L"}, name="128"
    )
    assert names_in(path) == ["checkpoints", "checkpoints/128.pt", "config.json", "config.yaml"]
    content = torch.load(path / "checkpoints" / "128.pt", weights_only=True)
    assert list(content) == ["model"]
    same(from_torch(content["model"]), TENSORS)
    assert all(x.is_contiguous() for x in content["model"].values())
    config = {"dim": 8, "causal_num": None, "sizes": [1, 2], "rate": 0.5}
    assert json.loads((path / "config.json").read_text()) == config
    assert yaml.safe_load((path / "config.yaml").read_text()) == {**config, "gpt_model": "GPT-L"}
    read = read_checkpoint(path)
    same(read.tensors, TENSORS)
    assert read.config == {**config, "gpt_model": "GPT-L"} and read.notices == []


def test_safetensors_file(tmp_path):
    path = write_pytorch(TENSORS, tmp_path / "model.safetensors", CONFIG)
    same(from_torch(safetensors.torch.load_file(path)), TENSORS)
    assert names_in(tmp_path) == ["config.json", "config.yaml", "model.safetensors"]
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert len(modes) == 1  # readable by whoever may read the configuration
    same(read_checkpoint(tmp_path).tensors, TENSORS)
    with pytest.raises(CheckpointError, match="safetensors holds one set"):
        write_pytorch(TENSORS, tmp_path / "x.safetensors", {}, more={"ema": TENSORS})


def test_wrapping(tmp_path):
    two = {"w": np.ones(1000, np.float32)}
    other = {"w": np.zeros(1000, np.float32)}
    write_pytorch(two, tmp_path / "a" / "x.pt", {}, wrap=None)
    write_pytorch(two, tmp_path / "b" / "x.pt", {}, wrap="state_dict")
    write_pytorch(two, tmp_path / "c" / "x.pt", {}, more={"ema": two})
    write_pytorch(two, tmp_path / "d" / "x.pt", {}, more={"ema": other})
    files = {name: tmp_path / name / "x.pt" for name in "abcd"}
    read = {name: torch.load(file, weights_only=True) for name, file in files.items()}
    assert list(read["a"]) == ["w"] and list(read["b"]) == ["state_dict"]
    assert list(read["c"]) == list(read["d"]) == ["model", "ema"]
    same(read_checkpoint(files["d"], "ema").tensors, other)
    same(read_checkpoint(files["c"], "ema").tensors, two)
    # The same weights twice are in the file once.
    assert files["c"].stat().st_size < files["b"].stat().st_size + 1000 < files["d"].stat().st_size


@pytest.mark.parametrize("dtype", ["bfloat16", np.float16, np.float32])
@pytest.mark.parametrize("file", ["x.pt", "x.safetensors"])
def test_type_of_the_floats(tmp_path, dtype, file):
    write_pytorch(TENSORS, tmp_path / file, {}, dtype=dtype)
    floats = {"int64", "bool"}
    expected = {k: x if k in floats else x.astype(dtype) for k, x in TENSORS.items()}
    same(read_checkpoint(tmp_path / file).tensors, expected)


def test_no_copy_of_contiguous_weights(tmp_path, monkeypatch):
    weights = {"w": np.ones((4, 4), np.float32), "b": np.ones(4, ml_dtypes.bfloat16)}
    seen = {}
    monkeypatch.setattr(torch, "save", lambda content, path: seen.update(content["model"]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_pytorch(weights, tmp_path / "x.pt", {})
    for name, x in weights.items():
        assert seen[name].data_ptr() == x.ctypes.data
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["out", "x.pt", "x.safetensors"])
def test_nothing_half_written(tmp_path, file, monkeypatch):
    write_pytorch(TENSORS, tmp_path / file, {"a": 1})
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match="exists already"):
        write_pytorch(TENSORS, tmp_path / file, {"a": 2})

    def fail(*args):
        raise OSError("disk full")

    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, fail)
            with pytest.raises(CheckpointError, match="disk full"):
                write_pytorch({}, tmp_path / file, {"a": 2}, overwrite=True)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    write_pytorch({"w": np.ones(2)}, tmp_path / file, {"a": 2}, name="model", overwrite=True)
    read = read_checkpoint(tmp_path / file)
    assert list(read.tensors) == ["w"] and read.config == {"a": 2}
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == set(before)


def test_an_empty_folder_is_free(tmp_path):
    (tmp_path / "out").mkdir()
    write_pytorch(TENSORS, tmp_path / "out", {})
    assert "checkpoints/model.pt" in names_in(tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="exists already"):
        write_pytorch(TENSORS, tmp_path / "link", {})


def test_second_rename_failing_restores_the_folder(tmp_path, monkeypatch):
    write_pytorch(TENSORS, tmp_path / "out", {"a": 1})
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    calls, original = [], os.replace

    def replace(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("disk full")
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(CheckpointError, match="disk full"):
        write_pytorch({}, tmp_path / "out", {"a": 2}, overwrite=True)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_only_a_checkpoint_is_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match=r"holds more than the checkpoint.*letter.txt"):
        write_pytorch(TENSORS, tmp_path / "home", {}, overwrite=True)
    assert names_in(tmp_path) == ["home", "home/letter.txt"]


@pytest.mark.parametrize(
    ("path", "config", "found"),
    [
        ("gs://bucket/x", {}, "not a local path"),
        ("out", {"a": object()}, "configuration cannot be written: .*object"),
        ("out", {"a": float("nan")}, "configuration cannot be written"),
    ],
)
def test_what_cannot_be_written(tmp_path, monkeypatch, path, config, found):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=found):
        write_pytorch(TENSORS, path, config)
    assert list(tmp_path.iterdir()) == []


def test_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"pip install 'detailflow_jax\[torch\]'"):
        write_pytorch(TENSORS, tmp_path / "out", {})
    assert list(tmp_path.iterdir()) == []
    write_pytorch(TENSORS, tmp_path / "x.safetensors", {})
