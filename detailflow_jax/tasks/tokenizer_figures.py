"""Pictures of what a tokenizer makes of a batch.

Shapes: B images, s their side in pixels, N tokens; H x W pixels of a picture.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from detailflow_jax.models.layers import apply
from detailflow_jax.models.tokenizer import Tokenizer, TokenizerConfig
from detailflow_jax.ops import Array, interpolation
from detailflow_jax.ops import images as pixels


def draw(
    model: Tokenizer, params: Any, images: UInt8[Array, "B s s 3"], counts: Sequence[int]
) -> Mapping[str, UInt8[Array, "_ _ 3"]]:
    """Pictures of images, encoded in `counts[-1]` tokens.

    `reconstructions`: originals above reconstructions. `coarse_to_fine`: one row per image, decoded
    from each of `counts` tokens, and the original.
    """
    originals = pixels.to_float(images)
    codes = _encode(model, params, originals, counts[-1])
    strip = decode_progressively(model, params, codes, counts, images.shape[1])
    show = pixels.to_uint8(jnp.concatenate([strip, originals[None]]))
    pair = jnp.stack([show[-1], show[-2]])
    return {
        "reconstructions": pixels.tile(pair),
        "coarse_to_fine": pixels.tile(jnp.swapaxes(show, 0, 1)),
    }


@functools.partial(jax.jit, static_argnums=(0, 3))
def _encode(model: Tokenizer, params: Any, images: Array, num_tokens: int) -> Array:
    return apply(model, params, images, num_tokens, method="encode")


@functools.partial(jax.jit, static_argnums=(0, 3))
def _decode(model: Tokenizer, params: Any, codes: Array, size: int, num_tokens: Array) -> Array:
    return apply(model, params, codes, size, num_tokens, method="decode_codes")


def group_counts(config: TokenizerConfig, most: int = 16, tokens: int | None = None) -> list[int]:
    """At most `most` token counts of whole groups, evenly spread, the last one `tokens` (N)."""
    tokens = tokens or config.num_tokens
    groups = -(-tokens // config.group_size)  # fewer than a group count as one
    picked = np.unique(np.linspace(1, groups, min(groups, most)).round().astype(int))
    return [min(int(n) * config.group_size, tokens) for n in picked]


def decode_progressively(
    model: Tokenizer, params: Any, codes: Int[Array, "B N"], counts: Sequence[int], size: int
) -> Float[Array, "counts B {size} {size} 3"]:
    """Images of the first n codes for every n in `counts`, enlarged to `size`."""
    resolutions = model.config.resolutions
    return jnp.stack(
        [
            interpolation.enlarge(
                _decode(model, params, codes, resolutions.decoded_size(n), jnp.int32(n)), size
            )
            for n in counts
        ]
    )
