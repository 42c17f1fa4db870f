"""The TFDS source on a real builder, prepared on disk and found by its name."""

import io
import pathlib
import shlex
import subprocess
import sys

import cloudpickle
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import bucket_server
from detailflow_jax.data import UnreadableImage, make_iterator, make_source, prepare
from detailflow_jax.runtime.errors import ConfigError

CLASSES = ["ant", "bee", "fly"]


def pixels(i):
    return np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)


def png(i):
    file = io.BytesIO()
    Image.fromarray(pixels(i)).save(file, "PNG")
    return file.getvalue()


class TinyInsects(tfds.core.GeneratorBasedBuilder):
    """Defining the class registers the name `tiny_insects`."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="png"),
                "label": tfds.features.ClassLabel(names=CLASSES),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._examples(0, 9), "validation": self._examples(9, 13)}

    def _generate_examples(self):
        raise NotImplementedError("each split has its own generator")

    def _examples(self, start, stop):
        for i in range(start, stop):
            # Example 4 is damaged on purpose: bytes are stored as they are given.
            data = png(i)[:-200] if i == 4 else png(i)
            yield i, {"image": io.BytesIO(data), "label": i % 3}


class UnlabelledInsects(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"image": pixels(0)}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("tfds"))
    for name in ("tiny_insects", "unlabelled_insects"):
        tfds.builder(name, data_dir=path, file_format="array_record").download_and_prepare()
    return path


def test_reads_a_prepared_dataset_by_name(data_dir):
    source = make_source("tfds:tiny_insects", split="train", data_dir=data_dir)
    assert len(source) == 9 and source.class_names == tuple(CLASSES) and source.num_classes == 3
    seen, broken = {}, []
    for i in range(9):
        try:
            example = source[i]
        except UnreadableImage as error:
            broken.append(error.name)
            continue
        seen[example["image"].shape[0] - 20] = example
    assert len(broken) == 1 and broken[0].startswith("tfds:tiny_insects:train[")
    assert sorted(seen) == [0, 1, 2, 3, 5, 6, 7, 8]
    for i, example in seen.items():  # TFDS shuffles the examples when it prepares them.
        np.testing.assert_array_equal(example["image"], pixels(i))
        assert example["label"] == i % 3


def test_reads_from_a_bucket(data_dir):
    local = make_source("tfds:tiny_insects", split="validation", data_dir=data_dir)
    with bucket_server.shared() as bucket:
        place = bucket.put(pathlib.Path(data_dir), "tf ds")
        remote = make_source("tfds:tiny_insects", split="validation", data_dir=place)
        assert remote.fingerprint == local.fingerprint
        faults = [503, bucket_server.CUT]
        bucket.proxy.fault = lambda method, path: faults.pop() if faults else None
        for i in (3, 0, 2):
            assert remote[i]["label"] == local[i]["label"]
            np.testing.assert_array_equal(remote[i]["image"], local[i]["image"])
        assert not faults
        bucket.proxy.fault = lambda method, path: 403 if "array_record" in path else None
        with pytest.raises(ConfigError, match="may it read and write there"):
            make_source("tfds:tiny_insects", split="validation", data_dir=place)[0]


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("tfds:tiny_insects:validation", 4),
        ("tfds:tiny_insects:train[:5]", 5),
        ("tfds:tiny_insects:1.0.0:validation", 4),
        ("tfds:tiny_insects:1.0.0", 9),
    ],
)
def test_split_in_the_spec(spec, size, data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    source = make_source(spec)
    assert len(source) == size
    assert cloudpickle.loads(cloudpickle.dumps(source)).fingerprint == source.fingerprint


def test_fingerprint_tells_splits_apart(data_dir):
    specs = ["tfds:tiny_insects", "tfds:tiny_insects:validation", "tfds:tiny_insects:train[:5]"]
    assert len({make_source(s, data_dir=data_dir).fingerprint for s in specs}) == 3


def test_trains_from_it(data_dir):
    data = {"source": "tfds:tiny_insects", "split": "train", "data_dir": data_dir}
    data |= {"image_size": 16, "crop": "random", "flip": True}
    batches = make_iterator(data, batch_size=9, seed=0)
    for _ in range(3):  # One batch an epoch: the damaged record is met once in each.
        batch = next(batches)
        assert batch["image"].shape == (9, 16, 16, 3) and batch["skipped"].sum() == 1


def test_reading_needs_no_tensorflow(data_dir):
    program = (
        "import sys; from detailflow_jax.data import make_source\n"
        f"source = make_source('tfds:tiny_insects:validation', data_dir={data_dir!r})\n"
        "assert source[0]['image'].shape[1:] == (30, 3)\n"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_missing_data_say_how_to_prepare_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="'tiny_insects' is not under") as caught:
        make_source("tfds:tiny_insects", data_dir=str(tmp_path))
    command = shlex.split(str(caught.value).partition("with: ")[2])
    assert command[:2] == ["detailflow", "prepare"]
    assert prepare.main(command[2:]) == 0  # The advice works as it is written.
    assert len(make_source("tfds:tiny_insects", data_dir=str(tmp_path))) == 9


def test_unknown_names_and_unusable_features_are_refused(data_dir):
    with pytest.raises(ValueError, match=r"no dataset 'tiny_insect' .*closest names: tiny_insects"):
        make_source("tfds:tiny_insect", data_dir=data_dir)
    with pytest.raises(ValueError, match=r"test.*validation"):
        make_source("tfds:tiny_insects:test", data_dir=data_dir)
    with pytest.raises(ValueError, match=r"one image and one ClassLabel.*'image'"):
        make_source("tfds:unlabelled_insects", data_dir=data_dir)


def test_data_without_random_access_are_refused(tmp_path):
    builder = tfds.builder("unlabelled_insects", data_dir=str(tmp_path), file_format="tfrecord")
    builder.download_and_prepare()
    with pytest.raises(ValueError, match=r"stored as tfrecord.*detailflow prepare --dataset unlab"):
        make_source("tfds:unlabelled_insects", data_dir=str(tmp_path))
