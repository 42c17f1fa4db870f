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
import inspect
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from array_record.python import array_record_module
from tqdm import tqdm

from detailflow_jax.data.spool import Spool, SpoolError
from detailflow_jax.runtime.files import write_atomically


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
def resumable(builder: Any, definition: Any, expected: Mapping[str, int]) -> Iterator[None]:
    """Within it `builder.download_and_prepare` goes on with what an earlier run has done.

    Args:
        builder: of a dataset for which `is_supported` holds.
        definition: JSON that tells one input from another; progress on another one is removed.
        expected: images of those splits that must have so many.

    Raises:
        SpoolError: the progress does not fit the data; it has been removed.
        ValueError: a split has another number of images than expected.
    """
    import tensorflow_datasets as tfds

    folder, info = progress_folder(builder), builder.info
    _open(
        folder,
        {"format": 1, "dataset": info.full_name, "tfds": tfds.__version__, "input": definition},
    )
    known, write_info = info.splits, info.write_to_directory

    def generate_splits(dl_manager: Any, config: Any) -> list[Any]:
        info.set_splits(known)
        return _generate_splits(builder, folder, expected, dl_manager, config)

    def write_info_safely(path: Any, **kwargs: Any) -> None:
        write_info(path, **kwargs)
        _sync(pathlib.Path(path))

    if any(folder.glob("*/journal.json")):  # TFDS would ask for free space for all of it once more.
        info.set_splits(tfds.core.SplitDict([]))
        info.download_size = 0
    builder._generate_splits, info.write_to_directory = generate_splits, write_info_safely
    try:
        yield
    except SpoolError:
        _remove(folder)
        raise
    finally:
        del builder._generate_splits, info.write_to_directory  # The classes' own again.
    _sync(folder.parent)  # The dataset's final name, before the progress is gone.
    _remove(folder)


def remove_progress(builder: Any) -> None:
    """Removes what is left of a dataset that is complete."""
    _remove(progress_folder(builder))


def _remove(folder: pathlib.Path) -> None:
    with contextlib.suppress(OSError):
        # First, for without it the rest counts for nothing.
        (folder / "definition.json").unlink(missing_ok=True)
        shutil.rmtree(folder)


def _sync(folder: pathlib.Path) -> None:
    """Makes the files of a folder and their names safe on the disk."""
    for path in [*(path for path in folder.iterdir() if path.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _open(folder: pathlib.Path, definition: Any) -> None:
    file = folder / "definition.json"
    content = json.dumps(definition, indent=1).encode()
    if folder.exists() and not (file.exists() and file.read_bytes() == content):
        print(f"removing {folder}: unfinished, and made of other files", flush=True)
        file.unlink(missing_ok=True)
        shutil.rmtree(folder)
    (folder / "shards").mkdir(exist_ok=True, parents=True)
    if not file.exists():
        write_atomically(file, content)


def _generate_splits(
    builder: Any, folder: pathlib.Path, expected: Mapping[str, int], dl_manager: Any, config: Any
) -> list[Any]:
    """What TFDS's method of this name does; returns the `SplitInfo` of all splits."""

    splits = builder._split_generators(dl_manager)
    if not isinstance(splits, dict):  # A list is the older form.
        splits = {str(s.name): builder._generate_examples(**s.gen_kwargs) for s in splits}
    if not all(isinstance(examples, Iterable) for examples in splits.values()):
        print("a Beam pipeline, TFDS runs it itself: killed, it would begin again", flush=True)
        return type(builder)._generate_splits(builder, dl_manager, config)
    infos = [
        _generate_split(builder, folder, name, examples, expected.get(name), config)
        for name, examples in splits.items()
    ]
    for info in infos:
        for path in info.filename_template.sharded_filepaths(info.num_shards):
            _give(folder / "shards" / path.name, pathlib.Path(path))
    return infos


def _generate_split(
    builder: Any,
    folder: pathlib.Path,
    name: str,
    examples: Iterable[Any],
    expected: int | None,
    config: Any,
) -> Any:
    import tensorflow_datasets as tfds

    spool = Spool(folder / name)
    if not spool.is_complete:
        _fill(spool, builder, name, examples, expected)
    if expected and spool.num_examples != expected:
        raise ValueError(
            f"{spool.num_examples:,} {name} images, expected {expected:,}: the files that they "
            "come from are not the official ones"
        )
    template = tfds.core.ShardedFileTemplate(
        dataset_name=builder.name,
        data_dir=builder.data_path,  # Its temporary name, in here.
        split=name,
        filetype_suffix=builder.info.file_format.file_suffix,
    )
    number = config.get_shard_config().get_number_shards(spool.record_bytes, spool.num_examples)
    shards = [folder / "shards" / path.name for path in template.sharded_filepaths(number)]
    return tfds.core.SplitInfo(
        name=name,
        shard_lengths=_write_shards(spool, name, shards),
        num_bytes=spool.record_bytes,
        filename_template=template,
    )


def _fill(
    spool: Spool, builder: Any, split: str, examples: Iterable[Any], expected: int | None
) -> None:
    from tensorflow_datasets.core import hashing

    if spool.num_examples:
        print(f"{split}: {spool.num_examples:,} images are in already", flush=True)
    hash_key = hashing.Hasher(split).hash_key
    known = builder.info.splits.get(split)
    total = expected or (known.num_examples if known else None)
    with tqdm(examples, desc=f"read {split}", unit="image", total=total) as progress:
        keyed = ((hash_key(key), example) for key, example in progress)
        spool.fill(keyed, builder.info.features.serialize_example)


def _write_shards(spool: Spool, split: str, paths: list[pathlib.Path]) -> list[int]:
    """Writes those that are not there, each under a temporary name first; returns all lengths."""
    from tensorflow_datasets.core.utils import shard_utils

    ends = shard_utils.get_shard_boundaries(spool.num_examples, len(paths))
    starts = [0, *ends[:-1]]
    shards = list(zip(paths, starts, ends, strict=True))
    for path, start, end in tqdm(shards, desc=f"write {split}", unit="file"):
        if not path.exists():
            _write_shard(path, spool.records(start, end))
        spool.release(end)
    return [end - start for _, start, end in shards]


def _write_shard(path: pathlib.Path, records: Iterable[bytes]) -> None:
    temporary = path.parent.parent / f"{path.name}.part"  # Not among the finished ones.
    try:
        writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), "group_size:1")
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()
    except RuntimeError as error:  # Its only kind: a full disk, above all.
        raise OSError(f"{temporary} cannot be written: {error}") from error
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _give(shard: pathlib.Path, to: pathlib.Path) -> None:
    """Puts a finished file into the dataset; by a second name where the file system has such.

    TFDS's temporary folder is removed when it fails or is killed; the file is then still among the
    finished. On a file system without second names such an end, in this last moment, costs it all.
    """
    try:
        os.link(shard, to)
    except OSError:
        shard.replace(to)
