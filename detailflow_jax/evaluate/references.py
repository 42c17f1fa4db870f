"""The statistics of a set of real images, with which samples are compared.

    PATH.npz            the guided-diffusion layout: `mu`, `sigma`, `mu_s`, `sigma_s` of the whole
                        set, and/or `arr_0`, images for precision and recall
    PATH, folder:PATH   a folder of pictures, with or without subfolders
    tfds:NAME:SPLIT     and whatever else `detailflow_jax.data.make_source` opens

Images are reduced and centre-cropped to the side of the samples. What had to be computed is kept in
a cache under a hash of the images, the network and the side.
"""

import dataclasses
import hashlib
import json
import os
import pathlib

import jax
import numpy as np
from absl import logging

from detailflow_jax import data
from detailflow_jax.evaluate.chunks import ChunkFolder
from detailflow_jax.evaluate.distances import NEIGHBOUR
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.evaluate.features import FeatureExtractor
from detailflow_jax.evaluate.moments import Moments
from detailflow_jax.evaluate.samples import (
    NpzImages,
    PictureImages,
    SourceImages,
    array_names,
    hash_file,
    read_arrays,
    write_npz,
)
from detailflow_jax.runtime import sharding

CACHE = "~/.cache/detailflow_jax/references"
MOST_NEIGHBOURS = 10_000
"""Images that precision and recall take of a reference, as many as the published one holds."""
_STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean float64 [D] and covariance float64 [D, D] of features."""

    mean: np.ndarray
    covariance: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reference:
    """A set of real images as the metrics need it.

    `pool` gives FID, `spatial` sFID (None: not in the file), `features` float32 [n, D] of some of
    the images precision and recall (None: the file holds statistics only). `count` is how many
    images were seen here, 0 where the file does not tell.
    """

    name: str
    fingerprint: str
    pool: Statistics
    spatial: Statistics | None
    features: np.ndarray | None
    count: int


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
      cache: folder for what is computed; with several processes one that all of them see.
      data_dir: where TFDS keeps its data.

    Raises:
      EvaluationError: a file that is truncated or holds something else, images of another
        resolution, too few, or values that are not finite.
      ValueError, FileNotFoundError: a data source that does not exist.
    """
    if str(spec).endswith(".npz"):
        return _from_npz(str(spec), extractor, image_size, cache)
    images = open_images(str(spec), image_size, data_dir)
    arrays = _measured(images, extractor, cache)
    return _reference(images.name, images.fingerprint, arrays, len(images))


def open_images(
    spec: str, image_size: int, data_dir: str | None = None
) -> NpzImages | PictureImages | SourceImages:
    """The images of an `.npz`, a folder or a data source, as image_size x image_size.

    Raises:
      EvaluationError: images of another resolution, or none.
    """
    if spec.endswith(".npz"):
        images = NpzImages(spec)
        _check_side(images, image_size)
        return images
    kind, colon, path = spec.partition(":")
    if colon and kind != "folder":
        return SourceImages(data.make_source(spec, data_dir=data_dir), image_size)
    pictures = PictureImages(path if colon else spec, image_size)
    # A few small pictures are enlarged, as in published references; a set of them is a mistake.
    largest = max(min(pictures.original(i).shape[:2]) for i in range(min(len(pictures), 8)))
    if largest < image_size:
        raise EvaluationError(
            f"{spec}: pictures have a short side of {largest} px, the samples are {image_size}x"
            f"{image_size}: enlarged pictures are no reference; choose one of this resolution"
        )
    return pictures


def _check_side(images: NpzImages, image_size: int) -> None:
    if images.shape[:2] != (image_size, image_size):
        height, width = images.shape[:2]
        raise EvaluationError(
            f"{images.name} holds images of {width}x{height} px, the samples are "
            f"{image_size}x{image_size}: choose the reference of this resolution"
        )


