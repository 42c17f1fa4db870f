"""Mean squared error of the reconstruction."""

import jax.numpy as jnp

from detailflow_jax.tasks.losses import Loss, Scalar, Step


class MSE(Loss):
    """mean((reconstruction - target)^2)."""

    def __call__(self, step: Step) -> Scalar:
        """See `Loss`."""
        return jnp.mean(jnp.square(step.reconstruction - step.repeated_target()))
