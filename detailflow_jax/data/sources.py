"""Labelled images with random access: those that packages ship, a folder, a TFDS dataset."""

import contextlib
import functools
import hashlib
import os
import re
import shlex
from collections.abc import Sequence

import numpy as np

from detailflow_jax.data.folders import class_folders
from detailflow_jax.data.images import decode_picture, read_file
from detailflow_jax.data.shipped import DigitsSource, MnistSource, PhotosSource
from detailflow_jax.data.source import Source
from detailflow_jax.runtime import extras, files
from detailflow_jax.runtime.errors import ConfigError, NotFoundError, near_names, unknown_name
from detailflow_jax.runtime.retry import read_again

SHIPPED = {"digits": DigitsSource, "mnist": MnistSource, "photos": PhotosSource}
SOURCE_KINDS = (*SHIPPED, "folder", "tfds")
_SAMPLED = 16  # Files whose sizes a quick fingerprint looks at.


def make_source(spec: str, split: str | None = None, data_dir: str | None = None) -> Source:
    """Opens the images that `spec` names.

    Args:
        spec: "digits", "mnist" or "photos", with ":train" or ":test" (`shipped.py`);
            "folder:PATH"; or "tfds:NAME[:SPLIT]" (NAME may hold a config and a version,
            "cifar10/cfg:1.0.0"; SPLIT any TFDS split, "train[:5%]").
        split: used where `spec` names no split ("train" if both are silent). A folder has no
            splits and accepts "train" only.
        data_dir: where TFDS keeps its data; else the environment's TFDS_DATA_DIR, else the
            default of TFDS.

    Raises:
        ConfigError: unknown source or split, or a dataset without the needed fields.
        NotFoundError: missing or empty folder, dataset that is not prepared.
    """
    kind, _, rest = spec.partition(":")
    if kind in SHIPPED:
        return SHIPPED[kind](rest or split or "train")
    if kind == "folder":
        if split not in (None, "train"):
            raise ConfigError(
                f"{spec!r} has no split {split!r}: a folder is one set of images; "
                "name the folder of that split as the source"
            )
        return FolderSource(rest)
    if kind == "tfds":
        match = re.fullmatch(r"([^:]+(?::\d+\.\d+\.\d+)?)(?::(.+))?", rest)
        if not match:
            raise ConfigError(f"source {spec!r}: expected tfds:NAME or tfds:NAME:SPLIT")
        return TfdsSource(match[1], match[2] or split or "train", data_dir)
    raise unknown_source(spec, SOURCE_KINDS)


def unknown_source(spec: str, kinds: Sequence[str]) -> ConfigError:
    """Returns the error for a source of none of the kinds; a folder needs the word `folder:`."""
    if files.is_remote(spec) or os.path.isdir(os.path.expanduser(spec)):
        return ConfigError(f"data source {spec!r} is a folder: write folder:{spec}")
    if spec.startswith(("/", "./", "../", "~")):
        return NotFoundError(f"there is no folder {spec}; a folder of images is folder:{spec}")
    return unknown_name("data source", spec.partition(":")[0], kinds)


