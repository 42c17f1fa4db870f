"""`python -m detailflow_jax.convert`, and models trained here, in PyTorch's own hands."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

import bucket_server
import detailflow_jax as df
import small_tasks
from convert_models import TOKENIZER_HEADS, published, recorded
from detailflow_jax import tasks
from detailflow_jax.convert import CheckpointError
from detailflow_jax.convert import published as published_lib
from detailflow_jax.convert.__main__ import main
from detailflow_jax.models import discriminator, layers
from detailflow_jax.runtime import checkpoint
from detailflow_jax.runtime.checkpoint import Checkpoints, restore_params
from detailflow_jax.runtime.config import load_config, write_config

HEADS = [f"--{name}={value}" for name, value in TOKENIZER_HEADS.items()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Published folders of the recorded networks."""
    root = tmp_path_factory.mktemp("published")
    names = {"tokenizer": "tokenizer_a", "generator": "generator_a"}
    return {kind: published(root / kind, name) for kind, name in names.items()}


def run(*args):
    return main([str(arg) for arg in args])


def names_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


# ------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_there_and_back(tmp_path, folders, kind, capsys):
    heads = HEADS if kind == "tokenizer" else []
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert run("--to", "jax", "--src", folders[kind], "--dst", ours, *heads) == 0
    output = capsys.readouterr()
    assert "read: 100%" in output.err
    report = {line[:18].strip(): line[18:] for line in output.out.splitlines()}
    assert report["network"].startswith(kind)
    assert report["loaded"].endswith(" tensors, float32 -> float32")
    assert report["missing (new)"] == report["unused"] == "none"
    teacher = "repa_model.* (53), global_token_proj.* (6)"
    assert report["skipped (design)"] == (teacher if kind == "tokenizer" else "none")
    assert re.fullmatch(r"\d+\.\d\d GiB at most, [\d.]+x the weights", report["memory"])
    assert re.fullmatch(r"[\d.]+ s", report["time"])
    load = {"tokenizer": df.load_tokenizer, "generator": df.load_generator}[kind]
    options = TOKENIZER_HEADS if kind == "tokenizer" else {}
    assert load(ours).fingerprint == load(folders[kind], **options).fingerprint
    assert load(ours).config == load(folders[kind], **options).config

    assert run("--to", "pytorch", "--src", ours, "--dst", back) == 0
    report = capsys.readouterr().out
    assert "left out (design) none" in report
    content = torch.load(back / "checkpoints" / "32.pt", weights_only=True)
    state, settings = recorded("tokenizer_a" if kind == "tokenizer" else "generator_a")
    want = {k: x for k, x in state.items() if not k.startswith(("repa_model", "global_token_proj"))}
    if kind == "tokenizer":
        assert "buffers quantize.codebook_used" in report
        want["quantize.codebook_used"] = np.zeros(65536, np.float32)
    for name in {"tokenizer": ["model"], "generator": ["model", "ema"]}[kind]:
        assert content[name].keys() == want.keys()
        for key, x in content[name].items():
            assert x.numpy().tobytes() == want[key].tobytes(), key
    written = json.loads((back / "config.json").read_text())
    shared = set(written) & set(settings) - {"global_token_loss_weight"}  # 0: without its teacher
    assert len(shared) > 5
    assert {key: written[key] for key in shared} == {key: settings[key] for key in shared}


def test_single_files(tmp_path, folders):
    source = folders["generator"] / "checkpoints" / "32.pt"
    assert run("--to", "pytorch", "--src", source, "--dst", tmp_path / "x.safetensors") == 0
    state, _ = recorded("generator_a")
    read = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert {k: x.numpy().tobytes() for k, x in read.items()} == {
        k: x.tobytes() for k, x in state.items()
    }
    assert names_in(tmp_path) == ["config.json", "config.yaml", "x.safetensors"]


def test_overrides_and_allowances(tmp_path, capsys):
    change = {"norm.weight": None, "adapter.weight": np.zeros(3, np.float32)}
    path = published(tmp_path / "src", "generator_a", change, config={})
    command = ["--to", "jax", "--src", path, "--dst", tmp_path / "dst"]
    assert run(*command, "--num_heads=4") == 2
    assert "1 of 19 tensors are missing: norm.weight" in capsys.readouterr().err
    told = ["--num_heads=4", "--num_tokens=32", "--causal_num=8"]
    assert run(*command, *told, "--allow_missing", "--allow_unused") == 0
    report = capsys.readouterr().out
    assert "missing (new)     norm.weight\nunused            adapter.weight\n" in report
    config = df.load_generator(tmp_path / "dst").config
    assert (config.num_heads, config.num_tokens, config.causal) == (4, 32, 8)


