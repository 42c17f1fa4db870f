"""The FlowAR part of the door: autoencoder and FlowAR as plain functions on arrays.

Shapes: B images or samples, h x w latent positions, C latent channels, S side of the latent.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detailflow_jax.inference.model import Model, check_labels
from detailflow_jax.models import flow_sampler, sampler
from detailflow_jax.models import flowar as flowar_network
from detailflow_jax.models import vae as vae_network
from detailflow_jax.ops import flow
from detailflow_jax.ops import images as pixels


class VAE(Model):
    """Images to latents and back; `config.scale_factor` brings latents to about unit variance."""

    kind = "vae"

    def __init__(self, config: vae_network.VAEConfig, params, source: str = "memory"):
        super().__init__(vae_network.VAE, config, params, source)

    def encode(self, images: Any, *, batch_size: int = 16) -> tuple[np.ndarray, np.ndarray]:
        """Images -> the posterior over their latents.

        Args:
          images: [B, H, W, 3], uint8 or float in [-1, 1]; sides a multiple of the stride.
          batch_size: images a call of the compiled program.

        Returns:
          (mean, logvar), float32 [B, h, w, C] each, unscaled.

        Raises:
          ValueError, TypeError: another shape or type.
        """
        images = np.asarray(images)
        _check_images(images, self.config)
        moments = self.in_batches(lambda x: self.moments(x), batch_size, images)
        mean, logvar = np.split(moments, 2, axis=-1)
        return mean, logvar

    def moments(self, images: Any) -> jax.Array:
        """One call of the compiled encoder: (mean, logvar) along the last axis, [B, h, w, 2C]."""
        return _moments(self.network, self.params, self.place(images))

    def sample(
        self, images: Any, seed: int = 0, *, first_index: int = 0, batch_size: int = 16
    ) -> np.ndarray:
        """Images -> latents drawn from their posterior, scaled.

        Args:
          images: as `encode` takes them.
          seed: of all draws; the draw of image i depends on it and `first_index + i` alone.
          first_index: index of the first image, when a set is encoded in parts.
          batch_size: images a call of the compiled program.

        Returns:
          float32 [B, h, w, C], of about unit variance.

        Raises:
          ValueError, TypeError: another shape or type.
        """
        mean, logvar = self.encode(images, batch_size=batch_size)
        keys = sampler.sample_keys(seed, first_index + np.arange(len(mean)))
        return np.asarray(_draw_latents(self.network, mean, logvar, keys))

    def decode(self, latents: Any, *, batch_size: int = 16) -> np.ndarray:
        """Scaled latents -> images.

        Args:
          latents: float [B, h, w, C].
          batch_size: latents a call of the compiled program.

        Returns:
          float32 [B, H, W, 3], about [-1, 1].

        Raises:
          ValueError: another shape or type.
        """
        latents, channels = np.asarray(latents), self.config.latent_channels
        if latents.ndim != 4 or latents.shape[-1] != channels:
            raise ValueError(
                f"latents have shape {latents.shape}, expected [B, h, w, {channels}]: "
                f"{self.source} has {channels} latent channels"
            )
        if not np.issubdtype(latents.dtype, np.floating):
            raise ValueError(f"latents are {latents.dtype}, expected floating point numbers")
        latents = latents.astype(np.float32)
        return self.in_batches(
            lambda x: _decode_latents(self.network, self.params, x), batch_size, latents
        )


class FlowAR(Model):
    """Labels to latents."""

    kind = "flowar"

    def __init__(self, config: flowar_network.FlowARConfig, params, source: str = "memory"):
        super().__init__(flowar_network.FlowAR, config, params, source)

    def sample(
        self,
        labels: Sequence[int],
        seed: int = 0,
        cfg_scale: float = 2.4,
        num_steps: int | Sequence[int] = 25,
        guidance_high: float = 0.9,
        guidance_low: float = 0.0,
        grid: str | None = None,
        solver: str = "euler",
        noise: Sequence[Any] | None = None,
        *,
        first_index: int = 0,
        batch_size: int = 64,
    ) -> np.ndarray:
        """Latents for labels; sample i depends on `seed` and `first_index + i` alone.

        Args:
          labels: class numbers in [0, num_classes), [B].
          seed: of the whole set of samples.
          cfg_scale: guidance >= 1 at the last scale, rising from 1 at the first; at 1 no null half
            is computed. Published: 4.3 for S, 2.4 for L and H.
          num_steps: flow steps, one number or one a scale (annealing: later scales need fewer).
          guidance_high: guidance applies from this time on (1 is noise, 0 data).
          guidance_low: and down to this one.
          grid: of times, "published", "uniform" or "sde"; default what the solver is used with.
          solver: "euler", "heun" (two evaluations a step) or "euler_maruyama" (an SDE).
          noise: one array [B, i^2, C] a scale, or [2B, i^2, C] of which the null half is unused.
          first_index: index of the first sample, when a set is made in parts.
          batch_size: samples a call of the compiled program.

        Returns:
          float32 [B, S, S, C], scaled as in training: what `VAE.decode` takes.

        Raises:
          ValueError: a label or setting out of range.
        """
        c = self.config
        labels = np.asarray(labels)
        check_labels(labels, c.num_classes)
        _check_settings(cfg_scale, guidance_low, guidance_high, solver)
        if grid is None:
            grid = "sde" if solver == "euler_maruyama" else "published"
        options = flow_sampler.FlowSamplingOptions(
            flow_sampler.flow_times(len(c.scales), num_steps, grid),
            guided=cfg_scale != 1.0,
            guidance_low=guidance_low,
            guidance_high=guidance_high,
            solver=solver,
        )
        factors = flow_sampler.guidance_factors(cfg_scale, len(c.scales))
        noise = None if noise is None else _check_noise(noise, c, len(labels))

        def run(rows: np.ndarray) -> jax.Array:
            given = None if noise is None else [part[rows[:, 2]] for part in noise]
            return flow_sampler.sample(
                self.network,
                self.params,
                rows[:, 0],
                sampler.sample_keys(seed, rows[:, 1]),
                factors,
                given,
                options=options,
            )

        place = np.arange(len(labels))
        rows = np.stack([labels, first_index + place, place], axis=1).astype(np.int32)
        return self.in_batches(run, batch_size, rows)


@functools.partial(jax.jit, static_argnums=0)
def _moments(network, params, images):
    posterior = network.apply({"params": params}, pixels.to_float(images), method="encode")
    return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def _draw_latents(network, mean, logvar, keys):
    draw = lambda mean, logvar, key: vae_network.Posterior(mean, logvar).sample(key)  # noqa: E731
    return network.scale(jax.vmap(draw)(mean, logvar, keys))


@functools.partial(jax.jit, static_argnums=0)
def _decode_latents(network, params, latents):
    return network.apply({"params": params}, latents, method="decode")


def _check_images(images: np.ndarray, config: vae_network.VAEConfig) -> None:
    if images.ndim != 4 or images.shape[-1] != config.image_channels:
        raise ValueError(
            f"images have shape {images.shape}, expected [B, H, W, {config.image_channels}]"
        )
    if images.shape[1] % config.stride or images.shape[2] % config.stride:
        raise ValueError(
            f"images are {images.shape[1]} x {images.shape[2]}, expected sides that are multiples "
            f"of the autoencoder's stride {config.stride}"
        )


def _check_settings(cfg_scale: float, low: float, high: float, solver: str) -> None:
    if not cfg_scale >= 1.0:
        raise ValueError(f"cfg_scale={cfg_scale}, expected >= 1 (1 means no guidance)")
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(
            f"guidance_low={low}, guidance_high={high}: expected 0 <= low <= high <= 1"
        )
    if solver not in flow.SOLVERS:
        raise ValueError(f"solver={solver!r} is not one of {', '.join(flow.SOLVERS)}")


def _check_noise(
    noise: Sequence[Any], config: flowar_network.FlowARConfig, batch: int
) -> list[np.ndarray]:
    """The conditional half of every scale's noise."""
    noise = [np.asarray(part, np.float32) for part in noise]
    wanted = [(side * side, config.channels) for side in config.scales]
    shapes = [part.shape for part in noise]
    rows = {shape[0] for shape in shapes if shape}
    if [shape[1:] for shape in shapes] != wanted or not rows <= {batch, 2 * batch}:
        raise ValueError(
            f"noise has shapes {shapes}, expected one array a scale, [{batch} or {2 * batch}, "
            f"i^2, C] with (i^2, C) = {wanted}"
        )
    return [part[:batch] for part in noise]
