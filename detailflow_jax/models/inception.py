"""The Inception network that FID is measured with: the TensorFlow graph of 2015-12-05.

Shapes: B batch, H x W pixels, h x w positions and C channels of a feature.

It differs from other InceptionV3 networks: images reach 299 px by TF1's bilinear resize, average
pools do not count their padding, the last block pools by maximum, and there are 1008 logits.
Everything is float32, with convolutions at full precision, as in published scores.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from detailflow_jax.ops import Array, interpolation

Feature = Float[Array, "B h w C"]

SIZE = 299
CLASSES = 1008
_HIGHEST = jax.lax.Precision.HIGHEST


class Features(NamedTuple):
    """What the metrics read, float32.

    Attributes:
      pool: [B, 2048], for FID, precision and recall.
      spatial: [B, 2023], the first 7 channels of `mixed_6/conv` in (row, column, channel) order,
        for sFID.
      logits: [B, 1008], without the bias, for the Inception score. The bias is
        `params["logits"]["bias"]`.
    """

    pool: Array
    spatial: Array
    logits: Array

    @property
    def probabilities(self) -> Float[Array, "B classes"]:
        """Softmax of the logits without bias."""
        return jax.nn.softmax(self.logits, axis=-1)


@functools.cache
def tf1_bilinear_matrix(size_in: int, size_out: int) -> Float[np.ndarray, "{size_out} {size_in}"]:
    """Matrix of TensorFlow 1's bilinear resize of one axis.

    No half-pixel centres, no antialiasing, the right neighbour clamped. Positions are computed in
    float32, as TensorFlow does.
    """
    scale = np.float32(size_in) / np.float32(size_out)
    position = np.arange(size_out, dtype=np.float32) * scale
    left = np.floor(position).astype(int)
    share = position - left.astype(np.float32)
    matrix = np.zeros((size_out, size_in), np.float32)
    rows = np.arange(size_out)
    np.add.at(matrix, (rows, np.minimum(left, size_in - 1)), 1 - share)
    np.add.at(matrix, (rows, np.minimum(left + 1, size_in - 1)), share)
    return interpolation.read_only(matrix)


def preprocess(images: Shaped[Array, "B H W 3"]) -> Float[Array, "B 299 299 3"]:
    """Images of values 0 to 255 and any size, resized to 299 px, as (x - 128) / 128."""
    rows, columns = (tf1_bilinear_matrix(side, SIZE) for side in images.shape[1:3])
    return (interpolation.apply_matrices(images, rows, columns) - 128.0) / 128.0


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm by running values (eps 1e-3), ReLU."""

    features: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "B _ _ _"]) -> Float[Array, "B _ _ _"]:
        x = nn.Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.padding,
            use_bias=False,
            precision=_HIGHEST,
            name="conv",
        )(x)
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale = self.param("scale", ones, (self.features,))
        bias = self.param("bias", zeros, (self.features,))
        mean = self.param("mean", zeros, (self.features,))
        var = self.param("var", ones, (self.features,))
        return nn.relu((x - mean) * (scale * jax.lax.rsqrt(var + 1e-3)) + bias)


# --------------------------------------------------------------------------------- the mixed blocks
# A block is a tuple of branches, whose outputs are concatenated. A branch is a chain of pools and
# convolutions (name, features, kernel size). A fourth entry, the stride 2, also turns padding off.
# A tuple of convolutions ends a branch with several convolutions of the same input.

_3, _5, _1x7, _7x1, _1x3, _3x1 = (3, 3), (5, 5), (1, 7), (7, 1), (1, 3), (3, 1)
_1 = (1, 1)


def _block_35(pool: int):
    return (
        (("branch1x1", 64, _1),),
        (("branch5x5_1", 48, _1), ("branch5x5_2", 64, _5)),
        (("branch3x3dbl_1", 64, _1), ("branch3x3dbl_2", 96, _3), ("branch3x3dbl_3", 96, _3)),
        ("mean", ("branch_pool", pool, _1)),
    )


def _block_17(inner: int):
    double = zip(range(2, 5), (_7x1, _1x7, _7x1), strict=True)
    return (
        (("branch1x1", 192, _1),),
        (("branch7x7_1", inner, _1), ("branch7x7_2", inner, _1x7), ("branch7x7_3", 192, _7x1)),
        (
            ("branch7x7dbl_1", inner, _1),
            *((f"branch7x7dbl_{i}", inner, size) for i, size in double),
            ("branch7x7dbl_5", 192, _1x7),
        ),
        ("mean", ("branch_pool", 192, _1)),
    )


