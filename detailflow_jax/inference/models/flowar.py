"""FlowAR on arrays: labels to latents.

The letters of shapes are those of the package.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from detailflow_jax.inference.checks import ArrayLike, check_known, check_noise
from detailflow_jax.inference.models.base import Sampler
from detailflow_jax.inference.sampling import sample_latents
from detailflow_jax.models.flowar import FlowARConfig


class FlowAR(Sampler):
    """Labels to latents."""

    kind = "flowar"
    config: FlowARConfig

    def sample(
        self,
        labels: ArrayLike | None,
        seed: int = 0,
        cfg_scale: float = 2.4,
        num_steps: int | Sequence[int] = 25,
        guidance_high: float = 0.9,
        guidance_low: float = 0.0,
        grid: str | None = None,
        solver: str | None = None,
        noise: Sequence[ArrayLike] | None = None,
        *,
        latents: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        first_index: int = 0,
        batch_size: int = 64,
    ) -> Float32[np.ndarray, "B S S C"]:
        """Latents for labels, scaled as `VAE.decode` takes them.

        Sample i depends on `seed` and `first_index + i` alone.

        Args:
          labels: class numbers in [0, num_classes), [B]; or None for no class, with latents.
          seed: of the whole set of samples.
          cfg_scale: guidance >= 1 at the last scale, rising from 1 at the first; at 1 no null half
            is computed. Published: 4.3 for S, 2.4 for L and H.
          num_steps: flow steps, one number or one per scale (annealing: later scales need fewer).
          guidance_high: guidance applies from this time on (1 is noise, 0 data).
          guidance_low: guidance applies down to this time.
          grid: of times, "published", "uniform" or "sde"; default what the solver is used with.
          solver: "euler" (default), "heun" (two evaluations per step) or "euler_maruyama" (an SDE);
            of a model that predicts noise "ddim" (default) or "ddpm" (draws noise).
          noise: one array [B, i^2, C] per scale of side i, or [2B, i^2, C] of which the null half
            is unused.
          latents: of images that are kept outside of the mask, float [B, S, S, C], scaled.
          mask: bool [B, S, S], true where latents are sampled anew.
          first_index: index of the first sample, when a set is made in parts.
          batch_size: samples per call of the compiled program.

        Raises:
          ValueError: a label or setting out of range.
        """
        flow = num_steps, guidance_high, guidance_low, grid, solver
        scale = 1.0 if labels is None else cfg_scale
        sampling = sample_latents(self.network, scale, *flow)
        given: dict[str, Any] = {}
        if latents is not None or mask is not None:
            given["known"] = check_known(latents, mask, self.config)
        classes = self._classes(labels, len(given["known"].mask) if given else 0)
        if noise is not None:
            given["noise"] = check_noise(noise, self.config, len(classes))
        return self._sample(sampling, classes, seed, first_index, batch_size, **given)
