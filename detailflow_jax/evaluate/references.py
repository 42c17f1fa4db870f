"""The statistics of a set of real images, with which samples are compared.

    PATH.npz            the guided-diffusion layout: `mu`, `sigma`, `mu_s`, `sigma_s` of the whole
                        set, and/or `arr_0`, images for precision and recall
    PATH, folder:PATH   a folder of pictures, with or without subfolders
    tfds:NAME:SPLIT     and whatever else `detailflow_jax.data.make_source` opens

Images are reduced and centre-cropped to the side of the samples. Computed statistics are kept in a
cache under a hash of the images, the network and the side.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from detailflow_jax import data
from detailflow_jax.data.errors import report_skipped
from detailflow_jax.evaluate.chunks import UNREADABLE, ChunkFolder, of_images, unreadable_in
from detailflow_jax.evaluate.distances import NEIGHBOUR, Gaussian, gaussian
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.evaluate.features import FeatureExtractor
from detailflow_jax.evaluate.samples import (
    Images,
    NpzImages,
    Part,
    PictureSource,
    SourceImages,
    hash_file,
    read_arrays,
    write_npz,
)
from detailflow_jax.runtime import files, sharding

CACHE = "~/.cache/detailflow_jax/references"
MOST_NEIGHBOURS = 10_000
"""Images that precision and recall take of a larger reference; the published one holds as many."""
_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A set of real images as the metrics need it.

    `pool` gives FID, `spatial` sFID (None: not in the file), `features` float32 [n, D] of some of
    the images precision and recall (None: the file holds statistics only). `count` is the number
    of images read here, 0 if the file holds none; `unreadable` names those that were skipped.
    """

    name: str
    fingerprint: str
    pool: Gaussian
    spatial: Gaussian | None
    features: np.ndarray | None
    count: int
    unreadable: Sequence[str] = ()


