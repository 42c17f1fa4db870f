"""Weights in formats that are not read: each says what it is, and its recipe makes a checkpoint."""

import io
import pickle
import re
import zipfile

import h5py
import joblib
import numpy as np
import pytest
from flax import serialization, traverse_util

import detailflow_jax as df
from convert_models import recorded
from detailflow_jax.convert import CheckpointError, read_checkpoint
from detailflow_jax.inference import generate

STATE = recorded("generator_a")[0]
TREE = traverse_util.unflatten_dict(STATE, sep=".")


def write_h5(path):
    with h5py.File(path, "w") as file:
        for name, x in STATE.items():
            file[name.replace(".", "/")] = x


def exported():
    """The beginning of what torch.export.save writes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data/weights/weight_0", bytes(24))
    return stream.getvalue()


WRITERS = {
    "npz": (lambda path: np.savez(path, **STATE), "an archive of np.savez"),
    "savez_compressed.npz": (lambda path: np.savez_compressed(path, **STATE), "of np.savez"),
    "npy": (lambda path: np.save(path, STATE, allow_pickle=True), "a Python object of np.save"),
    "h5": (write_h5, "an HDF5 file"),
    "msgpack": (lambda path: path.write_bytes(serialization.to_bytes(TREE)), "as Flax writes"),
    "joblib": (lambda path: joblib.dump({"model": STATE}, path), "a pickle of joblib"),
    "z.joblib": (lambda path: joblib.dump(STATE, path, compress=3), "compressed by zlib"),
    **{
        f"{protocol}.pkl": (
            lambda path, protocol=protocol: path.write_bytes(pickle.dumps(STATE, protocol)),
            "a pickle, but not one of torch.save",
        )
        for protocol in (0, 1, 2, 4)
    },
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_recipe_makes_a_checkpoint(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    write, found = WRITERS[suffix]
    path = tmp_path / f"weights.{suffix}"
    write(path)
    with pytest.raises(CheckpointError, match=found) as caught:
        df.load_generator(path)
    (recipe,) = re.findall(r"If you trust it, run `(.*)` in Python", str(caught.value))
    exec(recipe, {})
    (made,) = (p for p in tmp_path.iterdir() if p != path)
    tensors = read_checkpoint(made).tensors
    assert tensors.keys() == STATE.keys()
    for name, x in STATE.items():
        np.testing.assert_array_equal(tensors[name], x)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (exported(), r"a program of torch.export; .*torch\.export\.load"),
        (b"\x08\x07\x12\x07pytorch", r"an ONNX model; .*onnx\.load"),
        (b"GGUF\3", "weights for running elsewhere"),
        (b"\x89PNG", "an image"),
    ],
)
def test_files_are_named(tmp_path, content, found):
    path = tmp_path / "x.pt"
    path.write_bytes(content + bytes(99))
    with pytest.raises(CheckpointError, match=found):
        read_checkpoint(path)


def test_a_folder_of_such_files_and_the_command_say_so(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", **STATE)
    with pytest.raises(CheckpointError, match=r"holds no weights .x.npz.*Name the file itself"):
        read_checkpoint(tmp_path)
    path = str(tmp_path / "x.npz")
    args = f"--tokenizer {path} --generator {path} --labels 0 --out {tmp_path / 'o'}"
    assert generate.main(args.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "an archive of np.savez" in error
