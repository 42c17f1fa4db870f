"""Perceptual distance of the reconstruction: LPIPS over a frozen VGG16."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

from detailflow_jax.models import lpips
from detailflow_jax.models.layers import apply
from detailflow_jax.ops import Array, padded
from detailflow_jax.ops.adversarial import ramp
from detailflow_jax.runtime import weights
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks.losses import Frozen, Loss, Scalar, Step
from detailflow_jax.tasks.losses.placement import by_batch, gathered, named


@dataclasses.dataclass(frozen=True, eq=False)
class Perceptual(Loss):
    """Mean LPIPS of reconstructions and targets.

    Attributes:
      ramp: steps in which the weight grows from 0.
      path: a whole LPIPS, or VGG16 of torchvision.
      linear: beside VGG16, LPIPS's weights over it.
      random: random weights, to try the code.
      network: LPIPS.
    """

    ramp: int = 0
    path: str | None = None
    linear: str | None = None
    random: bool = False
    network: lpips.LPIPS = dataclasses.field(default_factory=lpips.LPIPS)

    padded = True

    @classmethod
    def make(cls, name, section, setting):
        """See `Loss`."""
        if setting.smallest < lpips.SMALLEST:
            raise ConfigError(
                f"config.losses.{name}.weight={section['weight']}: the smallest images are of "
                f"{setting.smallest} px, LPIPS needs {lpips.SMALLEST} at least; set "
                f"config.losses.{name}.weight=0"
            )
        network = lpips.LPIPS(jnp.dtype(setting.network.dtype))
        return super().make(name, section | {"network": network}, setting)

    @property
    def frozen(self) -> Frozen:
        """See `Loss`."""
        files = ((weights.VGG16, self.path), (weights.LPIPS, self.linear))
        if self.path and not self.linear:
            files = files[:1]  # a whole LPIPS
        dtype = jnp.dtype(self.network.dtype).name
        make = lambda key: init(self.network, key)  # noqa: E731
        return Frozen("lpips", "lpips", make, files, self.random, dtype=dtype)

    def factor(self, step: Step) -> Scalar:
        """See `Loss`."""
        return self.weight * ramp(step.state.step, 0, self.ramp)

    def __call__(self, step: Step) -> Scalar:
        """See `Loss`."""
        params = step.state.frozen["lpips"]
        return distance(self.network, params, step.reconstruction, step.target, step.part)


def init(network: lpips.LPIPS, key: PRNGKeyArray) -> Any:
    """Random parameters of LPIPS."""
    example = jnp.zeros((1, lpips.SMALLEST, lpips.SMALLEST, 3))
    return named(network.init(key, example, example)["params"])


def distance(
    network: lpips.LPIPS,
    params: Any,
    reconstruction: Float[Array, "n S S 3"],
    target: Float[Array, "B S S 3"],
    part: padded.Part | None = None,
) -> Scalar:
    """Mean LPIPS of reconstructions and their targets, which are repeated to as many.

    Where a `part` is filled, of that alone.
    """
    params = gathered(params)
    features = apply(network, params, by_batch(reconstruction), part, method="features")
    # A target stands for several reconstructions: its features are computed once.
    wanted = apply(network, params, target, part, method="features")
    times = len(reconstruction) // len(target)
    wanted = tuple(jnp.concatenate([x] * times) for x in wanted)
    return jnp.mean(apply(network, params, features, wanted, part, method="compare"))
