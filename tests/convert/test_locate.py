"""Which file of a place is read and which of its weights: folders, shards, buckets, addresses."""

import argparse
import json
import re
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

import bucket_server
from detailflow_jax.convert import CheckpointError, check_finite, read_checkpoint
from detailflow_jax.convert.locate import choose_weights

ONE, TWO = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}


@pytest.mark.parametrize(
    ("content", "weights", "value", "noticed"),
    [
        ({"model": ONE, "ema": TWO}, "model", 1, False),
        ({"model": ONE, "ema": TWO}, None, 1, False),
        ({"model": ONE, "ema": TWO}, "ema", 2, False),
        ({"model": ONE}, "ema", 1, True),
        ({"ema": TWO}, "model", 2, True),
        ({"module": ONE, "steps": 3}, "model", 1, False),
        ({"state_dict": ONE, "loss": torch.tensor(0.5)}, "model", 1, False),
        ({"ema": {"module": TWO, "decay": 0.999}, "model": ONE}, "ema", 2, False),
        (ONE, "model", 1, False),
        (ONE, "ema", 1, True),
    ],
)
def test_which_weights_are_read(tmp_path, content, weights, value, noticed):
    torch.save(content, tmp_path / "x.pt")
    read = read_checkpoint(tmp_path / "x.pt", weights)
    assert read.tensors["w"].tolist() == [value]
    assert bool(read.notices) == noticed


def test_no_weights_names_the_keys(tmp_path):
    torch.save({"optimizer": {}, "steps": 3}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="it holds: optimizer, steps"):
        read_checkpoint(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="weights='teacher'"):
        read_checkpoint(tmp_path / "x.pt", "teacher")


def published_folder(root, content=None):
    (root / "checkpoints").mkdir(parents=True)
    (root / "config.json").write_text(json.dumps({"image_size": 256, "causal_num": None}))
    (root / "config.yaml").write_text(yaml.safe_dump({"image_size": 512, "gpt_model": "GPT-L"}))
    content = content or {"model": ONE, "args": argparse.Namespace(image_size=64, dim=8)}
    torch.save(content, root / "checkpoints" / "128.pt")
    return root


def test_folder_and_file_give_the_same(tmp_path):
    root = published_folder(tmp_path / "published")
    for path in (root, root / "checkpoints" / "128.pt", str(root) + "/"):
        read = read_checkpoint(path)
        assert read.tensors["w"].tolist() == [1]
        assert read.source == str(root / "checkpoints" / "128.pt")
        assert read.config == {
            "image_size": 256, "causal_num": None, "gpt_model": "GPT-L", "dim": 8,
        }  # fmt: skip
        assert len(read.notices) == 1 and "image_size" in read.notices[0]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["a.pt", "config.json", "model.safetensors"], "model.safetensors"),
        (["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
         "model.safetensors.index.json"),
        (["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"],
         "pytorch_model.bin.index.json"),
        (["x.pt", "x.safetensors", "checkpoints/1.pt"], "x.safetensors"),
        (["checkpoints/256.pt", "optimizer.pt", "x.pth"], "checkpoints/256.pt"),
        (["README.md", "optimizer.pt", "training_args.bin", "x.ckpt"], "x.ckpt"),
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
         "mp_rank_00_model_states.pt"),
        (["a.pt", "._a.pt", "opt000100.pt", "sampler_1.bin", "dl_state_dict.bin"], "a.pt"),
        (["checkpoints/1.PT", "checkpoints/._1.PT"], "checkpoints/1.PT"),
        (["model_best.pth.tar", "log.txt"], "model_best.pth.tar"),
        ([".metadata", "__0_0.distcp"], "dcp_to_torch FOLDER x.pt"),
        (["latest", "zero_to_fp32.py"], "file `latest` names the folder"),
        (["zero_pp_rank_0_mp_rank_00_model_states.pt"], "zero_to_fp32.py"),
        (["data.pkl", "version"], "was unpacked"),
        (["model-00001-of-00002.safetensors"], "Download the missing shards"),
        (["a.pt", "b.pth"], "several checkpoints: a.pt, b.pth"),
        (["checkpoints/1.pt", "checkpoints/2.pt"], "several checkpoints"),
        (["README.md"], r"holds no weights \(README.md\)"),
        ([], "no files are in it"),
    ],
)  # fmt: skip
def test_choice_in_a_folder(names, chosen):
    if chosen in names:
        assert choose_weights(names, "here") == chosen
    else:
        with pytest.raises(CheckpointError, match=chosen):
            choose_weights(names, "here")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path, suffix):
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    save({"a": torch.ones(2)}, tmp_path / f"{stem}-00001-of-00002.{suffix}")
    save({"module.b": torch.zeros(3)}, tmp_path / f"{stem}-00002-of-00002.{suffix}")
    weight_map = {n: f"{stem}-0000{i}-of-00002.{suffix}" for n, i in (("a", 1), ("module.b", 2))}
    index = tmp_path / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in (tmp_path, index):
        read = read_checkpoint(path)
        assert {n: x.tolist() for n, x in read.tensors.items()} == {"a": [1, 1], "b": [0, 0, 0]}
        assert read.source == str(index)
    index.write_text(json.dumps({"weight_map": {**weight_map, "c": weight_map["a"]}}))
    with pytest.raises(CheckpointError, match="not in the shards it names for them: c"):
        read_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="not beside it"):
        read_checkpoint(tmp_path)
    for nothing in ({}, [], {"a": 1}):
        index.write_text(json.dumps({"weight_map": nothing}))
        with pytest.raises(CheckpointError, match="has no usable weight_map"):
            read_checkpoint(tmp_path)
    index.unlink()  # All shards are there, which their names tell.
    assert list(read_checkpoint(tmp_path).tensors) == ["a", "b"]
    (tmp_path / f"{stem}-00001-of-00002.{suffix}").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_checkpoint(tmp_path)


