"""Every command with its input and output in a bucket gives what it gives on a disk."""

import json
import os
import pathlib
import tarfile

import jax
import numpy as np
import pytest

import bucket_server
import detailflow_jax as df
from detailflow_jax import cli, train
from detailflow_jax.evaluate import __main__ as evaluate
from detailflow_jax.inference import extract_codes, extract_latents, generate
from detailflow_jax.runtime.checkpoint import restore_params
from detailflow_jax.runtime.config import read_config
from scored_models import images, save_pictures

ARCHIVE = pathlib.Path(__file__).parents[1] / "fixtures" / "old_runs" / "runs.tar.xz"


@pytest.fixture(scope="module")
def bucket():
    with bucket_server.shared() as found:
        yield found


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder of this machine with a run of each kind, their shards, and pictures."""
    folder = tmp_path_factory.mktemp("runs") / "a ü"
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder)
    save_pictures(folder / "pictures", images(4, size=32), "ö/{}.png")
    save_pictures(folder / "pictures", images(3, size=32, seed=1), "b c/{}.png")
    np.savez(folder / "reference.npz", images(40, size=32))
    return folder


@pytest.fixture(scope="module")
def there(bucket, here):
    """The same in the bucket."""
    return bucket.put(here, "a ü")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Where an address that is taken for a local path would leave a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETAILFLOW_COPIES", str(tmp_path / "copies"))
    yield
    assert set(os.listdir()) <= {"copies", "out"}


def local(folder: str) -> dict[str, bytes]:
    found = [file for file in pathlib.Path(folder).rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def run_twice(bucket, here, there, main, *options: str, out: str) -> tuple[dict, dict]:
    """The files that a command writes to a disk, and those in the bucket."""
    for place, output in ((here, "out"), (there, bucket.path(f"{out}/"))):
        words = [option.replace("PLACE", os.fspath(place)) for option in options]
        assert main([*words, f"--out={output}"]) == 0
    return local("out"), bucket.get(out)


@pytest.mark.parametrize("name", ["tokenizer", "generator", "vae", "flowar"])
def test_models_load(there, here, name):
    load = getattr(df, f"load_{name}")
    assert load(f"{there}/{name}/").fingerprint == load(here / name).fingerprint


@pytest.mark.parametrize(
    ("main", "options", "count"),
    [
        (extract_codes.main, ("--tokenizer=PLACE/tokenizer/", "--crops=center"), 8),
        (extract_latents.main, ("--vae=PLACE/vae",), 7),
    ],
)
def test_extraction(bucket, there, here, main, options, count):
    options = (*options, "--source=folder:PLACE/pictures/", "--shard_size=3", "--batch_size=8")
    a, b = run_twice(bucket, here, there, main, *options, out=f"ö {main.__self__.name}")
    for found in (a, b):
        manifest = json.loads(found.pop("manifest.json"))
        assert manifest["num_records"] == 7 and len(manifest["shards"]) == 3
    assert a == b and len(a) == count


def test_samples(bucket, there, here):
    models = ("--tokenizer=PLACE/tokenizer", "--generator=PLACE/generator/")
    options = (*models, "--labels=0-1", "--per_class=10", "--single", "--batch_size=10")
    a, b = run_twice(bucket, here, there, generate.main, *options, out="sam ples")
    assert a.pop("samples.json") and b.pop("samples.json")
    assert a == b and len(a) == 22


def test_scores(bucket, there, here):
    for found, reference in (("pictures/ö/", "reference.npz"), ("reference.npz", "pictures/")):
        out = f"sco res of {found}".rstrip("/")
        options = ["generation", "--features=pixels", f"--cache={bucket.path('ca che')}"]
        options += [f"--samples={there}/{found}", f"--reference={there}/{reference}"]
        assert evaluate.main([*options, f"--out={bucket.path(out)}/"]) == 0
        assert json.loads(bucket.read(f"{out}/results.json"))["rows"][0]["num_samples"] > 3


def test_reconstruction(bucket, there, here):
    options = (
        "--model=PLACE/tokenizer",
        "--reference=PLACE/pictures",
        "--without",
        "rfid",
        "lpips",
    )
    a, b = run_twice(bucket, here, there, reconstruction, *options, out="rfid")
    rows = [json.loads(found["results.json"])["rows"] for found in (a, b)]
    assert a.keys() == b.keys() and rows[0] == rows[1]


def reconstruction(options: list[str]) -> int:
    return evaluate.main(["reconstruction", *options])


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("tokenizer", "folder:PLACE/pictures/"),
        ("generator", "codes:PLACE/codes/"),
        ("flowar", "latents:PLACE/latents/"),
    ],
)
def test_training(bucket, there, here, kind, source):
    runs = {here: "out/", there: bucket.path(f"run of {kind}/")}
    for place, workdir in runs.items():
        config = read_config(here / kind)
        config.data.source = source.replace("PLACE", os.fspath(place))
        config.init_from.model = f"{place}/{kind}/"
        config.update(total_steps=2, batch_size=4, tensorboard=True)
        train.train(config, workdir)
    states = [jax.tree.leaves(restore_params(workdir)) for workdir in runs.values()]
    for a, b in zip(*states, strict=True):
        np.testing.assert_array_equal(a, b)
    a, b = set(local("out")), set(bucket.get(f"run of {kind}"))
    kept = {name for name in a ^ b if not name.startswith(("checkpoints/", "tensorboard/"))}
    assert kept <= {".lock"} and any(name.startswith("tensorboard/") for name in b)


@pytest.mark.parametrize(
    "command",
    [
        "convert --to jax --src PLACE/vae --dst PLACE/new",
        "demo --out PLACE/demo",
        "train --config PLACE/config.py --workdir out",
        "train --config configs/tokenizer.py:digits --workdir s3:/bucket/run",
        "train --config configs/tokenizer.py:digits --workdir gs:bucket/run",
        "generate --tokenizer PLACE/tokenizer --generator PLACE/generator --labels 0 --out gs:/b/x",
        "extract --tokenizer PLACE/tokenizer --out gs:b",
        "evaluate generation --samples PLACE/x.npz --reference PLACE/reference.npz --out gs:/b/x",
        "evaluate reconstruction --model PLACE/tokenizer --reference digits --out out "
        "--lpips PLACE/vgg.pth",
    ],
)
def test_what_a_bucket_cannot_hold_is_refused(bucket, there, capsys, command):
    before = bucket.names()
    with pytest.raises(SystemExit) as left:
        cli.main([word.replace("PLACE", there) for word in command.split()])
    assert left.value.code == 2
    assert "expected a" in (told := capsys.readouterr().err) or "not a local path" in told, told
    assert bucket.names() == before
