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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int, Int32, Key

from detailflow_jax.models.generator import Generator, empty_cache, extend_cache
from detailflow_jax.ops import Array
from detailflow_jax.ops import logits as filters

Rule = Callable[[Array], Array]
"""Logits float32 [..., V] -> logits; -inf excludes a code."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """The static settings; numbers that may vary without a new compilation are arguments.

    Attributes:
      num_tokens: n.
      guided: compute the null half. Without guidance (scale 1) it is not computed.
    """

    num_tokens: int
    guided: bool = True


@dataclasses.dataclass(frozen=True)
class _Program:
    """The model, its parameters and the settings of one sampling run, bound together."""

    model: Generator
    params: Any
    options: SamplingOptions
    keys: Array
    scales: Array
    rules: Sequence[Rule]
    prefix: Array | None

    def apply(self, method: str, *args):
        return self.model.apply({"params": self.params}, *args, method=method)

    def rows(self, x: Array) -> Array:
        """Sample rows [B, ...] as network rows [R, ...]: both halves see the same codes."""
        return filters.pair(x, x) if self.options.guided else x

    def choose(self, logits: Array, start: Array | int) -> Array:
        """Logits [R, m, V] of tokens start .. start + m - 1 -> codes int32 [B, m]."""
        if self.options.guided:
            scale = jax.lax.dynamic_slice_in_dim(self.scales, start, logits.shape[1])
            logits = filters.guide(*filters.unpair(logits), scale[:, None])
        for rule in self.rules:
            logits = rule(logits)
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, start)
        return filters.sample_codes(keys, logits)

    def advance(self, carry, start: Array | int, x: Array):
        """Runs embedded positions x [R, m, D] at `start`; returns codes and cache with theirs."""
        codes, cache = carry
        logits, new = self.apply("step", x, cache, start)
        chosen = self.choose(logits, start)
        if self.prefix is not None:
            given = jax.lax.dynamic_slice_in_dim(self.prefix, start, chosen.shape[1], axis=1)
            chosen = jnp.where(given < 0, chosen, given)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, chosen, start, axis=1)
        return codes, extend_cache(cache, new, start)


@functools.partial(jax.jit, static_argnames=("model", "options"))
def sample(
    model: Generator,
    params: Any,
    labels: Int[Array, " B"],
    keys: Key[Array, " B"],
    scales: Float32[Array, " N"],
    rules: Sequence[Rule] = (),
    prefix: Int[Array, "B N"] | None = None,
    *,
    options: SamplingOptions,
) -> Int32[Array, "B n"]:
    """Codes for labels, in one program.

    Args:
      model: the generator.
      params: its parameters, in the layout of `model.config.scan`.
      labels: class numbers.
      keys: one PRNG key per sample; a sample depends on its own key alone.
      scales: guidance scale at each token (`ops.logits.guidance_scales`).
      rules: pytrees that map guided logits float32 [B, m, V] to those that a code is drawn from,
        in this order (`inference.rules`).
      prefix: codes that are given; -1 where one is sampled. Any number of them is one program,
        which runs over the given codes as if it had sampled them.
      options: static settings.
    """
    c, n = model.config, options.num_tokens
    program = _Program(model, params, options, keys, scales, rules, prefix)
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


def sample_keys(seed: int, indices: Int[Array, " B"]) -> Key[Array, " B"]:
    """One PRNG key per sample, from the seed and the sample's own index."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
