"""Placement on a mesh of frozen networks, of the discriminator and of their images."""

from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Float

from detailflow_jax.ops import Array

_SPLIT_FROM = 2**16


def named(params: Any) -> Any:
    """Large kernels in boxes that let the mesh split their last axis; all else as it is."""
    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731

    def box(x):
        if is_box(x) or x.ndim < 3 or x.size < _SPLIT_FROM:
            return x
        return nn.LogicallyPartitioned(x, (*(None,) * (x.ndim - 1), "embed"))

    return jax.tree.map(box, params, is_leaf=is_box)


def gathered(params: Any) -> Any:
    """Whole on every device, so that a convolution splits its batch and not its channels."""
    return jax.tree.map(lambda x: nn.with_logical_constraint(x, (None,) * x.ndim), params)


def by_batch(images: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Images, split over the devices along the batch."""
    return nn.with_logical_constraint(images, ("batch", None, None, None))
