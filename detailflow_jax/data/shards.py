"""Writes what is derived from each image of a dataset (codes, latents) to ArrayRecord shards.

A folder holds, WHAT being "codes" or "latents",
    layout.json                          first: everything that defines the extraction
    WHAT-00003-of-00012.json             the unreadable images of shard 3, before the shard
    WHAT-00003-of-00012.array_record     shard 3: source positions [3 S, 4 S), one record per image
    manifest.json                        last: the layout and what was written
Each file gets its final name only when it is complete. So a killed run can be started again: it
writes the missing shards, and the result has the same bytes.
"""

import abc
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from array_record.python import array_record_module

from detailflow_jax.runtime import files
from detailflow_jax.runtime.errors import ConfigError, FileError
from detailflow_jax.runtime.files import atomic_path, remove_partial, write_atomically

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ShardLayout(abc.ABC):
    """Which source position lies in which shard, and the bytes of one record.

    A subclass adds the fields that describe a record, and says `what` the records are, which names
    the files; `needed`, the fields that the definition of an extraction must have beside the
    layout; `field`, the name of the value in a record; and `accepts`, its type in memory.
    """

    num_examples: int  # of the source, readable or not
    shard_size: int  # S, positions per shard

    what: ClassVar[str]
    needed: ClassVar[frozenset[str]]
    field: ClassVar[str]
    accepts: ClassVar[type]

    def __post_init__(self):
        for field, value in dataclasses.asdict(self).items():
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"{type(self).__name__}.{field}={value}: must be at least 1")

    @property
    def num_shards(self) -> int:
        return -(-self.num_examples // self.shard_size)

    @property
    @abc.abstractmethod
    def value_dtype(self) -> np.dtype:
        """Type and shape of one value as it is stored, little-endian."""

    @abc.abstractmethod
    def check(self, index: int, value: np.ndarray) -> None:
        """Raises ValueError for a value of another range."""

    @property
    def record_dtype(self) -> np.dtype:
        """(index, label, value)."""
        return np.dtype([("index", "<i8"), ("label", "<i4"), (self.field, self.value_dtype)])

    def encode(self, index: int, label: int, value: np.ndarray) -> bytes:
        """One record; raises ValueError for a value of another shape, type or range."""
        shape = self.value_dtype.shape
        if value.shape != shape or not np.issubdtype(value.dtype, self.accepts):
            raise ValueError(
                f"{self.field} of {index}: {value.dtype} {value.shape}, "
                f"not {self.accepts.__name__} {shape}"
            )
        self.check(index, value)
        return np.array((index, label, value), self.record_dtype).tobytes()

    def positions(self, shard: int) -> range:
        """The source positions of one shard."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_examples))

    def file_name(self, shard: int) -> str:
        return f"{self.what}-{shard:05d}-of-{self.num_shards:05d}.array_record"


def open_extraction(directory: str, layout: ShardLayout, definition: Mapping) -> None:
    """Starts an extraction, or makes sure that the one begun in `directory` is the same.

    Args:
        directory: created if missing.
        definition: JSON values; all that the records depend on or that a reader needs, except
            the layout. It must have the fields `layout.needed`.

    Raises:
        ConfigError: the folder holds an extraction that differs; the differing fields are named.
        ValueError: the definition lacks a needed field.
    """
    if missing := sorted(layout.needed - set(definition)):
        raise ValueError(f"the definition of an extraction lacks {', '.join(missing)}")
    fields = {**definition, **dataclasses.asdict(layout), "format_version": FORMAT_VERSION}
    fields = json.loads(json.dumps(fields))  # As they will be read: tuples become lists.
    path = os.path.join(directory, "layout.json")
    files.make_folder(directory)
    if not files.exists(path):
        if any(name.endswith(".array_record") for name in files.names(directory)):
            raise ConfigError(f"{directory} holds shards but no layout.json: use another folder")
        _write_json(path, fields)
        return
    begun = files.read_json(path)
    if "encoded_by" not in begun:  # It was begun before this was kept beside the whole fingerprint.
        fields.pop("encoded_by", None)
    differing = [k for k in sorted({*fields, *begun}) if fields.get(k) != begun.get(k)]
    if differing:
        lines = [f"  {k}: {begun.get(k)!r} there, {fields.get(k)!r} asked" for k in differing]
        raise ConfigError(
            f"{directory} holds another extraction, which differs in\n"
            + "\n".join(lines)
            + "\nuse another folder, or remove this one to start again"
        )


def pending_shards(
    directory: str, layout: ShardLayout, process_index: int = 0, process_count: int = 1
) -> list[int]:
    """The shards that this process has yet to write: every process_count-th of those missing.

    Removes what an interrupted run left half-written of this process's shards.
    """
    pending, there = [], set(files.names(directory))
    for shard in range(process_index, layout.num_shards, process_count):
        path = os.path.join(directory, layout.file_name(shard))
        remove_partial(directory, os.path.basename(path))
        remove_partial(directory, os.path.basename(_sidecar(path)))
        if os.path.basename(path) not in there:
            pending.append(shard)
    return pending


def write_shard(
    directory: str,
    layout: ShardLayout,
    shard: int,
    records: Iterable[tuple[int, int, np.ndarray]],
    unreadable: Mapping[int, str],
) -> None:
    """Writes one shard and its list of unreadable images; visible only when complete.

    Args:
        records: (source position, label, what `layout.encode` takes) in ascending position.
        unreadable: source position -> name and reason, of positions without a record. May be filled
            while `records` is consumed.

    Raises:
        ValueError: `layout.encode` raises it; or the positions, together with the unreadable
            ones, are not exactly those of the shard.
    """
    path = os.path.join(directory, layout.file_name(shard))
    written = []

    def encoded() -> Iterator[bytes]:
        for index, label, value in records:
            yield layout.encode(index, label, value)
            written.append(index)
        if written != [i for i in layout.positions(shard) if i not in unreadable]:
            raise ValueError(
                f"shard {shard} needs, in order, the positions {layout.positions(shard)} without "
                f"the {len(unreadable)} unreadable ones; got {len(written)} records"
            )
        # Before the shard, whose presence means that both are there.
        sidecar = {"unreadable": [[int(i), unreadable[i]] for i in sorted(unreadable)]}
        _write_json(_sidecar(path), sidecar)

    write_records(path, encoded())


def write_manifest(
    directory: str, layout: ShardLayout, notes: Mapping[str, Any] | None = None
) -> dict:
    """Ends the extraction: checks that every shard is there and writes manifest.json.

    Returns the manifest. It has the fields of layout.json, then num_records, unreadable, shards
    (file, num_records, num_bytes), and `notes`: facts that do not change the records. Writing it
    again gives the same bytes. Raises ConfigError if shards are missing.
    """
    paths = [os.path.join(directory, layout.file_name(k)) for k in range(layout.num_shards)]
    there = set(files.names(directory))
    if missing := [path for path in paths if os.path.basename(path) not in there]:
        raise ConfigError(
            f"{len(missing)} of {len(paths)} shards are not written: {missing[0]} ..."
        )
    remove_partial(directory)
    shards, unreadable = [], []
    for shard, path in enumerate(paths):
        broken = _read_unreadable(path)
        unreadable += broken
        shards.append(
            {
                "file": os.path.basename(path),
                "num_records": len(layout.positions(shard)) - len(broken),
                "num_bytes": files.size(path),
            }
        )
    manifest = files.read_json(os.path.join(directory, "layout.json"))
    manifest |= {
        "num_records": sum(s["num_records"] for s in shards),
        "unreadable": unreadable,
        "shards": shards,
        **(notes or {}),
    }
    _write_json(os.path.join(directory, "manifest.json"), manifest)
    return manifest


def _sidecar(path: str) -> str:
    return path.removesuffix(".array_record") + ".json"


def _read_unreadable(path: str) -> list[list]:
    """[[source position, name and reason], ...] of the unreadable images of a shard."""
    try:
        found = files.read_json(_sidecar(path))["unreadable"]
        if all(type(position) is int and isinstance(text, str) for position, text in found):
            return found
        reason = f"it lists {found!r:.99}"
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        reason = str(error)
    raise ConfigError(
        f"{_sidecar(path)} is damaged ({reason}): remove it and {os.path.basename(path)}, and run "
        "the same command again"
    )


def write_records(
    path: str | os.PathLike, records: Iterable[bytes], expected: int | None = None
) -> None:
    """Writes an ArrayRecord file; it appears only when it is complete.

    Raises:
        FileError: the disk is full, or the file does not read back.
        ValueError: there are not `expected` records.
    """
    with atomic_path(path) as temporary:
        count = 0
        try:
            # One record per group: random access then decompresses nothing that is not asked for.
            writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), "group_size:1")
            try:
                for record in records:
                    writer.write(record)
                    count += 1
            finally:
                writer.close()
        except RuntimeError as error:  # Its only kind: a full disk, above all.
            raise FileError(f"cannot write {path}: {error}") from error
        if expected not in (None, count):
            raise ValueError(f"{path}: {count:,} records, expected {expected:,}")
        if num_records(temporary) != count:  # A full disk may show only here.
            raise FileError(f"{path}: {count:,} records were written but do not read back")


def num_records(path: str | os.PathLike) -> int:
    """The number of records in an ArrayRecord file; raises RuntimeError if it is damaged."""
    reader = array_record_module.ArrayRecordReader(os.fspath(path))
    count = reader.num_records()
    reader.close()
    return count


def _write_json(path: str, value: Mapping) -> None:
    write_atomically(path, json.dumps(value, indent=1).encode())