def test_weights_can_be_chosen(tmp_path, folders, capsys):
    content = torch.load(folders["generator"] / "checkpoints" / "32.pt", weights_only=True)
    average = {k: x + 1 for k, x in content["model"].items()}
    shutil.copytree(folders["generator"], tmp_path / "src")
    torch.save({**content, "ema": average}, tmp_path / "src" / "checkpoints" / "32.pt")
    for choice, want in (("model", content["model"]), ("ema", average), (None, average)):
        dst = tmp_path / f"{choice}.safetensors"
        (tmp_path / "config.json").unlink(missing_ok=True)
        (tmp_path / "config.yaml").unlink(missing_ok=True)
        chosen = ["--weights", choice] if choice else []
        assert run("--to", "pytorch", "--src", tmp_path / "src", "--dst", dst, *chosen) == 0
        assert torch.equal(safetensors.torch.load_file(dst)["norm.weight"], want["norm.weight"])
        taken = "their average (ema)" if want is average else "model"
        assert f"weights           {taken}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ refusals


def test_refusals_leave_nothing(tmp_path, folders, theirs, capsys, monkeypatch):
    (tmp_path / "cut.pt").write_bytes(
        (folders["generator"] / "checkpoints" / "32.pt").read_bytes()[:-100]
    )
    monkeypatch.chdir(tmp_path)
    for to, source, options, message in (
        ("jax", tmp_path / "nowhere", [], "there is no such file or folder"),
        ("jax", tmp_path / "cut.pt", [], "damaged or cut"),
        ("jax", folders["tokenizer"], [], "encoder_num_heads=..."),
        ("pytorch", folders["tokenizer"], [*HEADS, "--group_size=5"], "group_size=5"),
        ("jax", theirs[1]["vision"], [], "looks like a SigLIP2 vision model"),
        ("pytorch", theirs[1]["vision"], [], "It needs no conversion"),
        ("jax", folders["generator"], ["--image_size=32"], "unknown override 'image_size'"),
    ):
        assert run("--to", to, "--src", source, "--dst", tmp_path / "a" / "dst", *options) == 2
        output = capsys.readouterr()
        assert output.out == "" and message in output.err
        error = output.err.splitlines()[-1]
        assert error.startswith("error: ") and "Traceback" not in output.err
    assert run("--to", "jax", "--src", folders["generator"], "--dst", "gs://bucket/x") == 2
    assert "gs://bucket/x: not a local path" in capsys.readouterr().err
    assert names_in(tmp_path) == ["cut.pt"]


@pytest.mark.parametrize("to", ["jax", "pytorch"])
def test_failure_while_writing_leaves_nothing(tmp_path, folders, to, capsys, monkeypatch):
    def save(target, params):
        (target / "checkpoints").mkdir()
        (target / "checkpoints" / "half").write_bytes(bytes(1000))
        raise OSError("disk full")

    def torch_save(content, path):
        pathlib.Path(path).write_bytes(bytes(1000))
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_params", save)
    monkeypatch.setattr(torch, "save", torch_save)
    assert run("--to", to, "--src", folders["generator"], "--dst", tmp_path / "dst") == 2
    assert "disk full" in capsys.readouterr().err
    assert names_in(tmp_path) == []


def test_a_mount_that_takes_no_checkpoint_is_one_line(tmp_path, folders, capsys, monkeypatch):
    def save(*_):  # As TensorStore says it where files cannot be replaced or synced.
        raise ValueError("Failed to fsync file: Invalid argument [os_error_code='22']\nmore")

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "save", save)
    assert run("--to", "jax", "--src", folders["generator"], "--dst", tmp_path / "dst") == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: cannot write a checkpoint to ") and "Failed to fsync" in last
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("to", ["jax", "pytorch"])
def test_what_is_there_is_kept_unless_it_may_go(tmp_path, folders, to, capsys):
    command = ["--to", to, "--src", folders["generator"], "--dst", tmp_path / "dst"]
    (tmp_path / "dst").mkdir()
    assert run(*command) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "dst").rglob("*") if p.is_file()}
    assert run(*command) == 2
    assert "exists already" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (tmp_path / "dst").rglob("*") if p.is_file()} == before
    assert run(*command, "--num_tokens=64", "--overwrite") == 0
    assert df.load_generator(tmp_path / "dst").config.num_tokens == 64
    (tmp_path / "dst" / "log.txt").write_text("a run of weeks")
    assert run(*command, "--overwrite") == 2
    assert "holds more than the checkpoint to replace (log.txt)" in capsys.readouterr().err
    assert df.load_generator(tmp_path / "dst").config.num_tokens == 64


