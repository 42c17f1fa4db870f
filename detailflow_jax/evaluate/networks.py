"""The networks that images are scored by: from their published files, or without any."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from detailflow_jax.convert import published
from detailflow_jax.evaluate import features, reconstruction
from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.evaluate.samples import Images, hash_file
from detailflow_jax.models.lpips import LPIPS
from detailflow_jax.runtime import weights

FEATURES = ("inception", "encoder", "pixels")
"""What images may be compared by: Inception gives FID, the others figures of their own."""
_WITHOUT = "--features pixels or --features encoder"
_MOST, _BLOCK = 2048, 8  # Images that a principal component analysis takes, and together.


def load_extractor(
    path: str | None, batch_size: int, *, field: str = "--inception", without: str = _WITHOUT
) -> features.FeatureExtractor:
    """The Inception network of published numbers.

    Args:
      path: its file; None is the usual one.
      batch_size: images a call.
      field: what the user sets to name another file, for the message.
      without: what the user sets to do without, for the message.

    Raises:
      WeightsError: the file is not there; the text says where people get it.
      CheckpointError: it is damaged or another network.
    """
    file = weights.locate("inception", path=path, field=field, without=without)
    params = published.read("inception", file).params
    return features.FeatureExtractor(
        features.inception(params, hash_file(file)), batch_size=batch_size
    )


def encoder_extractor(model: Any, batch_size: int) -> features.FeatureExtractor:
    """Features of the encoder of a loaded tokenizer or autoencoder."""
    network = features.encoder(model.kind, model.network, model.params, model.encoder_fingerprint)
    return features.FeatureExtractor(network, batch_size=batch_size)


def pixel_extractor(images: Images, batch_size: int) -> features.FeatureExtractor:
    """Pixels after a principal component analysis of images from all over a reference.

    Raises:
      EvaluationError: fewer than two can be read.
    """
    if len(images) <= _MOST:
        some = images.read(0, len(images))
    else:
        starts = np.linspace(0, len(images) - _BLOCK, _MOST // _BLOCK).round().astype(int)
        some = np.concatenate([images.read(i, i + _BLOCK) for i in starts.tolist()])
    if len(some) < 2:
        raise EvaluationError(f"{images.name} holds {len(some)} readable images, expected more")
    network = features.principal_components(some)
    return features.FeatureExtractor(network, batch_size=batch_size)


def load_perceptual(paths: Sequence[str] | None) -> reconstruction.Perceptual:
    """LPIPS, compiled, from the files named or from the two usual ones.

    Raises:
      WeightsError: they are not there; the text says where people get them.
      CheckpointError: they are damaged or something else.
    """
    paths = paths or [weights.expected("vgg16"), weights.expected("lpips")]
    locate = functools.partial(weights.locate, field="--lpips", without="--without lpips")
    files = [locate("lpips" if i else "vgg16", path=path) for i, path in enumerate(paths)]
    params = published.read("lpips", *files).params
    network = LPIPS(precision=jax.lax.Precision.HIGHEST)
    compiled = jax.jit(lambda p, x, y: network.apply({"params": p}, x, y))
    return reconstruction.Perceptual(
        functools.partial(compiled, params), "+".join(map(hash_file, files))
    )
