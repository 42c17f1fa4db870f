"""Losses of the tokenizer's quantizer: codebook, commitment, entropy of the code usage.

With self-correction each is over both passes: N clean tokens and the N - e tokens from the end e of
the noise on (`ops/correction.py`).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Float

from detailflow_jax.ops import Array, correction, quantization
from detailflow_jax.tasks.losses import Loss, Pass, Scalar, Step


def _over_passes(step: Step, error: Callable[[Pass], Float[Array, "B N"]]) -> Scalar:
    """Mean of an error of each pass."""
    errors = [error(one) for one in step.passes]
    if step.span is None:
        return jnp.mean(errors[0])
    return correction.weighted_vq(*errors, step.span)


class VQ(Loss):
    """Squared distance of the codebook entries to the latents, which pass no gradient."""

    reads = ("passes",)
    padded = True

    def __call__(self, step: Step) -> Scalar:
        """See `Loss`."""
        return _over_passes(step, lambda one: quantization.vq_errors(one.z, one.entries)[0])


class Commitment(Loss):
    """Squared distance of the latents to the codebook entries, which pass no gradient."""

    reads = ("passes",)
    padded = True

    def __call__(self, step: Step) -> Scalar:
        """See `Loss`."""
        return _over_passes(step, lambda one: quantization.vq_errors(one.z, one.entries)[1])


class Entropy(Loss):
    """Low entropy per token, high entropy over the batch: see `quantization.entropy_loss`."""

    reads = ("passes",)
    padded = True

    def __call__(self, step: Step) -> Scalar:
        """See `Loss`."""
        losses = [quantization.entropy_loss(one.distances) for one in step.passes]
        if step.span is None:
            return losses[0]
        clean, noisy = correction.pass_weights(step.span, step.passes[0].z.shape[1])
        return clean * losses[0] + noisy * losses[1]
