"""Floating-point operations that traced code asks for, and what devices can do of them.

Matrix products and convolutions count; operations on single numbers (softmax, norms, Adam) are
bound by memory and do not.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,  # v6e
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}
"""Start of `jax.Device.device_kind` -> FLOP/s in bfloat16, without sparsity, as the vendors say."""

EXTRA = "extra_products"
"""`jax.named_scope` of products that a backend prefers to less arithmetic."""

_NOT_THE_MODELS = (EXTRA, "rematted_computation")  # JAX's name, in the equations of a gradient.


def peak(device: jax.Device) -> float | None:
    """FLOP/s in bfloat16 of a device; None if it is not in `PEAKS`."""
    names = [name for name in PEAKS if device.device_kind.startswith(name)]
    return PEAKS[max(names, key=len)] if names else None


def written(traced: Any, *, model: bool = False) -> int:
    """FLOPs of the matrix products and convolutions of a `jax.stages.Traced`, loops unrolled.

    Args:
      traced: the program; the count is over all devices together.
      model: count the model's own work alone: not what `jax.checkpoint` computes again for the
        gradient, nor `EXTRA` products.
    """
    return _count(traced.jaxpr.jaxpr, model)


def _count(jaxpr: core.Jaxpr, model: bool) -> int:
    return sum(_equation(equation, model) for equation in jaxpr.eqns)


def _equation(equation: core.JaxprEqn, model: bool) -> int:
    scopes = str(equation.source_info.name_stack)
    if model and any(name in scopes for name in _NOT_THE_MODELS):
        return 0
    parameters, name = equation.params, equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        return _traced_convolution(equation)
    inner = [_count(jaxpr, model) for jaxpr in _inner(parameters)]
    if name == "cond":
        return max(inner)
    times = parameters["length"] if name == "scan" else 1
    if name == "shard_map":
        times = math.prod(parameters["mesh"].shape.values())
    return times * sum(inner)


def _traced_convolution(equation: core.JaxprEqn) -> int:
    kernel = equation.invars[1].aval.shape
    numbers = equation.params["dimension_numbers"]
    per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
    if math.prod(equation.params["lhs_dilation"]) == 1:
        return 2 * equation.outvars[0].aval.size * per_output
    # The gradient of a strided convolution: as many products as the convolution itself.
    left = equation.invars[0].aval.shape
    return 2 * math.prod(left) * math.prod(kernel) // kernel[numbers.rhs_spec[1]]


def _inner(parameters: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in parameters.values():
        values: Sequence = value if isinstance(value, tuple | list) else (value,)
        for candidate in values:
            if isinstance(candidate, core.ClosedJaxpr):
                yield candidate.jaxpr
            elif isinstance(candidate, core.Jaxpr):
                yield candidate
