"""Long work on many images, cut into chunks that survive a kill.

A chunk is a fixed range of `CHUNK` images whatever the batch size and number of processes, and is
written under its name only once it is whole. Process i of P makes chunks i, i + P, ...; the folder
must be one that all of them see. What is read back is in the order of the images, so that results
do not depend on who made which part.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from detailflow_jax.data.errors import report_skipped
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.evaluate.samples import Images, Part, readable, write_npz
from detailflow_jax.runtime import files, sharding
from detailflow_jax.runtime.files import write_atomically

CHUNK = 1024

Make = Callable[[int, int], Mapping[str, Mapping[str, np.ndarray]]]
"""(start, stop) -> {kind: {name: array [n, ...]}}; each kind is a file of its own.

n is stop - start, or less where images cannot be read; a kind of no images may be left out.
"""
UNREADABLE = "unreadable"
"""The kind that holds the names of images that cannot be read."""


class ChunkFolder:
    """Arrays of images 0 .. total - 1, in files `KIND-00000.npz` of CHUNK images each."""

    def __init__(self, path: pathlib.Path, total: int, definition: Mapping[str, Any]):
        """Makes the folder, or opens that of the same work.

        Args:
          path: the folder.
          total: number of images.
          definition: what the arrays depend on; compared with that of an existing folder.

        Raises:
          EvaluationError: the folder holds other work; the differing fields are named.
        """
        self.path, self.total = path, total
        files.make_folder(path)
        definition = json.loads(json.dumps({**definition, "total": total, "chunk": CHUNK}))
        file = path / "definition.json"
        if files.exists(file):
            _check_same(path, files.read_json(file), definition)
        write_atomically(file, json.dumps(definition, indent=2).encode())

    def fill(self, make: Make, kinds: Sequence[str], description: str, step: int) -> None:
        """Makes the chunks that are missing, behind a progress bar; returns when all are there.

        Args:
          make: gives every one of `kinds` for a range of images.
          kinds: the files that are needed of each chunk.
          description: for the progress bar.
          step: most images per call of `make`, such as a few batches.
        """
        mine = range(0, self.total, CHUNK)[jax.process_index() :: jax.process_count()]
        sizes = {start: min(CHUNK, self.total - start) for start in mine}
        there = set(files.names(self.path))
        missing = [s for s in mine if not {self._file(kind, s).name for kind in kinds} <= there]
        with tqdm(
            total=sum(sizes.values()),
            initial=sum(sizes[start] for start in sizes.keys() - set(missing)),
            unit="image",
            desc=description,
            disable=jax.process_index() != 0,
        ) as progress:
            for start in missing:
                stop, parts = start + sizes[start], []
                for at in range(start, stop, step):
                    parts.append(make(at, min(at + step, stop)))
                    progress.update(min(step, stop - at))
                for kind in kinds:
                    given = [part[kind] for part in parts if kind in part]
                    joined = jax.tree.map(lambda *x: np.concatenate(x), *given) if given else {}
                    write_npz(self._file(kind, start), joined)
        sharding.sync_processes(f"{self.path.name}: {description}")

    def parts(self, kind: str, name: str) -> Iterator[np.ndarray]:
        """One array, chunk by chunk in the order of the images.

        Raises:
          EvaluationError: a chunk is missing or damaged.
        """
        for start in range(0, self.total, CHUNK):
            with _opened(self._file(kind, start)) as arrays:
                array = arrays[name] if arrays.files else None
            if array is not None:  # None of its images can be read.
                yield array

    def read(self, kind: str, name: str) -> np.ndarray:
        """One array of all images.

        Raises:
          EvaluationError: a chunk is missing or damaged, or no image can be read.
        """
        parts = list(self.parts(kind, name))
        if not parts:
            raise EvaluationError(f"{self.path}: none of the {self.total} images can be read")
        return np.concatenate(parts)

    def remove(self, kind: str | None = None) -> None:
        """Deletes one kind of file, or the whole folder, once its content is stored elsewhere."""
        for name in files.names(self.path):
            if kind is None or name.startswith(f"{kind}-"):
                files.remove(self.path / name)
        if kind is None and not files.is_remote(self.path):
            self.path.rmdir()

    def _file(self, kind: str, start: int) -> pathlib.Path:
        return self.path / f"{kind.replace(' ', '_')}-{start // CHUNK:05d}.npz"


def of_images(images: Images, make: Callable[[Part], Mapping[str, Any]]) -> Make:
    """What fills a folder from a set of images: the kinds of `make`, and UNREADABLE."""

    def made(start: int, stop: int) -> dict[str, Any]:
        part = images.read_part(start, stop)
        unreadable = {"name": np.array(part.unreadable, dtype=np.str_)}
        return {**(make(part) if len(part.images) else {}), UNREADABLE: unreadable}

    return made


def unreadable_in(path: pathlib.Path) -> list[str]:
    """Names of the images that could not be read for a filled folder, and the reasons.

    Each is logged once per process, also where another process or an earlier run met it.
    """
    names = []
    for file in (path / name for name in files.names(path) if name.startswith(f"{UNREADABLE}-")):
        with _opened(file) as arrays:
            names += arrays["name"].tolist()
    for name in names:
        report_skipped(name)
    return names


@contextlib.contextmanager
def _opened(file: pathlib.Path) -> Iterator[np.lib.npyio.NpzFile]:
    missing = "missing; several processes need one folder that all of them see"
    again = "remove it and run the same command again"
    with readable(file, missing, again), files.open_file(file) as stream, np.load(stream) as arrays:
        yield arrays


def _check_same(path: pathlib.Path, old: dict, new: dict) -> None:
    differing = [
        f"{name} was {old.get(name)!r}, is now {new.get(name)!r}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise EvaluationError(
            f"{path} holds other results: {'; '.join(differing)}. Choose another --out, or remove "
            "that folder"
        )
