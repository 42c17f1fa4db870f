"""Floating-point operations of traced code."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from detailflow_jax.models import layers
from detailflow_jax.ops import rotary
from detailflow_jax.runtime import compiler, flops

ROWS, WIDTH, DEPTH = 4, 8, 3


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, prefix, mask, rope):
        return x + nn.Dense(WIDTH)(nn.tanh(nn.Dense(2 * WIDTH)(x))), None


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("remat", ["none", *sorted(set(layers.REMAT_POLICIES) - {"none"})])
def test_recomputation_is_no_work_of_the_model(scan, remat):
    stack = layers.Stack(Block, {}, DEPTH, scan=scan, remat=remat)
    x = jnp.ones((ROWS, WIDTH))
    params = stack.init(jax.random.key(0), x)
    traced = jax.jit(jax.grad(lambda params: stack.apply(params, x)[0].sum())).trace(params)
    forward = 2 * ROWS * DEPTH * 2 * 2 * WIDTH**2
    first = 2 * ROWS * 2 * WIDTH**2  # The input of the first layer has no gradient.
    expected = 3 * forward - (0 if scan else first)
    assert flops.written(traced, model=True) == expected
    assert (flops.written(traced) > expected) == (remat == "full")


def test_rotary_turns_are_no_work_of_the_model():
    layer = layers.Attention(2, 2, use_bias=False, dtype=jnp.float32)
    table, x = rotary.group_rotary_table(12, 4, 8), jnp.ones((2, 13, 16))
    params = layer.init(jax.random.key(0), x)

    def count(platform: str, model: bool) -> int:
        loss = jax.checkpoint(lambda params, x: layer.apply(params, x, rope=table)[0].sum())
        with compiler.target(platform):
            traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(params, x)
        return flops.written(traced, model=model)

    turns = 2 * x.size * 8 * 2  # Two arrays of heads, each number a product with 8.
    assert count("tpu", False) == count("cpu", False) + 3 * turns  # again, and in the gradient
    assert count("tpu", True) == count("cpu", True) < count("cpu", False)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("cpu", None),
    ],
)
def test_peak_of_a_device(kind, peak):
    assert flops.peak(types.SimpleNamespace(device_kind=kind)) == peak
