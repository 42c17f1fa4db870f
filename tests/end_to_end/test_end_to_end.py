"""The whole chain through its command lines, with real processes that are really killed."""

import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import children
import detailflow_jax as df
from detailflow_jax import data, train
from detailflow_jax.inference import extract_codes, generate
from detailflow_jax.runtime.checkpoint import restore_params

QUICK = ["--config.tensorboard=False", "--config.checkpoint_every=4", "--config.log_every=1"]
TOKENIZER = ["--config=configs/tokenizer.py:digits:runlocal", *QUICK]
TOKENIZER += ["--config.model.scan=False"]
TOKENIZER += [
    f"--config.model.{part}.{size}"
    for part in ("encoder", "decoder")
    for size in ("width=32", "depth=1", "num_heads=2", "mlp_dim=32")
]
GENERATOR = ["--config=configs/generator.py:digits:runlocal", *QUICK]
GENERATOR += ["--config.model.width=32", "--config.model.depth=1", "--config.model.multiple_of=8"]
CROPS = ["--crops=center", "--shard_size=50"]


def start(module, *args):
    return children.start(sys.executable, "-m", f"detailflow_jax.{module}", *args)


def finish(module, *args):
    return children.run("-m", f"detailflow_jax.{module}", *args)


def kill_when(process, condition):
    """SIGKILL as soon as the condition holds; fails if the process ends before."""
    deadline = time.monotonic() + 240
    while not condition() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    assert condition(), children.finish(process, 1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def steps_logged(workdir):
    path = pathlib.Path(workdir) / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def assert_same_bits(first, second):
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    assert all(np.array_equal(a, b) for a, b in leaves)


def killed_and_resumed(arguments, workdir):
    """Trains in `workdir`, killed once at a random step, to the end."""
    at = random.randint(5, 17)
    process = start("train", *arguments, "--workdir", workdir)
    kill_when(process, lambda: steps_logged(workdir) >= at)
    assert steps_logged(workdir) < 20
    finish("train", *arguments, "--workdir", workdir)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tokenizer, its codes and a generator, each made without interruption."""
    root = tmp_path_factory.mktemp("runs")
    assert train.main([*TOKENIZER, f"--workdir={root}/tok"]) == 0
    assert extract_codes.main(extraction(root, root / "codes")) == 0
    assert train.main([*generator_of(root), f"--workdir={root}/gen"]) == 0
    return root


def extraction(runs, out):
    return [f"--tokenizer={runs}/tok", f"--out={out}", "--source=digits:test", *CROPS]


def generator_of(runs):
    return [*GENERATOR, f"--config.data.source=codes:{runs}/codes"]


@pytest.mark.full
def test_a_killed_tokenizer_run_ends_with_the_same_bits(runs, tmp_path):
    killed_and_resumed(TOKENIZER, tmp_path / "tok")
    for ema in (False, True):
        got = restore_params(tmp_path / "tok", ema=ema, step=20)
        assert_same_bits(got, restore_params(runs / "tok", ema=ema, step=20))


@pytest.mark.full
def test_a_killed_generator_run_ends_with_the_same_bits(runs, tmp_path):
    killed_and_resumed(generator_of(runs), tmp_path / "gen")
    assert_same_bits(
        restore_params(tmp_path / "gen", ema=False), restore_params(runs / "gen", ema=False)
    )


@pytest.mark.full
def test_killed_extraction_ends_with_the_same_files(runs, tmp_path):
    out = tmp_path / "codes"
    process = start("extract_codes", *extraction(runs, out))
    kill_when(process, lambda: len(list(out.glob("codes-*.array_record"))) >= 3)
    assert not (out / "manifest.json").exists()
    finish("extract_codes", *extraction(runs, out))
    assert_same_files(out, runs / "codes")


def test_an_extraction_goes_on_where_it_stopped(runs, tmp_path):
    out = tmp_path / "codes"
    shutil.copytree(runs / "codes", out)
    (out / "manifest.json").unlink()
    kept, *lost = sorted(out.glob("codes-*.array_record"))
    for shard in lost[::2]:
        shard.unlink()
    written = kept.stat().st_mtime_ns
    assert extract_codes.main(extraction(runs, out)) == 0
    assert kept.stat().st_mtime_ns == written
    assert_same_files(out, runs / "codes")


def assert_same_files(found, wanted):
    assert sorted(p.name for p in found.iterdir()) == sorted(p.name for p in wanted.iterdir())
    for path in found.iterdir():
        assert path.read_bytes() == (wanted / path.name).read_bytes(), path.name


def test_codes_are_what_the_tokenizer_gives(runs):
    source = data.CodeSource(str(runs / "codes"))
    assert len(source) == 359
    tokenizer = df.load_tokenizer(str(runs / "tok"))
    digits = data.make_source("digits:test")
    images = np.stack([digits[i]["image"] for i in range(8)])
    clean = np.stack([source[i]["codes"][0, :, 0] for i in range(8)])
    np.testing.assert_array_equal(tokenizer.encode(images), clean)
    triplets = np.stack([source[i]["codes"][0] for i in range(200)])
    # The noise lies inside one group, before it the input is clean, and until its end the label.
    differs = triplets[..., 1] != triplets[..., 0]
    assert differs.any(axis=1).mean() > 0.5
    first = np.argmax(differs, axis=1)
    assert len(np.unique(first[differs.any(axis=1)])) > 5  # a position of its own for each crop


def test_generate_writes_pictures_and_arrays(runs, tmp_path, capsys):
    models = ["--tokenizer", str(runs / "tok"), "--generator", str(runs / "gen")]
    rest = ["--labels", "0-2,7", "--per_class", "2", "--num_tokens", "4,8,16", "--single"]
    assert generate.main([*models, "--out", str(tmp_path), *rest]) == 0, capsys.readouterr().err
    stored = np.load(tmp_path / "samples.npz")
    assert stored["arr_0"].shape == (8, 32, 32, 3) and stored["arr_0"].dtype == np.uint8
    assert stored["labels"].tolist() == [0, 0, 1, 1, 2, 2, 7, 7]
    assert len(list((tmp_path / "images").glob("*.png"))) == 8
    # From the tokenizer to the codes, to the generator, to the samples.
    tokenizer, generator = df.load_tokenizer(runs / "tok"), df.load_generator(runs / "gen")
    assert generator.encoded_by == tokenizer.encoder_fingerprint
    made_by = json.loads((tmp_path / "samples.json").read_text())["made_by"]
    assert {kind: one["fingerprint"] for kind, one in made_by.items()} == {
        "tokenizer": tokenizer.fingerprint, "generator": generator.fingerprint
    }  # fmt: skip
    single = np.asarray(Image.open(tmp_path / "images" / "000006_class0007.png"))
    np.testing.assert_array_equal(single, stored["arr_0"][6])
    for name in ("grid.png", "progressive.png"):
        assert Image.open(tmp_path / name).size[0] > 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--labels", "3,10"], "labels [10] are out of range, expected 0..9"),
        (["--labels", "3", "--num_tokens", "6"], "num_tokens=6 is not valid"),
        (["--labels", "three"], "cannot read labels 'three'"),
    ],
)
def test_generate_refuses_what_the_models_do_not_allow(runs, tmp_path, capsys, change, message):
    models = ["--tokenizer", str(runs / "tok"), "--generator", str(runs / "gen")]
    assert generate.main([*models, "--out", str(tmp_path / "out"), *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_swapped_models_are_refused(runs, tmp_path, capsys):
    models = ["--tokenizer", str(runs / "gen"), "--generator", str(runs / "tok")]
    assert generate.main([*models, "--out", str(tmp_path), "--labels", "1"]) == 2
    assert "holds a generator; expected a tokenizer" in capsys.readouterr().err


def test_a_workdir_of_another_config_is_refused(runs, capsys):
    workdir = ["--workdir", str(runs / "tok")]
    assert train.main([*TOKENIZER, *workdir, "--config.optim.lr=0.5"]) == 2
    error = capsys.readouterr().err
    assert "optim.lr" in error and "0.5" in error and "another --workdir" in error


def test_an_unknown_field_is_refused_with_near_names(tmp_path, capsys):
    arguments = [*TOKENIZER, "--workdir", str(tmp_path / "run"), "--config.optim.lrr=0.5"]
    assert train.main(arguments) == 2
    assert "optim.lr" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_extraction_counts_and_names_unreadable_images(runs, tmp_path, capsys):
    digits = data.make_source("digits:test")
    for i in range(6):
        folder = tmp_path / "images" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits[i]["image"]).save(folder / f"{i}.png")
    (tmp_path / "images" / "0" / "notes.jpg").write_text("not an image")
    command = ["--tokenizer", str(runs / "tok"), "--out", str(tmp_path / "codes")]
    source = f"folder:{tmp_path / 'images'}"
    assert extract_codes.main([*command, "--source", source, "--crops", "center"]) == 0
    captured = capsys.readouterr()
    assert "6 images" in captured.out and "1 unreadable" in captured.out
    assert "notes.jpg" in captured.err
    assert len(data.CodeSource(str(tmp_path / "codes"))) == 6
