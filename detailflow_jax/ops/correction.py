"""Self-correction training: where noise strikes, what it does, and what counts afterwards.

A noise span [start, stop) holds one token within the causal first c, or one whole group later (the
paper's self-correction training). Spans are int32 arrays [B]. start = stop = N means "no noise";
every weight below then reduces to the plain loss.

Shapes: B batch, N tokens, D width, V codes. Sizes: g group, c causal tokens.
"""

import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray, Shaped

from detailflow_jax.ops import Array


class Span(typing.NamedTuple):
    """The perturbed positions start <= n < stop of every sample: two int32 arrays [B]."""

    start: Array
    stop: Array


def span_of(position: Int[Array, " B"], group_size: int, causal_num: int) -> Span:
    """The span of a noise position: the position itself before c, its group from there on."""
    group_start = position // group_size * group_size
    single = position < causal_num
    start = jnp.where(single, position, group_start)
    return Span(start, jnp.where(single, position + 1, group_start + group_size))


def no_span(batch: int, num_tokens: int) -> Span:
    """Spans that perturb nothing."""
    end = jnp.full((batch,), num_tokens, jnp.int32)
    return Span(end, end)


def draw_span(
    key: PRNGKeyArray,
    batch: int,
    token_count: Int[Array, ""] | np.integer | int,
    *,
    num_tokens: int,
    group_size: int,
    causal_num: int,
    per_sample: bool = True,
) -> Span:
    """The span of a random position m, U[0, t) for t <= c and U[0, t - g) for larger t.

    Nothing is perturbed when t = 1, or when t = g and c = 0, since nothing later could correct it.

    Args:
      key: PRNG key.
      batch: B.
      token_count: t, the number of tokens that will be decoded (data, not static).
      num_tokens: N.
      group_size: g.
      causal_num: c.
      per_sample: one position per sample; False draws one for the whole batch, as published.
    """
    limit = jnp.where(token_count <= causal_num, token_count, token_count - group_size)
    uniform = jax.random.uniform(key, (batch if per_sample else 1,))
    position = jnp.minimum((uniform * limit).astype(jnp.int32), limit - 1)
    span = span_of(jnp.broadcast_to(position, (batch,)), group_size, causal_num)
    silent = no_span(batch, num_tokens)
    is_silent = (token_count == 1) | (limit < 1)
    return Span(*(jnp.where(is_silent, n, s) for s, n in zip(span, silent, strict=True)))


def inside(span: Span, num_tokens: int) -> Bool[Array, "B {num_tokens}"]:
    """True at the perturbed positions."""
    n = jnp.arange(num_tokens)
    return (n >= span.start[:, None]) & (n < span.stop[:, None])


def after(span: Span, num_tokens: int) -> Bool[Array, "B {num_tokens}"]:
    """True at the positions that correct the noise."""
    return jnp.arange(num_tokens) >= span.stop[:, None]


def splice(
    span: Span,
    before: Shaped[Array, "B N *D"],
    noisy: Shaped[Array, "B N *D"],
    later: Shaped[Array, "B N *D"],
) -> Shaped[Array, "B N *D"]:
    """`before` ahead of the span, `noisy` inside it, `later` after it; [B, N] or [B, N, D]."""
    shape = (*span.start.shape, before.shape[1], *(1,) * (before.ndim - 2))
    is_noisy = inside(span, before.shape[1]).reshape(shape)
    is_later = after(span, before.shape[1]).reshape(shape)
    return jnp.where(is_later, later, jnp.where(is_noisy, noisy, before))


def near_code(
    distances: Float[Array, "B N V"], choice: Int[Array, "B N"], top: int = 50
) -> Int[Array, "B N"]:
    """The code of rank `choice` by ascending distance, int32; rank 0 is the nearest code.

    Args:
      distances: from the clean vectors to all codes.
      choice: rank in [0, min(top, V)).
      top: how many of the nearest codes are candidates.
    """
    _, ranked = jax.lax.top_k(-distances, min(top, distances.shape[-1]))
    return jnp.take_along_axis(ranked, choice[..., None], axis=-1)[..., 0].astype(jnp.int32)


def weighted_vq(
    clean: Float[Array, "B N"], corrected: Float[Array, "B N"], span: Span
) -> Float[Array, ""]:
    """Mean error over the N clean and the N - e corrected tokens, e being the end of the noise.

    If e is the same in the whole batch, this is N/(2N-e) times the clean mean plus (N-e)/(2N-e)
    times the mean over the tokens from e on, as published.
    """
    num_tokens = clean.shape[1]
    counted = jnp.where(after(span, num_tokens), corrected, 0.0)
    per_sample = (clean.sum(1) + counted.sum(1)) / (2 * num_tokens - span.stop)
    return jnp.mean(per_sample)


def pass_weights(span: Span, num_tokens: int) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weights of the clean and the corrected pass: batch means of N/(2N-e) and (N-e)/(2N-e)."""
    total = 2 * num_tokens - span.stop
    return jnp.mean(num_tokens / total), jnp.mean((num_tokens - span.stop) / total)
