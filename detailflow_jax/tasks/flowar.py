"""Training of FlowAR: flow matching at every position of every scale, in one pass.

Shapes: B batch, S side of the latent, C channels, K scales, T positions of all scales.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, PRNGKeyArray, UInt8

from detailflow_jax.models import flow_sampler
from detailflow_jax.models.autoencoder import Autoencoder, Posterior
from detailflow_jax.models.dc_ae import DCAE, DCAEConfig
from detailflow_jax.models.flowar import SIZES, FlowAR, FlowARConfig, check_vae, example
from detailflow_jax.models.layers import apply, by_batch, drop_labels
from detailflow_jax.models.vae import VAE
from detailflow_jax.ops import Array
from detailflow_jax.ops import images as pixels
from detailflow_jax.ops import scales as grids
from detailflow_jax.ops.objectives import GRIDS, OBJECTIVES
from detailflow_jax.runtime.errors import ConfigError, raised_as
from detailflow_jax.tasks import Task, TrainState, from_section, no_plan, optim, with_size
from detailflow_jax.tasks.vae import autoencoder_config


def model_config(model: Any) -> FlowARConfig:
    """The `model` section of a config as the network's own dataclass.

    `size` names a published size (FlowAR-S, -B, -L, -H); None takes widths and depths as given.
    With a size, `head_depth` may still be given (the paper's H has 18 blocks).

    Raises:
      ConfigError: an unknown size, or values that contradict each other.
    """
    return from_section(FlowARConfig, with_size(model.to_dict(), SIZES), "config.model")


def scale_weights(
    config: FlowARConfig, weights: Sequence[float] | None = None
) -> Float32[np.ndarray, " K"]:
    """Weight of every scale's mean squared error: as given, or i^2 / S^2.

    Raises:
      ConfigError: not one per scale.
    """
    if weights is None:
        return np.square(np.array(config.scales, np.float32) / np.float32(config.latent_side))
    if len(weights) != len(config.scales):
        raise ConfigError(
            f"config.loss.scale_weights has {len(weights)} values, expected one for each of the "
            f"{len(config.scales)} scales {config.scales}"
        )
    return np.array(weights, np.float32)


def flow_losses(
    model: FlowAR,
    params: Any,
    pyramid: tuple[Float[Array, "B T C"], Float[Array, "B T_later C"]],
    labels: Int[Array, " B"],
    times: Float[Array, "B K"],
    noise: Float[Array, "B T C"],
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, " K"], Float[Array, "B T W"]]:
    """Mean squared error of what the head predicts at every scale, and the semantics.

    Args:
      model: the network.
      params: its parameters.
      pyramid: targets and inputs (`ops.scales.pyramid`), of scaled latents.
      labels: null classes drawn already.
      times: one per image and scale.
      noise: at every position.
      dropout_key: PRNG key, or None for no dropout.
    """
    scales = model.config.scales
    data, inputs = pyramid
    objective = OBJECTIVES[model.config.objective]
    time = jnp.take(times, grids.scale_index(scales), axis=1)
    noisy = objective.interpolate(data, noise, time[..., None])
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    semantics, predicted = apply(model, params, inputs, labels, noisy, time, rngs=rngs)
    error = jnp.mean(jnp.square(predicted - objective.target(data, noise)), axis=(0, 2))
    # Means over each scale's own positions, as one product.
    members = grids.scale_index(scales)[None] == np.arange(len(scales))[:, None]
    members = members / np.square(np.array(scales, np.float32))[:, None]
    return jnp.sum(members * error, axis=1), semantics


def draw(
    key: PRNGKeyArray, config: FlowARConfig, batch: int
) -> tuple[Float[Array, "{batch} K"], Float[Array, "{batch} T C"]]:
    """Times U[0, 1) and standard normal noise."""
    time_key, noise_key = jax.random.split(key)
    times = jax.random.uniform(time_key, (batch, len(config.scales)))
    noise = jax.random.normal(noise_key, (batch, config.num_positions, config.channels))
    return by_batch(times), by_batch(noise)


def _vae(config: Any, c: FlowARConfig) -> Autoencoder | None:
    """The frozen autoencoder: encodes images, and decodes the samples that are drawn as figures.

    Raises:
      ConfigError: images to train on but no autoencoder, or one of other channels.
    """
    fields = config.vae.to_dict()
    path, random = fields.pop("path", None), fields.pop("random", False)
    if not (path or random):
        if not config.data.source.startswith("latents:"):
            raise ConfigError(
                "config.vae.path is not set: training on images needs an autoencoder. Name a run "
                "of the vae task or a published checkpoint (kl16.ckpt), or train on cached moments "
                "with config.data.source=latents:DIR (detailflow extract); "
                "config.vae.random=True takes a random one, to try the code only"
            )
        return None
    vae = autoencoder_config(fields, "config.vae")
    with raised_as(ConfigError):
        check_vae(c, vae.latent_channels, "config.vae")
    return DCAE(vae) if isinstance(vae, DCAEConfig) else VAE(vae)


def _latents(
    vae: Autoencoder | None, frozen: Any, batch: Any, key: Array
) -> Float[Array, "B S S C"]:
    """A sample of the scaled latents of a batch of moments or of images."""
    if vae is None or "moments" in batch:
        mean, logvar = jnp.split(batch["moments"], 2, axis=-1)
        return Posterior(mean, logvar).sample(key)
    return _encode(vae, frozen["vae"], pixels.to_float(batch["image"]), key)


def _encode(
    vae: Autoencoder, params: Any, images: Float[Array, "B H W _"], key: Array
) -> Float[Array, "B S S C"]:
    return vae.scale(apply(vae, params, images, method="encode").sample(key))


def reduced_images(
    vae: Autoencoder,
    params: Any,
    images: Float[Array, "B H W _"],
    scales: Sequence[int],
    key: Array,
) -> list[Float[Array, "B _ C"]]:
    """The positions [B, i^2, C] of every scale, each encoded from the image reduced to its size.

    What the paper compares reduced latents with (its ablation).
    """
    levels = []
    for scale, side in enumerate(scales):
        size = side * vae.config.stride
        small = grids.reduce_to(images, size).reshape(len(images), size, size, -1)
        latents = _encode(vae, params, small, jax.random.fold_in(key, scale))
        levels.append(latents.reshape(len(images), side * side, -1))
    return levels


def _scales_from(config: Any) -> str:
    """What the scales are made of: "latent", also for runs older than the choice, or "image".

    Raises:
      ConfigError: something else, or the data has no images.
    """
    scales_from = config.get("scales_from", "latent")
    if scales_from not in ("latent", "image"):
        raise ConfigError(f"config.scales_from={scales_from!r}, expected 'latent' or 'image'")
    if scales_from == "image" and config.data.source.startswith("latents:"):
        raise ConfigError(
            f"config.scales_from='image' needs images, but config.data.source="
            f"{config.data.source} holds latents of one size: name the images, and the autoencoder "
            "in config.vae.path"
        )
    return scales_from


def _check_batch(c: FlowARConfig, vae: Autoencoder | None, batch: Any) -> None:
    """Raises ConfigError if a batch's latents are not those of the scale schedule."""
    if vae is None or "moments" in batch:
        height, width, channels = batch["moments"].shape[1:]
        channels //= 2
    else:
        height, width = (side // vae.config.stride for side in batch["image"].shape[1:3])
        channels = vae.config.latent_channels
    if (height, width, channels) != (c.latent_side, c.latent_side, c.channels):
        raise ConfigError(
            f"the data's latents are {height} x {width} x {channels}; config.model.scales="
            f"{c.scales} and config.model.channels={c.channels} expect "
            f"{c.latent_side} x {c.latent_side} x {c.channels}"
        )


def make(config: Any) -> Task:
    """The FlowAR task of a config (see `configs/flowar.py` for its fields)."""
    c = model_config(config.model)
    model, vae = FlowAR(c), _vae(config, c)
    weights = scale_weights(c, config.loss.scale_weights)
    scales_from = _scales_from(config)
    optimizer = optim.optimizer(config.optim, config.total_steps)

    def init(key: jax.Array) -> TrainState:
        params = model.init(key, *example(c))["params"]
        frozen = {}
        if vae is not None:
            image = jnp.zeros((1, vae.config.stride, vae.config.stride, vae.config.image_channels))
            frozen["vae"] = vae.init(jax.random.fold_in(key, 1), image)["params"]
        return optim.new_state(params, optimizer.init(params), config.ema, frozen=frozen)

    def make_pyramid(frozen, batch, key):
        if vae is None or scales_from == "latent":
            return grids.pyramid(_latents(vae, frozen, batch, key), c.scales)
        images = pixels.to_float(batch["image"])
        return grids.sequence(reduced_images(vae, frozen["vae"], images, c.scales, key), c.scales)

    def train_step(state: TrainState, batch, plan, *, variant=None):
        del plan, variant
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        latent_key, flow_key, label_key, dropout_key = jax.random.split(key, 4)
        pyramid = jax.lax.stop_gradient(make_pyramid(state.frozen, batch, latent_key))
        labels = drop_labels(label_key, batch["label"], c)
        times, noise = draw(flow_key, c, len(labels))

        def mean_loss(params, rows, key):
            losses, _ = flow_losses(model, params, *rows, dropout_key=key)
            by_scale = {f"loss/scale_{side}": losses[k] for k, side in enumerate(c.scales)}
            return jnp.sum(weights * losses), by_scale

        rows = pyramid, labels, times, noise
        new, metrics = optim.update(state, optimizer, mean_loss, rows, dropout_key, config)
        return new, metrics | {"latent_std": jnp.std(pyramid[0][:, c.offsets[-2] :])}

    return Task(
        init,
        no_plan,
        train_step,
        functools.partial(figures, model, vae),
        check=functools.partial(_check_batch, c, vae),
    )


def figures(
    model: FlowAR, vae: Autoencoder | None, state: TrainState, batch: Any, num_steps: int = 25
) -> Mapping[str, UInt8[Array, "_ _ 3"]]:
    """`samples`: four of each of up to eight classes, one column per class.

    Without an autoencoder to decode them (`config.vae.path`) there are none.
    """
    del batch
    if vae is None:
        return {}
    c = model.config
    classes = np.arange(min(8, c.num_classes), dtype=np.int32)
    labels = np.tile(classes, 4)
    params = state.params if state.ema is None else state.ema
    images = _draw(model, vae, params, state.frozen["vae"], labels, num_steps)
    return {
        "samples": pixels.tile(pixels.to_uint8(images).reshape(4, len(classes), *images.shape[1:]))
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def _draw(
    model: FlowAR,
    vae: Autoencoder,
    params: Any,
    vae_params: Any,
    labels: Int[Array, " B"],
    num_steps: int,
) -> Float[Array, "B H W _"]:
    num_scales = len(model.config.scales)
    solver = OBJECTIVES[model.config.objective].default
    times = flow_sampler.flow_times(num_scales, num_steps, GRIDS[solver])
    options = flow_sampler.FlowSamplingOptions(times, guidance_high=0.9, solver=solver)
    keys = jax.random.split(jax.random.key(0), len(labels))
    factors = flow_sampler.guidance_factors(2.4, num_scales)
    latents = flow_sampler.sample(model, params, labels, keys, factors, options=options)
    return apply(vae, vae_params, latents, method="decode")