def load_reference(
    spec: str | os.PathLike[str],
    extractor: FeatureExtractor,
    *,
    image_size: int,
    cache: str | os.PathLike[str] = CACHE,
    data_dir: str | None = None,
) -> Reference:
    """The reference that `spec` names (see the head of this file), computed or from the cache.

    Args:
      spec: an `.npz`, a folder, or a data source.
      extractor: the features to compute; those in an `.npz` are of the 2015 Inception.
      image_size: side of the samples.
      cache: folder for computed statistics; with several processes one that all of them see.
      data_dir: where TFDS keeps its data.

    Raises:
      EvaluationError: a file that is truncated or holds something else, images of another
        resolution, too few, or values that are not finite.
      ConfigError: a data source that does not exist.
    """
    spec, given, names = str(spec), {}, ["arr_0"]
    if spec.endswith(".npz"):
        given, names = read_arrays(spec, _STATISTICS)
        if extractor.name and "mu" in given:
            if "arr_0" not in names:
                raise EvaluationError(
                    f"{spec} holds statistics of Inception's features, not of "
                    f"{extractor.name!r}: name a reference with images"
                )
            given = {}
        pairs = [[name in given for name in pair] for pair in (_STATISTICS[:2], _STATISTICS[2:])]
        if any(first != second for first, second in pairs) or not (
            "mu" in given or "arr_0" in names
        ):
            raise EvaluationError(
                f"{spec} holds {', '.join(names) or 'nothing'}: expected mu with sigma and mu_s "
                "with sigma_s, or images as arr_0"
            )
    images, unreadable = None, []
    arrays: dict[str, Any] = {}
    if "arr_0" in names:
        images = open_images(spec, image_size, data_dir)
        arrays = _measured(images, extractor, cache)
        unreadable = arrays.pop(UNREADABLE).tolist()
        if "mu" in given:  # Of the whole set, of which the images are a part.
            arrays = {"features": arrays["features"]}
    arrays |= given
    for key in _STATISTICS:
        if key in arrays and not np.isfinite(arrays[key]).all():
            raise EvaluationError(f"{spec}: {key} holds NaN or infinity: the file is damaged")
    return Reference(
        name=images.name if images else spec,
        fingerprint=images.fingerprint if images else hash_file(spec),
        pool=Gaussian(arrays["mu"], arrays["sigma"]),
        spatial=Gaussian(arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None,
        features=arrays.get("features"),
        count=len(images) - len(unreadable) if images else 0,
        unreadable=unreadable,
    )


def open_images(spec: str, image_size: int, data_dir: str | None = None) -> Images:
    """The images of an `.npz`, a folder or a data source, as image_size x image_size.

    Raises:
      EvaluationError: images of another resolution, or none.
    """
    if spec.endswith(".npz"):
        images = NpzImages(spec)
        height, width = images.shape[:2]
        if (height, width) != (image_size, image_size):
            raise EvaluationError(
                f"{spec} holds images of {width}x{height} px, the samples are {image_size}x"
                f"{image_size}: choose the reference of this resolution"
            )
        return images
    kind, colon, path = spec.partition(":")
    if colon and kind != "folder" and not files.is_remote(spec):
        return SourceImages(data.make_source(spec, data_dir=data_dir), image_size)
    images = SourceImages(PictureSource(path if kind == "folder" else spec), image_size)
    # A few small pictures are enlarged, as in published references; a set of them is a mistake.
    largest = max(min(image.shape[:2]) for image in images.first(8))
    if largest < image_size:
        raise EvaluationError(
            f"{spec}: pictures have a short side of {largest} px, the samples are {image_size}x"
            f"{image_size}: enlarged pictures are no reference; choose one of this resolution"
        )
    return images


def _measured(images: Images, extractor: FeatureExtractor, cache) -> dict[str, np.ndarray]:
    """Statistics and features of images, from the cache if they were measured before."""
    if len(images) <= NEIGHBOUR:
        raise EvaluationError(
            f"{images.name} holds {len(images)} images: at least {NEIGHBOUR + 1} are needed, and "
            "tens of thousands for figures to compare"
        )
    definition = {
        "images": images.fingerprint,
        "shape": list(images.shape),
        "network": extractor.fingerprint,
        "neighbours": MOST_NEIGHBOURS,
    }
    if len(images) > MOST_NEIGHBOURS:
        definition["chosen"] = "by content"
    key = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:20]
    folder = files.path(cache)
    file = folder / f"{key}.npz"
    if not files.exists(file):
        files.make_folder(folder)
        parts = ChunkFolder(folder / f"{key}.parts", len(images), definition)
        _measure(images, extractor, parts, file)
    arrays, _ = read_arrays(file, (*_STATISTICS, "features", UNREADABLE))
    arrays = {UNREADABLE: np.zeros(0, np.str_)} | arrays  # Files of earlier versions have none.
    for name in arrays[UNREADABLE].tolist():
        report_skipped(name)
    count, width = len(images) - len(arrays[UNREADABLE]), arrays["features"].shape[1]
    if count <= width:
        logging.warning(
            "%s holds %d images, fewer than its %d features: the distance is far from that of a "
            "large set, and comparable only with figures from as many",
            images.name,
            count,
            width,
        )
    return arrays


def _measure(images: Images, extractor, parts: ChunkFolder, file: pathlib.Path) -> None:
    """Writes the statistics and features of images to `file`; resumable through `parts`."""

    def make(part: Part) -> dict:
        digests = [hashlib.blake2b(image, digest_size=8).digest() for image in part.images]
        keys = np.frombuffer(b"".join(digests), np.uint64)
        return {"features": extractor(part.images) | {"key": keys}}

    name = f"reference {pathlib.Path(images.name).name}"
    parts.fill(of_images(images, make), ["features", UNREADABLE], name, extractor.step)
    unreadable = unreadable_in(parts.path)
    count = len(images) - len(unreadable)
    if count <= NEIGHBOUR:
        raise EvaluationError(
            f"{images.name}: only {count} of {len(images)} images can be read, expected at least "
            f"{NEIGHBOUR + 1}"
        )
    if jax.process_index() == 0:
        pool = gaussian(parts.parts("features", "pool"))
        chosen, features, start = np.arange(count), [], 0
        if count > MOST_NEIGHBOURS:  # The same ones in whatever order images are stored.
            keys = parts.read("features", "key")
            chosen = np.sort(np.argsort(keys, kind="stable")[:MOST_NEIGHBOURS])
        for part in parts.parts("features", "pool"):
            inside = (chosen >= start) & (chosen < start + len(part))
            features.append(part[chosen[inside] - start])
            start += len(part)
        arrays = {"mu": pool.mean, "sigma": pool.covariance, "features": np.concatenate(features)}
        if not extractor.name:
            spatial = gaussian(parts.parts("features", "spatial"))
            arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
        write_npz(file, arrays | {UNREADABLE: np.array(unreadable, dtype=np.str_)})
        parts.remove()
    sharding.sync_processes(file.name)
