"""Alignment of the first code with the image, as a frozen teacher sees it."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Float

from detailflow_jax.ops import Array, quantization
from detailflow_jax.tasks.losses import Frozen, Loss, Scalar, Step, teacher


@dataclasses.dataclass(frozen=True, eq=False)
class Align(Loss):
    """-cos(projection of the first code, mean teacher feature): the paper's alignment loss."""

    frozen: Frozen | None = None

    reads = ("aligned",)
    padded = True

    @classmethod
    def make(cls, name, section, setting):
        """See `Loss`."""
        section = section | {"frozen": teacher.make(name, setting)}
        return super().make(name, section, setting)

    def __call__(self, step: Step) -> Scalar:
        """See `Loss`."""
        mean = jnp.mean(step.features["teacher"], axis=1)
        return alignment(step.aligned, mean)


def alignment(predicted: Float[Array, "B D"], target: Float[Array, "B D"]) -> Scalar:
    """-cos(predicted, target), batch mean."""
    predicted = quantization.normalize(predicted, 1e-8)
    return -jnp.mean(jnp.sum(predicted * quantization.normalize(target, 1e-8), axis=-1))
