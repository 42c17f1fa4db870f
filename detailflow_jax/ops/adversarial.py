"""Adversarial losses and what weights them.

Logits are float32 of any shape, [B, positions] here; larger means more real. Everything that
depends on the step is data, so a term starts without a recompilation.
"""

import typing
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

Logits = jax.Array


def ramp(step: jax.Array, start: int = 0, length: int = 0) -> jax.Array:
    """The share of its weight that a term has: float32, 0 before `start`, 1 from `start + length`.

    Linear in between; `length` 0 switches on at once. The perceptual loss is ramped from step 0,
    the adversarial terms are switched on at their start step.
    """
    step = jnp.asarray(step, jnp.float32)
    if not length:
        return (step >= start).astype(jnp.float32)
    return jnp.clip((step - start) / length, 0.0, 1.0)


# ------------------------------------------------------------------------------------------ losses


def _hinge(real: Logits, fake: Logits) -> jax.Array:
    return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))


def _logistic(real: Logits, fake: Logits) -> jax.Array:
    return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


DISCRIMINATOR_LOSSES: Mapping[str, Callable[[Logits, Logits], jax.Array]] = {
    "hinge": _hinge,
    "vanilla": _logistic,
    "non_saturating": _logistic,
}
"""(logits of real, of fake images) -> loss. "vanilla" and "non_saturating" are the same for the
discriminator: cross-entropy of real against fake (Goodfellow et al., arXiv 1406.2661)."""

GENERATOR_LOSSES: Mapping[str, Callable[[Logits], jax.Array]] = {
    "hinge": lambda fake: -jnp.mean(fake),
    "vanilla": lambda fake: -jnp.mean(fake),
    "non_saturating": lambda fake: jnp.mean(jax.nn.softplus(-fake)),
}
"""Logits of fake images -> loss. "vanilla" goes with -mean as in VQGAN (arXiv 2012.09841).

The published code gives the arguments of its cross-entropy in the wrong order, so that its
"non-saturating" losses are linear in the logits; here the name means what the literature means.
"""


def discriminator_loss(kind: str, real: Logits, fake: Logits) -> jax.Array:
    """The discriminator's loss of a `kind`.

    Raises:
      ValueError: there is no such kind.
    """
    return _chosen(DISCRIMINATOR_LOSSES, kind)(real, fake)


def generator_loss(kind: str, fake: Logits) -> jax.Array:
    """The generator's loss of a `kind`; raises as `discriminator_loss`."""
    return _chosen(GENERATOR_LOSSES, kind)(fake)


def _chosen(losses: Mapping[str, Callable], kind: str) -> Callable:
    if kind not in losses:
        raise ValueError(f"adversarial loss {kind!r}; expected one of {', '.join(losses)}")
    return losses[kind]


def consistency_loss(weak: tuple[Logits, Logits], strong: tuple[Logits, Logits]) -> jax.Array:
    """Mean squared difference of logits of the same images, augmented weakly and strongly.

    Args:
      weak: logits of real and of fake images.
      strong: the same, in the same order. Gradients flow into both, as published.
    """
    return jnp.mean(jnp.square(jnp.concatenate(weak) - jnp.concatenate(strong)))


# ------------------------------------------------------------------------------------------- LeCAM


class LeCAM(typing.NamedTuple):
    """Moving averages of the mean logit of real and of fake images: float32 scalars."""

    real: jax.Array
    fake: jax.Array

    @classmethod
    def start(cls) -> "LeCAM":
        """Both zero, as published."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))

    def update(self, real: Logits, fake: Logits, decay: float = 0.999) -> "LeCAM":
        """The averages after these logits; no gradient passes."""

        def step(average: jax.Array, logits: Logits) -> jax.Array:
            return decay * average + (1 - decay) * jax.lax.stop_gradient(jnp.mean(logits))

        return LeCAM(step(self.real, real), step(self.fake, fake))

    def penalty(self, real: Logits, fake: Logits) -> jax.Array:
        """Logits beyond the other side's average, squared (Tseng et al., arXiv 2104.03310).

        The published code updates the averages first, then takes this.
        """
        beyond_fake = jnp.mean(jnp.square(jax.nn.relu(real - self.fake)))
        return beyond_fake + jnp.mean(jnp.square(jax.nn.relu(self.real - fake)))


# ---------------------------------------------------------------------------------- adaptive weight


def adaptive_weight(reconstruction: jax.Array, adversarial: jax.Array) -> jax.Array:
    """How large the adversarial term must be to weigh as much as the reconstruction (VQGAN eq. 7).

    Args:
      reconstruction: gradient of mse + perceptual with respect to the last decoder layer's kernel.
      adversarial: gradient of the adversarial term with respect to the same.

    Returns:
      |reconstruction| / (|adversarial| + 1e-4), at most 1e4; no gradient passes.
    """
    norms = (jnp.linalg.norm(x.astype(jnp.float32)) for x in (reconstruction, adversarial))
    numerator, denominator = norms
    return jax.lax.stop_gradient(jnp.clip(numerator / (denominator + 1e-4), 0.0, 1e4))
