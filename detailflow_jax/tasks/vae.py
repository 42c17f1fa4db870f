"""Training of the KL autoencoder: reconstruction from a sample of the posterior, and its KL.

Perceptual and adversarial terms are in `tasks/adversarial.py`.

Shapes: B batch, R image side, C latent channels, h = w = R / stride.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from detailflow_jax.models import lpips
from detailflow_jax.models.vae import VAE, VAEConfig
from detailflow_jax.ops import images as pixels
from detailflow_jax.tasks import Task, TrainState, adversarial, optim


def model_config(model) -> VAEConfig:
    """The `model` part of a config as the network's own dataclass."""
    return VAEConfig(**model.to_dict())


def all_losses(model: VAE, images: jax.Array, key: jax.Array, *, loss, perceptual=None):
    """Every loss term of one batch but the adversarial one, inside `VAE.apply`.

    Reconstruction and KL are both sums over an image, divided by its number of values: so
    `loss.kl` weighs them as the LDM family does, and does not depend on the image's size.

    Args:
      model: the bound VAE.
      images: float32 [B, R, R, 3] in [-1, 1].
      key: of the posterior's sample.
      loss: the `loss` part of the config.
      perceptual: (reconstruction, images) -> scalar, weight included, or None.

    Returns:
      {name: scalar}, weights included; what to watch, {name: scalar}; the reconstruction,
      float32 [B, R, R, 3].
    """
    posterior = model.encode(images)
    latents = model.scale(posterior.sample(key))
    reconstruction = model.decode(latents)
    kl = jnp.mean(posterior.kl())
    terms = {
        "mse": loss.mse * jnp.mean(jnp.square(reconstruction - images)),
        "kl": loss.kl * kl / images[0].size,
    }
    if perceptual is not None:
        terms["perceptual"] = perceptual(reconstruction, images)
    watched = {
        "kl": kl,  # nats an image
        "psnr": jnp.mean(pixels.psnr(reconstruction, images)),
        "latent_std": jnp.std(latents),  # about 1 where `scale_factor` is right
    }
    return terms, watched, reconstruction


def make(config) -> Task:
    """The autoencoder task of a config (see `configs/vae.py` for its fields).

    Raises:
      ValueError: images that the stride does not divide, or terms that cannot be.
    """
    c = model_config(config.model)
    side = config.data.image_size
    if side % c.stride:
        raise ValueError(
            f"config.data.image_size={side} is no multiple of the autoencoder's stride "
            f"{c.stride}, given by the {len(c.multipliers)} levels of config.model.multipliers"
        )
    trainer = Trainer(
        config=config,
        model=VAE(c),
        vgg=adversarial.perceptual_network(config, side, jnp.dtype(c.dtype)),
        adversary=adversarial.make(config, c, side),
        optimizer=optim.optimizer(config.optim, config.total_steps),
    )
    return Task(trainer.init, trainer.plan, trainer.train_step, trainer.figures)


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """The functions of a `Task` over what a config makes of the autoencoder.

    Attributes:
      config: of the task.
      model: the network.
      vgg: frozen, of the perceptual term, or None.
      adversary: None where there is no adversarial term.
      optimizer: of the network.
    """

    config: Any
    model: VAE
    vgg: lpips.LPIPS | None
    adversary: adversarial.Adversary | None
    optimizer: optax.GradientTransformation

    def init(self, key: jax.Array) -> TrainState:
        """See `Task`."""
        c = self.model.config
        # The parameters' shapes do not depend on the images' size.
        example = jnp.zeros((1, c.stride, c.stride, c.image_channels))
        params = self.model.init(key, example)["params"]
        extra, frozen = {}, {}
        if self.vgg is not None:
            frozen["lpips"] = adversarial.perceptual_init(self.vgg, jax.random.fold_in(key, 1))
        if self.adversary is not None:
            held = self.adversary.init(jax.random.fold_in(key, 2))
            extra["discriminator"], frozen["dino"] = held
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(params),
            ema=optim.start_average(params, self.config.ema),
            extra=extra,
            frozen=frozen,
        )

    def plan(self, step: int) -> tuple[None, dict[str, np.ndarray]]:
        """See `Task`. Nothing is decided on the host: one program for every step."""
        del step
        return None, {}

    def train_step(self, state: TrainState, batch, plan, *, variant=None):
        """See `Task`."""
        del plan, variant
        images = pixels.to_float(batch["image"])
        key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
        if self.adversary is not None:
            return self._adversarial_step(state, images, key)

        def total(params, images, key):
            terms, watched, _ = self._forward(state, params, images, key)
            return sum(terms.values()), _by_name(terms) | watched

        (_, found), grads = optim.gradients(
            total, state.params, images, key, self.config.accumulate
        )
        return self._update(state, grads, found)

    def _forward(self, state: TrainState, params: Any, images: jax.Array, key: jax.Array):
        """`all_losses` with other parameters."""
        loss = self.config.loss
        losses = functools.partial(
            all_losses,
            images=images,
            key=key,
            loss=loss,
            perceptual=adversarial.perceptual_term(loss, self.vgg, state),
        )
        return self.model.apply({"params": params}, method=losses)

    def _adversarial_step(self, state: TrainState, images: jax.Array, key: jax.Array):
        def loss(params):
            terms, watched, reconstruction = self._forward(state, params, images, key)
            return (sum(terms.values()), reconstruction), (terms, watched)

        grads, (terms, watched), term, held, metrics = self.adversary.gradients(
            loss,
            state.params,
            held=state.extra["discriminator"],
            frozen=state.frozen["dino"],
            target=images,
            step=state.step,
            key=jax.random.fold_in(key, 1),
            last_kernel=lambda grads: grads["decoder"]["conv_out"]["kernel"],
        )
        new, found = self._update(state, grads, _by_name(terms | term) | watched)
        return new.replace(extra=state.extra | {"discriminator": held}), found | metrics

    def _update(self, state: TrainState, grads: Any, found: dict[str, jax.Array]):
        new = optim.updated(state, self.optimizer, grads, self.config.ema)
        loss = sum(value for name, value in found.items() if name.startswith("loss/"))
        return new, found | {"loss": loss, "gradient_norm": optax.global_norm(grads)}

    def figures(self, state: TrainState, batch) -> dict[str, np.ndarray]:
        """Pictures of the first 8 images of a batch; see `figures`."""
        return figures(self.model, state, batch)


def _by_name(terms: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {f"loss/{name}": value for name, value in terms.items()}


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
