"""The autoencoder on arrays: images to latents and back.

The letters of shapes are those of the package.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from detailflow_jax.inference import programs
from detailflow_jax.inference.checks import (
    ArrayLike,
    as_array,
    as_images,
    check_images,
    check_seed,
)
from detailflow_jax.inference.errors import InputError
from detailflow_jax.inference.models.base import Model, sample_indices
from detailflow_jax.models import autoencoder, sampler


class VAE(Model):
    """Images to latents and back."""

    kind = "vae"
    config: autoencoder.AutoencoderConfig

    def encode(self, images: ArrayLike, *, batch_size: int = 16) -> "LatentPosterior":
        """Images -> the posterior over their latents.

        `vae.decode(vae.encode(images))` reconstructs. `mean, logvar = vae.encode(images)` gives
        the unscaled moments.

        Args:
          images: [B, H, W, 3], uint8 or float in [-1, 1]; sides a multiple of the stride.
          batch_size: images per call of the compiled program.

        Raises:
          ValueError, TypeError: another shape or type.
        """
        images = as_images(images)
        check_images(images, self.config.image_channels, self.config.stride)
        moments = self.run(programs.encode_moments, batch_size, images)
        return LatentPosterior(*np.split(moments, 2, axis=-1), self.network)

    def moments(self, images: ArrayLike) -> Float32[np.ndarray, "B h w moments"]:
        """`encode(images).moments`: mean and log-variance, unscaled."""
        return self.encode(images, batch_size=max(1, len(images))).moments

    def sample(
        self, images: ArrayLike, seed: int = 0, *, first_index: int = 0, batch_size: int = 16
    ) -> Float32[np.ndarray, "B h w C"]:
        """`encode(images).sample(seed)`: latents drawn from the posterior, scaled."""
        posterior = self.encode(images, batch_size=batch_size)
        return posterior.sample(seed, first_index=first_index)

    def decode(
        self, latents: "ArrayLike | LatentPosterior", *, batch_size: int = 16
    ) -> Float32[np.ndarray, "B H W c"]:
        """Latents -> images.

        Args:
          latents: scaled, float [B, h, w, C], as `FlowAR.sample` and the posterior's methods give
            them; or a posterior, of which the mode is decoded.
          batch_size: latents per call of the compiled program.

        Returns:
          images about [-1, 1]. Values may leave this range: the decoder does not clip, and
          `df.to_uint8` does.

        Raises:
          ValueError: another shape or type.
        """
        if isinstance(latents, LatentPosterior):
            latents = latents.mode()
        latents, channels = as_array("latents", latents), self.config.latent_channels
        if latents.ndim != 4 or latents.shape[-1] != channels:
            raise InputError(
                f"latents have shape {latents.shape}, expected [B, h, w, {channels}]: "
                f"{self.source} has {channels} latent channels"
            )
        if not np.issubdtype(latents.dtype, np.floating):
            raise InputError(f"latents are {latents.dtype}, expected floating point numbers")
        if not np.isfinite(latents).all():
            raise InputError("latents hold NaN or infinity")
        return self.run(programs.decode_latents, batch_size, latents.astype(np.float32))


@dataclasses.dataclass(frozen=True, eq=False)
class LatentPosterior(Sequence):
    """A Gaussian over the latents of images, from `VAE.encode`.

    `mode` and `sample` are scaled to about unit variance, which is what `VAE.decode` takes. The
    moments are unscaled; as a sequence the posterior is the pair (mean, logvar).

    Attributes:
      mean, logvar: unscaled, float32 [B, h, w, C].
      network: the autoencoder's module, which knows the scale.
    """

    mean: Float32[np.ndarray, "B h w C"]
    logvar: Float32[np.ndarray, "B h w C"]
    network: autoencoder.Autoencoder = dataclasses.field(repr=False)

    def mode(self) -> Float32[np.ndarray, "B h w C"]:
        """The most likely latents, scaled."""
        return np.asarray(self.network.scale(self.mean))

    def sample(self, seed: int = 0, *, first_index: int = 0) -> Float32[np.ndarray, "B h w C"]:
        """Latents drawn from the posterior, scaled.

        Args:
          seed: of all draws; that of image i depends on the seed and `first_index + i` alone.
          first_index: index of the first image, when a set is encoded in parts.
        """
        keys = sampler.sample_keys(check_seed(seed), sample_indices(first_index, len(self.mean)))
        return np.asarray(programs.draw_latents(self.network, self.mean, self.logvar, keys))

    @property
    def moments(self) -> Float32[np.ndarray, "B h w moments"]:
        """Mean and log-variance along the last axis, unscaled: what latent shards hold."""
        return np.concatenate([self.mean, self.logvar], axis=-1)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index):
        return (self.mean, self.logvar)[index]
