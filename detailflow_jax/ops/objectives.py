"""What the flow head learns: the way from data to noise, and who walks it back."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from detailflow_jax.ops import Array, diffusion, flow


class Objective(NamedTuple):
    """One way from data to noise.

    Attributes:
      interpolate: (data, noise, time) -> noisy data.
      target: (data, noise) -> what the head predicts.
      solvers: steps back to the data, by name; the first is the default.
    """

    interpolate: Callable[..., Array]
    target: Callable[..., Array]
    solvers: Mapping[str, Callable[..., Array]]

    @property
    def default(self) -> str:
        """The solver that is used unless another is named."""
        return next(iter(self.solvers))


OBJECTIVES = {
    "flow": Objective(flow.interpolate, flow.target_velocity, flow.SOLVERS),
    "diffusion": Objective(diffusion.interpolate, diffusion.target, diffusion.SOLVERS),
}
"""Flow matching (published), and noise prediction (the paper's ablation)."""

GRIDS = {
    "euler": "published",
    "heun": "published",
    "euler_maruyama": "sde",
    "ddim": "uniform",
    "ddpm": "uniform",
}
"""The grid of times (`ops.flow.GRIDS`) that each solver is used with unless another is named."""

STOCHASTIC = ("euler_maruyama", "ddpm")
"""Solvers that draw noise at every step."""