def _block_8(pool: str):
    def ends(name: str):
        return (f"{name}a", 384, _1x3), (f"{name}b", 384, _3x1)

    return (
        (("branch1x1", 320, _1),),
        (("branch3x3_1", 384, _1), ends("branch3x3_2")),
        (("branch3x3dbl_1", 448, _1), ("branch3x3dbl_2", 384, _3), ends("branch3x3dbl_3")),
        (pool, ("branch_pool", 192, _1)),
    )


MIXED = {
    "Mixed_5b": _block_35(32),
    "Mixed_5c": _block_35(64),
    "Mixed_5d": _block_35(64),
    "Mixed_6a": (
        (("branch3x3", 384, _3, 2),),
        (("branch3x3dbl_1", 64, _1), ("branch3x3dbl_2", 96, _3), ("branch3x3dbl_3", 96, _3, 2)),
        ("reduce",),
    ),
    "Mixed_6b": _block_17(128),
    "Mixed_6c": _block_17(160),
    "Mixed_6d": _block_17(160),
    "Mixed_6e": _block_17(192),
    "Mixed_7a": (
        (("branch3x3_1", 192, _1), ("branch3x3_2", 320, _3, 2)),
        (
            ("branch7x7x3_1", 192, _1),
            ("branch7x7x3_2", 192, _1x7),
            ("branch7x7x3_3", 192, _7x1),
            ("branch7x7x3_4", 192, _3, 2),
        ),
        ("reduce",),
    ),
    "Mixed_7b": _block_8("mean"),
    "Mixed_7c": _block_8("max"),
}
"""Every mixed block by its published name."""

STEM: tuple[Any, ...] = (
    ("Conv2d_1a_3x3", 32, _3, 2, "VALID"),
    ("Conv2d_2a_3x3", 32, _3, 1, "VALID"),
    ("Conv2d_2b_3x3", 64, _3, 1, "SAME"),
    "reduce",
    ("Conv2d_3b_1x1", 80, _1, 1, "SAME"),
    ("Conv2d_4a_3x3", 192, _3, 1, "VALID"),
    "reduce",
)
"""The convolutions and pools before the mixed blocks."""


def _pool(x: Feature, kind: str) -> Float[Array, "B _ _ C"]:
    """x after 3x3 pooling: "mean" and "max" keep the size, "reduce" is the maximum at stride 2."""
    if kind == "mean":
        return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
    if kind == "max":
        return nn.max_pool(x, (3, 3), (1, 1), "SAME")
    return nn.max_pool(x, (3, 3), (2, 2))


class Mixed(nn.Module):
    """One block of `MIXED`."""

    branches: tuple

    @nn.compact
    def __call__(self, x: Feature) -> tuple[Float[Array, "B _ _ _"], Float[Array, "B _ _ _"]]:
        """The branches, concatenated, and the first of them."""
        ends: list[Array] = []
        for branch in self.branches:
            y = [x]
            for step in branch:
                y = self._step(step, y[0])
            ends += y
        return jnp.concatenate(ends, axis=-1), ends[0]

    def _step(self, step: Any, x: Array) -> list[Array]:
        if isinstance(step, str):
            return [_pool(x, step)]
        if isinstance(step[0], tuple):
            return [end for one in step for end in self._step(one, x)]
        name, features, size, *stride = step
        padding = "VALID" if stride else "SAME"
        return [ConvNorm(features, size, *(stride or [1]), padding, name=name)(x)]


class Logits(nn.Module):
    """The last layer. Its bias is loaded but not added (see `Features`)."""

    @nn.compact
    def __call__(self, x: Float[Array, "B C"]) -> Float[Array, "B classes"]:
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (x.shape[-1], CLASSES))
        self.param("bias", nn.initializers.zeros, (CLASSES,))
        return jnp.dot(x, kernel, precision=_HIGHEST)


class Inception(nn.Module):
    """The whole network, from images to features."""

    @nn.compact
    def __call__(self, images: Shaped[Array, "B H W 3"]) -> Features:
        """Features of uint8 or float images of values 0 to 255, any size."""
        x = preprocess(images)
        for step in STEM:
            if isinstance(step, str):
                x = _pool(x, step)
            else:
                name, *options = step
                x = ConvNorm(*options, name=name)(x)
        for name, branches in MIXED.items():
            x, first = Mixed(branches, name=name)(x)
            if name == "Mixed_6d":
                spatial = first[..., :7].reshape(len(x), -1)
        pool = jnp.mean(x, axis=(1, 2))
        return Features(pool, spatial, Logits(name="logits")(pool))
