"""The networks that images are scored by, from their published files."""

import functools
from collections.abc import Sequence

import jax

from detailflow_jax.convert import published
from detailflow_jax.evaluate import features, reconstruction
from detailflow_jax.evaluate.samples import hash_file
from detailflow_jax.models.lpips import LPIPS
from detailflow_jax.runtime import weights

# Samples cannot do without it; of the scores of reconstructions only rFID needs it.
_WITHOUT = "for reconstructions, --without rfid"


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
