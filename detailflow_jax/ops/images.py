"""Pixels: value ranges, tiling, PSNR."""

import einops
import jax.numpy as jnp
from jaxtyping import Float, Shaped, UInt8

from detailflow_jax.ops import Array


def to_float(images: Shaped[Array, "..."]) -> Float[Array, "..."]:
    """uint8 images [0, 255] as float32 [-1, 1], by x/127.5 - 1; floating images are unchanged.

    Raises:
      TypeError: if the images are neither uint8 nor floating point.
    """
    if images.dtype == jnp.uint8:
        return images / jnp.float32(127.5) - jnp.float32(1.0)
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images are {images.dtype}; expected uint8, or floats in [-1, 1]")
    return images


def to_uint8(images: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Float images [-1, 1] as uint8: clip(127.5 * x + 128, 0, 255), truncated, as published."""
    return jnp.clip(127.5 * images + 128.0, 0.0, 255.0).astype(jnp.uint8)


def tile(images: Shaped[Array, "rows columns H W C"]) -> Shaped[Array, "H_all W_all C"]:
    """One picture [rows*H, columns*W, C] of images [rows, columns, H, W, C], on their device."""
    return einops.rearrange(images, "r c h w ch -> (r h) (c w) ch")


def psnr(
    images: Float[Array, "*B H W C"], reference: Float[Array, "*B H W C"]
) -> Float[Array, "*B"]:
    """Peak signal-to-noise ratio in dB, per image, of images in [-1, 1]."""
    error = jnp.mean(jnp.square(jnp.clip(images, -1, 1) - reference), axis=(-3, -2, -1))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(error, 1e-12))
