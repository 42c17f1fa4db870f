"""Sampling rules: what each keeps, the order they apply in, and rules from outside the package."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import detailflow_jax as df
from detailflow_jax.inference.rules import Greedy, Temperature, TopK, TopP, as_rules
from detailflow_jax.models import sampler
from detailflow_jax.runtime.errors import UserError
from scored_models import generator

LABELS = np.arange(7) % 3


@pytest.fixture(scope="module")
def gen():
    return generator()


@flax.struct.dataclass
class MinP:
    """A rule of a user: leaves codes of at least `p` times the highest probability."""

    p: float

    def __call__(self, logits):
        return jnp.where(
            logits >= logits.max(-1, keepdims=True) + jnp.log(self.p), logits, -jnp.inf
        )


@dataclasses.dataclass(frozen=True)
class Only:
    """A rule of a user that is no pytree: one code."""

    code: int

    def __call__(self, logits):
        return jnp.where(jnp.arange(logits.shape[-1]) == self.code, logits, -jnp.inf)


@pytest.mark.slow
def test_rules_in_the_published_order_are_the_settings(gen):
    by_settings = gen.sample(LABELS, seed=3, temperature=0.7, top_k=6, top_p=0.8)
    rules = [df.rules.Temperature(0.7), df.rules.TopK(6), df.rules.TopP(0.8)]
    np.testing.assert_array_equal(gen.sample(LABELS, seed=3, rules=rules), by_settings)
    other = gen.sample(LABELS, seed=3, rules=[*rules[1:], rules[0]])
    assert (other != by_settings).any()
    greedy = gen.sample(LABELS, seed=3, greedy=True)
    np.testing.assert_array_equal(gen.sample(LABELS, seed=4, rules=Greedy()), greedy)


@pytest.mark.slow
def test_a_rule_from_outside_needs_no_registration(gen):
    all_but_greedy = MinP(0.999)
    greedy = gen.sample(LABELS, greedy=True)
    np.testing.assert_array_equal(gen.sample(LABELS, seed=3, rules=all_but_greedy), greedy)
    programs = sampler.sample._cache_size()
    free = gen.sample(LABELS, seed=3, rules=MinP(1e-9))
    assert sampler.sample._cache_size() == programs  # its field is data
    np.testing.assert_array_equal(free, gen.sample(LABELS, seed=3, rules=[]))
    assert (free != greedy).any()
    # Neither a frozen dataclass nor a function is a pytree: static as a whole.
    assert (gen.sample(LABELS, rules=[Temperature(2.0), Only(7)]) == 7).all()
    assert (gen.sample(LABELS, rules=lambda logits: logits.at[..., 9].set(1e9)) == 9).all()


def test_greedy_leaves_the_first_of_equals():
    logits = jnp.asarray([[0.0, 2.0, 2.0], [3.0, 1.0, 2.0]])
    np.testing.assert_array_equal(jnp.isfinite(Greedy()(logits)), [[0, 1, 0], [1, 0, 0]])


def test_values_are_data_and_k_is_static():
    assert jax.tree.leaves(as_rules([Temperature(0.5), TopK(3), TopP(0.9)])) == [0.5, 0.9]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rules": [TopK(3)], "temperature": 0.5}, "rules replace temperature"),
        ({"rules": [3]}, "rules hold 3; expected rules such as"),
        ({"rules": TopK}, "rules hold <class"),
    ],
)
def test_what_is_no_rule(gen, settings, message):
    with pytest.raises(UserError, match=message):
        gen.sample(LABELS, **settings)


def test_values_out_of_range():
    for make in (lambda: Temperature(0.0), lambda: TopK(-1), lambda: TopP(0.0), lambda: TopP(1.5)):
        with pytest.raises(UserError, match="expected"):
            make()
