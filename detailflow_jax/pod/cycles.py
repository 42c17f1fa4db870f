"""The compiler's own estimate of how many cycles a program keeps the chip's core busy.

The TPU compiler writes one with each fusion and most other instructions. Unlike the peak it knows
how well a product fills the matrix unit. Collectives, asynchronous copies and kernels written by
hand (Pallas) have none; `flops.kernels` counts the latter.
"""

from collections.abc import Iterable

from detailflow_jax.pod.hlo import Execution


def estimated(executions: Iterable[Execution]) -> int:
    """Cycles of one run of the program, loops counted as often as they run."""
    total = 0
    for execution in executions:
        if execution.fused:  # The fusion has the estimate of what is inside.
            continue
        for instruction in execution.computation.instructions.values():
            found = instruction.attribute(r'"estimated_cycles":"(\d+)"')
            total += execution.times * int(found or 0)
    return total
