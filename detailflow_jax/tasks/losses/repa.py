"""Alignment of a decoder block's tokens with the teacher's patch features (REPA)."""

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Float

from detailflow_jax.ops import Array, interpolation, padded, quantization
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks.losses import Frozen, Loss, Scalar, Step, teacher


@dataclasses.dataclass(frozen=True, eq=False)
class Repa(Loss):
    """-mean cosine over the patches of the reconstruction."""

    frozen: Frozen | None = None

    reads = ("tapped",)
    padded = True

    @classmethod
    def make(cls, name, section, setting):
        """See `Loss`."""
        frozen = teacher.make(name, setting)
        if not setting.network.repa_layer:
            raise ConfigError(
                f"config.losses.{name}.weight > 0 needs config.model.repa_layer, the block of the "
                f"decoder whose tokens are aligned, 1 to {setting.network.decoder.depth}"
            )
        return super().make(name, section | {"frozen": frozen}, setting)

    def __call__(self, step: Step) -> Scalar:
        """See `Loss`."""
        return patch_alignment(step.tapped, step.features["teacher"], step.part)


def patch_alignment(
    predicted: Float[Array, "n p D"],
    patches: Float[Array, "B P D"],
    part: padded.Part | None = None,
) -> Scalar:
    """-mean cosine of projected decoder tokens and the teacher's patch features, over patches.

    Args:
      predicted: of a square grid, of the B images once or several times.
      patches: of a square grid, resized to that of `predicted` by antialiased bilinear
        interpolation.
      part: of the image in pixels, where that fills a part of the grid of `predicted`.
    """
    batch, length, width = patches.shape
    have, want = (round(n**0.5) for n in (length, predicted.shape[1]))
    if part:
        part = padded.over(part, part.sides[-1] // want)
    if part or have != want:
        resize = functools.partial(interpolation.antialiased_bilinear_matrix, have)
        matrix = padded.pick(resize, want, part)
        grid = patches.reshape(batch, have, have, width)
        patches = interpolation.apply_matrices(grid, matrix, matrix).reshape(batch, -1, width)
    predicted = predicted.reshape(-1, *patches.shape)  # so that the features need no copies
    cosine = quantization.normalize(predicted, 1e-8) * quantization.normalize(patches, 1e-8)
    return -padded.mean(jnp.sum(cosine, axis=-1).reshape(-1, want, want, 1), part)
