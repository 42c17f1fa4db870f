"""Training of the KL autoencoder: reconstruction from a sample of the posterior, and its KL.

The loss terms are in `tasks/losses/`, the step itself in `tasks/trainer.py`.

Shapes: B batch, R image side, C latent channels, h = w = R / stride.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detailflow_jax.models.vae import VAE, VAEConfig
from detailflow_jax.ops import images as pixels
from detailflow_jax.runtime.errors import ConfigError
from detailflow_jax.tasks import Task, TrainState, optim
from detailflow_jax.tasks.losses import Setting, Step, make_losses
from detailflow_jax.tasks.trainer import Trainer


def model_config(model) -> VAEConfig:
    """The `model` part of a config as the network's own dataclass."""
    return VAEConfig(**model.to_dict())


def forward(model: VAE, images: jax.Array, key: jax.Array) -> Step:
    """What a step makes of images [B, R, R, 3] in [-1, 1], inside of `VAE.apply`."""
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


def make(config) -> Task:
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
    trainer = VAETrainer(
        config=config,
        model=VAE(c),
        losses=make_losses(Setting(config, c, side)),
        optimizer=optim.optimizer(config.optim, config.total_steps),
        last_kernel=("decoder", "conv_out", "kernel"),
        keys=("lpips", "adversarial"),
    )
    return Task(
        trainer.init,
        trainer.plan,
        trainer.train_step,
        functools.partial(figures, trainer.model),
        frozen=tuple(trainer.frozen.values()),
    )


class VAETrainer(Trainer):
    """The functions of a `Task` over what a config makes of the autoencoder."""

    def init(self, key: jax.Array) -> TrainState:
        """See `Task`."""
        c = self.model.config
        # The parameters' shapes do not depend on the images' size.
        return self.start(key, jnp.zeros((1, c.stride, c.stride, c.image_channels)))

    def plan(self, step: int) -> tuple[None, dict[str, np.ndarray]]:
        """See `Task`. Nothing is decided on the host: one program for every step."""
        del step
        return None, {}

    def train_step(self, state: TrainState, batch, plan, *, variant=None):
        """See `Task`."""
        del plan, variant
        images = pixels.to_float(batch["image"])
        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
        return self.step(state, images, key, forward)[:2]


def figures(model: VAE, state: TrainState, batch, draws: int = 4) -> dict[str, np.ndarray]:
    """Pictures of the first 8 images of a batch, uint8 [H, W, 3].

    `reconstructions`: originals above reconstructions from the posterior's mean.
    `posterior_samples`: one row per image, decoded from several draws of its posterior, and the
    original.
    """
    images = pixels.to_float(jnp.asarray(batch["image"][:8]))
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), state.step), draws)
    show = jnp.stack(
        [
            _reconstruct(model, state.params, images, None),
            *(_reconstruct(model, state.params, images, key) for key in keys),
            images,
        ]
    )
    show = pixels.to_uint8(show)
    return {
        "reconstructions": pixels.tile(jnp.stack([show[-1], show[0]])),
        "posterior_samples": pixels.tile(jnp.swapaxes(show[1:], 0, 1)),
    }


@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(model: VAE, params: Any, images: jax.Array, key: jax.Array | None) -> jax.Array:
    return model.apply({"params": params}, images, key)[0]
