"""Training of the KL autoencoder: reconstruction from a sample of the posterior, and its KL.

The loss terms are in `tasks/losses/`, the step itself in `tasks/trainer.py`.

Shapes: B batch, R image side, C latent channels, h = w = R / stride.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray, UInt8

from detailflow_jax.models.dc_ae import DCAEConfig
from detailflow_jax.models.layers import apply
from detailflow_jax.models.vae import VAE, VAEConfig
from detailflow_jax.ops import Array
from detailflow_jax.ops import images as pixels
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks import Metrics, Task, TrainState, from_section
from detailflow_jax.tasks.losses import Step
from detailflow_jax.tasks.trainer import Trainer


def model_config(model: Any) -> VAEConfig:
    """The `model` section of a config as the network's own dataclass.

    Raises:
      ConfigError: values that contradict each other.
    """
    return from_section(VAEConfig, model.to_dict(), "config.model")


def autoencoder_config(fields: Mapping[str, Any], section: str) -> VAEConfig | DCAEConfig:
    """The configuration of a trained autoencoder of either architecture.

    Args:
      fields: `architecture` "kl", also if there is none, or "dc_ae"; and those of this network.
      section: where they are from, for messages.

    Raises:
      ConfigError: an unknown architecture or field, or values that contradict each other.
    """
    architecture = fields.get("architecture") or "kl"
    if architecture == "dc_ae":
        # A section has the fields of a KL autoencoder, which are not set then.
        given = {name: value for name, value in fields.items() if value is not None}
        return from_section(DCAEConfig, given, section)
    if architecture != "kl":
        raise ConfigError(f"{section}.architecture={architecture!r}; expected 'kl' or 'dc_ae'")
    of_kl = {name: value for name, value in fields.items() if name != "architecture"}
    return from_section(VAEConfig, of_kl, section)


def forward(model: VAE, images: Float[Array, "B R R c"], key: PRNGKeyArray) -> Step:
    """What a step makes of images in [-1, 1], inside of `VAE.apply`."""
    posterior = model.encode(images)
    latents = model.scale(posterior.sample(key))
    reconstruction = model.decode(latents)
    return Step(
        images=images,
        target=images,
        reconstruction=reconstruction,
        latents=latents,
        posterior=posterior,
        watched={
            "kl": jnp.mean(posterior.kl()),  # nats per image
            "psnr": jnp.mean(pixels.psnr(reconstruction, images)),
            "latent_std": jnp.std(latents),  # about 1 where `scale_factor` is right
        },
    )


def make(config: Any) -> Task:
    """The autoencoder task of a config (see `configs/vae.py` for its fields).

    Raises:
      ConfigError: the stride does not divide the images, or terms contradict each other.
    """
    c = model_config(config.model)
    side = config.data.image_size
    if side % c.stride:
        raise ConfigError(
            f"config.data.image_size={side} is no multiple of the autoencoder's stride "
            f"{c.stride}, given by the {len(c.multipliers)} levels of config.model.multipliers"
        )
    return VAETrainer.task(config, VAE(c), smallest=side)


class VAETrainer(Trainer):
    """The functions of a `Task` for what a config makes of the autoencoder."""

    last_kernel = ("decoder", "conv_out", "kernel")
    keys = ("lpips", "adversarial")

    def init(self, key: PRNGKeyArray) -> TrainState:
        """See `Task`."""
        c = self.model.config
        # The parameters' shapes do not depend on the images' size.
        return self.start(key, jnp.zeros((1, c.stride, c.stride, c.image_channels)))

    def train_step(
        self, state: TrainState, batch: Any, plan: Mapping[str, Any], *, variant: Any = None
    ) -> tuple[TrainState, Metrics]:
        """See `Task`."""
        del plan, variant
        images = pixels.to_float(batch["image"])
        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
        return self.step(state, images, key, forward)[:2]

    def figures(
        self, state: TrainState, batch: Any, draws: int = 4
    ) -> Mapping[str, UInt8[Array, "_ _ 3"]]:
        """Pictures of the first 8 images of a batch.

        `reconstructions`: originals above reconstructions from the posterior's mean.
        `posterior_samples`: one row per image, decoded from several draws of its posterior, and
        the original.
        """
        images = pixels.to_float(jnp.asarray(batch["image"][:8]))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.step), draws)
        made = [_reconstruct(self.model, state.params, images, key) for key in (None, *keys)]
        show = pixels.to_uint8(jnp.stack([*made, images]))
        return {
            "reconstructions": pixels.tile(jnp.stack([show[-1], show[0]])),
            "posterior_samples": pixels.tile(jnp.swapaxes(show[1:], 0, 1)),
        }


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(model: VAE, params: Any, images: Array, key: Array | None) -> Array:
    return apply(model, params, images, key)[0]
