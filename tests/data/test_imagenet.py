"""ImageNet from tars of its real form: prepared, compared with TFDS's own, trained on, extracted.

The pictures are scikit-learn's two photographs, cut and scaled to several sizes.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import detailflow_jax as df
from detailflow_jax import train
from detailflow_jax.data import (
    UnreadableImage,
    imagenet,
    make_iterator,
    make_source,
    shards,
)
from detailflow_jax.data.images import decode_image
from detailflow_jax.data.prepare import main as prepare
from detailflow_jax.inference import extract_codes
from detailflow_jax.models import siglip
from detailflow_jax.models.tokenizer import Tokenizer, TokenizerConfig
from imagenet_tars import encoded, photo, write_tars
from random_weights import TRUNK, random_like

TRUNCATED, CMYK, PNG = "n01443537_3.JPEG", "n01739381_1309.JPEG", "n02105855_2933.JPEG"
STRAY_CMYK, STRAY_PNG = "n01440764_7.JPEG", "n01443537_8.JPEG"  # That the builder knows nothing of.


def training_files():
    """{synset: {file name: bytes}} with every peculiarity of the real data."""
    synsets = {}
    for k, synset in enumerate(("n01440764", "n01443537", "n01739381", "n02105855")):
        names = [f"{synset}_{i}.JPEG" for i in range(5)]
        synsets[synset] = {name: encoded(photo(5 * k + i)) for i, name in enumerate(names)}
    synsets["n01739381"][CMYK] = encoded(photo(1).convert("CMYK"))
    synsets["n01440764"][STRAY_CMYK] = encoded(photo(2).convert("CMYK"))
    synsets["n02105855"][PNG] = encoded(photo(3), "PNG")
    synsets["n01443537"][STRAY_PNG] = encoded(photo(4), "PNG")
    synsets["n02105855"]["n02105855_9.JPEG"] = encoded(photo(0).convert("L"))
    whole = synsets["n01443537"][TRUNCATED]
    synsets["n01443537"][TRUNCATED] = whole[: len(whole) // 2]
    return synsets


def validation_files(count=4):
    exif = Image.Exif()
    exif[0x0112] = 6  # A stored orientation, which ImageNet's users have always ignored.
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, count + 1)]
    return {name: encoded(photo(40 + i), exif=exif) for i, name in enumerate(names)}


KILLED_EVER_LATER = """
import itertools, os, signal, sys, tensorflow, tensorflow_datasets
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder
from detailflow_jax.data import imagenet, prepare
imagenet.SHARD_BYTES = 50_000

