"""LPIPS: the perceptual distance over VGG16 features (Zhang et al., arXiv 1801.03924).

Shapes: B batch, H x W pixels, h x w positions and C channels of a feature. Float images are
[B, H, W, 3] in [-1, 1].
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from detailflow_jax.ops import Array, padded

Images = Float[Array, "B H W 3"]
Features = tuple[Float[Array, "B _ _ _"], ...]
"""One feature [B, H / 2^i, W / 2^i, C] per stage of VGG16."""

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Widths of VGG16's convolutions. A stage ends where a feature is read; the next pools first."""

SMALLEST = 2 ** (len(STAGES) - 1)
"""The smallest side of an image that leaves at least one pixel after every pool."""

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def _in_three(convolution: nn.Conv, x: Float[Array, "B h w _"]) -> Float[Array, "B h w _"]:
    """A 3 x 3 convolution of a feature whose h or w is below 3, on a grid of at least 3.

    XLA treats two pixels under a 3 x 3 kernel as a special case, which is 40 times slower on a CPU
    than three pixels. The zeros added here are those that the convolution pads with anyway; the
    barriers, in the forward and the backward pass, keep XLA from noticing that.
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
    def __call__(self, images: Images, part: padded.Part | None = None) -> Features:
        """Five features of normalised images, in `dtype`; outside of a part they mean nothing.

        A convolution sees zeros there, as beyond the border of a whole image.
        """
        features, x, count = [], images.astype(self.dtype), 0
        for stage in STAGES:
            if features:
                x, part = nn.max_pool(x, (2, 2), (2, 2)), padded.over(part, 2)
            for width in stage:
                convolution = nn.Conv(
                    width,
                    (3, 3),
                    padding=1,
                    dtype=self.dtype,
                    precision=self.precision,
                    name=f"conv_{count}",
                )
                small, x = min(x.shape[1:3]) < 3, padded.zeroed(x, part)
                x = nn.relu(_in_three(convolution, x) if small else convolution(x))
                count += 1
            features.append(x)
        return tuple(features)


def unit_channels(feature: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    """Every position divided by its length, with eps 1e-10 outside the root; float32.

    If all channels are zero, the result and its gradient are zero; that of the root would be NaN.
    """
    feature = feature.astype(jnp.float32)
    square = jnp.sum(jnp.square(feature), axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return jnp.where(square > 0, feature / (length + 1e-10), 0.0)


class LPIPS(nn.Module):
    """The distance with learned non-negative channel weights and no dropout.

    Attributes:
      dtype: of the convolutions; distances are float32.
      precision: of the convolutions. Use `jax.lax.Precision.HIGHEST` to evaluate: otherwise
        accelerators round float32 inputs.
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

    def features(self, images: Images, part: padded.Part | None = None) -> Features:
        """VGG16's five features of images in [-1, 1]; see `VGG16` for a part of them.

        Raises:
          ValueError: if the images are smaller than 16 x 16.
        """
        if min(images.shape[1:3]) < SMALLEST:
            raise ValueError(
                f"LPIPS was given images of {images.shape[1:3]}; expected sides of {SMALLEST} at "
                "least, as VGG16 halves them four times"
            )
        shift, scale = jnp.array(_SHIFT), jnp.array(_SCALE)
        return self.vgg((images.astype(jnp.float32) - shift) / scale, part)

    def compare(
        self, features: Features, others: Features, part: padded.Part | None = None
    ) -> Float[Array, " B"]:
        """The distance of two images, or of a part of them, from the features of each, float32."""
        distance = jnp.zeros(len(features[0]))
        for weight, a, b in zip(self.weights, features, others, strict=True):
            difference = jnp.square(unit_channels(a) - unit_channels(b))
            difference = jnp.sum(difference * weight[..., 0], axis=-1, keepdims=True)
            distance += padded.mean(difference, part, axis=(1, 2, 3))
            part = padded.over(part, 2)
        return distance

    def __call__(self, images: Images, reference: Images) -> Float[Array, " B"]:
        """The distance of images in [-1, 1] from a reference, float32; 0 if they are equal."""
        return self.compare(self.features(images), self.features(reference))