def _from_npz(path: str, extractor: FeatureExtractor, image_size: int, cache) -> Reference:
    arrays = read_arrays(path, _STATISTICS)
    missing = [name for name in ("mu", "sigma") if name not in arrays]
    if (missing and len(missing) < 2) or ("mu_s" in arrays) != ("sigma_s" in arrays):
        raise EvaluationError(
            f"{path} holds {', '.join(arrays)}: expected mu with sigma and mu_s with sigma_s"
        )
    count, fingerprint, names = 0, hash_file(path), array_names(path)
    if missing and "arr_0" not in names:
        raise EvaluationError(
            f"{path} holds {', '.join(names) or 'nothing'}: expected mu and sigma, or images as "
            "arr_0"
        )
    if "arr_0" in names:
        images = NpzImages(path)
        _check_side(images, image_size)
        measured = _measured(images, extractor, cache, fingerprint)
        count = len(images)
        # The statistics in the file are of the whole set, the images a part of it.
        arrays = (measured if missing else {"features": measured["features"]}) | arrays
    return _reference(path, fingerprint, arrays, count)


def _reference(name: str, fingerprint: str, arrays: dict, count: int) -> Reference:
    for key in _STATISTICS:
        if key in arrays and not np.isfinite(arrays[key]).all():
            raise EvaluationError(f"{name}: {key} holds NaN or infinity: the file is damaged")
    spatial = Statistics(arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None
    pool = Statistics(arrays["mu"], arrays["sigma"])
    return Reference(name, fingerprint, pool, spatial, arrays.get("features"), count)


def _measured(
    images, extractor: FeatureExtractor, cache, fingerprint: str | None = None
) -> dict[str, np.ndarray]:
    """Statistics and features of images, from the cache if they were measured before."""
    if len(images) <= NEIGHBOUR:
        raise EvaluationError(
            f"{images.name} holds {len(images)} images: at least {NEIGHBOUR + 1} are needed, and "
            "tens of thousands for figures to compare"
        )
    definition = {
        "images": fingerprint or images.fingerprint,
        "shape": list(images.shape),
        "network": extractor.fingerprint,
        "neighbours": MOST_NEIGHBOURS,
    }
    key = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:20]
    folder = pathlib.Path(cache).expanduser()
    file = folder / f"{key}.npz"
    names = (*_STATISTICS, "features")
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        parts = ChunkFolder(folder / f"{key}.parts", len(images), definition)
        _measure(images, extractor, parts, file)
    arrays = read_arrays(file, names)
    width = arrays["features"].shape[1]
    if len(images) <= width:
        logging.warning(
            "%s holds %d images, fewer than its %d features: FID is far from that of a large set, "
            "and comparable only with figures from as many",
            images.name,
            len(images),
            width,
        )
    return arrays


def _measure(images, extractor, parts: ChunkFolder, file: pathlib.Path) -> None:
    """Writes the statistics and features of images to `file`; resumable through `parts`."""

    def make(start: int, stop: int) -> dict:
        return {"features": extractor(images.read(start, stop))}

    name = f"reference {pathlib.Path(images.name).name}"
    parts.fill(make, ["features"], name, extractor.step)
    if jax.process_index() == 0:
        pool = Moments.of(parts.parts("features", "pool"))
        spatial = Moments.of(parts.parts("features", "spatial"))
        chosen = np.linspace(0, len(images) - 1, min(len(images), MOST_NEIGHBOURS)).round()
        features = np.concatenate(_rows(parts.parts("features", "pool"), chosen.astype(int)))
        arrays = {"mu": pool.mean, "sigma": pool.covariance, "features": features}
        write_npz(file, arrays | {"mu_s": spatial.mean, "sigma_s": spatial.covariance})
        parts.remove()
    sharding.sync_processes(file.name)


def _rows(parts, chosen: np.ndarray):
    """The chosen rows (ascending) of an array that comes in parts."""
    found, start = [], 0
    for part in parts:
        stop = start + len(part)
        found.append(part[chosen[(chosen >= start) & (chosen < stop)] - start])
        start = stop
    return found
