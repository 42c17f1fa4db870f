"""Pixels: value ranges and tiling."""

import einops
import jax
import jax.numpy as jnp
import numpy as np


def to_float(images: jax.Array) -> jax.Array:
    """uint8 [0, 255] -> float32 [-1, 1] by x/127.5 - 1; floating images pass unchanged.

    Raises:
      TypeError: neither uint8 nor floating point.
    """
    if images.dtype == jnp.uint8:
        return images / jnp.float32(127.5) - jnp.float32(1.0)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images are {images.dtype}; expected uint8, or floats in [-1, 1]")
    return images


def to_uint8(images: jax.Array) -> jax.Array:
    """Float [-1, 1] -> uint8: clip(127.5 * x + 128, 0, 255), truncated, as published."""
    return jnp.clip(127.5 * images + 128.0, 0.0, 255.0).astype(jnp.uint8)


def tile(images: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """[rows, columns, H, W, C] -> one picture [rows*H, columns*W, C], where the images are."""
    return einops.rearrange(images, "r c h w ch -> (r h) (c w) ch")


def psnr(images: jax.Array, reference: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], one value an image: [B]."""
    error = jnp.mean(jnp.square(jnp.clip(images, -1, 1) - reference), axis=(-3, -2, -1))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(error, 1e-12))
