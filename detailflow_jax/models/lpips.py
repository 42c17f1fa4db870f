"""LPIPS: the perceptual distance over VGG16 features (Zhang et al., arXiv 1801.03924).

Shapes: B batch, C channels of a feature. Float images are [B, H, W, 3] in [-1, 1].
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of VGG16's convolutions; a stage ends where a feature is read, the next pools first."""

SMALLEST = 2 ** (len(STAGES) - 1)
"""The smallest side of an image that every pool leaves a pixel of."""

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def _in_three(convolution: nn.Conv, x: jax.Array) -> jax.Array:
    """A 3 x 3 convolution of [B, H, W, C] with H or W below 3, on a grid of 3 at least.

    Two pixels under a 3 x 3 kernel are a case of their own to XLA, on a CPU 40 times slower than
    three. The zeros are those that the convolution pads with anyway; the barriers, in the forward
    and the backward pass, keep XLA from finding that out.
    """
    height, width = x.shape[1:3]
    more = [(0, max(3 - size, 0)) for size in (height, width)]
    x = jax.lax.optimization_barrier(jnp.pad(x, [(0, 0), *more, (0, 0)]))
    return jax.lax.optimization_barrier(convolution(x))[:, :height, :width]


class VGG16(nn.Module):
    """The convolutions of VGG16, read after relu1_2, 2_2, 3_3, 4_3 and 5_3."""

    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        """Normalised images [B, H, W, 3] -> five features [B, H / 2^i, W / 2^i, C] in `dtype`."""
        features, x, count = [], images.astype(self.dtype), 0
        for stage in STAGES:
            if features:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for width in stage:
                convolution = nn.Conv(
                    width,
                    (3, 3),
                    padding=1,
                    dtype=self.dtype,
                    precision=self.precision,
                    name=f"conv_{count}",
                )
                small = min(x.shape[1:3]) < 3
                x = nn.relu(_in_three(convolution, x) if small else convolution(x))
                count += 1
            features.append(x)
        return tuple(features)


def unit_channels(feature: jax.Array) -> jax.Array:
    """Every position divided by its length, eps 1e-10 outside the root; float32.

    Where all channels are zero the result and its gradient are zero: the root's own would be NaN.
    """
    feature = feature.astype(jnp.float32)
    square = jnp.sum(jnp.square(feature), axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return jnp.where(square > 0, feature / (length + 1e-10), 0.0)


class LPIPS(nn.Module):
    """The distance with learned non-negative channel weights, no dropout.

    Attributes:
      dtype: of the convolutions; distances are float32.
      precision: of the convolutions. To measure, take `jax.lax.Precision.HIGHEST`: accelerators
        round float32 inputs otherwise.
    """

    dtype: Any = jnp.float32
    precision: Any = None

    def setup(self):
        self.vgg = VGG16(self.dtype, self.precision)
        even = nn.initializers.constant
        self.weights = [  # published as convolutions of one pixel
            self.param(f"linear_{i}", even(1 / stage[-1]), (1, 1, stage[-1], 1))
            for i, stage in enumerate(STAGES)
        ]

    def features(self, images: jax.Array) -> tuple[jax.Array, ...]:
        """Images [B, H, W, 3] in [-1, 1] -> VGG16's five features.

        Raises:
          ValueError: the images are smaller than 16 x 16.
        """
        if min(images.shape[1:3]) < SMALLEST:
            raise ValueError(
                f"LPIPS was given images of {images.shape[1:3]}; expected sides of {SMALLEST} at "
                "least, as VGG16 halves them four times"
            )
        shift, scale = jnp.array(_SHIFT), jnp.array(_SCALE)
        return self.vgg((images.astype(jnp.float32) - shift) / scale)

    def compare(self, features: tuple[jax.Array, ...], others: tuple[jax.Array, ...]) -> jax.Array:
        """Distance of two images from what `features` gave for each: float32 [B]."""
        distance = 0.0
        for weight, a, b in zip(self.weights, features, others, strict=True):
            difference = jnp.square(unit_channels(a) - unit_channels(b))
            distance += jnp.mean(jnp.sum(difference * weight[..., 0], axis=-1), axis=(1, 2))
        return distance

    def __call__(self, images: jax.Array, reference: jax.Array) -> jax.Array:
        """Images and reference, [B, H, W, 3] in [-1, 1] -> distance, float32 [B], 0 where equal."""
        return self.compare(self.features(images), self.features(reference))
