"""Sampling codes: the whole loop is one jitted program with a key/value cache.

The class token gives z_1, then tokens come one by one to z_c; [z_c, s_1 .. s_{g-1}] gives the next
group, and every group the next (the paper's parallel inference). With c = 0 the class stands for
z_c. The published sampler recomputes the whole prefix at each step; the group mask makes caching
exact. `stream` gives the tokens group by group, as they are drawn, from a few programs.

With a flow head, the tokens of one step are drawn jointly: their noise is carried to code vectors,
which the nearest codes replace.

Shapes: B samples, n tokens asked for, m tokens of one step, g group, c causal, V codes, d code
dimension, D width; R = B rows, or 2B under guidance (of each sample the conditional row, then the
null row).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int, Key, Shaped

from detailflow_jax.models.generator import Transformer, empty_cache, extend_cache
from detailflow_jax.ops import Array, flow
from detailflow_jax.ops import logits as filters

Rule = Callable[[Array], Array]
"""Logits float32 [..., V] -> logits; -inf excludes a code."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """The static settings; numbers that may vary without a new compilation are arguments.

    Attributes:
      num_tokens: n.
      guided: compute the null half. Without guidance (scale 1) it is not computed.
      times: of a flow head, from 1 to 0, float64 values (`ops.flow.GRIDS`).
      continuous: of a flow head: keep its vectors, which no codes replace.
    """

    num_tokens: int
    guided: bool = True
    times: tuple[float, ...] = ()
    continuous: bool = False


@dataclasses.dataclass(frozen=True)
class _Program:
    """The model, its parameters and the settings of one sampling run, bound together."""

    model: Transformer
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

    def empty(self, batch: int) -> Array:
        """Tokens [B, N, ...] before any is drawn; room for whole groups."""
        return jnp.zeros((batch, self.model.config.num_tokens), jnp.int32)

    def embed(self, tokens: Array) -> Array:
        """Tokens [B, m, ...] -> their embedding in network rows, [R, m, D]."""
        return self.apply("embed_codes", self.rows(tokens))

    def step_keys(self, start: Array | int) -> Array:
        """One PRNG key per sample, for the tokens from `start` on."""
        return jax.vmap(jax.random.fold_in, (0, None))(self.keys, start)

    def guide(self, rows: Array, start: Array | int) -> Array:
        """Guided logits or velocities [B, m, ...] of network rows [R, m, ...]."""
        scale = jax.lax.dynamic_slice_in_dim(self.scales, start, rows.shape[1])
        return filters.guide(*filters.unpair(rows), scale[:, None])

    def choose(self, logits: Array, start: Array | int) -> Array:
        """Logits [R, m, V] of tokens start .. start + m - 1 -> codes int32 [B, m]."""
        if self.options.guided:
            logits = self.guide(logits, start)
        for rule in self.rules:
            logits = rule(logits)
        return filters.sample_codes(self.step_keys(start), logits)

    def keep(self, chosen: Array, given: Array) -> Array:
        """The tokens chosen, but for the codes that are given, [B, m]; -1 is none."""
        return jnp.where(given < 0, chosen, given)

    def classes(self, labels: Array) -> Array:
        """Class numbers [B] -> those of network rows [R]: the null class in a null row."""
        null = jnp.full_like(labels, self.model.config.num_classes)
        return filters.pair(labels, null) if self.options.guided else labels

    def begin(self, labels: Array):
        """(tokens, cache) before any token is drawn."""
        cache = empty_cache(self.model.config, len(self.classes(labels)))
        return self.empty(len(labels)), cache

    def advance(self, carry, start: Array | int, x: Array):
        """Runs embedded positions x [R, m, D] at `start`; returns tokens and cache with theirs."""
        tokens, cache = carry
        found, new = self.apply("step", x, cache, start)
        chosen = self.choose(found, start)
        if self.prefix is not None:
            given = jax.lax.dynamic_slice_in_dim(self.prefix, start, chosen.shape[1], axis=1)
            chosen = self.keep(chosen, given)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, chosen, start, axis=1)
        return tokens, extend_cache(cache, new, start)

    def first(self, labels: Array, carry):
        """With z_1, which the class gives."""
        return self.advance(carry, jnp.int32(0), self.apply("embed_class", self.classes(labels)))

    def single(self, start: Array | int, carry):
        """With the token at `start`, which the one before it gives."""
        previous = jax.lax.dynamic_slice_in_dim(carry[0], start - 1, 1, axis=1)
        return self.advance(carry, start, self.embed(previous))

    def opening(self, labels: Array, carry):
        """With the group at c, which z_c (c = 0: the class) and the special tokens give."""
        c = self.model.config.causal
        classes = self.classes(labels)
        last = self.embed(carry[0][:, c - 1 : c]) if c else self.apply("embed_class", classes)
        special = self.apply("embed_special", len(classes))
        return self.advance(carry, jnp.int32(c), jnp.concatenate([last, special], axis=1))

    def group(self, start: Array | int, carry):
        """With the group at `start`, which the one before it gives."""
        size = self.model.config.group_size
        previous = jax.lax.dynamic_slice_in_dim(carry[0], start - size, size, axis=1)
        return self.advance(carry, start, self.embed(previous))


class _FlowProgram(_Program):
    """Codes by way of a flow head."""

    def solve(self, semantics: Array, start: Array | int) -> Array:
        """Semantics [R, m, D] of one draw -> vectors [B, m, d] of any length."""
        shape = semantics.shape[1], self.model.config.code_dim
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(self.step_keys(start))

        def velocity(x: Array, time: Array) -> Array:
            # Both rows of a sample share x: the null row never moves on its own.
            x = self.rows(x)
            found = self.apply("velocity", x, jnp.broadcast_to(time, len(x)), semantics, start)
            return self.guide(found, start) if self.options.guided else found

        def advance(x: Array, step: flow.Step):
            return flow.euler_step(velocity, x, step), None

        times = self.options.times
        return jax.lax.scan(advance, noise, flow.steps(times, 0, len(times) - 1))[0]

    def choose(self, logits: Array, start: Array | int) -> Array:
        """Semantics of one draw -> codes int32 [B, m]."""
        return self.apply("nearest", self.solve(logits, start))


class _ContinuousProgram(_FlowProgram):
    """Vectors of length sqrt(d) in place of codes."""

    def empty(self, batch: int) -> Array:
        """See `_Program`."""
        c = self.model.config
        return jnp.zeros((batch, c.num_tokens, c.code_dim))

    def embed(self, tokens: Array) -> Array:
        """See `_Program`."""
        return self.apply("embed_vectors", self.rows(tokens))

    def choose(self, logits: Array, start: Array | int) -> Array:
        """Semantics of one draw -> vectors [B, m, d]."""
        return self.apply("scaled", self.solve(logits, start))

    def keep(self, chosen: Array, given: Array) -> Array:
        """See `_Program`."""
        vectors = self.apply("vectors", jnp.maximum(given, 0))
        return jnp.where(given[..., None] < 0, chosen, vectors)


def _program(model: Transformer, options: SamplingOptions) -> type[_Program]:
    if model.config.head == "categorical":
        return _Program
    return _ContinuousProgram if options.continuous else _FlowProgram


@functools.partial(jax.jit, static_argnames=("model", "options"))
def sample(
    model: Transformer,
    params: Any,
    labels: Int[Array, " B"],
    keys: Key[Array, " B"],
    scales: Float32[Array, " N"],
    rules: Sequence[Rule] = (),
    prefix: Int[Array, "B N"] | None = None,
    *,
    options: SamplingOptions,
) -> Shaped[Array, "B n ..."]:
    """Codes for labels, int32 [B, n], in one program; or vectors, if `options.continuous`.

    Args:
      model: the generator.
      params: its parameters, in the layout of `model.config.scan`.
      labels: class numbers.
      keys: one PRNG key per sample; a sample depends on its own key alone.
      scales: guidance scale at each token (`ops.logits.guidance_scales`).
      rules: pytrees that map guided logits float32 [B, m, V] to those that a code is drawn from,
        in this order (`inference.rules`); a flow head has none.
      prefix: codes that are given; -1 where one is sampled. Any number of them is one program,
        which runs over the given codes as if it had sampled them.
      options: static settings.
    """
    c, n = model.config, options.num_tokens
    program = _program(model, options)(model, params, options, keys, scales, rules, prefix)
    carry = program.begin(labels)
    # A count inside the causal part is cut at the end.
    if c.causal:
        carry = program.first(labels, carry)
    carry = jax.lax.fori_loop(1, min(n, c.causal), program.single, carry)
    if n > c.causal:
        carry = program.opening(labels, carry)
    first = c.causal // c.group_size + 1

    def group(i, carry):
        return program.group(i * c.group_size, carry)

    carry = jax.lax.fori_loop(first, max(n // c.group_size, first), group, carry)
    return carry[0][:, :n]


def stream(
    model: Transformer,
    params: Any,
    labels: Int[Array, " B"],
    keys: Key[Array, " B"],
    scales: Float32[Array, " N"],
    rules: Sequence[Rule] = (),
    *,
    options: SamplingOptions,
) -> Iterator[Shaped[Array, "B _ ..."]]:
    """The tokens of `sample` so far, [B, g], [B, 2g] .. [B, n], each as soon as it is drawn.

    A group is one call of a program: one for the first group, one for the others of the causal
    part, one for the group that the special tokens open, and one for all that follow.
    """
    size, c, carry = model.config.group_size, model.config.causal, None
    given = model, params, labels, keys, scales, rules
    for start in range(0, options.num_tokens, size):
        kind = "group"
        if start <= c:
            kind = "opening" if start == c else "single" if start else "first"
        carry = _stage(*given, carry, jnp.int32(start), kind=kind, options=options)
        yield carry[0][:, : min(start + size, options.num_tokens)]


@functools.partial(jax.jit, static_argnames=("model", "kind", "options"), donate_argnames="carry")
def _stage(model, params, labels, keys, scales, rules, carry, start, *, kind, options):
    """(tokens, cache) with the tokens of one more group, from `start` on."""
    program = _program(model, options)(model, params, options, keys, scales, rules, None)
    carry, stop = carry or program.begin(labels), start + model.config.group_size
    if kind == "opening":
        return program.opening(labels, carry)
    if kind == "group":
        return program.group(start, carry)
    if kind == "first":
        carry, start = program.first(labels, carry), start + 1
    return jax.lax.fori_loop(start, stop, program.single, carry)


def sample_keys(seed: int, indices: Int[Array, " B"]) -> Key[Array, " B"]:
    """One PRNG key per sample, from the seed and the sample's own index."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)
