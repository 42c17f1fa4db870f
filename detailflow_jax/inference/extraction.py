"""One pass over a data set that stores what a network makes of every image, restartably.

Several processes share the shards between them; each works with its own devices.

Killed at any moment, it goes on with the missing shards and ends with the same bytes, as long as
`encode` depends on nothing but the views and positions it is given.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from tqdm import tqdm

from detailflow_jax import data
from detailflow_jax.data.shards import read_json
from detailflow_jax.runtime import distributed, sharding
from detailflow_jax.runtime.errors import UserError

Encode = Callable[[np.ndarray, np.ndarray], np.ndarray]


def encode_shard(
    encode: Encode,
    source: data.Source,
    positions: Sequence[int],
    unreadable: dict[int, str],
    *,
    image_size: int,
    crops: str,
    batch_size: int,
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(position, label, value) of every readable image, in order.

    `unreadable` is filled with position -> name and reason.
    """

    def encoded(batch: list) -> Iterator[tuple[int, int, np.ndarray]]:
        views = np.stack([example["crops"] for _, example in batch])
        values = encode(views, np.array([position for position, _ in batch]))
        for (position, example), value in zip(batch, values, strict=True):
            yield position, example["label"], value

    batch = []
    for position, example in data.iterate_crops(source, positions, image_size, crops):
        if isinstance(example, data.UnreadableImage):
            unreadable[position] = str(example)
            continue
        batch.append((position, example))
        if len(batch) == batch_size:
            yield from encoded(batch)
            batch = []
    if batch:
        yield from encoded(batch)


def extract(
    encode: Encode,
    source: data.Source,
    out: str,
    layout: data.ShardLayout,
    definition: Mapping,
    *,
    image_size: int,
    crops: str,
    batch_size: int,
) -> dict:
    """Writes the records of a source to the folder `out`; resumes what is there.

    Args:
      encode: (views uint8 [m, K, R, R, 3], positions int [m]) -> what `layout.encode` takes, [m],
        for m <= M.
      source: of images.
      out: folder, made if missing.
      layout: of the shards and their records.
      definition: what the records depend on (`data.open_extraction`).
      image_size: R.
      crops: views of each image, K (`data.encoding_crops`).
      batch_size: M, images per call of `encode`.

    Returns:
      the manifest.

    Raises:
      ConfigError: the folder holds another extraction; the differing fields are named.
    """
    first, count = jax.process_index(), jax.process_count()
    if first == 0:
        data.open_extraction(out, layout, definition)
    sharding.sync_processes("opened")
    pending = data.pending_shards(out, layout, first, count)
    total = sum(len(layout.positions(shard)) for shard in pending)
    title = f"extract {layout.what}"
    with tqdm(total=total, unit="image", desc=title, disable=first > 0) as progress:
        for shard in pending:
            unreadable: dict[int, str] = {}
            records = encode_shard(
                encode,
                source,
                layout.positions(shard),
                unreadable,
                image_size=image_size,
                crops=crops,
                batch_size=batch_size,
            )
            data.write_shard(out, layout, shard, _counted(records, progress), unreadable)
            progress.update(len(unreadable))
    sharding.sync_processes("written")
    if first > 0:
        sharding.sync_processes("closed")
        return read_json(os.path.join(out, "manifest.json"))
    manifest = data.write_manifest(out, layout)
    sharding.sync_processes("closed")
    for _, image in manifest["unreadable"]:
        print(f"skipping an unreadable image: {data.printable(image)}", file=sys.stderr)
    return manifest


def _counted(records: Iterator, progress: tqdm) -> Iterator:
    for record in records:
        yield record
        progress.update()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of every extraction: the source, the folder, the size of a shard."""
    add = parser.add_argument
    add("--out", required=True, help="folder for the shards; manifest.json comes last")
    add("--source", default="digits", help="digits[:SPLIT], folder:PATH or tfds:NAME[:SPLIT]")
    add("--split", help="split of the source, where it has any; default: its training split")
    add("--data_dir", help="where TFDS keeps its data")
    add("--shard_size", type=int, default=4096, help="images per shard")
    distributed.add_arguments(parser)


def run_command(args: argparse.Namespace, run: Callable[[data.Source], dict], views: str) -> int:
    """Runs an extraction from the command line; returns its exit code.

    Args:
      args: of `add_arguments`.
      run: extracts a source and returns the manifest.
      views: what is stored per image, for the last line.
    """
    try:
        distributed.start(args.coordinator_address, args.num_processes, args.process_id)
        manifest = run(data.make_source(args.source, args.split, args.data_dir))
    except UserError as error:
        return error.report()
    if jax.process_index() == 0:
        print(
            f"{manifest['num_records']} images {views} in {len(manifest['shards'])} shards in "
            f"{args.out}; {len(manifest['unreadable'])} unreadable"
        )
    return 0
