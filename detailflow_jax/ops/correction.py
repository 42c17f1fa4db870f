"""Self-correction training: where noise strikes, what it does, and what counts afterwards.

A noise span [start, stop) holds one token inside the causal first c, or one whole group later
(the paper's self-correction training). Spans are arrays [B]; start = stop = N stands for "no
noise", for which every weight below reduces to the plain loss. Shapes: B batch, N tokens, V codes.
"""

import typing

import jax
import jax.numpy as jnp


class Span(typing.NamedTuple):
    """Perturbed positions start <= n < stop, one span a sample: two int32 arrays [B]."""

    start: jax.Array
    stop: jax.Array


def span_of(position: jax.Array, group_size: int, causal_num: int) -> Span:
    """The span that a noise position m (int32 [B]) stands for."""
    group_start = position // group_size * group_size
    single = position < causal_num
    start = jnp.where(single, position, group_start)
    return Span(start, jnp.where(single, position + 1, group_start + group_size))


def no_span(batch: int, num_tokens: int) -> Span:
    """Spans that perturb nothing."""
    end = jnp.full((batch,), num_tokens, jnp.int32)
    return Span(end, end)


def draw_span(
    key: jax.Array,
    batch: int,
    token_count: jax.Array,
    *,
    num_tokens: int,
    group_size: int,
    causal_num: int,
    per_sample: bool = True,
) -> Span:
    """m ~ U[0, t) for t <= c, else U[0, t - g); nothing is perturbed when t = 1.

    Nor when t = g and c = 0: no group is left that could correct for the first one.

    Args:
      key: PRNG key.
      batch: B.
      token_count: t, the number of tokens that will be decoded (an int32 scalar, data).
      num_tokens: N.
      group_size: g.
      causal_num: c.
      per_sample: one position a sample; False draws one for the whole batch, as published.
    """
    limit = jnp.where(token_count <= causal_num, token_count, token_count - group_size)
    uniform = jax.random.uniform(key, (batch if per_sample else 1,))
    position = jnp.minimum((uniform * limit).astype(jnp.int32), limit - 1)
    span = span_of(jnp.broadcast_to(position, (batch,)), group_size, causal_num)
    silent = no_span(batch, num_tokens)
    is_silent = (token_count == 1) | (limit < 1)
    return Span(*(jnp.where(is_silent, n, s) for s, n in zip(span, silent, strict=True)))


def inside(span: Span, num_tokens: int) -> jax.Array:
    """bool [B, N]: the perturbed positions."""
    n = jnp.arange(num_tokens)
    return (n >= span.start[:, None]) & (n < span.stop[:, None])


def after(span: Span, num_tokens: int) -> jax.Array:
    """bool [B, N]: the positions that correct for the noise."""
    return jnp.arange(num_tokens) >= span.stop[:, None]


def splice(span: Span, before: jax.Array, noisy: jax.Array, later: jax.Array) -> jax.Array:
    """`before` the span, `noisy` inside, `later` after it; all [B, N] or [B, N, D]."""
    shape = (*span.start.shape, before.shape[1], *(1,) * (before.ndim - 2))
    is_noisy = inside(span, before.shape[1]).reshape(shape)
    is_later = after(span, before.shape[1]).reshape(shape)
    return jnp.where(is_later, later, jnp.where(is_noisy, noisy, before))


def near_code(distances: jax.Array, choice: jax.Array, top: int = 50) -> jax.Array:
    """The code of rank `choice` (0 = nearest) by ascending distance: int32 [B, N].

    Args:
      distances: of the clean vectors to all codes, float32 [B, N, V].
      choice: rank in [0, min(top, V)), int32 [B, N].
      top: how many nearest codes are candidates.
    """
    _, ranked = jax.lax.top_k(-distances, min(top, distances.shape[-1]))
    return jnp.take_along_axis(ranked, choice[..., None], axis=-1)[..., 0].astype(jnp.int32)


def weighted_vq(clean: jax.Array, corrected: jax.Array, span: Span) -> jax.Array:
    """Mean error of N clean and N - e corrected tokens a sample (e the end of the noise).

    For one e in the whole batch this is N/(2N-e) times the clean mean plus (N-e)/(2N-e) times the
    mean over tokens from e on, as published. Both inputs are [B, N]; returns a scalar.
    """
    num_tokens = clean.shape[1]
    counted = jnp.where(after(span, num_tokens), corrected, 0.0)
    per_sample = (clean.sum(1) + counted.sum(1)) / (2 * num_tokens - span.stop)
    return jnp.mean(per_sample)


def pass_weights(span: Span, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Weights N/(2N-e) and (N-e)/(2N-e) of the clean and the corrected pass, batch means."""
    total = 2 * num_tokens - span.stop
    return jnp.mean(num_tokens / total), jnp.mean((num_tokens - span.stop) / total)
