"""Floating-point operations of matrix products and convolutions in a compiled program.

They are those of one chip, with recomputation and work that is repeated on several chips. What the
code asks for is counted by `runtime.flops`; the ratio tells how much of the work is useful to the
one who wrote the code. Operations on single numbers (softmax, norms, Adam) are left out of both:
they are bound by memory.
"""

import math
import re
from collections.abc import Iterable

import numpy as np

from detailflow_jax.pod import hlo

# Passes of the matrix unit for a product in float32 of the given precision.
_PASSES = {"default": 1, "high": 3, "highest": 6}
# Products [T, S, h] of the kernels of `ops.attention.splash`: scores and sums of values; with them
# again, the gradients of weights, values, keys and queries.
_KERNELS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
_UNIT = 128  # Rows and columns of the matrix unit; a smaller head dimension leaves a part idle.


def executed(module: hlo.Module, executions: Iterable[hlo.Execution]) -> tuple[int, int]:
    """FLOPs of one chip, and the same with each product weighted by the passes that it takes."""
    flops = weighted = 0
    for execution in executions:
        instructions = execution.computation.instructions
        for instruction in instructions.values():
            if instruction.opcode in ("dot", "convolution"):
                shapes = [instructions[name].shapes[0] for name in instruction.operands]
                once = _dot(instruction, *shapes) or _convolution(instruction, *shapes)
                precision = instruction.attribute(r"operand_precision=\{(\w+)") or "default"
                flops += once * execution.times
                weighted += once * execution.times * _PASSES.get(precision, 1)
    return flops, weighted


def kernels(executions: Iterable[hlo.Execution]) -> tuple[int, int]:
    """FLOPs of attention kernels on one chip, and the same as if h filled the matrix unit.

    Blocks that a mask hides, which the kernels skip, are counted too.
    """
    flops = weighted = 0
    for execution in executions:
        instructions = execution.computation.instructions
        for name, instruction in instructions.items():
            products = _KERNELS.get("_".join(name.split("_")[:3]), 0)
            if products and instruction.opcode == "custom-call":
                shapes = (instructions[operand].shapes[0] for operand in instruction.operands)
                query, key, *_ = (shape.dims for shape in shapes if len(shape.dims) == 4)
                once = 2 * products * math.prod(query) * key[2] * execution.times
                flops += once
                weighted += once * max(1, _UNIT // query[3])
    return flops, weighted


def _dot(instruction: hlo.Instruction, left: hlo.Shape, _: hlo.Shape) -> int:
    if instruction.opcode != "dot":
        return 0
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    sizes = [left.dims[int(i)] for i in contracted.split(",") if i]
    return 2 * instruction.shapes[0].elements * math.prod(sizes)


def _convolution(instruction: hlo.Instruction, left: hlo.Shape, right: hlo.Shape) -> int:
    """Only products with numbers that are there count, neither padding nor the gaps of dilation.

    The TPU compiler writes batched matrix products as convolutions with many such gaps.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = _window(instruction.attribute(r"window=\{([^}]*)\}") or "")
    out = instruction.shapes[0]
    groups = int(instruction.attribute(r"feature_group_count=(\d+)") or 1)
    batch_groups = int(instruction.attribute(r"batch_group_count=(\d+)") or 1)
    products = out.dims[labels[3].index("f")] * out.dims[labels[3].index("b")]
    products *= right.dims[labels[2].index("i")]
    if groups == 1 and batch_groups > 1:
        products //= batch_groups
    for i in range(len(labels[1]) - 2):
        sizes = [
            shape.dims[label.index(str(i))]
            for shape, label in zip((left, right, out), labels.groups(), strict=True)
        ]
        products *= _valid_pairs(*sizes, window, i)
    return 2 * products


def _window(text: str) -> dict[str, list[str]]:
    return {key: value.split("x") for key, _, value in (p.partition("=") for p in text.split())}


def _valid_pairs(size: int, kernel: int, out: int, window: dict[str, list[str]], i: int) -> int:
    """(kernel position, output position) pairs that meet a number of the input along axis i."""

    def number(key: str, default: int = 1) -> int:
        return int(window[key][i]) if key in window else default

    low = int(window["pad"][i].split("_")[0]) if "pad" in window else 0
    stride, gap, spread = number("stride"), number("lhs_dilate"), number("rhs_dilate")
    position = np.arange(out)[:, None] * stride + np.arange(kernel) * spread - low
    valid = (position >= 0) & (position <= (size - 1) * gap) & (position % gap == 0)
    return int(valid.sum())
