"""Runs a feature network over images: sharded over a mesh, in batches of one size.

FID is a distance between features of the Inception network of 2015. Two other kinds of features
need no download, so that a run can be followed anywhere: those of the encoder of a tokenizer or
autoencoder, and pixels after a principal component analysis. Their distances have names of their
own, and compare with others of the same network alone.

Every process works on images of its own with a mesh of its own devices, so nothing waits for
another process; `chunks.py` puts the parts together.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.inference.batching import in_batches, whole_shares
from detailflow_jax.models import layers
from detailflow_jax.models.inception import Inception
from detailflow_jax.ops import images as pixels
from detailflow_jax.runtime import sharding

_PARTS, _SIDE = 4, 32


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """What images are compared by, such as the Inception network of 2015.

    `apply(params, images)` maps uint8 [B, H, W, 3] to {"pool": [B, D], "spatial": [B, ...],
    "logits": [B, K]}, or to "pool" alone, each image by itself. `fingerprint` names network and
    weights in caches, `name` the figures that they give: empty for those of published tables.
    """

    apply: Callable[[Any, jax.Array], Mapping[str, jax.Array]]
    params: Any
    fingerprint: str
    name: str = ""


def inception(params: Any, fingerprint: str) -> FeatureNetwork:
    """The network of published numbers (`models/inception.py`) with its parameters."""

    def apply(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        return Inception().apply({"params": params}, images)._asdict()

    return FeatureNetwork(apply, params, f"inception-2015:{fingerprint}")


def encoder(kind: str, network: Any, params: Any, fingerprint: str) -> FeatureNetwork:
    """The encoder of a tokenizer or autoencoder.

    Of a tokenizer the mean of its tokens before they are quantized, of an autoencoder the mean of
    the posterior, averaged over 4 x 4 parts of the image.

    Args:
      kind: "tokenizer" or "vae".
      network: the module.
      params: its parameters.
      fingerprint: of the parameters.
    """

    def tokens(tokenizer: Any, images: jax.Array) -> jax.Array:
        queries = tokenizer.encoder.first_queries(len(images))
        return tokenizer.encoder.read(tokenizer.encode_patches(images), queries).mean(axis=1)

    def latents(vae: Any, images: jax.Array) -> jax.Array:
        mean = vae.encode(images).mean
        height, width = (min(_PARTS, side) for side in mean.shape[1:3])
        mean = jax.image.resize(mean, (len(mean), height, width, mean.shape[-1]), "linear")
        return mean.reshape(len(mean), -1)

    side = network.config.image_size if kind == "tokenizer" else None

    def apply(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        if side not in (None, images.shape[1]):
            raise EvaluationError(
                f"images are {images.shape[1]} px, the {kind} that gives the features takes {side}"
            )
        method = tokens if kind == "tokenizer" else latents
        return {"pool": layers.apply(network, params, pixels.to_float(images), method=method)}

    return FeatureNetwork(apply, params, f"{kind}-encoder:{fingerprint}", kind)


def principal_components(images: np.ndarray, most: int = 64) -> FeatureNetwork:
    """Pixels, after a principal component analysis of some images.

    Args:
      images: uint8 [N, R, R, 3].
      most: components; fewer if there are not more images than that.
    """
    rows = np.asarray(_few_pixels(images), np.float64)
    mean = rows.mean(axis=0)
    axes = np.linalg.svd(rows - mean, full_matrices=False)[2][: min(most, len(rows) - 1)]
    params = {"mean": mean.astype(np.float32), "axes": axes.T.astype(np.float32)}
    digest = hashlib.sha256(params["mean"].tobytes() + params["axes"].tobytes()).hexdigest()[:16]

    def apply(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        rows = _few_pixels(images) - params["mean"]
        return {"pool": jnp.matmul(rows, params["axes"], precision=jax.lax.Precision.HIGHEST)}

    return FeatureNetwork(apply, params, f"pixels:{digest}", "pixels")


@jax.jit
def _few_pixels(images: jax.Array) -> jax.Array:
    """Images at no more than 32 x 32 px, float32 [B, D]."""
    side = min(_SIDE, images.shape[1])
    few = jax.image.resize(pixels.to_float(images), (len(images), side, side, 3), "linear")
    return few.reshape(len(few), -1)


def local_mesh() -> Mesh:
    """All devices of this process along the data axis."""
    return sharding.make_mesh({"data": -1}, jax.local_devices())


class FeatureExtractor:
    """uint8 images -> features, the same for every batch size and number of devices."""

    def __init__(self, network: FeatureNetwork, *, mesh: Mesh | None = None, batch_size: int = 64):
        """Puts a copy of the network on every device.

        Args:
          network: what to run.
          mesh: of this process's devices; default all of them.
          batch_size: images a call of the compiled program, rounded up to whole device shares.
        """
        if batch_size < 1:
            raise EvaluationError(f"batch_size={batch_size}: expected at least 1")
        self.mesh = local_mesh() if mesh is None else mesh
        self.batch_size = whole_shares(batch_size, self.mesh)
        self.step = 4 * self.batch_size  # Images a call that keep the devices busy.
        self.fingerprint, self.name = network.fingerprint, network.name
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        self._split = NamedSharding(self.mesh, PartitionSpec(sharding.BATCH))
        self._params = jax.device_put(network.params, everywhere)
        self._apply = jax.jit(network.apply, out_shardings=self._split)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Features of uint8 images [N, H, W, 3], N > 0: float32 `pool` [N, D].

        Also `spatial` [N, S] (flattened) and `logits` [N, K], where the network has them.

        Raises:
          EvaluationError: images of another type or shape, or features that are not finite.
        """
        check_images(images)

        def apply(batch: jax.Array) -> dict[str, jax.Array]:
            return self._apply(self._params, batch)

        found = in_batches(apply, self.batch_size, images, mesh=self.mesh, whole=True)
        found = {name: x.astype(np.float32).reshape(len(x), -1) for name, x in found.items()}
        for name, rows in found.items():
            if not np.isfinite(rows).all():
                raise EvaluationError(
                    f"{name} features hold NaN or infinity: the weights of the feature network "
                    "are damaged or of another network"
                )
        return found


def check_images(images: np.ndarray) -> None:
    """Raises EvaluationError unless images are uint8 [N, H, W, 3] with N > 0."""
    if images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise EvaluationError(f"images are {list(images.shape)}, expected [N, H, W, 3] with N > 0")
    if images.dtype == np.uint8:
        return
    if np.issubdtype(images.dtype, np.floating) and not np.isfinite(images).all():
        raise EvaluationError(f"images ({images.dtype}) hold NaN or infinity: expected uint8")
    raise EvaluationError(f"images are {images.dtype}, expected uint8 in 0..255")
