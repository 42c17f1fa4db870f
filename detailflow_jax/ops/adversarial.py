"""Adversarial losses and their weights.

Logits are float arrays of any shape, usually [B, positions]; larger means more real. Whatever
depends on the step is data, so that a term switches on without a recompilation.
"""

import typing
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from detailflow_jax.ops import Array

Logits = Float[Array, "..."]
Scalar = Float[Array, ""]


def ramp(step: Int[Array, ""] | np.integer | int, start: int = 0, length: int = 0) -> Scalar:
    """The share of its weight that a term has at a step: 0 before `start`, 1 from `start + length`.

    It grows linearly in between; `length` 0 switches the term on at once. The perceptual loss is
    ramped from step 0, the adversarial terms are switched on at their start step.
    """
    now = jnp.asarray(step, jnp.float32)
    if not length:
        return (now >= start).astype(jnp.float32)
    return jnp.clip((now - start) / length, 0.0, 1.0)


# ------------------------------------------------------------------------------------------ losses


def _hinge(real: Logits, fake: Logits) -> Scalar:
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def _logistic(real: Logits, fake: Logits) -> Scalar:
    return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


DISCRIMINATOR_LOSSES: Mapping[str, Callable[[Logits, Logits], Scalar]] = {
    "hinge": _hinge,
    "vanilla": _logistic,
    "non_saturating": _logistic,
}
"""(logits of real, of fake images) -> loss. "vanilla" and "non_saturating" are the same for the
discriminator: cross-entropy of real against fake (Goodfellow et al., arXiv 1406.2661)."""

GENERATOR_LOSSES: Mapping[str, Callable[[Logits], Scalar]] = {
    "hinge": lambda fake: -jnp.mean(fake),
    "vanilla": lambda fake: -jnp.mean(fake),
    "non_saturating": lambda fake: jnp.mean(jax.nn.softplus(-fake)),
}
"""Logits of fake images -> loss. "vanilla" uses -mean, as VQGAN does (arXiv 2012.09841).

The published code passes the arguments of its cross-entropy in the wrong order, which makes its
"non-saturating" losses linear in the logits. Here the name has the meaning of the literature.
"""


def discriminator_loss(kind: str, real: Logits, fake: Logits) -> Scalar:
    """The discriminator's loss.

    Args:
      kind: one of `DISCRIMINATOR_LOSSES`.
      real: logits of real images.
      fake: logits of fake images.

    Raises:
      ValueError: if `kind` is unknown.
    """
    return _chosen(DISCRIMINATOR_LOSSES, kind)(real, fake)


def generator_loss(kind: str, fake: Logits) -> Scalar:
    """The generator's loss, `kind` being one of `GENERATOR_LOSSES`.

    Raises:
      ValueError: if `kind` is unknown.
    """
    return _chosen(GENERATOR_LOSSES, kind)(fake)


def _chosen(losses: Mapping[str, Callable], kind: str) -> Callable:
    if kind not in losses:
        raise ValueError(f"adversarial loss {kind!r}; expected one of {', '.join(losses)}")
    return losses[kind]


def consistency_loss(weak: Sequence[Logits], strong: Sequence[Logits]) -> Scalar:
    """Mean squared difference of the logits of weakly and of strongly augmented images.

    Args:
      weak: logits of real and of fake images.
      strong: the same images in the same order. Gradients flow into both, as published.
    """
    return jnp.mean(jnp.square(jnp.concatenate(weak) - jnp.concatenate(strong)))


# ------------------------------------------------------------------------------------------- LeCAM


class LeCAM(typing.NamedTuple):
    """Moving averages of the mean logit of real and of fake images: float32 scalars."""

    real: Array
    fake: Array

    @classmethod
    def start(cls) -> "LeCAM":
        """Both averages at zero, as published."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def update(self, real: Logits, fake: Logits, decay: float = 0.999) -> "LeCAM":
        """The averages after these logits. No gradient flows through them."""

        def step(average: Array, logits: Logits) -> Array:
            return decay * average + (1 - decay) * jax.lax.stop_gradient(jnp.mean(logits))

        return LeCAM(step(self.real, real), step(self.fake, fake))

    def penalty(self, real: Logits, fake: Logits) -> Scalar:
        """Squared excess of the logits over the other side's average (Tseng et al., 2104.03310).

        The published code updates the averages before it takes the penalty.
        """
        beyond_fake = jnp.mean(jnp.square(jax.nn.relu(real - self.fake)))
        return beyond_fake + jnp.mean(jnp.square(jax.nn.relu(self.real - fake)))


# ---------------------------------------------------------------------------------- adaptive weight


def adaptive_weight(
    reconstruction: Float[Array, "*kernel"], adversarial: Float[Array, "*kernel"]
) -> Scalar:
    """The factor that makes the adversarial term weigh as much as the reconstruction (VQGAN eq. 7).

    Args:
      reconstruction: gradient of mse + perceptual with respect to the last decoder layer's kernel.
      adversarial: gradient of the adversarial term with respect to the same kernel.

    Returns:
      |reconstruction| / (|adversarial| + 1e-4), at most 1e4. No gradient flows through it.
    """
    norms = (jnp.linalg.norm(x.astype(jnp.float32)) for x in (reconstruction, adversarial))
    numerator, denominator = norms
    return jax.lax.stop_gradient(jnp.clip(numerator / (denominator + 1e-4), 0.0, 1e4))
