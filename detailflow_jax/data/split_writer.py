"""Writes the splits of a TFDS dataset so that a killed run is gone on with.

TFDS itself begins with the first image again. Here examples come from the dataset's own builder,
and the files hold what TFDS would write: the same examples, in the same order (by a hash of their
keys), in the same shards. But progress is kept, in a folder beside the dataset:
    definition.json   what is being prepared; of another definition nothing is used
    SPLIT/            its examples on their way (see `spool`)
    shards/           finished files of all splits; they move when the last one is there
Examples that are in are only read past; a shard that is finished is not written again.
"""

import contextlib
import functools
import inspect
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from array_record.python import array_record_module
from tqdm import tqdm

from detailflow_jax.config import write_atomically
from detailflow_jax.data.spool import Spool, SpoolError


def is_supported(builder: Any) -> bool:
    """Whether `resumable` can do it: a local folder, a shuffled dataset, no Beam pipeline."""
    import tensorflow_datasets as tfds

    return (
        hasattr(tfds.core.GeneratorBasedBuilder, "_generate_splits")  # Not in older releases.
        and isinstance(builder, tfds.core.GeneratorBasedBuilder)
        and not isinstance(builder, tfds.core.BeamBasedBuilder)
        and "pipeline" not in inspect.signature(builder._split_generators).parameters
        and not os.fspath(builder.data_path).startswith("gs://")
        and not builder.info.disable_shuffling
    )


def progress_folder(builder: Any) -> pathlib.Path:
    """Where the progress of an unfinished dataset lies."""
    return pathlib.Path(builder.data_path.parent, f"unfinished.{builder.data_path.name}")


def progress_bytes(builder: Any) -> int:
    """What an earlier run has written of an unfinished dataset."""
    return sum(f.stat().st_size for f in progress_folder(builder).rglob("*") if f.is_file())


@contextlib.contextmanager
def resumable(builder: Any, definition: Any, totals: Mapping[str, int]) -> Iterator[None]:
    """Within it `builder.download_and_prepare` goes on with what an earlier run has done.

    Args:
        builder: of a dataset for which `is_supported` holds.
        definition: JSON that tells one input from another; progress on another one is removed.
        totals: images of splits, as far as they are known, for the progress bar.

    Raises:
        SpoolError: the progress does not fit the data; it has been removed.
    """
    import tensorflow_datasets as tfds

    folder = progress_folder(builder)
    versions = {"dataset": builder.info.full_name, "tfds": tfds.__version__}
    _open(folder, {**versions, "input": definition})
    totals = {name: split.num_examples for name, split in builder.info.splits.items()} | totals
    if any(folder.glob("*/journal.json")):  # TFDS would ask for free space for all of it once more.
        builder.info.set_splits(tfds.core.SplitDict([]))
        builder.info.download_size = 0
    builder._generate_splits = functools.partial(_generate_splits, builder, folder, totals)
    try:
        yield
    except SpoolError:
        shutil.rmtree(folder)
        raise
    finally:
        del builder._generate_splits  # The class's own again.
    shutil.rmtree(folder, ignore_errors=True)  # The dataset is there, whatever becomes of it.


def _open(folder: pathlib.Path, definition: Any) -> None:
    file = folder / "definition.json"
    content = json.dumps(definition, indent=1).encode()
    if folder.exists() and not (file.exists() and file.read_bytes() == content):
        print(f"removing {folder}: unfinished, and made of other files", flush=True)
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "shards").mkdir(exist_ok=True)
    if not file.exists():
        write_atomically(file, content)


def _generate_splits(
    builder: Any, folder: pathlib.Path, totals: Mapping[str, int], dl_manager: Any, config: Any
) -> list[Any]:
    """What TFDS's method of this name does; returns the `SplitInfo` of all splits."""
    import tensorflow_datasets as tfds

    splits = builder._split_generators(dl_manager)
    if not isinstance(splits, dict):  # A list is the older form.
        splits = {str(s.name): builder._generate_examples(**s.gen_kwargs) for s in splits}
    if not all(isinstance(examples, Iterable) for examples in splits.values()):
        print("a Beam pipeline, TFDS runs it itself: killed, it would begin again", flush=True)
        return type(builder)._generate_splits(builder, dl_manager, config)
    infos = []
    for name, examples in splits.items():
        spool = Spool(folder / name)
        if not spool.is_complete:
            _fill(spool, builder, name, examples, totals.get(name))
        template = tfds.core.ShardedFileTemplate(
            dataset_name=builder.name,
            data_dir=builder.data_path,  # Its temporary name, in here.
            split=name,
            filetype_suffix=builder.info.file_format.file_suffix,
        )
        lengths = _write_shards(spool, template, folder / "shards", config.get_shard_config())
        infos.append(
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=lengths,
                num_bytes=spool.record_bytes,
                filename_template=template,
            )
        )
    for shard in (folder / "shards").iterdir():
        _give(shard, pathlib.Path(builder.data_path, shard.name))
    return infos


def _fill(
    spool: Spool, builder: Any, split: str, examples: Iterable[Any], total: int | None
) -> None:
    from tensorflow_datasets.core import hashing

    if spool.num_examples:
        print(f"{split}: {spool.num_examples:,} images are in already", flush=True)
    hash_key = hashing.Hasher(split).hash_key
    with tqdm(examples, desc=f"read {split}", unit="image", total=total) as progress:
        keyed = ((hash_key(key), example) for key, example in progress)
        spool.fill(keyed, builder.info.features.serialize_example)


def _write_shards(spool: Spool, template: Any, folder: pathlib.Path, config: Any) -> list[int]:
    """Writes those that are not there, each under a temporary name first; returns all lengths."""
    from tensorflow_datasets.core.utils import shard_utils

    total = config.get_number_shards(spool.record_bytes, spool.num_examples)
    ends = shard_utils.get_shard_boundaries(spool.num_examples, total)
    starts = [0, *ends[:-1]]
    spans = tqdm(list(zip(starts, ends, strict=True)), desc=f"write {template.split}", unit="file")
    for index, (start, end) in enumerate(spans):
        name = template.sharded_filepath(shard_index=index, num_shards=total).name
        if not (folder / name).exists():
            _write_shard(folder / name, functools.partial(spool.records, start, end))
        spool.release(end)
    return [end - start for start, end in zip(starts, ends, strict=True)]


def _write_shard(path: pathlib.Path, records: Callable[[], Iterator[bytes]]) -> None:
    temporary = path.parent.parent / f"{path.name}.part"  # Not among the finished ones.
    writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), "group_size:1")
    try:
        for record in records():
            writer.write(record)
    finally:
        writer.close()
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _give(shard: pathlib.Path, to: pathlib.Path) -> None:
    """Puts a finished file into the dataset; by a second name where the file system has such.

    TFDS removes its temporary folder when it fails, and the file is then still among the finished.
    """
    try:
        os.link(shard, to)
    except OSError:
        shard.replace(to)