def test_command_line():
    def call(*args):
        command = [sys.executable, "-m", "detailflow_jax.convert", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=100)

    shown = call("--help")
    assert shown.returncode == 0
    for word in (
        "--to {jax,pytorch,diffusers}",
        "hf:OWNER/NAME",
        "--allow_missing",
        "--encoder_num_heads N",
    ):
        assert word in shown.stdout
    done = call("--to", "jax", "--src", "nowhere.pt", "--dst", "x")
    assert done.returncode == 2 and "error: nowhere.pt: there is no such file" in done.stderr
    assert call("--to", "onnx", "--src", "a", "--dst", "b").returncode == 2


# --------------------------------------------------------------------------- models trained here


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{task: workdir} as a run on digits leaves it; the tokenizer keeps an average."""
    workdir = tmp_path_factory.mktemp("runs") / "tok"
    config = load_config("configs/tokenizer.py:digits:runlocal")
    config.ema.decay = 0.5
    state = small_tasks.start(tasks.make_task(config))
    state = state.replace(ema=jax.tree.map(lambda x: x * 0.9, state.params))
    write_config(config, workdir)
    with Checkpoints(workdir, 2) as checkpoints:
        before = jax.tree.map(lambda x: x * 0.8, state.params)
        checkpoints.save(2, state.replace(params=before), {}, {})
        checkpoints.save(3, state, {}, {})
    return {"tokenizer": workdir}


def test_trained_tokenizer_in_pytorch(tmp_path, runs):
    """The numbers are those of the run, by hand: PyTorch's linear layers are [out, in]."""
    tokenizer = df.load_tokenizer(runs["tokenizer"])
    df.save_pytorch(tokenizer, tmp_path / "out")
    df.save_pytorch(tokenizer, tmp_path / "single" / "x.safetensors")
    state = torch.load(tmp_path / "out" / "checkpoints" / "16.pt", weights_only=True)["model"]
    again = safetensors.torch.load_file(tmp_path / "single" / "x.safetensors")
    assert state.keys() == again.keys()
    assert all(torch.equal(x, again[name]) for name, x in state.items())

    params = layers.unstack_layers(restore_params(runs["tokenizer"]))
    codebook, trunk = params["codebook"], params["encoder"]["trunk"]
    np.testing.assert_array_equal(state["quantize.embedding.weight"], codebook)
    for i in range(2):
        block = trunk["blocks"][f"layers_{i}"]
        name = f"encoder.visual_model.encoder.layers.{i}"
        q = block["attention"]["q_proj"]
        np.testing.assert_array_equal(state[f"{name}.self_attn.q_proj.weight"], q["kernel"].T)
        np.testing.assert_array_equal(state[f"{name}.self_attn.q_proj.bias"], q["bias"])
        np.testing.assert_array_equal(state[f"{name}.layer_norm2.weight"], block["norm2"]["scale"])
    count = sum(x.numel() for name, x in state.items() if name != "quantize.codebook_used")
    assert count == sum(x.size for x in jax.tree.leaves(params))

    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    back = df.load_tokenizer(tmp_path / "out")
    assert back.config == tokenizer.config
    np.testing.assert_array_equal(back.encode(images), tokenizer.encode(images))
    with pytest.raises(CheckpointError, match="exists already"):
        df.save_pytorch(tokenizer, tmp_path / "out")
    df.save_pytorch(tokenizer, tmp_path / "out", overwrite=True)


def test_which_weights_of_a_run(runs, monkeypatch):
    workdir = runs["tokenizer"]
    live, average = (restore_params(workdir, ema=ema)["codebook"] for ema in (False, True))
    assert not np.array_equal(live, average)
    for options, want in (
        ({}, average), ({"weights": "ema"}, average), ({"weights": "model"}, live),
        ({"step": 2, "weights": "model"}, restore_params(workdir, ema=False, step=2)["codebook"]),
    ):  # fmt: skip
        np.testing.assert_array_equal(
            df.load_tokenizer(workdir, **options).params["codebook"], want
        )


def test_runs_refuse_what_does_not_fit(runs):
    workdir = runs["tokenizer"]
    with pytest.raises(CheckpointError, match=r"holds a tokenizer.*df\.load_tokenizer"):
        df.load_generator(workdir)
    with pytest.raises(
        CheckpointError, match=r"latent_positions is \(16, 96\); expected \(32, 96\)"
    ):
        df.load_tokenizer(workdir, num_tokens=32)
    with pytest.raises(ValueError, match="unknown override 'groupsize'; closest names: group_size"):
        df.load_tokenizer(workdir, groupsize=8)
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint of step 7"):
        df.load_tokenizer(workdir, step=7)
    assert df.load_tokenizer(workdir, group_size=8).config.group_size == 8


