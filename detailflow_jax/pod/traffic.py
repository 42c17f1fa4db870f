"""Bytes between a chip's main memory (HBM) and its core, read from the compiled program.

Each instruction outside of fusions reads its operands and writes its result; what lies in on-chip
memory is free. A fusion that reads a slice of an array, or updates one in place, moves that slice
only, so the stacked parameters of scanned layers count once per pass and not once per layer.
"""

from collections.abc import Iterable

from detailflow_jax.pod.hlo import HBM, Computation, Execution, Instruction, Module, Shape

_FREE = frozenset(
    {
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "add-dependency"),
        *("while", "conditional", "call", "after-all", "optimization-barrier"),
        *("partition-id", "replica-id", "send", "recv"),
        *("copy-done", "slice-done", "async-done", "async-update", "send-done", "recv-done"),
        *("all-gather-done", "all-reduce-done", "collective-permute-done"),
        "async-start",  # its inside is counted by itself
    }
)
# Custom calls that move nothing.
_FREE_CALLS = ("AllocateBuffer", "Sharding", "AsyncCollectiveStart", "AsyncCollectiveDone")
_SLICES = ("dynamic-slice", "slice", "gather")
_VIEWS = ("bitcast", "reshape", "copy", "convert")


def memory_bytes(module: Module, executions: Iterable[Execution]) -> int:
    """Bytes that one chip reads and writes in its main memory in one run of the program."""
    total = 0
    for execution in executions:
        if execution.fused:
            continue
        for instruction in execution.computation.instructions.values():
            total += execution.times * _moved(module, execution.computation, instruction)
    return total


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    opcode, out = instruction.opcode, instruction.shapes
    if opcode in _FREE:
        return 0
    if opcode == "custom-call" and instruction.attribute(r'target="(\w+)"') in _FREE_CALLS:
        return 0
    inputs = [computation.instructions[name].shapes[0] for name in instruction.operands]
    if opcode == "copy-start":  # (destination, source, context)
        return _in_memory(out[0]) + _in_memory(out[1])
    if opcode == "slice-start":  # ((source), destination, context)
        read = out[1].bytes if out[0].space == HBM else 0
        return read + _in_memory(out[1])
    if opcode in _SLICES:
        read = out[0].bytes if inputs[0].space == HBM else 0
        return read + _in_memory(out[0])
    if opcode == "dynamic-update-slice":
        return _in_memory(inputs[1]) + (inputs[1].bytes if out[0].space == HBM else 0)
    if opcode == "fusion":
        return _fusion(module, instruction, inputs)
    if opcode.endswith("-start"):  # a collective: (operands, results, ...)
        out = out[len(inputs) :]
    return sum(map(_in_memory, inputs)) + sum(map(_in_memory, out))


def _in_memory(shape: Shape) -> int:
    return shape.bytes if shape.space == HBM else 0


def _fusion(module: Module, instruction: Instruction, inputs: list[Shape]) -> int:
    inner = module.computations[instruction.called("calls")]
    total = 0
    for number, shape in enumerate(inputs):
        if shape.space == HBM and number in inner.parameters:
            total += _read(module, inner, inner.parameters[number].name, shape.bytes)
    root = inner.instructions[inner.root]
    parts = root.operands if root.opcode == "tuple" else (root.name,)
    if len(parts) != len(instruction.shapes):  # nested tuples: take the whole results
        return total + sum(map(_in_memory, instruction.shapes))
    for name, shape in zip(parts, instruction.shapes, strict=True):
        if shape.space == HBM:
            total += _written(module, inner, name, shape.bytes)
    return total


def _read(module: Module, computation: Computation, name: str, whole: int) -> int:
    """Bytes that a fused computation reads of a value of `whole` bytes."""
    total = 0
    for user in computation.users[name]:
        first = user.operands[0] == name
        if user.opcode in _SLICES and first:
            total += user.bytes
        elif user.opcode == "dynamic-update-slice" and first:
            continue  # in place
        elif user.opcode in _VIEWS:
            total += _read(module, computation, user.name, whole)
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")]
            for number, operand in enumerate(user.operands):
                if operand == name:
                    total += _read(module, inner, inner.parameters[number].name, whole)
        elif user.opcode != "tuple":  # a tuple passes it on
            return whole
    return min(total, whole)


def _written(module: Module, computation: Computation, name: str, whole: int) -> int:
    """Bytes that a fused computation writes of a result of `whole` bytes."""
    instruction = computation.instructions[name]
    while instruction.opcode in _VIEWS:
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.opcode == "parameter":
        return 0
    if instruction.opcode == "dynamic-update-slice":
        return min(whole, computation.instructions[instruction.operands[1]].bytes)
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")]
        if inner.instructions[inner.root].opcode != "tuple":
            return _written(module, inner, inner.root, whole)
    return whole
