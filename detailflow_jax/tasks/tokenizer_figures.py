"""Pictures of what a tokenizer makes of a batch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detailflow_jax.models.tokenizer import Tokenizer, TokenizerConfig
from detailflow_jax.ops import images as pixels
from detailflow_jax.ops import interpolation


def draw(model: Tokenizer, params: Any, images: jax.Array, counts: list[int]):
    """Pictures of uint8 images [B, s, s, 3], encoded in `counts[-1]` tokens; uint8 [H, W, 3] each.

    `reconstructions`: originals above reconstructions. `coarse_to_fine`: a row an image, decoded
    from each of `counts` tokens, and the original.
    """
    images = pixels.to_float(images)
    codes = _encode(model, params, images, counts[-1])
    strip = decode_progressively(model, params, codes, counts, images.shape[1])
    show = pixels.to_uint8(jnp.concatenate([strip, images[None]]))
    pair = jnp.stack([show[-1], show[-2]])
    return {
        "reconstructions": pixels.tile(pair),
        "coarse_to_fine": pixels.tile(jnp.swapaxes(show, 0, 1)),
    }


@functools.partial(jax.jit, static_argnums=(0, 3))
def _encode(model: Tokenizer, params: Any, images: jax.Array, num_tokens: int) -> jax.Array:
    return model.apply({"params": params}, images, num_tokens, method="encode")


@functools.partial(jax.jit, static_argnums=(0, 3))
def _decode(model: Tokenizer, params: Any, codes: jax.Array, size: int, num_tokens: jax.Array):
    return model.apply({"params": params}, codes, size, num_tokens, method="decode_codes")


def group_counts(config: TokenizerConfig, most: int = 16, tokens: int | None = None) -> list[int]:
    """At most `most` token counts of whole groups, evenly spread, the last one `tokens` (N)."""
    tokens = tokens or config.num_tokens
    groups = -(-tokens // config.group_size)  # fewer than a group count as one
    picked = np.unique(np.linspace(1, groups, min(groups, most)).round().astype(int))
    return [min(int(n) * config.group_size, tokens) for n in picked]


def decode_progressively(model: Tokenizer, params: Any, codes, counts, size: int) -> jax.Array:
    """The first n codes for every n in `counts`, enlarged to `size`: [counts, B, size, size, 3]."""
    resolutions = model.config.resolutions
    return jnp.stack(
        [
            interpolation.enlarge(
                _decode(model, params, codes, resolutions.decoded_size(n), jnp.int32(n)), size
            )
            for n in counts
        ]
    )
