"""Batches for training, as a pure function of (seed, step).

Position p of the endless stream is one example, fixed by the seed: which record (every epoch is
shuffled anew) and which random numbers. Batch k holds the positions [k B, (k+1) B), and process
i of P reads the i-th block of B / P of them, so the global batch is the same array for every
number of processes and worker processes, and a run resumes exactly from its batch index.

With dynamic input resolution the size of batch k's images is a function of (seed, k) too. A batch
of fewer, larger images takes the first of its B positions and passes over the others.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from detailflow_jax.data.codes import CodeSource
from detailflow_jax.data.errors import UnreadableImage, report_skipped
from detailflow_jax.data.latents import LatentSource
from detailflow_jax.data.sources import SOURCE_KINDS, Source, make_source, unknown_source
from detailflow_jax.data.transforms import (
    TRAINING_CROPS,
    check_scales,
    encoding_crops,
    longest_short_side,
    training_crop,
)
from detailflow_jax.data.workers import WorkerIterator, check_memory
from detailflow_jax.ops.input_sizes import InputSizes, input_sizes
from detailflow_jax.runtime.errors import ConfigError, raised_as, unknown_name

_MAX_SKIPS = 64  # Broken records in a row after which the whole data set is at fault.


class ReadableSource:
    """A source in which every position holds a picture, a pure function of the position.

    A broken record is replaced by the next readable one (cyclic). Adds "skipped", the int32
    number of broken records passed over at this position. Raises RuntimeError after 64.
    `reduce_to` goes to `Source.read`. With `quiet` the broken ones are not named, but each example
    has its "record", an int64 position, from which `report` names them in another process.
    """

    def __init__(self, source: Source, reduce_to: int | None = None, quiet: bool = False):
        self._source, self._reduce_to, self._quiet = source, reduce_to, quiet
        self._named: set[int] = set()

    @property
    def class_names(self) -> Sequence[str]:
        return self._source.class_names

    @property
    def quick_fingerprint(self) -> str:
        return self._source.quick_fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        for skipped in range(min(_MAX_SKIPS, len(self))):
            try:
                example = self._source.read((index + skipped) % len(self), self._reduce_to)
            except UnreadableImage as error:
                last = error
                if not self._quiet:
                    report_skipped(error)
                continue
            record = {"record": np.int64(index)} if self._quiet else {}
            return {**example, **record, "skipped": np.int32(skipped)}
        raise RuntimeError(
            f"{self._source.name}: {skipped + 1} records in a row from {index} on are unreadable, "
            f"the last is {last}; check that the data are complete"
        )

    def report(self, records: np.ndarray, skipped: np.ndarray) -> None:
        """Names the broken records, by reading them once more, of a batch of examples [b]."""
        for record, count in zip(records.tolist(), skipped.tolist(), strict=True):
            for index in range(record, record + count):
                if (index := index % len(self)) not in self._named:
                    self._named.add(index)
                    try:
                        self._source.read(index)
                    except UnreadableImage as error:
                        report_skipped(error)


class _ProcessBlock(grain.MapDataset):
    """The `process_index`-th of `process_count` equal blocks of every batch.

    All blocks are as long here as those of a whole batch of `batch_size`. Where `sizes` give a
    batch fewer images, the rest of its block is None, which reads nothing.
    """

    def __init__(
        self,
        parent,
        batch_size: int,
        process_index: int,
        process_count: int,
        sizes: InputSizes | None,
    ):
        super().__init__(parent)
        self._batch_size, self._sizes = batch_size, sizes
        self._process_index, self._process_count = process_index, process_count
        self._block = batch_size // process_count

    def __len__(self) -> int:
        # Endless is `sys.maxsize` to Grain, which a batch of one image would round up beyond it.
        return len(self._parent) // 2 // self._batch_size * self._block

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._block)
        rows = self._block
        if self._sizes is not None:
            rows = self._sizes.images(self._sizes.size(batch)) // self._process_count
        if row >= rows:
            return None
        return self._parent[batch * self._batch_size + self._process_index * rows + row]


def _stack_rows(examples: Sequence[dict | None]) -> dict:
    rows = [example for example in examples if example is not None]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _with_size(position: int, example: dict, sizes: InputSizes) -> dict:
    return {**example, "size": sizes.size(position // sizes.batch_size)}


def _training_view(example: dict, rng: np.random.Generator, size: int, **crop) -> dict:
    image = training_crop(example["image"], example.get("size", size), rng=rng, **crop)
    kept = {name: example[name] for name in ("record", "skipped") if name in example}
    return {"image": image, "label": np.int32(example["label"]), **kept}


def _training_codes(example: dict, rng: np.random.Generator) -> dict:
    codes = example["codes"][rng.integers(len(example["codes"]))]
    return {"codes": codes, "label": np.int32(example["label"])}


def _training_latents(
    example: dict, rng: np.random.Generator, flip: bool, scale: float, shift: float
) -> dict:
    mirrored = rng.random() < 0.5  # Drawn always: switching `flip` moves no other draw.
    mean, logvar = np.split(example["moments"][int(flip and mirrored)], 2, axis=-1)
    # The moments of scaled latents: training on them needs no autoencoder.
    scaled = [
        (mean - np.float32(shift)) * np.float32(scale),
        logvar + np.float32(2 * np.log(scale)),
    ]
    return {"moments": np.concatenate(scaled, axis=-1), "label": np.int32(example["label"])}


def _open(data: Mapping, largest: int | None):
    """(source, random map) of a data configuration; `largest` is the side of the largest crop."""
    kind, _, rest = data["source"].partition(":")
    if kind == "codes":
        return CodeSource(rest), _training_codes
    if kind == "latents":
        source = LatentSource(rest)
        scaling = {
            "scale": source.manifest["scale_factor"],
            "shift": source.manifest["shift_factor"],
        }
        view = functools.partial(_training_latents, flip=data.get("flip", True), **scaling)
        return source, view
    if kind not in SOURCE_KINDS:
        raise unknown_source(data["source"], (*SOURCE_KINDS, "codes", "latents"))
    if data["crop"] not in TRAINING_CROPS:
        raise unknown_name("crop", data["crop"], TRAINING_CROPS)
    size, crop = data["image_size"], data["crop"]
    min_scale, max_scale = data.get("min_scale", 0.8), data.get("max_scale", 1.0)
    check_scales(min_scale, max_scale)
    view = functools.partial(
        _training_view,
        size=size,
        kind=crop,
        min_scale=min_scale,
        max_scale=max_scale,
        flip=data.get("flip", False),
    )
    source = make_source(data["source"], data.get("split"), data.get("data_dir"))
    scaled = data.get("scaled_decode", False)
    reduce_to = longest_short_side(crop, largest, min_scale) if scaled else None
    return ReadableSource(source, reduce_to, quiet=data.get("num_workers", 0) > 0), view


def make_iterator(
    data: Mapping, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """The endless training stream of this process.

    Args:
        data: `config.data`: source, split, image_size, crop, min_scale, max_scale, flip,
            data_dir for images; source "codes:DIR" for codes; source "latents:DIR" and flip (take
            the image or its mirror; default True) for latents. Optional for images: scaled_decode
            (decode large JPEGs at a fraction of their size, docs/imagenet.md), dynamic (batches of
            other sizes: probability, sizes, multiple; `ops.input_sizes`). For all:
            num_workers (processes, 0 for none); worker_buffer (finished batches that each keeps,
            default 1); prefetch (batches in the making, in each worker); num_threads (that make
            them, 0: one per batch).
        batch_size: the global batch B, over all processes.
        seed: non-negative; with the step it determines every batch.

    Returns:
        Iterator of this process's b = B / process_count rows:
        {"image": uint8 [b, R, R, 3], "label": int32 [b], "skipped": int32 [b]}, R and b of the
        step where `dynamic` is on, or
        {"codes": int32 [b, N, 3], "label": int32 [b]} or {"moments": float32 [b, h, w, 2C], mean
        and log-variance of scaled latents, "label": int32 [b]}. `get_state` and `set_state` are
        exact, with any number of worker processes, and `grain.checkpoint.CheckpointSave` takes it.
        `class_names` has the names of the labels, `num_examples` the size of the data,
        `encoded_by` the fingerprint of the encoder that made codes or latents, `fingerprint`
        that of the data themselves.

    Raises:
        ConfigError: a batch that the processes do not divide, an unknown source or crop, shared
            memory that is too small for `num_workers`, and what `make_source`, `CodeSource` and
            `LatentSource` raise.
    """
    sizes = _check_batches(data, batch_size, seed, process_index, process_count)
    source, random_map = _open(data, sizes.possible[-1] if sizes else data.get("image_size"))
    if not len(source):
        raise ConfigError(f"data source {data['source']!r} holds no examples")
    # Seeds are derived here: those that Grain derives depend on the depth of the pipeline.
    shuffle_seed, map_seed = map(int, np.random.SeedSequence(seed).generate_state(2))
    dataset = grain.MapDataset.source(source).shuffle(seed=shuffle_seed).repeat()
    if sizes:
        dataset = dataset.map_with_index(functools.partial(_with_size, sizes=sizes))
    # Before the cut into processes, so that the random numbers follow the global position.
    dataset = dataset.random_map(random_map, seed=map_seed)
    dataset = _ProcessBlock(dataset, batch_size, process_index, process_count, sizes)
    together = _stack_rows if sizes else None
    rows = batch_size // process_count
    iterator = _start(source, dataset.batch(rows, batch_fn=together), data, rows, sizes)
    iterator.class_names, iterator.num_examples = source.class_names, len(source)
    iterator.encoded_by = getattr(source, "encoded_by", "")
    iterator.fingerprint = source.quick_fingerprint
    return iterator


def batch_sizes(data: Mapping, batch_size: int, seed: int) -> InputSizes | None:
    """Returns the image size of every batch; None where `data.dynamic` is off.

    Raises:
        ConfigError: fields of `data.dynamic` that cannot be used.
    """
    with raised_as(ConfigError):
        return input_sizes(data, batch_size, seed)


def _check_batches(
    data: Mapping, batch_size: int, seed: int, process_index: int, process_count: int
) -> InputSizes | None:
    """Returns the sizes of the batches, None if all are equal; raises ConfigError."""
    if batch_size <= 0 or batch_size % process_count:
        raise ConfigError(
            f"batch_size={batch_size} must be a positive multiple of the {process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} of {process_count} processes")
    sizes = batch_sizes(data, batch_size, seed)
    if sizes and sizes.multiple % process_count:
        raise ConfigError(
            f"config.data.dynamic.multiple={sizes.multiple} must be a multiple of the "
            f"{process_count} processes, which share every batch"
        )
    return sizes


def _start(
    source: Any, batches: grain.MapDataset, data: Mapping, rows: int, sizes: InputSizes | None
) -> grain.DatasetIterator:
    prefetch, workers = data.get("prefetch", 2), data.get("num_workers", 0)
    read_options = grain.ReadOptions(
        num_threads=data.get("num_threads", 0) or prefetch, prefetch_buffer_size=prefetch
    )
    if not workers:
        return iter(batches.to_iter_dataset(read_options))
    options = grain.MultiprocessingOptions(workers, data.get("worker_buffer", 1))
    check_memory(_largest_batch(source, data, rows, sizes), options)
    return WorkerIterator(source, batches, read_options, options)


def _largest_batch(source: Any, data: Mapping, rows: int, sizes: InputSizes | None) -> int:
    """Bytes of the values in a batch of `rows` rows, and of other sizes where there are `sizes`."""
    if not isinstance(source, ReadableSource):
        return rows * sum(np.asarray(value).nbytes for value in source[0].values())
    sides = sizes.possible if sizes else (data["image_size"],)
    count = lambda side: rows * sizes.images(side) // sizes.batch_size if sizes else rows  # noqa: E731
    return max(3 * side**2 * count(side) for side in sides)


def iterate_crops(
    source: Source, positions: Sequence[int], size: int, kind: str, *, num_threads: int = 8
) -> Iterator[tuple[int, dict | UnreadableImage]]:
    """Decodes and cuts the images at `positions`, in order, with threads ahead of the caller.

    Yields (position, {"crops": uint8 [K, size, size, 3], "label": int}), or (position, the
    UnreadableImage) where a record cannot be decoded.
    """

    def load(position):
        try:
            example = source.read(position)
        except UnreadableImage as error:
            return position, error
        crops = encoding_crops(example["image"], size, kind)
        return position, {"crops": crops, "label": example["label"]}

    dataset = grain.MapDataset.source(positions).map(load)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
    yield from dataset.to_iter_dataset(options)