def counted(call, left):
    def count(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return count

for attempt in itertools.count():
    if (child := os.fork()) == 0:
        left = [4 * attempt + 1]
        for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir")):
            setattr(module, name, counted(getattr(module, name), left))
        os._exit(prepare.main(["--data_dir", sys.argv[1], "--partial"]))
    if (status := os.waitpid(child, 0)[1]) != signal.SIGKILL:
        print("killed", attempt, "times")
        sys.exit(os.waitstatus_to_exitcode(status))
"""


def prepare_and_kill(data_dir):
    """Runs the command until it is not killed any more; returns its output."""
    command = [sys.executable, "-c", KILLED_EVER_LATER, str(data_dir)]
    options = {"check": True, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, **options).stdout


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Prepared by the command, which was killed many times and run again."""
    path = tmp_path_factory.mktemp("tfds")
    write_tars(path, training_files(), validation_files())
    output = prepare_and_kill(path)
    assert int(output.split("killed ")[1].split()[0]) >= 5
    assert "removing" not in output and "damaged" not in output
    return str(path)


def test_a_preparation_killed_and_run_again_holds_what_tfds_would_write(data_dir, tmp_path):
    builder = tfds.builder("imagenet2012", data_dir=str(tmp_path), file_format="array_record")
    manual = os.path.join(data_dir, "downloads", "manual")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
    by_directory = tfds.builder_from_directory(os.path.join(data_dir, "imagenet2012", "5.1.0"))
    ours = tfds.builder("imagenet2012", data_dir=data_dir)
    assert dict(ours.info.features.items()).keys() == dict(builder.info.features.items()).keys()
    for split in ("train", "validation"):
        expected = content(builder, split)
        assert content(ours, split) == content(by_directory, split) == expected
        assert ours.info.splits[split].num_examples == len(expected)
    assert ours.info.splits["train"].num_shards > 5
    folders = {path.name for path in pathlib.Path(data_dir, "imagenet2012").iterdir()}
    assert folders == {"5.1.0", ".lock"}
    files = pathlib.Path(data_dir, "imagenet2012", "5.1.0").iterdir()
    assert not [file.name for file in files if "partial" in file.name]


def content(builder, split):
    """{file name: (label, bytes of the image)}; every image once."""
    source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    records = [(x["file_name"], (x["label"], x["image"])) for x in source]
    assert len(dict(records)) == len(records)
    return dict(records)


def test_a_slice_holds_many_classes(data_dir):
    source = make_source("tfds:imagenet2012:train[:40%]", data_dir=data_dir)
    assert len({int(source._records[i]["label"]) for i in range(len(source))}) == 4


def by_name(source):
    """{file name: example}, and the names of the unreadable ones."""
    examples, unreadable = {}, []
    for i in range(len(source)):
        name = source._records[i]["file_name"].decode()
        try:
            examples[name] = source[i]
        except UnreadableImage as error:
            assert name in error.name
            unreadable.append(name)
    return examples, unreadable


def test_every_image_is_there_with_its_label(data_dir):
    source = make_source("tfds:imagenet2012", data_dir=data_dir)
    assert len(source) == 25 and source.num_classes == 1000
    examples, unreadable = by_name(source)
    assert unreadable == [TRUNCATED]
    for synset, files in training_files().items():
        for name, data in files.items():
            if name == TRUNCATED:
                continue
            got = examples[name]
            assert source.class_names[got["label"]] == synset
            expected = decode_image(data, name).astype(int)
            # What is encoded again, the known CMYK and PNG files, loses a little.
            far = np.abs(got["image"] - expected).mean()
            assert far == 0 if name not in (CMYK, PNG) else far < 6, name


def test_validation_labels_and_stored_pixels(data_dir):
    source = make_source("tfds:imagenet2012:validation", data_dir=data_dir)
    examples, unreadable = by_name(source)
    assert not unreadable and len(source) == 4
    # The first four of the official list.
    official = ["n01751748", "n09193705", "n02105855", "n04263257"]
    for (name, data), synset in zip(validation_files().items(), official, strict=True):
        assert source.class_names[examples[name]["label"]] == synset
        with Image.open(io.BytesIO(data)) as image:
            np.testing.assert_array_equal(examples[name]["image"], np.asarray(image))


def test_the_broken_image_is_skipped_and_counted_once_an_epoch(data_dir):
    data = {"source": "tfds:imagenet2012", "split": "train", "data_dir": data_dir}
    data |= {"image_size": 32, "crop": "random", "flip": True, "scaled_decode": True}
    first = make_iterator(data, batch_size=25, seed=0)
    batches = [next(first) for _ in range(3)]
    assert [batch["skipped"].sum() for batch in batches] == [1, 1, 1]
    again = make_iterator(data | {"num_workers": 1}, batch_size=25, seed=0)
    for batch in batches:
        repeated = next(again)
        for key in batch:
            np.testing.assert_array_equal(batch[key], repeated[key])
    again.close()


def test_the_commands_read_it(data_dir, tmp_path):
    """What a run draws from it, and a whole extraction with a small tokenizer."""
    skipped = []

    def run(config, workdir):
        batches = make_iterator(config.data, batch_size=config.batch_size, seed=config.seed)
        skipped.extend(int(next(batches)["skipped"].sum()) for _ in range(4))

    arguments = [
        "--config=configs/tokenizer.py:digits:runlocal",
        "--config.data.source=tfds:imagenet2012",
        "--config.data.split=train",
        f"--config.data.data_dir={data_dir}",
        f"--workdir={tmp_path / 'tok'}",
    ]
    assert train.main(arguments, run) == 0
    assert sum(skipped) == 1  # 4 batches of 8 over 25 images: one epoch and a bit.
    vit = siglip.ViTConfig(**TRUNK)
    config = TokenizerConfig(
        image_size=16, num_tokens=8, group_size=2, codebook_size=32, encoder=vit, decoder=vit
    )
    init = Tokenizer(config).init
    abstract = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    tokenizer = df.Tokenizer(config, random_like(abstract)["params"])
    command = dataclasses.replace(extract_codes.COMMAND, load={"tok": tokenizer}.get)
    out = tmp_path / "codes"
    arguments = ["--tokenizer", "tok", "--out", str(out), "--crops", "five", "--noise_top", "4"]
    arguments += ["--source", "tfds:imagenet2012:train", "--data_dir", data_dir]
    assert command.main(arguments) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["num_records"] == 24 and manifest["num_classes"] == 1000
    assert [TRUNCATED in name for _, name in manifest["unreadable"]] == [True]


def test_a_finished_dataset_is_left_as_it_is_and_verified(data_dir, capsys):
    def times():
        files = pathlib.Path(data_dir, "imagenet2012", "5.1.0").iterdir()
        return {file: file.stat().st_mtime_ns for file in files}

    before = times()
    assert prepare(["--data_dir", data_dir, "--verify"]) == 0
    assert times() == before
    out = capsys.readouterr().out
    assert "train: 25 images" in out and "--config.data.source=tfds:imagenet2012 " in out
    assert "train: 1 unreadable" in out and TRUNCATED in out and "validation: 0 unreadable" in out


@pytest.fixture
def unfinished(tmp_path, monkeypatch, capsys):
    """A preparation that the full disk stopped after three shards: (folder, progress)."""
    monkeypatch.setattr(imagenet, "SHARD_BYTES", 100_000)
    write_tars(tmp_path, training_files(), validation_files())
    whole, made = shards.array_record_module.ArrayRecordWriter, []

    class Full:
        def __init__(self, path, options):
            pathlib.Path(path).touch()

        def write(self, record):
            raise RuntimeError("pwrite: No space left on device")  # As ArrayRecord does it.

        def close(self):
            pass

    def writer(path, options):
        made.append(path)
        return (whole if len(made) <= 3 else Full)(path, options)

    with monkeypatch.context() as patch:
        patch.setattr(shards.array_record_module, "ArrayRecordWriter", writer)
        assert prepare(["--data_dir", str(tmp_path), "--partial"]) == 2
    assert "No space left" in capsys.readouterr().err
    progress = tmp_path / "imagenet2012" / "unfinished.5.1.0"
    assert len(list(progress.glob("*train*"))) == 3
    return tmp_path, progress


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("harm", "message", "kept"),
    [
        (lambda path, progress: None, "prepared in", 3),
        (lambda path, progress: cut(min(progress.glob("*train*"))), "is damaged", 2),
        (lambda path, progress: (progress / "tars.json").write_bytes(b"{"), "other files", 0),
        (
            lambda path, progress: os.utime(next(path.glob("downloads/manual/*train*")), (7, 7)),
            "made of other files",
            0,
        ),
    ],
)
def test_what_was_done_before_is_used_if_it_is_whole(unfinished, capsys, harm, message, kept):
    path, progress = unfinished
    before = {file.name: file.stat().st_mtime_ns for file in progress.glob("*train*")}
    harm(path, progress)
    assert prepare(["--data_dir", str(path), "--partial"]) == 0
    assert message in capsys.readouterr().out
    folder = path / "imagenet2012" / "5.1.0"
    after = {file.name: file.stat().st_mtime_ns for file in folder.glob("*train*")}
    assert sum(after[name] == number for name, number in before.items()) == kept
    assert len(make_source("tfds:imagenet2012", data_dir=str(path))) == 25
    assert not progress.exists()


