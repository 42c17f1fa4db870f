"""Training of the KL autoencoder: reconstruction from a sample of the posterior, and its KL.

Shapes: B batch, R image side, C latent channels, h = w = R / stride.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from detailflow_jax.models.vae import VAE, VAEConfig
from detailflow_jax.ops import images as pixels
from detailflow_jax.tasks import Task, TrainState, optim


def model_config(model) -> VAEConfig:
    """The `model` part of a config as the network's own dataclass."""
    return VAEConfig(**model.to_dict())


def all_losses(model: VAE, images: jax.Array, key: jax.Array, *, loss):
    """Every loss term of one batch, inside `VAE.apply`.

    Reconstruction and KL are both sums over an image, divided by its number of values: so
    `loss.kl` weighs them as the LDM family does, and does not depend on the image's size.

    Args:
      model: the bound VAE.
      images: float32 [B, R, R, 3] in [-1, 1].
      key: of the posterior's sample.
      loss: the `loss` part of the config.

    Returns:
      {name: scalar}, weights included, and what to watch, {name: scalar}.
    """
    posterior = model.encode(images)
    latents = model.scale(posterior.sample(key))
    reconstruction = model.decode(latents)
    kl = jnp.mean(posterior.kl())
    terms = {
        "mse": loss.mse * jnp.mean(jnp.square(reconstruction - images)),
        "kl": loss.kl * kl / images[0].size,
    }
    # Perceptual (LPIPS) and adversarial terms join here: both compare `reconstruction` with
    # `images`.
    watched = {
        "kl": kl,  # nats an image
        "psnr": jnp.mean(pixels.psnr(reconstruction, images)),
        "latent_std": jnp.std(latents),  # about 1 where `scale_factor` is right
    }
    return terms, watched


def _check(config, c: VAEConfig) -> None:
    """Refuses what cannot be trained.

    Raises:
      ValueError: a loss term that is not there, or images that the stride does not divide.
    """
    for name in ("perceptual", "adversarial"):
        if config.loss[name]:
            raise ValueError(
                f"config.loss.{name}={config.loss[name]}: this term is not available for the "
                f"autoencoder; set config.loss.{name}=0"
            )
    if config.data.image_size % c.stride:
        raise ValueError(
            f"config.data.image_size={config.data.image_size} is no multiple of the autoencoder's "
            f"stride {c.stride}, given by the {len(c.multipliers)} levels of "
            "config.model.multipliers"
        )


def make(config) -> Task:
    """The autoencoder task of a config (see `configs/vae.py` for its fields)."""
    c = model_config(config.model)
    _check(config, c)
    model = VAE(c)
    optimizer = optim.optimizer(config.optim, config.total_steps)

    def init(key: jax.Array) -> TrainState:
        # The parameters' shapes do not depend on the images' size.
        example = jnp.zeros((1, c.stride, c.stride, c.image_channels))
        params = model.init(key, example)["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            ema=optim.start_average(params, config.ema),
        )

    def plan(step: int) -> tuple[None, dict[str, np.ndarray]]:
        del step  # nothing is decided on the host: one program for every step
        return None, {}

    def train_step(state: TrainState, batch, plan, *, variant=None):
        del plan, variant
        images = pixels.to_float(batch["image"])
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)

        def total(params, images, key):
            losses = functools.partial(all_losses, images=images, key=key, loss=config.loss)
            terms, watched = model.apply({"params": params}, method=losses)
            by_name = {f"loss/{name}": value for name, value in terms.items()}
            return sum(terms.values()), by_name | watched

        (loss, means), grads = optim.gradients(total, state.params, images, key, config.accumulate)
        new = optim.updated(state, optimizer, grads, config.ema)
        return new, means | {"loss": loss, "gradient_norm": optax.global_norm(grads)}

    return Task(init, plan, train_step, functools.partial(figures, model))


def figures(model: VAE, state: TrainState, batch, draws: int = 4) -> dict[str, np.ndarray]:
    """Pictures of the first 8 images of a batch, uint8 [H, W, 3].

    `reconstructions`: originals above reconstructions from the posterior's mean.
    `posterior_samples`: a row an image, decoded from several draws of its posterior, and the
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
