"""Sampling codes: the whole loop is one jitted program with a key/value cache.

The class token gives z_1, then tokens come one by one to z_c; [z_c, s_1 .. s_{g-1}] gives the next
group, and every group the next (the paper's parallel inference). With c = 0 the class stands for
z_c. The published sampler recomputes the whole prefix at each step; the group mask makes caching
exact.

Shapes: B samples, n tokens asked for, g group, c causal, V codes; R = B rows, or 2B under guidance
(of each sample the conditional row, then the null row).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from detailflow_jax.models.generator import Generator, empty_cache, extend_cache
from detailflow_jax.ops import logits as filters


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """What shapes the program; numbers that may vary without a new compile are arguments.

    Attributes:
      num_tokens: n.
      guided: compute the null half. Without guidance (scale 1) it is not computed.
      greedy: take the most likely code.
      top_k: keep the k most likely codes; 0 keeps all.
      use_top_p: apply the top-p filter.
    """

    num_tokens: int
    guided: bool = True
    greedy: bool = False
    top_k: int = 0
    use_top_p: bool = False


@dataclasses.dataclass(frozen=True)
class _Program:
    """The model, its parameters and the settings of one sampling run, bound together."""

    model: Generator
    params: Any
    options: SamplingOptions
    keys: jax.Array
    scales: jax.Array
    temperature: jax.Array
    top_p: jax.Array

    def apply(self, method: str, *args):
        return self.model.apply({"params": self.params}, *args, method=method)

    def rows(self, x: jax.Array) -> jax.Array:
        """Sample rows [B, ...] as network rows [R, ...]: both halves see the same codes."""
        return filters.pair(x, x) if self.options.guided else x

    def choose(self, logits: jax.Array, start: jax.Array) -> jax.Array:
        """Logits [R, m, V] of tokens start .. start + m - 1 -> codes int32 [B, m]."""
        options = self.options
        if options.guided:
            scale = jax.lax.dynamic_slice_in_dim(self.scales, start, logits.shape[1])
            logits = filters.guide(*filters.unpair(logits), scale[:, None])
        if options.greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = filters.top_k_filter(logits / self.temperature, options.top_k)
        if options.use_top_p:
            logits = filters.top_p_filter(logits, self.top_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, start)
        return filters.sample_codes(keys, logits)

    def advance(self, carry, start: jax.Array, x: jax.Array):
        """Run embedded positions x [R, m, D] at `start`; returns the carry and their codes."""
        codes, cache = carry
        logits, new = self.apply("step", x, cache, start)
        chosen = self.choose(logits, start)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, chosen, start, axis=1)
        return codes, extend_cache(cache, new, start)


@functools.partial(jax.jit, static_argnames=("model", "options"))
def sample(
    model: Generator,
    params: Any,
    labels: jax.Array,
    keys: jax.Array,
    scales: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    *,
    options: SamplingOptions,
) -> jax.Array:
    """Codes for labels, in one program.

    Args:
      model: the generator.
      params: its parameters, in the layout of `model.config.scan`.
      labels: int32 [B].
      keys: one PRNG key a sample, [B]; a sample depends on its own key alone.
      scales: guidance scale at each token, float32 [N] (`ops.logits.guidance_scales`).
      temperature: float32 scalar.
      top_p: float32 scalar, used if `options.use_top_p`.
      options: static settings.

    Returns:
      int32 [B, n].
    """
    c, n = model.config, options.num_tokens
    program = _Program(model, params, options, keys, scales, temperature, top_p)
    classes = labels
    if options.guided:
        classes = filters.pair(labels, jnp.full_like(labels, c.num_classes))
    # Room for whole groups; a count inside the causal part is cut at the end.
    codes = jnp.zeros((len(labels), c.num_tokens), jnp.int32)
    carry = codes, empty_cache(c, len(classes))

    last = program.apply("embed_class", classes)
    if c.causal:
        carry = program.advance(carry, jnp.int32(0), last)

    def one(i, carry):
        previous = jax.lax.dynamic_slice_in_dim(carry[0], i - 1, 1, axis=1)
        return program.advance(carry, i, program.apply("embed_codes", program.rows(previous)))

    carry = jax.lax.fori_loop(1, min(n, c.causal), one, carry)
    if n > c.causal:
        if c.causal:
            last = carry[0][:, c.causal - 1 : c.causal]
            last = program.apply("embed_codes", program.rows(last))
        special = program.apply("embed_special", len(classes))
        x = jnp.concatenate([last, special], axis=1)
        carry = program.advance(carry, jnp.int32(c.causal), x)

    def group(i, carry):
        start = i * c.group_size
        previous = jax.lax.dynamic_slice_in_dim(
            carry[0], start - c.group_size, c.group_size, axis=1
        )
        return program.advance(carry, start, program.apply("embed_codes", program.rows(previous)))

    first = c.causal // c.group_size + 1
    carry = jax.lax.fori_loop(first, max(n // c.group_size, first), group, carry)
    return carry[0][:, :n]


def sample_keys(seed: int, indices: jax.Array) -> jax.Array:
    """One key a sample from the seed and the sample's own index: keys [B]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
