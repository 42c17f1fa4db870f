"""What a discriminator's input goes through: differentiable augmentation and random views.

Of images that are filled in part, the part goes through the same with the same draws, and the rest
stays zero (`ops/padded.py`).

Shapes: B batch, H x W pixels, S side of a view. Float images are [B, H, W, 3] in [-1, 1]. Results
are float32 and differentiable with respect to the images. What is drawn for an image depends on
the key, the size of the global batch and the image's place in it, never on the devices.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from detailflow_jax.ops import Array, interpolation, padded

TRANSLATION = 1 / 8
"""The largest shift, as a share of the side."""

Images = Float[Array, "B H W 3"]
Part = padded.Part


@dataclasses.dataclass(frozen=True)
class Policy:
    """Strength of the augmentation.

    Attributes:
      cutout: side of the cut-out, as a share of the image's side.
      probability: of each of the three changes.
    """

    cutout: float
    probability: float


WEAK = Policy(cutout=0.2, probability=0.5)
STRONG = Policy(cutout=0.5, probability=1.0)


def diff_augment(
    key: PRNGKeyArray, images: Images, policy: Policy = WEAK, part: Part | None = None
) -> Images:
    """Images with changed colour, translation and cut-out (DiffAugment, arXiv 2006.10738).

    Each of the three applies to the whole batch or not at all, with the policy's probability. Its
    strength is drawn per image.
    """
    gate_key, *keys = jax.random.split(key, 4)
    gates = jax.random.uniform(gate_key, (3,)) < policy.probability
    images = images.astype(jnp.float32)
    images = jnp.where(gates[0], jitter_colour(keys[0], images, part), images)
    images = jnp.where(gates[1], translate(keys[1], images, part), images)
    return jnp.where(gates[2], cut_out(keys[2], images, policy.cutout, part), images)


def jitter_colour(key: PRNGKeyArray, images: Images, part: Part | None = None) -> Images:
    """Changes brightness by +-0.5, then saturation by U(0, 2), then contrast by U(0.5, 1.5)."""
    brightness, saturation, contrast = jax.random.uniform(key, (3, len(images), 1, 1, 1))
    images = images + (brightness - 0.5)
    grey = jnp.mean(images, axis=-1, keepdims=True)
    images = (images - grey) * (2 * saturation) + grey
    level = padded.mean(images, part, axis=(1, 2, 3), keepdims=True)
    return padded.zeroed((images - level) * (contrast + 0.5) + level, part)


def translate(key: PRNGKeyArray, images: Images, part: Part | None = None) -> Images:
    """Shifts each image by up to an eighth of the side in each direction; zeros come in."""
    shifts = []
    for side, one in zip(images.shape[1:3], jax.random.split(key), strict=True):
        most = padded.pick(lambda side: int(side * TRANSLATION + 0.5), side, part)
        shifts.append(jax.random.randint(one, (len(images),), -most, most + 1))
    return padded.zeroed(shift(images, *shifts), part)


def shift(
    images: Float[Array, "B H W C"], down: Int[Array, " B"], right: Int[Array, " B"]
) -> Float[Array, "B H W C"]:
    """Moves every image by whole pixels: float32 [B, H, W, C].

    Computed as products with matrices of zeros and ones, which is exact and whose gradient needs no
    scatter.
    """

    def matrix(side: int, by: Array) -> Array:
        at = jnp.arange(side)
        return (at[:, None] - by[:, None, None] == at).astype(jnp.float32)

    precision = jax.lax.Precision.HIGHEST
    rows, columns = (matrix(n, by) for n, by in zip(images.shape[1:3], (down, right), strict=True))
    images = jnp.einsum("bhH,bHWC->bhWC", rows, images, precision=precision)
    return jnp.einsum("bwW,bhWC->bhwC", columns, images, precision=precision)


def cut_out(key: PRNGKeyArray, images: Images, share: float, part: Part | None = None) -> Images:
    """Sets a rectangle of `share` of each side to zero; its centre lies anywhere."""
    inside = []
    for side, one in zip(images.shape[1:3], jax.random.split(key), strict=True):
        size = padded.pick(lambda side: int(side * share + 0.5), side, part)
        filled = padded.pick(lambda side: side, side, part)
        centre = jax.random.randint(one, (len(images), 1), 0, filled + (1 - size % 2))
        place = jnp.arange(side) - (centre - size // 2)
        inside.append((place >= 0) & (place < size))
    hole = inside[0][:, :, None] & inside[1][:, None, :]
    return jnp.where(hole[..., None], 0.0, images)


def random_view(
    key: PRNGKeyArray | None, images: Images, size: int, part: Part | None = None
) -> Float[Array, "B {size} {size} 3"]:
    """The batch at `size` x `size`, as the published DINO discriminator takes it.

    Half of the time, images larger than `size` are cropped, all at one random place; otherwise they
    are reduced by area averaging. Smaller ones are enlarged by bicubic interpolation. Without a key
    nothing is cropped.
    """
    height, width = images.shape[1:3]
    if part is None and (height, width) == (size, size):
        return images.astype(jnp.float32)

    def resize(side: int) -> np.ndarray:  # The height alone decides, as published.
        larger = (side if part else height) > size
        return (interpolation.area_matrix if larger else interpolation.bicubic_matrix)(side, size)

    rows, columns = (padded.pick(resize, side, part) for side in (height, width))
    if key is not None and min(height, width) > size:
        cropped, row_key, column_key = jax.random.split(key, 3)
        places = [padded.pick(lambda n: n - size + 1, side, part) for side in (height, width)]
        crop = jax.random.bernoulli(cropped) & (places[0] > 1)
        rows = jnp.where(crop, _window(row_key, height, size, places[0]), rows)
        columns = jnp.where(crop, _window(column_key, width, size, places[1]), columns)
    return interpolation.apply_matrices(images, rows, columns)


def _window(
    key: PRNGKeyArray, side: int, size: int, places: Int[Array, ""] | int
) -> Float[Array, "size side"]:
    """A random crop along one axis, at one of some places, as a matrix of zeros and ones."""
    start = jax.random.randint(key, (), 0, places)
    return (jnp.arange(size)[:, None] + start == jnp.arange(side)).astype(jnp.float32)