class FolderSource(Source):
    """Images of `path/<class>/<file>`; see `folders.class_folders` for classes and their order.

    Files of a class are in the order of their names. Raises what `class_folders` raises.
    """

    def __init__(self, path: str):
        self.path = path and os.fspath(files.path(path))
        if not files.is_remote(self.path):
            self.path = path and os.path.abspath(self.path)
        classes = class_folders(self.path)
        self.name = f"folder:{path}"
        self.class_names = tuple(classes)
        self._files = [os.path.join(name, x) for name, images in classes.items() for x in images]
        self._labels = np.repeat(np.arange(len(classes)), list(map(len, classes.values()))).tolist()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash over every file's relative name and size; the folder itself may move."""
        digest, sizes = hashlib.sha256(), {}
        if files.is_remote(self.path):
            sizes = files.sizes(self.path)
        for file in self._files:
            try:
                size = sizes[file] if sizes else os.path.getsize(os.path.join(self.path, file))
            except OSError:  # Such as a broken link: unreadable, and part of the data all the same.
                size = -1
            digest.update(os.fsencode(f"{file.replace(os.sep, '/')}\t{size}\n"))
        return f"folder:{digest.hexdigest()[:16]}"

    @functools.cached_property
    def quick_fingerprint(self) -> str:
        """Hash over every file's relative name, and the sizes of some."""
        names = "\n".join(file.replace(os.sep, "/") for file in self._files)
        digest = hashlib.sha256(os.fsencode(names))
        for file in self._files[:: -(-len(self._files) // _SAMPLED)]:
            with contextlib.suppress(OSError):  # Such as a broken link.
                digest.update(b"%d\n" % files.size(os.path.join(self.path, file)))
        return f"folder:{digest.hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int, reduce_to: int | None = None) -> dict:
        path = os.path.join(self.path, self._files[index])
        picture = decode_picture(read_file(path), path, reduce_to=reduce_to)
        return {"image": picture, "label": self._labels[index]}


class TfdsSource(Source):
    """A prepared TFDS dataset with one image and one class label per record, by random access.

    The stored JPEG or PNG bytes are decoded here, as for a folder, but not turned: like TFDS
    itself, and like the published ImageNet training, this takes the pixels as they are stored.
    Reading local data needs no TensorFlow.
    """

    def __init__(self, name: str, split: str, data_dir: str | None = None):
        tfds = extras.require("tensorflow_datasets")
        data_dir = data_dir or os.environ.get("TFDS_DATA_DIR") or str(tfds.core.constants.DATA_DIR)
        self._data_dir = data_dir = os.fspath(files.path(data_dir))
        with files.reaching(data_dir, "read"):
            builder = _prepared_builder(tfds, name, data_dir)
            self._image, self._label = image_and_label(builder)
            self._records = builder.as_data_source(
                split=split, decoders={self._image: tfds.decode.SkipDecoding()}
            )
        self.name = f"tfds:{name}:{split}"
        self.class_names = tuple(builder.info.features[self._label].names)
        sizes = {s: (i.num_examples, i.num_bytes) for s, i in builder.info.splits.items()}
        digest = hashlib.sha256(repr(sorted(sizes.items())).encode()).hexdigest()[:16]
        self.fingerprint = f"tfds:{builder.info.full_name}:{split}:{len(self)}:{digest}"

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int, reduce_to: int | None = None) -> dict:
        name = f"{self.name}[{index}]"
        with files.reaching(self._data_dir, "read"):
            record = read_again(lambda: self._records[index], name)
        if file_name := record.get("file_name"):  # ImageNet's; position 17 says less to a person.
            name += f" {file_name.decode(errors='replace')}"
        picture = decode_picture(record[self._image], name, reduce_to=reduce_to, upright=False)
        return {"image": picture, "label": int(record[self._label])}


def image_and_label(builder) -> tuple[str, str]:
    """The names of the features that hold the image and its class.

    They are the supervised pair of the dataset where it has one, else its only image of 8 or 16
    bits and its only class label. Raises ConfigError, listing the features, if neither is there.
    """
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())

    def is_image(feature) -> bool:  # Floating-point images are stored as disguised PNGs.
        kinds = (np.uint8, np.uint16)
        return isinstance(feature, tfds.features.Image) and feature.np_dtype in kinds

    images = [name for name, feature in features.items() if is_image(feature)]
    labels = [n for n, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    pair = builder.info.supervised_keys
    if pair and len(pair) == 2 and pair[0] in images and pair[1] in labels:
        return pair
    if len(images) != 1 or len(labels) != 1:
        raise ConfigError(
            f"TFDS dataset {builder.name!r} is not one for image classification: expected one "
            f"image and one ClassLabel, its features are {features}"
        )
    return images[0], labels[0]


def _prepared_builder(tfds, name: str, data_dir: str):
    """The builder of a dataset that is prepared under `data_dir` with random access."""
    where = f"--dataset {shlex.quote(name)} --data_dir {shlex.quote(data_dir)}"
    advice = f"prepare it once with: detailflow prepare {where}"
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise unknown_dataset(name, data_dir) from error
    if not builder.is_prepared():
        raise NotFoundError(f"TFDS dataset {name!r} is not under {data_dir}: {advice}")
    formats = {f.value for f in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise ConfigError(
            f"TFDS dataset {name!r} under {data_dir} is stored as {' '.join(sorted(formats))}, "
            f"which has no random access: remove it or choose another data_dir, then {advice}"
        )
    return builder


def unknown_dataset(name: str, data_dir: str) -> ConfigError:
    """Returns the error for a name that TFDS does not know; it suggests the closest names."""
    import tensorflow_datasets as tfds

    near = near_names(name, tfds.list_builders(with_community_datasets=False))
    closest = f"; closest names: {', '.join(near)}" if near else ""
    return ConfigError(
        f"TFDS knows no dataset {name!r} and none is prepared under {data_dir}{closest}"
    )