def test_stopped_from_the_keyboard_it_says_how_to_go_on(unfinished, monkeypatch, capsys):
    path, progress = unfinished

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(imagenet, "write_records", stop)
        assert prepare(["--data_dir", str(path), "--partial"]) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    assert progress.exists()
    assert prepare(["--data_dir", str(path), "--partial"]) == 0


def test_a_preparation_at_work_and_a_strange_folder_are_left_alone(tmp_path, capsys):
    write_tars(tmp_path, training_files(), validation_files())
    program = "import sys; from detailflow_jax.runtime.workdir import hold_workdir\n"
    program += "with hold_workdir(sys.argv[1]): print(flush=True); input()"
    command = [sys.executable, "-c", program, str(tmp_path / "imagenet2012")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert prepare(["--data_dir", str(tmp_path), "--partial"]) == 2
        other.communicate(b"\n")
    assert "another process prepares it" in capsys.readouterr().err
    strange = tmp_path / "imagenet2012" / "5.1.0"
    strange.mkdir()
    assert prepare(["--data_dir", str(tmp_path), "--partial"]) == 2
    assert f"{strange} is not a whole dataset: remove it" in capsys.readouterr().err


def refusal(data_dir, capsys, *arguments):
    assert prepare(["--data_dir", str(data_dir), *arguments]) == 2
    assert not list(pathlib.Path(data_dir).glob("imagenet2012/[5i]*"))
    return capsys.readouterr().err


def test_missing_tars_are_named_with_the_place_to_get_them(tmp_path, capsys):
    error = refusal(tmp_path, capsys)
    manual = tmp_path / "downloads" / "manual"
    for text in ("ILSVRC2012_img_train.tar", "6,744,924,160", "image-net.org", str(manual)):
        assert text in error
    write_tars(tmp_path, {}, {})
    (manual / "ILSVRC2012_img_val.tar").unlink()
    error = refusal(tmp_path, capsys)
    assert "ILSVRC2012_img_val.tar" in error and "ILSVRC2012_img_train.tar" not in error


def test_tars_that_are_not_the_official_ones_need_partial(tmp_path, capsys):
    write_tars(tmp_path, training_files(), validation_files())
    error = refusal(tmp_path, capsys)
    assert "the download is incomplete" in error and "--partial" in error
    assert error.count("ILSVRC2012_img") == 2


@pytest.mark.parametrize(
    ("training", "validation", "message"),
    [
        ({"n00000001": {}}, {}, "'n00000001.tar', expected SYNSET.tar"),
        ({"train/n01440764": {}}, {}, "'train/n01440764.tar', expected SYNSET.tar"),
        ({"n01440764": {"a.JPEG": b"x"}}, {}, "holds 'a.JPEG', expected n01440764_NUMBER"),
        ({}, {"val/ILSVRC2012_val_00000001.JPEG": b"x"}, "labels go by place"),
        ({}, {"ILSVRC2012_val_00000002.JPEG": b"x"}, "in the place of 'ILSVRC2012_val_00000001"),
    ],
)
def test_tars_of_another_form_are_refused(training, validation, message, tmp_path, capsys):
    good = {"n01440764": {"n01440764_0.JPEG": b"x"}}, validation_files(1)
    write_tars(tmp_path, training or good[0], validation or good[1])
    assert message in refusal(tmp_path, capsys, "--partial")


def test_a_tar_that_was_cut_short_is_refused(tmp_path, capsys):
    manual = write_tars(tmp_path, training_files(), validation_files())
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        data = (manual / name).read_bytes()
        (manual / name).write_bytes(data[: int(0.7 * len(data))])
    error = refusal(tmp_path, capsys, "--partial")
    assert error.count("unexpected end of data") == 2 and "download it again" in error


def test_counts_and_checksums_are_compared_with_the_official_ones(tmp_path, monkeypatch):
    manual = write_tars(tmp_path, training_files(), validation_files())
    files = [manual / tar.file for tar in imagenet.TARS]
    known = [
        tar._replace(
            num_bytes=file.stat().st_size,
            num_images=number,
            md5=hashlib.md5(file.read_bytes()).hexdigest(),
        )
        for tar, file, number in zip(imagenet.TARS, files, (25, 4), strict=True)
    ]
    monkeypatch.setattr(imagenet, "TARS", known)
    synsets = list(training_files())
    splits = imagenet.index_tars(manual, synsets, md5=True)
    assert [(split.name, len(split.members)) for split in splits] == [
        ("train", 25),
        ("validation", 4),
    ]
    known[1] = known[1]._replace(md5="0" * 32)
    with pytest.raises(imagenet.TarError, match=r"img_val.tar: MD5 .* official file has 0000"):
        imagenet.index_tars(manual, synsets, md5=True)
    known[0] = known[0]._replace(num_images=26)
    with pytest.raises(imagenet.TarError, match=r"img_train.tar: 25 images, expected 26"):
        imagenet.index_tars(manual, synsets)


def test_unknown_and_unsuitable_datasets_are_refused(tmp_path, capsys):
    error = refusal(tmp_path, capsys, "--dataset", "imagenet2021")
    assert "closest names: imagenet2012" in error
    error = refusal(tmp_path, capsys, "--dataset", "celeb_a")
    assert "not one for image classification" in error
