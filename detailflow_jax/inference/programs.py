"""What trained networks do, as compiled programs on arrays of the device.

Shapes: B images or samples, H x W pixels, R full image side, N tokens, n <= N tokens given, V
codes, h x w latent positions, C latent channels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int, Key, Shaped, UInt8

from detailflow_jax.convert.registry import NETWORKS
from detailflow_jax.models import autoencoder, generator, tokenizer
from detailflow_jax.models.layers import apply
from detailflow_jax.ops import Array, interpolation, quantization
from detailflow_jax.ops import images as pixels

Images = Shaped[Array, "B H W c"]
"""uint8, or float in [-1, 1]."""


def network_of(config: Any) -> Any:
    """The network that `config.task` trains, of the sizes in `config.model`."""
    network = NETWORKS[config.task]
    assert network.from_run, f"a {config.task} has no runs"
    return network.module(network.from_run(config.model))


# ------------------------------------------------------------------------------- of one network


@functools.partial(jax.jit, static_argnums=0)
def encode(network: tokenizer.Tokenizer, params: Any, images: Images) -> Int[Array, "B N"]:
    """Images -> codes."""
    return apply(network, params, pixels.to_float(images), method="encode")


@functools.partial(jax.jit, static_argnums=(0, 3))
def decode(
    network: tokenizer.Tokenizer, params: Any, codes: Shaped[Array, "B n ..."], size: int
) -> Float32[Array, "B {size} {size} 3"]:
    """Codes, or vectors [B, n, d] in their place, -> images of `size` px, about [-1, 1]."""
    if codes.ndim == 3:
        return apply(network, params, quantization.normalize(codes), size, method="decode")
    return apply(network, params, codes, size, method="decode_codes")


@functools.partial(jax.jit, static_argnums=0)
def logits(
    network: generator.Generator, params: Any, codes: Int[Array, "B n"], labels: Int[Array, " B"]
) -> Float32[Array, "B N V"]:
    """Teacher-forced logits of every token."""
    return apply(network, params, codes, labels)


@functools.partial(jax.jit, static_argnums=0)
def encode_moments(
    network: autoencoder.Autoencoder, params: Any, images: Images
) -> Float32[Array, "B h w moments"]:
    """Images -> mean and log-variance of their unscaled latents, along the last axis."""
    posterior = apply(network, params, pixels.to_float(images), method="encode")
    return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def draw_latents(
    network: autoencoder.Autoencoder,
    mean: Float32[Array, "B h w C"],
    logvar: Float32[Array, "B h w C"],
    keys: Key[Array, " B"],
) -> Float32[Array, "B h w C"]:
    """Scaled latents drawn from unscaled moments, with one PRNG key per image."""
    draw = lambda mean, logvar, key: autoencoder.Posterior(mean, logvar).sample(key)  # noqa: E731
    return network.scale(jax.vmap(draw)(mean, logvar, keys))


@functools.partial(jax.jit, static_argnums=0)
def decode_latents(
    network: autoencoder.Autoencoder, params: Any, latents: Float32[Array, "B h w C"]
) -> Float32[Array, "B H W _"]:
    """Scaled latents -> images, about [-1, 1]."""
    return apply(network, params, latents, method="decode")


# ------------------------------------------------------------------------------- of either system


def decode_whole(
    network: tokenizer.Tokenizer | autoencoder.Autoencoder,
    params: Any,
    samples: Shaped[Array, "B ..."],
) -> Float32[Array, "B R R 3"]:
    """Codes [B, n], their vectors [B, n, d] or latents [B, h, w, C] -> images.

    What fewer tokens give is enlarged to R.
    """
    if isinstance(network, autoencoder.Autoencoder):
        return decode_latents(network, params, samples)
    resolutions = network.config.resolutions
    size, full = resolutions.decoded_size(samples.shape[1]), network.config.image_size
    images = decode(network, params, samples, size)
    return images if size == full else interpolation.enlarge(images, full)


@functools.partial(jax.jit, static_argnums=0)
def reconstruct(
    network: tokenizer.Tokenizer | autoencoder.Autoencoder,
    params: Any,
    images: UInt8[Array, "B R R 3"],
) -> Float32[Array, "B R R 3"]:
    """Images by way of all their tokens, or of their mean latent."""
    if isinstance(network, autoencoder.Autoencoder):
        mean, _ = jnp.split(encode_moments(network, params, images), 2, axis=-1)
        return decode_latents(network, params, network.scale(mean))
    codes = encode(network, params, images)
    return decode(network, params, codes, network.config.image_size)
