"""What a discriminator's input goes through: differentiable augmentation and random views.

Shapes: B batch, H x W pixels, S view side. Float images [B, H, W, 3] in [-1, 1]; results are
float32 and differentiable with respect to the images. What is drawn for an image depends on the
key, the size of the global batch and its place there, never on the devices.
"""

import dataclasses

import jax
import jax.numpy as jnp

from detailflow_jax.ops import interpolation

TRANSLATION = 1 / 8
"""The largest shift, as a share of the side."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """How strong: side of the cut-out as a share, and how likely each of the three changes is."""

    cutout: float
    probability: float


WEAK = Policy(cutout=0.2, probability=0.5)
STRONG = Policy(cutout=0.5, probability=1.0)


def diff_augment(key: jax.Array, images: jax.Array, policy: Policy = WEAK) -> jax.Array:
    """Colour, translation and cut-out, each for the whole batch with the policy's probability.

    DiffAugment (Zhao et al., arXiv 2006.10738). How much is drawn for every image.
    """
    gate_key, *keys = jax.random.split(key, 4)
    gates = jax.random.uniform(gate_key, (3,)) < policy.probability
    images = images.astype(jnp.float32)
    images = jnp.where(gates[0], jitter_colour(keys[0], images), images)
    images = jnp.where(gates[1], translate(keys[1], images), images)
    return jnp.where(gates[2], cut_out(keys[2], images, policy.cutout), images)


def jitter_colour(key: jax.Array, images: jax.Array) -> jax.Array:
    """Brightness +-0.5, then saturation x U(0, 2), then contrast x U(0.5, 1.5)."""
    brightness, saturation, contrast = jax.random.uniform(key, (3, len(images), 1, 1, 1))
    images = images + (brightness - 0.5)
    grey = jnp.mean(images, axis=-1, keepdims=True)
    images = (images - grey) * (2 * saturation) + grey
    level = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
    return (images - level) * (contrast + 0.5) + level


def translate(key: jax.Array, images: jax.Array) -> jax.Array:
    """Shifts by up to an eighth of the side in each direction; zeros come in."""
    shifts = []
    for side, one in zip(images.shape[1:3], jax.random.split(key), strict=True):
        most = int(side * TRANSLATION + 0.5)
        shifts.append(jax.random.randint(one, (len(images),), -most, most + 1))
    return shift(images, *shifts)


def shift(images: jax.Array, down: jax.Array, right: jax.Array) -> jax.Array:
    """Moves every image by whole pixels, int32 [B] each way.

    As products with matrices of ones and zeros: exact, and their gradient needs no scatter.
    """

    def matrix(side: int, by: jax.Array) -> jax.Array:
        at = jnp.arange(side)
        return (at[:, None] - by[:, None, None] == at).astype(jnp.float32)

    precision = jax.lax.Precision.HIGHEST
    rows, columns = (matrix(n, by) for n, by in zip(images.shape[1:3], (down, right), strict=True))
    images = jnp.einsum("bhH,bHWC->bhWC", rows, images, precision=precision)
    return jnp.einsum("bwW,bhWC->bhwC", columns, images, precision=precision)


def cut_out(key: jax.Array, images: jax.Array, share: float) -> jax.Array:
    """A rectangle of `share` of each side becomes zero; its centre lies anywhere."""
    inside = []
    for side, one in zip(images.shape[1:3], jax.random.split(key), strict=True):
        size = int(side * share + 0.5)
        centre = jax.random.randint(one, (len(images), 1), 0, side + (1 - size % 2))
        place = jnp.arange(side) - (centre - size // 2)
        inside.append((place >= 0) & (place < size))
    hole = inside[0][:, :, None] & inside[1][:, None, :]
    return jnp.where(hole[..., None], 0.0, images)


def random_view(key: jax.Array | None, images: jax.Array, size: int) -> jax.Array:
    """The batch at `size` x `size`, as the published DINO discriminator takes it.

    Larger images are cropped, all at one random place, half of the time and reduced by area
    averaging otherwise; smaller ones are enlarged by bicubic interpolation. Without a key nothing
    is cropped.
    """
    height, width = images.shape[1:3]
    # Which of the two is told by the height alone, as published.
    resize = interpolation.area_matrix if height > size else interpolation.bicubic_matrix
    rows, columns = resize(height, size), resize(width, size)
    if (height, width) == (size, size):
        return images.astype(jnp.float32)
    if key is not None and min(height, width) > size:
        cropped, *keys = jax.random.split(key, 3)
        crop = jax.random.bernoulli(cropped)
        rows, columns = (
            jnp.where(crop, _window(one, side, size), matrix)
            for one, side, matrix in zip(keys, (height, width), (rows, columns), strict=True)
        )
    return interpolation.apply_matrices(images, rows, columns)


def _window(key: jax.Array, side: int, size: int) -> jax.Array:
    """A random crop along one axis as a matrix [size, side]."""
    start = jax.random.randint(key, (), 0, side - size + 1)
    return (jnp.arange(size)[:, None] + start == jnp.arange(side)).astype(jnp.float32)
