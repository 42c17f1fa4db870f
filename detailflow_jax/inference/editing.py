"""What trained models do with an image that is there: edit a part, vary it, make it larger.

FlowAR keeps latents and samples the others; the generator continues codes.

Shapes: B images, H x W pixels, S side of the latent, R full image side, n <= N tokens.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Shaped, UInt8

from detailflow_jax.inference.checks import (
    ArrayLike,
    as_array,
    as_images,
    check_images,
    check_mask,
    check_whole,
)
from detailflow_jax.inference.errors import InputError, as_input_error
from detailflow_jax.inference.models import VAE, FlowAR, Generator, Tokenizer
from detailflow_jax.inference.pairs import check_pair
from detailflow_jax.ops import images as pixels
from detailflow_jax.ops import interpolation


def edit(
    vae: VAE,
    flowar: FlowAR,
    images: ArrayLike,
    mask: ArrayLike,
    labels: ArrayLike | None,
    seed: int = 0,
    **settings: Any,
) -> Float32[np.ndarray, "B R R c"]:
    """Images whose masked part is sampled anew; elsewhere they are the VAE's reconstructions.

    At every scale, and at every flow step, the kept latents stand at their place on the path from
    noise to data, so that what is sampled fits them. A latent of which a pixel is masked is new.

    Args:
      vae: of the latents that `flowar` was trained on.
      flowar: samples the masked part.
      images: [B, R, R, c], uint8 or float in [-1, 1], R being the side that `flowar` makes.
      mask: bool [R, R] or [B, R, R], true where the image is to be new.
      labels: class of the new part, [B]; None for no class.
      seed: image i depends on it and on i alone.
      **settings: of `FlowAR.sample`.

    Returns:
      images about [-1, 1].

    Raises:
      InputError: models that do not belong together, images or a mask of another size, an empty
        mask, a label or setting out of range.
    """
    check_pair(vae, flowar)
    images, mask, c = as_images(images), as_array("the mask", mask), vae.config
    side = flowar.config.latent_side * c.stride
    check_images(images, c.image_channels)
    if images.shape[1:3] != (side, side):
        found = " x ".join(map(str, images.shape[1:3]))
        raise InputError(f"images are {found}, expected {side} x {side}, which this FlowAR makes")
    if mask.ndim == 2:
        mask = np.broadcast_to(mask, (len(images), *mask.shape))
    check_mask(mask, (len(images), side, side))
    latents = vae.encode(images).mode()
    blocks = mask.reshape(len(mask), side // c.stride, c.stride, side // c.stride, c.stride)
    cells = np.asarray(blocks.any(axis=(2, 4)))  # [B, S, S]
    edited = flowar.sample(labels, seed, latents=latents, mask=cells, **settings)
    return np.where(mask[..., None], vae.decode(edited), vae.decode(latents))


def on_canvas(
    images: UInt8[np.ndarray, "B h w c"], side: int
) -> tuple[UInt8[np.ndarray, "B {side} {side} c"], Bool[np.ndarray, "{side} {side}"]]:
    """Images in the middle of a larger canvas, and the mask of what is to be painted around them.

    The canvas repeats the border of the image: latents beside the border read some of it.

    Raises:
      InputError: images that leave nothing to paint.
    """
    height, width = images.shape[1:3]
    if max(height, width) > side or (height, width) == (side, side):
        raise InputError(f"images are {height} x {width}, expected smaller ones than the {side} px")
    top, left = (side - height) // 2, (side - width) // 2
    around = (top, side - height - top), (left, side - width - left)
    mask = np.pad(np.zeros((height, width), bool), around, constant_values=True)
    return np.pad(images, ((0, 0), *around, (0, 0)), mode="edge"), mask


def vary(
    tokenizer: Tokenizer,
    generator: Generator,
    images: ArrayLike,
    labels: ArrayLike | None,
    keep: int,
    seed: int = 0,
    **settings: Any,
) -> Float32[np.ndarray, "B R R 3"]:
    """Images that share their first tokens with the given ones; the others are sampled.

    Few kept tokens keep the composition, many change the details only.

    Args:
      tokenizer: of the codes that `generator` was trained on.
      generator: continues the codes.
      images: [B, H, W, 3], uint8 or float in [-1, 1]; sides a multiple of the patch.
      labels: class of the sampled tokens, [B]; None for no class.
      keep: how many tokens are kept, 0 .. N.
      seed: image i depends on it and on i alone.
      **settings: of `Generator.sample`.

    Returns:
      images about [-1, 1].

    Raises:
      InputError: models that do not belong together, a count, label or setting out of range.
    """
    check_pair(tokenizer, generator)
    keep = check_whole("keep", keep, 0, tokenizer.config.num_tokens)
    prefix = tokenizer.encode(images)[:, :keep]
    return tokenizer.decode(generator.sample(labels, seed, prefix=prefix, **settings))


def upscale(
    tokenizer: Tokenizer,
    generator: Generator,
    images: Shaped[np.ndarray, "B s s 3"],
    labels: ArrayLike | None = None,
    seed: int = 0,
    *,
    enlarged: bool = False,
    **settings: Any,
) -> Float32[np.ndarray, "B R R 3"]:
    """Small images at full size: their tokens, as many as their size stands for, and sampled ones.

    An image of s px is encoded at its own size, which a tokenizer has to be trained for, or
    enlarged first. Its first n codes are kept, n being the inverse of the resolution map at s, and
    the generator adds the others.

    Args:
      tokenizer: of the codes that `generator` was trained on.
      generator: adds the detail.
      images: uint8 or float in [-1, 1]; s is one of the sizes that tokens decode to.
      labels: class of the images, [B]; None for no class.
      seed: image i depends on it and on i alone.
      enlarged: encode them brought to R px by bicubic interpolation, not at s px.
      **settings: of `Generator.sample`.

    Returns:
      images about [-1, 1].

    Raises:
      InputError: a size that no number of tokens stands for; else as `vary`.
    """
    images = as_images(images)
    check_images(images, channels=3)
    height, width = images.shape[1:3]
    if height != width:
        raise InputError(f"images are {height} x {width}, expected square ones")
    with as_input_error(f"images of {height} px: "):
        keep = tokenizer.config.resolutions.best_count(height)
    if enlarged:
        large = interpolation.enlarge(pixels.to_float(images), tokenizer.config.image_size)
        images = np.clip(large, -1, 1)
    return vary(tokenizer, generator, images, labels, keep, seed, **settings)