def test_bucket_is_copied_and_cleaned_up(tmp_path, monkeypatch):
    published_folder(tmp_path / "run")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    serving = bucket_server.serve(proxy=True)
    with serving as bucket, bucket_server.environment(bucket.variables):
        for file in (tmp_path / "run").rglob("*"):
            if file.is_file():
                bucket.write(file.relative_to(tmp_path).as_posix(), file.read_bytes())
        for path in (bucket.path("run"), bucket.path("run/checkpoints/128.pt")):
            read = read_checkpoint(path)
            assert list((tmp_path / "scratch").iterdir()) == []
            assert read.tensors["w"].tolist() == [1]  # mapped, so still there
            assert read.source == bucket.path("run/checkpoints/128.pt")
            assert read.config["gpt_model"] == "GPT-L"
        with pytest.raises(CheckpointError, match="/none: there is no such object"):
            read_checkpoint(bucket.path("none"))
        bucket.proxy.fault = lambda method, path: 403
        with pytest.raises(CheckpointError, match=r"test-bucket/run.*made by the test"):
            read_checkpoint(bucket.path("run"))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_safetensors_whose_length_looks_like_a_pickle(tmp_path):
    """The header's length comes first; a low byte of 0x80 is also how a pickle begins."""
    for padding in range(256):
        metadata = {"note": "x" * padding}
        safetensors.torch.save_file(ONE, tmp_path / "x.safetensors", metadata)
        assert read_checkpoint(tmp_path / "x.safetensors").tensors["w"].tolist() == [1]
        if (tmp_path / "x.safetensors").read_bytes()[0] == 0x80:
            return
    raise AssertionError("no header had such a length")


def test_finite_check():
    tensors = {
        "fine": np.ones(3, np.float16), "whole": np.ones(3, np.int64),
        "nan": np.array([1, np.nan], ml_dtypes.bfloat16), "inf": np.array([np.inf]),
    }  # fmt: skip
    (notice,) = check_finite(tensors)
    assert notice == "2 of 4 tensors hold NaN or infinite numbers: nan, inf"
    assert check_finite({"fine": tensors["fine"]}) == []


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("missing.pt", "there is no such file"),
        ("owner/name", "write hf:owner/name"),
        ("https://host/x.pt", "address of an unknown kind"),
        ("file:///x/y.pt", r"Write /x/y\.pt\."),
        ("", "The path is empty"),
        ("~/missing.pt", "Only a shell knows ~: write /"),
        ("hf:only-owner", "not a name on the hub"),
    ],
)
def test_addresses_that_lead_nowhere(path, found):
    with pytest.raises(CheckpointError, match=found):
        read_checkpoint(path)


def test_a_folder_of_another_kind(tmp_path):
    Path(tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"holds no weights \(notes.txt\).*expected"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '\ufeff{"dim": 8, "betas": [1, 2]}'),
        ("config.yaml", "dim: 8\nbetas: !!python/tuple [1, 2]"),
        ("config.yaml", "!!python/object:argparse.Namespace {dim: 8, betas: [1, 2]}"),
    ],
)
def test_settings_as_editors_and_yaml_dump_write_them(tmp_path, name, text):
    torch.save(ONE, tmp_path / "x.pt")
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_checkpoint(tmp_path).config == {"dim": 8, "betas": [1, 2]}


def test_paths_that_lead_elsewhere_say_where(tmp_path):
    (tmp_path / "x.pt").symlink_to("blobs/1")
    page = "https://huggingface.co/owner/name"
    for path, message in (
        (tmp_path / "x.pt", "It is a link to blobs/1, which is not there"),
        (f"{page}/resolve/main/a/x.pt?download=true", "Write hf:owner/name@main/a/x.pt."),
        (page, "Write hf:owner/name."),
        ("https://example.org/x.pt", "Download the file"),
        ("", "'': an address"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(message)):
            read_checkpoint(path)
