"""Records sorted by way of the disk, by a process that may be killed at any moment.

A folder holds
    journal.json    how many examples have been taken in, which, and the length of every bucket
    bucket-0123     records of one range of keys, as they came; removed when they are in shards
The journal is written after what it speaks of is safe on the disk. What a bucket holds beyond its
length in the journal came from a process that was killed, and is written over.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from detailflow_jax.runtime.files import write_atomically

KEY_BITS = 128
_BUCKETS = 256  # 600 MB each for ImageNet: one is sorted in memory.
_HEAD = struct.Struct("<16sQ")  # key, length of the record
_IN_FLIGHT = 16  # Syncing waits for the disk, not for the processor.


class SpoolError(ValueError):
    """What is on the disk does not fit what is to be sorted; it is of no use any more."""


@dataclasses.dataclass
class _Journal:
    examples: int = 0  # taken in, in the order they come
    digest: str = ""  # of their keys, in that order
    complete: bool = False  # there are no more
    record_bytes: int = 0  # without keys
    sizes: list[int] = dataclasses.field(default_factory=lambda: [0] * _BUCKETS)  # bytes
    counts: list[int] = dataclasses.field(default_factory=lambda: [0] * _BUCKETS)  # records


class Spool:
    """Takes records in, in any order of their keys, and gives them out in rising order.

    Args:
        folder: made where there is none; what an earlier process left in it is gone on with.
        commit_bytes: how much is collected in memory before it is made safe on the disk.

    Raises:
        SpoolError: the journal cannot be read.
    """

    def __init__(self, folder: os.PathLike, commit_bytes: int = 2**30):
        self._folder = pathlib.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._journal_file = self._folder / "journal.json"
        self._commit_bytes = commit_bytes
        self._journal = _Journal()
        if self._journal_file.exists():
            try:
                self._journal = _Journal(**json.loads(self._journal_file.read_text()))
            except (ValueError, TypeError) as error:
                raise SpoolError(f"{self._journal_file}: {error}") from error
        self._pending: dict[int, list[bytes]] = {}
        self._cached: tuple[int, list[tuple[bytes, bytes]]] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all examples are in."""
        return self._journal.complete

    @property
    def num_examples(self) -> int:
        """Examples that are in, and safe."""
        return self._journal.examples

    @property
    def record_bytes(self) -> int:
        """Bytes of their records."""
        return self._journal.record_bytes

    # -------------------------------------------------------------------------------- taking in

    def fill(self, examples: Iterable[tuple[int, Any]], encode: Callable[[Any], bytes]) -> None:
        """Takes all examples in; those that an earlier process took in are read and left alone.

        Args:
            examples: (key below 2^128, example), the same ones in the same order in every process.
            encode: an example's record.

        Raises:
            SpoolError: they are not the same ones, there is none, or a bucket is damaged.
        """
        known, digest, pending = self._journal.examples, b"", 0
        count = 0
        for count, (key, example) in enumerate(examples, start=1):
            key_bytes = key.to_bytes(KEY_BITS // 8, "big")
            digest = hashlib.sha256(digest + key_bytes).digest()
            if count < known:
                continue
            if count == known:
                self._check_known(digest)
                continue
            record = encode(example)
            bucket = key * _BUCKETS >> KEY_BITS
            parts = self._pending.setdefault(bucket, [])
            parts += [_HEAD.pack(key_bytes, len(record)), record]
            self._journal.counts[bucket] += 1
            self._journal.record_bytes += len(record)
            pending += len(record)
            if pending >= self._commit_bytes:
                self._commit(count, digest)
                pending = 0
        if count < known:
            raise SpoolError(f"{count:,} examples, where an earlier run had taken in {known:,}")
        if not count:
            raise SpoolError(f"{self._folder.name} has no examples")
        self._commit(count, digest, complete=True)

    def _check_known(self, digest: bytes) -> None:
        if digest.hex() != self._journal.digest:
            raise SpoolError(
                f"the first {self.num_examples:,} examples are not those of an earlier run"
            )

    def _commit(self, examples: int, digest: bytes, *, complete: bool = False) -> None:
        """Makes safe what is in memory, then says so in the journal."""
        with ThreadPoolExecutor(_IN_FLIGHT) as pool:
            for bucket, size in pool.map(self._append, self._pending):
                self._journal.sizes[bucket] = size
        self._pending.clear()
        journal = dataclasses.replace(
            self._journal, examples=examples, digest=digest.hex(), complete=complete
        )
        write_atomically(self._journal_file, json.dumps(dataclasses.asdict(journal)).encode())
        self._journal = journal

    def _append(self, bucket: int) -> tuple[int, int]:
        path, size = self._path(bucket), self._journal.sizes[bucket]
        if size and not (path.exists() and path.stat().st_size >= size):
            raise SpoolError(f"{path}: missing or cut short, {size:,} bytes had been written")
        with path.open("r+b" if size else "wb") as file:
            file.seek(size)
            file.writelines(self._pending[bucket])
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
            return bucket, file.tell()

    def _path(self, bucket: int) -> pathlib.Path:
        return self._folder / f"bucket-{bucket:04d}"

    # ------------------------------------------------------------------------------- giving out

    def records(self, start: int, stop: int) -> Iterator[bytes]:
        """Records `start` to `stop` (excluded) in the order of their keys; all must be in.

        Raises:
            SpoolError: a bucket is missing or damaged, or two examples have one key.
        """
        for bucket, first, last in self._spans():
            if first < stop and last > start:
                for _, record in self._sorted(bucket)[max(start - first, 0) : stop - first]:
                    yield record

    def release(self, stop: int) -> None:
        """Removes what records from `stop` on do not need."""
        for bucket, _, last in self._spans():
            if last <= stop:
                self._path(bucket).unlink(missing_ok=True)

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        """(bucket, place of its first record, place after its last one)."""
        first = 0
        for bucket, count in enumerate(self._journal.counts):
            yield bucket, first, first + count
            first += count

    def _sorted(self, bucket: int) -> list[tuple[bytes, bytes]]:
        if self._cached is None or self._cached[0] != bucket:
            self._cached = None  # Not two of them in memory.
            self._cached = bucket, self._read(bucket)
        return self._cached[1]

    def _read(self, bucket: int) -> list[tuple[bytes, bytes]]:
        path, size = self._path(bucket), self._journal.sizes[bucket]
        content = path.read_bytes()[:size] if path.exists() else b""
        records, at = [], 0
        while at + _HEAD.size <= len(content):
            key, length = _HEAD.unpack_from(content, at)
            at += _HEAD.size
            records.append((key, content[at : at + length]))
            at += length
        if len(content) != size or at != size or len(records) != self._journal.counts[bucket]:
            raise SpoolError(f"{path}: {len(content):,} bytes, {size:,} had been written")
        records.sort()
        for (key, _), (next_key, _) in itertools.pairwise(records):
            if key == next_key:
                raise SpoolError(f"two examples of {self._folder.name} have the same key")
        return records