def test_a_run_in_a_bucket_is_known(runs):
    workdir = runs["tokenizer"]
    with bucket_server.serve() as bucket, bucket_server.environment(bucket.variables):
        for file in workdir.rglob("*"):
            if file.is_file():
                bucket.write(f"runs/tok/{file.relative_to(workdir)}", file.read_bytes())
        tokenizer = df.load_tokenizer(bucket.path("runs/tok"))
    assert tokenizer.fingerprint == df.load_tokenizer(workdir).fingerprint


def test_keys_that_published_scripts_read(tmp_path, runs, folders, capsys):
    command = ["--to", "pytorch", "--src", runs["tokenizer"], "--dst"]
    assert run(*command, tmp_path / "a") == 0
    said = capsys.readouterr().err
    assert "load_vq_model(ema=True)" in said and "--keys ema" in said
    assert "--vq-ckpt" in said and "--keys discriminator" in said
    assert run(*command, tmp_path / "b", "--keys", "ema") == 0
    assert "--keys ema" not in capsys.readouterr().err
    content = torch.load(tmp_path / "b" / "checkpoints" / "16.pt", weights_only=True)
    assert list(content) == ["model", "ema"]
    # The run keeps an average beside the raw weights; a model that was changed since has one set.
    fingerprints = {}
    for kind in ("model", "ema"):
        found = df.load_tokenizer(runs["tokenizer"], weights=kind)
        fingerprints[kind] = found.fingerprint
        assert df.load_tokenizer(tmp_path / "b", weights=kind).fingerprint == found.fingerprint
    assert fingerprints["model"] != fingerprints["ema"]
    found.params = jax.tree.map(lambda x: x + 1, found.params)
    (tmp_path / "changed").mkdir()
    df.save_pytorch(found, tmp_path / "changed" / "x.pt", keys=["ema"])
    content = torch.load(tmp_path / "changed" / "x.pt", weights_only=True)
    assert all(torch.equal(content["ema"][k], x) for k, x in content["model"].items())
    assert run(*command, tmp_path / "c", "--keys", "discriminator") == 2
    assert "holds no discriminator" in capsys.readouterr().err
    assert run(*command, tmp_path / "c", "--keys", "optimizer") == 2
    assert "expected one of ema, discriminator" in capsys.readouterr().err
    # What a published training checkpoint holds goes on as it is.
    state, _ = recorded("tokenizer_a")
    state = {k: torch.from_numpy(x) for k, x in state.items()}
    heads = {"heads.0.0.0.weight_orig": torch.ones(3), "heads.0.0.0.bias": torch.zeros(3)}
    torch.save({"model": state, "discriminator": heads}, tmp_path / "x.pt")
    command = ["--to", "pytorch", "--src", tmp_path / "x.pt", "--dst", tmp_path / "d.pt", *HEADS]
    assert run(*command, "--keys", "discriminator,ema", "--group_size=4") == 0
    content = torch.load(tmp_path / "d.pt", weights_only=True)
    assert content.keys() == {"model", "ema", "discriminator"}
    assert content["discriminator"].keys() == heads.keys()


def test_the_discriminator_of_a_run(tmp_path, runs, monkeypatch):
    """What is written is read again, whole, by what starts a discriminator from a file."""
    disc = discriminator.make(discriminator.PatchGANConfig(channels=4, num_layers=2))
    params, state, _ = disc.init(jax.random.key(0), 32)
    disc_state = {"params": params, "state": state, "opt_state": {}}
    monkeypatch.setattr(
        "detailflow_jax.convert.export.restore_field", lambda *_: {"discriminator": disc_state}
    )
    tokenizer = df.load_tokenizer(runs["tokenizer"])
    df.save_pytorch(tokenizer, tmp_path / "x.pt", keys=["discriminator"])
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(content) == ["model", "discriminator"]
    counted = [x for name, x in content["discriminator"].items() if "num_batches" in name]
    assert len(counted) == 2 and all(x.dtype == torch.int64 for x in counted)
    want = {"params": params, **state}
    read = published_lib.read("discriminator", tmp_path / "x.pt", params=want).params
    jax.tree.map(np.testing.assert_array_equal, read, want)


def test_run_to_pytorch_by_the_command(tmp_path, runs, capsys):
    assert run("--to", "pytorch", "--src", runs["tokenizer"], "--dst", tmp_path / "out") == 0
    output = capsys.readouterr()
    assert "is none of the published sizes" in output.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "encoder_model" not in config and config["num_latent_tokens"] == 16
    tokenizer = df.load_tokenizer(tmp_path / "out")
    assert tokenizer.fingerprint == df.load_tokenizer(runs["tokenizer"]).fingerprint
    # And on, as a folder of this project.
    ours = tmp_path / "ours"
    assert run("--to", "jax", "--src", tmp_path / "out", "--dst", ours) == 0
    assert df.load_tokenizer(ours).fingerprint == tokenizer.fingerprint
