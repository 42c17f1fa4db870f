"""Runs a network over a data set and stores its output for every image.

Several processes share the shards between them; each works with its own devices.

Killed at any moment, the same command continues with the missing shards and ends with the same
bytes: a record depends on its image, its position and the settings alone.

Shapes: K views per image, R their side, M images per batch.
"""

import argparse
import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Shaped, UInt8
from tqdm import tqdm

from detailflow_jax import data
from detailflow_jax.inference.batching import in_batches
from detailflow_jax.inference.models import Model
from detailflow_jax.runtime import command, distributed, files, sharding
from detailflow_jax.runtime.errors import reported

Views = UInt8[np.ndarray, "M K R R 3"]


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What is stored of every image, and the program that computes it.

    Attributes:
      layout: of the shards and their records.
      model: whose program it is; its mesh splits a batch.
      settings: what the records depend on beside the model, the source and `image_size`.
      program: (views uint8 [n, R, R, 3], position of the image of each [n], number of the view [n])
        -> what is stored of each view, [n, ...].
      image_size: R.
      crops: kind of the views (`data.encoding_crops`).
      num_views: K.
      batch_size: views per call of the program; whole images, at least one.
      mirrored: add the mirror image of every view.
      files: content of further files of the folder, by name.
    """

    layout: data.ShardLayout
    model: Model
    settings: Mapping[str, Any]
    program: Callable[..., Any]
    image_size: int
    crops: str
    num_views: int
    batch_size: int
    mirrored: bool = False
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """M."""
        return max(1, self.batch_size // self.num_views)

    def definition(self, source: data.Source) -> dict[str, Any]:
        """What the records depend on, and what their readers need (`data.open_extraction`)."""
        return {
            "source": source.fingerprint,
            self.model.kind: self.model.fingerprint,
            "encoded_by": self.model.encoder_fingerprint,
            "class_names": list(source.class_names),
            "num_classes": source.num_classes,
            "image_size": self.image_size,
            **self.settings,
        }

    def encode(
        self, views: Views, positions: Int[np.ndarray, " M"]
    ) -> Shaped[np.ndarray, "M n_views ..."]:
        """The records to store for the images at these positions of the source."""
        if self.mirrored:
            views = np.concatenate([views, views[:, :, :, ::-1]], axis=1)
        count = len(views)
        rows = (
            views.reshape(-1, *views.shape[2:]),
            np.repeat(positions, self.num_views).astype(np.int32),
            np.tile(np.arange(self.num_views, dtype=np.int32), count),
        )
        size = self.num_images * self.num_views
        values = in_batches(self.program, size, *rows, mesh=self.model.mesh, whole=True)
        return values.reshape(count, self.num_views, *values.shape[1:])

    def records(
        self, source: data.Source, positions: Sequence[int], unreadable: dict[int, str]
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """(position, label, value) of every readable image, in order.

        `unreadable` is filled with position -> name and reason.
        """
        batch: list[tuple[int, Any]] = []

        def encoded() -> Iterator[tuple[int, int, np.ndarray]]:
            views = np.stack([example["crops"] for _, example in batch])
            values = self.encode(views, np.array([position for position, _ in batch]))
            for (position, example), value in zip(batch, values, strict=True):
                yield position, example["label"], value
            batch.clear()

        for position, example in data.iterate_crops(source, positions, self.image_size, self.crops):
            if isinstance(example, data.UnreadableImage):
                unreadable[position] = str(example)
                continue
            batch.append((position, example))
            if len(batch) == self.num_images:
                yield from encoded()
        if batch:
            yield from encoded()


def extract(extraction: Extraction, source: data.Source, out: str) -> dict[str, Any]:
    """Writes the records of a source to the folder `out`; resumes what is there.

    Returns:
      the manifest.

    Raises:
      ConfigError: the folder holds another extraction; the differing fields are named.
    """
    layout, first = extraction.layout, jax.process_index()
    out = os.fspath(files.path(out))
    if first == 0:
        data.open_extraction(out, layout, extraction.definition(source))
        for name, content in extraction.files.items():
            files.write_atomically(os.path.join(out, name), content)
    sharding.sync_processes("opened")
    pending = data.pending_shards(out, layout, first, jax.process_count())
    total = sum(len(layout.positions(shard)) for shard in pending)
    title = f"extract {layout.what}"
    with tqdm(total=total, unit="image", desc=title, disable=first > 0) as progress:
        for shard in pending:
            unreadable: dict[int, str] = {}
            records = extraction.records(source, layout.positions(shard), unreadable)
            data.write_shard(out, layout, shard, _counted(records, progress), unreadable)
            progress.update(len(unreadable))
    sharding.sync_processes("written")
    if first > 0:
        sharding.sync_processes("closed")
        return files.read_json(os.path.join(out, "manifest.json"))
    network = extraction.model.source  # Noted for those who want to decode.
    local = os.path.abspath(network)
    notes = {"network": local if os.path.exists(local) else network}
    manifest = data.write_manifest(out, layout, notes)
    sharding.sync_processes("closed")
    for _, image in manifest["unreadable"]:
        print(f"skipping an unreadable image: {data.printable(image)}", file=sys.stderr)
    return manifest


def _counted(records: Iterator[Any], progress: tqdm) -> Iterator[Any]:
    for record in records:
        yield record
        progress.update()


@dataclasses.dataclass(frozen=True)
class Command:
    """An extraction as a command line.

    Attributes:
      name: of the command.
      network: option that names the network.
      takes: help of that option.
      load: path -> network.
      extract: (network, source, out, **settings) -> manifest.
      options: setting of `extract` -> its help. Type and default are those of `extract`.
      choices: setting -> values that it may have.
      stored: what is stored beside the images, for the last line.
      description: for the help text.
    """

    name: str
    network: str
    takes: str
    load: Callable[[str], Any]
    extract: Callable[..., dict[str, Any]]
    options: Mapping[str, str]
    choices: Mapping[str, Sequence[str]]
    stored: Callable[[Mapping[str, Any]], str]
    description: str

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """The arguments of a command line."""
        parser = command.make_parser(
            self.name, description=f"{self.description} Run the same command again to resume."
        )
        add = parser.add_argument
        add(f"--{self.network}", required=True, help=self.takes)
        add(
            "--out",
            required=True,
            help="folder, also gs://..., for the shards; manifest.json comes last",
        )
        kinds = "digits, mnist, photos (each with :SPLIT), folder:PATH or tfds:NAME[:SPLIT]"
        add("--source", default="digits", help=kinds)
        add("--split", help="split of the source, where it has any; default: its training split")
        add("--data_dir", help="where TFDS keeps its data")
        add("--shard_size", type=command.whole(1), default=4096, help="images per shard")
        parameters = inspect.signature(self.extract).parameters
        for name, text in self.options.items():
            default = parameters[name].default
            kind: Callable[[str], Any] = command.seed if name == "seed" else command.whole(1)
            kind = str if isinstance(default, str) else kind
            add(f"--{name}", type=kind, default=default, choices=self.choices.get(name), help=text)
        distributed.add_arguments(parser)
        return parser.parse_args(argv)

    @reported
    def main(self, argv: Sequence[str] | None = None) -> int:
        """Runs the command line; returns its exit code."""
        args = self.parse(argv)
        settings = {name: getattr(args, name) for name in ("shard_size", *self.options)}
        distributed.start(args.coordinator_address, args.num_processes, args.process_id)
        files.path(args.out)  # Before the images and the network are read.
        source = data.make_source(args.source, args.split, args.data_dir)
        network = self.load(getattr(args, self.network))
        manifest = self.extract(network, source, args.out, **settings)
        if jax.process_index() == 0:
            print(
                f"{manifest['num_records']} images {self.stored(settings)} in "
                f"{len(manifest['shards'])} shards in {args.out}; {len(manifest['unreadable'])} "
                "unreadable"
            )
        return 0
