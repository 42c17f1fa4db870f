"""Reading a finished folder of codes or latents (written by shards.py)."""

import dataclasses
import hashlib
import json
import os
from typing import ClassVar

import grain
import numpy as np

from detailflow_jax.data.shards import FORMAT_VERSION, ShardLayout, num_records, read_json
from detailflow_jax.runtime import files
from detailflow_jax.runtime.copies import copy_here
from detailflow_jax.runtime.errors import ConfigError, NotFoundError
from detailflow_jax.runtime.retry import read_again

_NUMBERS = {
    *("num_classes", "num_records", "num_examples", "shard_size", "image_size"),
    *("num_crops", "num_tokens", "codebook_size", "group_size", "causal_num"),
}
_PROBED = 64  # Records that are read when a folder is opened.


class ShardSource:
    """Random access to a finished folder of shards.

    `source[i]` is the value, under the name `layout.field`, with "label", an int, and "index", the
    position in the source of the images. `manifest` is manifest.json as a dict.

    Raises:
        NotFoundError: no such folder, extraction not finished, or a shard missing.
        ConfigError: a shard or its records are not those of the manifest, or of another kind.
    """

    layout_class: ClassVar[type[ShardLayout]]
    dtype: ClassVar[type]  # of the values in memory

    @classmethod
    def read_manifest(cls, directory: str) -> dict:
        """Returns the manifest, without a look at the shards."""
        what, folder = cls.layout_class.what, os.fspath(files.path(directory or "."))
        path = os.path.join(folder, "manifest.json")
        if not directory or not files.exists(path):
            raise NotFoundError(cls._missing(directory, folder))
        manifest = read_json(path)
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise ConfigError(f"{path}: format_version {version}, this code reads {FORMAT_VERSION}")
        fields = [field.name for field in dataclasses.fields(cls.layout_class)]
        fields += [*sorted(cls.layout_class.needed), "num_records", "shards"]
        if absent := [name for name in fields if name not in manifest]:
            raise ConfigError(f"{folder} holds no {what}: {path} lacks {', '.join(absent)}")
        for name in _NUMBERS.intersection(manifest):
            if type(manifest[name]) is not int or manifest[name] < 0:
                raise ConfigError(f"{path}: {name} is {manifest[name]!r}, expected a whole number")
        classes, names = manifest["num_classes"], manifest["class_names"]
        if not isinstance(names, list) or len(names) not in (0, classes):
            raise ConfigError(
                f"{path} contradicts itself: num_classes is {classes}, class_names {names!r:.99}"
            )
        return manifest

    @classmethod
    def _missing(cls, directory: str, folder: str) -> str:
        """What is wrong with a folder that has no manifest."""
        what, there = cls.layout_class.what, files.names(folder) if directory else []
        if not directory or not files.is_dir(folder):
            return f"no folder of {what} {directory!r}: expected {what}:DIR"
        if not there or "layout.json" in there:
            return (
                f"{folder} has no manifest.json: the extraction of {what} has not finished, run "
                "the same command again"
            )
        found = f"{folder} holds no {what} but {', '.join(there[:4])}{' ...' * (len(there) > 4)}"
        if "config.json" in there:
            found = f"{folder} is the workdir of a training run, it holds no {what}"
        return f"{found}: expected the folder that `detailflow extract ... --out` wrote"

    def __init__(self, directory: str):
        what = self.layout_class.what
        self.manifest = self.read_manifest(directory)
        fields = [field.name for field in dataclasses.fields(self.layout_class)]
        self.layout = self.layout_class(**{name: self.manifest[name] for name in fields})
        self.name = f"{what}:{directory}"
        self.num_classes = self.manifest["num_classes"]
        self.encoded_by = self.manifest.get("encoded_by", "")
        self.class_names = tuple(self.manifest["class_names"])
        digest = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode())
        self.fingerprint = self.quick_fingerprint = f"{what}:{digest.hexdigest()[:16]}"
        place = os.fspath(files.path(directory))
        self.directory = os.path.abspath(place)
        if files.is_remote(place):  # The reader of these files knows disks only.
            sizes = {s["file"]: s["num_bytes"] for s in self.manifest["shards"]}
            self.directory = copy_here(place, sizes, self.fingerprint)
        self._check_shards()
        filled = [s["file"] for s in self.manifest["shards"] if s["num_records"]]
        if not filled:
            raise ConfigError(f"{self.directory}: every image was unreadable, there are no {what}")
        paths = [os.path.join(self.directory, file) for file in filled]
        self._records = grain.sources.ArrayRecordDataSource(paths)
        # What contradicts the manifest shows here, not in the middle of a run. Records are in the
        # order of the images, and these mostly in that of the labels: the last one has the largest.
        for index in sorted({round(x) for x in np.linspace(0, len(self) - 1, _PROBED)}):
            self[index]

    def _check_shards(self) -> None:
        for shard in self.manifest["shards"]:
            path = os.path.join(self.directory, shard["file"])
            again = "remove manifest.json and the file and run the extraction again"
            if not os.path.exists(path):
                raise NotFoundError(f"{path} is missing, manifest.json lists it: {again}")
            if (size := os.path.getsize(path)) != shard["num_bytes"]:
                raise ConfigError(
                    f"{path} has {size} bytes, manifest.json says {shard['num_bytes']}: {again}"
                )
            if (count := num_records(path)) != shard["num_records"]:
                raise ConfigError(
                    f"{path} has {count} records, manifest.json says {shard['num_records']}: "
                    + again
                )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        data = read_again(lambda: self._records[index], f"{self.name}[{index}]")
        dtype = self.layout.record_dtype
        if len(data) != dtype.itemsize:
            raise ConfigError(
                f"{self.directory}: record {index} has {len(data)} bytes, manifest.json describes "
                f"{dtype.itemsize}: the shards are those of another layout"
            )
        record = np.frombuffer(data, dtype)[0]
        value = record[self.layout.field].astype(self.dtype)
        label, position = int(record["label"]), int(record["index"])
        try:
            self.layout.check(position, value)
        except ValueError as error:
            raise ConfigError(f"{self.directory} contradicts its manifest.json: {error}") from error
        if not 0 <= label < self.num_classes:
            raise ConfigError(
                f"{self.directory} contradicts its manifest.json: the label of {position} is "
                f"{label}, num_classes is {self.num_classes}"
            )
        return {self.layout.field: value, "label": label, "index": position}
