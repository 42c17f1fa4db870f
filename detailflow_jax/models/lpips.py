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
                x = nn.relu(
                    nn.Conv(
                        width,
                        (3, 3),
                        padding=1,
                        dtype=self.dtype,
                        precision=self.precision,
                        name=f"conv_{count}",
                    )(x)
                )
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
