"""Reading a finished folder of codes or latents (written by shards.py)."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import grain
import numpy as np

from detailflow_jax.data.folders import check_distinct
from detailflow_jax.data.shards import FORMAT_VERSION, ShardLayout, num_records
from detailflow_jax.runtime import files
from detailflow_jax.runtime.copies import copy_here
from detailflow_jax.runtime.errors import ConfigError, NotFoundError, raised_as
from detailflow_jax.runtime.retry import is_passing, read_again

_MAY_BE_ZERO = {"num_records", "causal_num"}
_NUMBERS = _MAY_BE_ZERO | {
    *("num_classes", "num_examples", "shard_size", "image_size"),
    *("num_crops", "num_tokens", "codebook_size", "group_size"),
}
_MOST = 2**31 - 1
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
        manifest = files.read_json(path)
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise ConfigError(f"{path}: format_version {version}, this code reads {FORMAT_VERSION}")
        fields = [field.name for field in dataclasses.fields(cls.layout_class)]
        fields += [*sorted(cls.layout_class.needed), "num_records", "shards"]
        if absent := [name for name in fields if name not in manifest]:
            raise ConfigError(f"{folder} holds no {what}: {path} lacks {', '.join(absent)}")
        for name in sorted(_NUMBERS.intersection(manifest)):
            least = int(name not in _MAY_BE_ZERO)
            value = manifest[name]
            if type(value) is not int or not least <= value <= _MOST:
                raise ConfigError(
                    f"{path}: {name} is {value!r:.99}, expected a whole number from {least} to "
                    f"{_MOST}"
                )
        for name in ("encoded_by", "network"):
            if not isinstance(manifest.get(name, ""), str):
                raise ConfigError(f"{path}: {name} is {manifest[name]!r:.99}, expected text")
        classes, names = manifest["num_classes"], manifest_names(manifest, path)
        if len(names) not in (0, classes):
            raise ConfigError(
                f"{path} contradicts itself: num_classes is {classes}, class_names {names!r:.99}"
            )
        shards = manifest["shards"]
        wrong = [x for x in shards if not _is_shard(x)] if isinstance(shards, list) else [shards]
        if wrong:
            raise ConfigError(
                f"{path}: a shard is {wrong[0]!r:.99}, expected file (in this folder), num_records "
                "and num_bytes; remove it and run the extraction again, which writes it"
            )
        if (total := sum(shard["num_records"] for shard in shards)) != manifest["num_records"]:
            raise ConfigError(
                f"{path} contradicts itself: num_records is {manifest['num_records']}, its shards "
                f"have {total}"
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
        self.class_names = manifest_names(self.manifest, directory)
        digest = hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode())
        self.fingerprint = self.quick_fingerprint = f"{what}:{digest.hexdigest()[:16]}"
        place = os.fspath(files.path(directory))
        self.directory = os.path.abspath(place)
        if files.is_remote(place):  # The reader of these files knows disks only.
            sizes = {s["file"]: s["num_bytes"] for s in self.manifest["shards"]}
            self.directory = copy_here(place, sizes, self.fingerprint)
        # Sizes may be beyond what NumPy can count.
        with raised_as(ConfigError, f"{self.name}: its manifest describes no records: "):
            self._dtype = self.layout.record_dtype
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
            try:
                count = num_records(path)
            except RuntimeError as error:
                raise ConfigError(f"{path} is damaged ({error}): {again}") from error
            if count != shard["num_records"]:
                raise ConfigError(
                    f"{path} has {count} records, manifest.json says {shard['num_records']}: "
                    + again
                )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        try:
            data = read_again(lambda: self._records[index], f"{self.name}[{index}]")
        except RuntimeError as error:  # The reader's only kind.
            if is_passing(error):
                raise
            raise ConfigError(
                f"{self.directory}: record {index} is damaged ({error}): remove manifest.json and "
                "its shard and run the extraction again"
            ) from error
        dtype = self._dtype
        if len(data) != dtype.itemsize:
            raise ConfigError(
                f"{self.directory}: record {index} has {len(data)} bytes, manifest.json describes "
                f"{dtype.itemsize}: the shards are those of another layout"
            )
        record = np.frombuffer(data, dtype)[0]
        value = record[self.layout.field].astype(self.dtype)
        label, position = int(record["label"]), int(record["index"])
        with raised_as(ConfigError, f"{self.directory} contradicts its manifest.json: "):
            self.layout.check(position, value)
        if not 0 <= label < self.num_classes:
            raise ConfigError(
                f"{self.directory} contradicts its manifest.json: the label of {position} is "
                f"{label}, num_classes is {self.num_classes}"
            )
        return {self.layout.field: value, "label": label, "index": position}


def manifest_names(manifest: Mapping[str, Any], path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Returns the class names in a manifest.

    Raises:
        ConfigError: it has none, or one of them twice.
    """
    names = manifest.get("class_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: class_names are {names!r:.99}, expected a list of texts")
    check_distinct(names, path)
    return tuple(names)


def _is_shard(entry: Any) -> bool:
    """Whether this describes a shard, a file of the same folder."""
    kinds = {"file": str, "num_records": int, "num_bytes": int}
    return (
        isinstance(entry, dict)
        and all(type(entry.get(name)) is kind for name, kind in kinds.items())
        and entry["file"] == os.path.basename(entry["file"])
    )
