"""Runs a feature network over images: sharded over a mesh, in batches of one size.

Every process works on images of its own with a mesh of its own devices, so nothing waits for
another process; `chunks.py` puts the parts together.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from detailflow_jax.evaluate.errors import EvaluationError
from detailflow_jax.inference.batching import in_batches, whole_shares
from detailflow_jax.models.inception import Inception
from detailflow_jax.runtime import sharding

FEATURES = ("pool", "spatial", "logits")


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """What images are compared by, such as the Inception network of 2015.

    `apply(params, images)` maps uint8 [B, H, W, 3] to {"pool": [B, D], "spatial": [B, ...],
    "logits": [B, K]}, each image by itself. `fingerprint` names network and weights in caches.
    """

    apply: Callable[[Any, jax.Array], Mapping[str, jax.Array]]
    params: Any
    fingerprint: str


def inception(params: Any, fingerprint: str) -> FeatureNetwork:
    """The network of published numbers (`models/inception.py`) with its parameters."""

    def apply(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        return Inception().apply({"params": params}, images)._asdict()

    return FeatureNetwork(apply, params, f"inception-2015:{fingerprint}")


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
        self.fingerprint = network.fingerprint
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        self._split = NamedSharding(self.mesh, PartitionSpec(sharding.BATCH))
        self._params = jax.device_put(network.params, everywhere)
        self._apply = jax.jit(network.apply, out_shardings=self._split)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Features of uint8 images [N, H, W, 3], N > 0: float32 `pool` [N, D], `spatial` [N, S]
        (flattened) and `logits` [N, K].

        Raises:
          EvaluationError: images of another type or shape, or features that are not finite.
        """
        check_images(images)

        def apply(batch: jax.Array) -> dict[str, jax.Array]:
            features = self._apply(self._params, batch)
            return {name: features[name] for name in FEATURES}

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
