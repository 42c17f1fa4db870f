"""Codes with noise and their correction, for extraction and evaluation.

Shapes: B images, R their side, N tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int, Integer, Key, UInt8

from detailflow_jax.models.layers import apply
from detailflow_jax.models.tokenizer import Tokenizer
from detailflow_jax.ops import Array, correction
from detailflow_jax.ops import images as pixels


@functools.partial(jax.jit, static_argnames=("network", "top"))
def encode_triplets(
    network: Tokenizer,
    params: Any,
    images: UInt8[Array, "B R R 3"],
    keys: Key[Array, " B"],
    *,
    top: int = 50,
    position: Integer[Array, ""] | None = None,
) -> Int[Array, "B N 3"]:
    """Triplets (clean, input, label) of images, each with noise of its own.

    Args:
      network: the tokenizer.
      params: its parameters.
      images: of the tokenizer's size.
      keys: one PRNG key per image; its noise depends on nothing else.
      top: a perturbed token becomes one of its `top` nearest codes.
      position: the first perturbed token of every image. Its whole group is perturbed; among the
        causal first tokens, it alone. Default: drawn, as in training on all tokens.

    Returns:
      codes without noise; codes with noise, of which those after it are encoded again to correct
      for it; and the target of the second, in which the perturbed tokens are clean.
    """
    c = network.config
    if position is None:
        pairs = jax.vmap(jax.random.split)(keys)
        position_keys, keys = pairs[:, 0], pairs[:, 1]
        groups = {"num_tokens": c.num_tokens, "group_size": c.group_size, "causal_num": c.causal}
        draw = functools.partial(
            correction.draw_span, batch=1, token_count=jnp.int32(c.num_tokens), **groups
        )
        span = jax.tree.map(lambda x: x[:, 0], jax.vmap(draw)(position_keys))
    else:
        span = correction.span_of(jnp.full(len(images), position), c.group_size, c.causal)
    highest = min(top, c.codebook_size)
    draw_choice = lambda key: jax.random.randint(key, (c.num_tokens,), 0, highest)  # noqa: E731
    choice = jax.vmap(draw_choice)(keys)
    pair = apply(network, params, pixels.to_float(images), span, choice, method="encode_pair")
    return pair.triplet


def uncorrected(
    triplets: Int[Array, "B N 3"], position: int, group_size: int, causal_num: int
) -> Int[Array, "B N"]:
    """Codes with noise whose later tokens are the clean ones, so that nothing corrects for it."""
    clean, noisy = triplets[..., 0], triplets[..., 1]
    start = jnp.full(len(triplets), position)
    span = correction.span_of(start, group_size, causal_num)
    return correction.splice(span, clean, noisy, clean)
