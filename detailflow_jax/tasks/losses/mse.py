"""Mean squared error of the reconstruction."""

import jax.numpy as jnp

from detailflow_jax.ops import padded
from detailflow_jax.tasks.losses import Loss, Scalar, Step


class MSE(Loss):
    """mean((reconstruction - target)^2)."""

    padded = True

    def __call__(self, step: Step) -> Scalar:
        """See `Loss`."""
        error = jnp.square(step.reconstruction - step.repeated_target())
        return padded.mean(error, step.part)
