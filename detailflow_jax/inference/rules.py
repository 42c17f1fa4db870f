"""Sampling rules: what happens to the logits of a token before its code is drawn.

A rule is a callable from logits to logits, float32 [..., V] with V codes; -inf excludes a code.
Rules apply in the order given, after guidance. Then one code is drawn from the softmax of what is
left. The published order is temperature, top-k, top-p:

    generator.sample(labels, rules=[Temperature(0.9), TopK(100), TopP(0.95)])

A rule of your own needs nothing from this file. As a `flax.struct.dataclass`, its fields are data:
another value does not compile the sampler again, unless the field has `pytree_node=False`. Any
other hashable callable, such as a function or a frozen dataclass, is static as a whole.
"""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from detailflow_jax.inference.checks import check_number, check_whole
from detailflow_jax.inference.errors import InputError
from detailflow_jax.models.sampler import Rule
from detailflow_jax.ops import Array
from detailflow_jax.ops import logits as filters
from detailflow_jax.runtime.command import number, whole

Logits = Float[Array, "*B V"]
_POSITIVE = "> 0; for the mode use greedy=True, or the rule Greedy()"


@flax.struct.dataclass
class Greedy:
    """Leaves the most likely code only; of equal ones the first."""

    def __call__(self, logits: Logits) -> Logits:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, logits, -jnp.inf)


@flax.struct.dataclass
class Temperature:
    """Divides the logits by `value` > 0."""

    value: Any  # a float, or its tracer

    def __post_init__(self):
        _check(self.value, lambda value: value > 0.0, "temperature", _POSITIVE)

    def __call__(self, logits: Logits) -> Logits:
        return logits / self.value


@flax.struct.dataclass
class TopK:
    """Keeps the `k` most likely codes, and those as likely as the last of them; 0 keeps all.

    `k` is static: it shapes the program.
    """

    k: int = flax.struct.field(pytree_node=False)

    def __post_init__(self):
        object.__setattr__(self, "k", check_whole("top_k", self.k, 0))

    def __call__(self, logits: Logits) -> Logits:
        return filters.top_k_filter(logits, self.k)


@flax.struct.dataclass
class TopP:
    """Keeps the most likely codes until their probability exceeds `p` in (0, 1].

    The code that crosses p is kept.
    """

    p: Any  # a float, or its tracer

    def __post_init__(self):
        _check(self.p, lambda p: 0.0 < p <= 1.0, "top_p", "in (0, 1]")

    def __call__(self, logits: Logits) -> Logits:
        return filters.top_p_filter(logits, self.p)


@flax.struct.dataclass
class _Static:
    """A callable that is no pytree, as a static part of the program."""

    function: Rule = flax.struct.field(pytree_node=False)

    def __call__(self, logits: Logits) -> Logits:
        return self.function(logits)


def published_rules(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, greedy: bool = False
) -> tuple[Rule, ...]:
    """The rules for the settings of the published sampler.

    Raises:
      InputError: a setting out of range.
    """
    rules: list[Rule] = [Temperature(temperature)]  # also 1: a sweep over it has one program
    if TopK(top_k).k:
        rules.append(TopK(top_k))
    if TopP(top_p).p < 1.0:
        rules.append(TopP(top_p))
    return (Greedy(),) if greedy else tuple(rules)


def as_rules(rules: Rule | Sequence[Any]) -> tuple[Rule, ...]:
    """One rule or several, in the form that the compiled sampler takes.

    Raises:
      InputError: not callable.
    """
    given: Sequence[Rule] = rules if isinstance(rules, Sequence) else (rules,)
    for rule in given:
        if isinstance(rule, type) or not callable(rule):
            raise InputError(f"rules hold {rule!r}; expected rules such as TopK(100), or functions")
    return tuple(_Static(rule) if jax.tree_util.all_leaves([rule]) else rule for rule in given)


def _check(value: Any, allowed: Callable[[Any], bool], name: str, expected: str) -> None:
    # Inside of a compiled program fields are tracers or placeholders, which were checked before.
    plain = value is None or isinstance(value, numbers.Real | str | np.ndarray)
    if plain and not allowed(check_number(name, value, expected)):
        raise InputError(f"{name}={value}, expected {expected}")


def add_arguments(add: Callable[..., Any]) -> None:
    """Adds the options of a command that set the rules; `add` is a parser's `add_argument`."""
    add("--temperature", type=number(above=0), default=1.0, help="divides the logits")
    add("--top_k", type=whole(0), default=0, help="keep the k most likely codes; 0 keeps all")
    add(
        "--top_p",
        type=number(most=1, above=0),
        default=1.0,
        help="keep the most likely codes of this probability",
    )
