"""What autoencoders have in common: images to a Gaussian over latents, and latents to images.

Shapes: B batch, H x W pixels, C latent channels, S stride, h = H/S, w = W/S.
The networks are in `models/vae.py` (the KL family) and `models/dc_ae.py` (DC-AE).
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Key

from detailflow_jax.ops import Array

LOGVAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """What every autoencoder's configuration has.

    Attributes:
      latent_channels: C.
      scale_factor: latents are (z - shift_factor) * scale_factor, of about unit variance. One
        number, or one per latent channel.
      shift_factor: the same; 0 but for newer autoencoders.
      image_channels: of the images.
      dtype: of the computation; parameters, norms and softmax are float32.
    """

    latent_channels: int
    scale_factor: float | tuple[float, ...] = 1.0
    shift_factor: float | tuple[float, ...] = 0.0
    image_channels: int = 3
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("latent_channels", "image_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        for name in ("scale_factor", "shift_factor"):
            if not isinstance(value := getattr(self, name), int | float):
                object.__setattr__(self, name, tuple(value))
            if np.shape(value) not in ((), (self.latent_channels,)):
                raise ValueError(
                    f"{name} has {len(value)} values, expected one or {self.latent_channels}, one "
                    "per latent channel"
                )
        if not np.all(np.asarray(self.scale_factor) > 0):
            raise ValueError(f"scale_factor={self.scale_factor}; expected more than 0")

    @property
    def stride(self) -> int:
        """S, pixels a latent position covers along a side."""
        raise NotImplementedError


@flax.struct.dataclass
class Posterior:
    """A diagonal Gaussian over unscaled latents: `mean` and `logvar`, float32 [B, h, w, C]."""

    mean: Array
    logvar: Array

    def sample(self, key: Key[Array, ""]) -> Float32[Array, "*B h w C"]:
        """mean + std * noise, unscaled."""
        noise = jax.random.normal(key, self.mean.shape)
        return self.mean + jnp.exp(0.5 * self.logvar) * noise

    def kl(self) -> Float32[Array, " B"]:
        """Divergence from a standard normal, summed over the latent of each sample."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


def _numbers(value: float | tuple[float, ...]) -> Any:
    """One number, or those of the channels as an array."""
    return np.asarray(value, np.float32) if isinstance(value, tuple) else value


class Autoencoder(nn.Module):
    """Encoder and decoder; latents that leave and enter it are scaled to about unit variance.

    A network defines `_posterior` and `_images`, which know nothing of scales.
    """

    config: Any

    def _posterior(self, images: Array) -> Posterior:
        raise NotImplementedError

    def _images(self, z: Array) -> Array:
        raise NotImplementedError

    def encode(self, images: Float[Array, "B H W _"]) -> Posterior:
        """Images in [-1, 1] -> the unscaled posterior.

        Raises:
          ValueError: sides that are no multiple of the stride, or other channels.
        """
        c = self.config
        if images.ndim != 4 or images.shape[-1] != c.image_channels:
            raise ValueError(
                f"images have shape {images.shape}, expected [B, H, W, {c.image_channels}]"
            )
        if images.shape[1] % c.stride or images.shape[2] % c.stride:
            raise ValueError(
                f"images are {images.shape[1]} x {images.shape[2]}; expected sides that are "
                f"multiples of the autoencoder's stride {c.stride}"
            )
        return self._posterior(images)

    def decode(self, latents: Float[Array, "B h w C"]) -> Float32[Array, "B H W _"]:
        """Scaled latents -> images, about [-1, 1].

        Raises:
          ValueError: other channels.
        """
        c = self.config
        if latents.ndim != 4 or latents.shape[-1] != c.latent_channels:
            raise ValueError(
                f"latents have shape {latents.shape}, expected [B, h, w, {c.latent_channels}]"
            )
        return self._images(latents / _numbers(c.scale_factor) + _numbers(c.shift_factor))

    def scale(self, z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Unscaled latents (a posterior's sample or mean) -> scaled, as the rest of the system."""
        return (z - _numbers(self.config.shift_factor)) * _numbers(self.config.scale_factor)

    def __call__(self, images: Array, key: Array | None = None):
        """Reconstruction from a sample (from the mean without a key), and the posterior."""
        posterior = self.encode(images)
        z = posterior.mean if key is None else posterior.sample(key)
        return self.decode(self.scale(z)), posterior
