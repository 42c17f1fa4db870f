"""Divergence of the autoencoder's posterior from a standard normal."""

import jax.numpy as jnp

from detailflow_jax.tasks.losses import Loss, Scalar, Step


class KL(Loss):
    """KL per image, divided by the number of values of an image.

    The LDM family sums both the reconstruction error and the KL over an image. Here both are
    divided by its number of values, so the weight is the same and holds for every image size.
    """

    reads = ("posterior",)

    def __call__(self, step: Step) -> Scalar:
        """See `Loss`."""
        return jnp.mean(step.posterior.kl()) / step.images[0].size
