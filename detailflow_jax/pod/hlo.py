"""Reads the text of a compiled program (HLO) and tells how often each part of it runs.

XLA's own `cost_analysis` counts the body of a loop once. Here a loop's body counts as often as it
runs: its trip count is read from the start, the step and the limit of its counter.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from detailflow_jax.runtime.errors import UserError

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
HBM = 0


class HloError(UserError, ValueError):
    """The text is not of the form that is understood here."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: `space` 0 is the chip's main memory (HBM), others lie on the chip."""

    dtype: str
    dims: tuple[int, ...]
    space: int = HBM

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Its size without the padding of tiles."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype) if self.dtype in _BITS else int(digits[0])
        return self.elements * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      opcode: such as "fusion".
      shapes: of the result; several for a tuple, nested ones flattened.
      operands: names of instructions of the same computation.
      text: what stands between the parentheses, for constants and parameters.
      attributes: the rest of the line.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    text: str
    attributes: str

    @property
    def bytes(self) -> int:
        """The size of the result."""
        return sum(shape.bytes for shape in self.shapes)

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression in the attributes, None where it is not found."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    def called(self, key: str) -> str | None:
        """The computation named by an attribute such as `calls=%name`."""
        return self.attribute(rf"\b{key}=%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order, and the name of the one that is the result."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each instruction."""
        found = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                found[name].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameters by number."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return {int(instruction.text): instruction for instruction in found}


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program: `entry` is where it starts."""

    computations: dict[str, Computation]
    entry: str


@dataclasses.dataclass(frozen=True)
class Execution:
    """A computation and how often one run of the program executes it.

    Attributes:
      computation: the computation.
      times: executions.
      fused: it is the inside of a fusion: what it makes stays on the chip.
      unknown: it lies in a loop whose trip count could not be read, and was counted once.
    """

    computation: Computation
    times: int
    fused: bool = False
    unknown: bool = False


# --------------------------------------------------------------------------------------- reading


def parse(text: str) -> Module:
    """The program that `compiled.as_text()` shows.

    Raises:
      HloError: there is no entry computation, or a line is not understood.
    """
    computations, entry, name, instructions, root = {}, None, None, {}, None
    for line in text.splitlines():
        if line.rstrip() == "}" and name:  # Attributes of kernels have lines of their own.
            computations[name] = Computation(name, instructions, root)
            name = None
        elif name and (start := _INSTRUCTION.match(line)):
            instructions[start[2]] = _instruction(start[2], line[start.end() :])
            root = start[2] if start[1] else root
        elif not line.startswith(" ") and (start := _COMPUTATION.match(line)):
            name, instructions, root = start[2], {}, None
            entry = name if start[1] else entry
    if entry is None:
        raise HloError("this is no HLO text: it has no ENTRY computation")
    return Module(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shapes = tuple(_shape(found) for found in _SHAPE.finditer(rest[:end]))
    opening = rest.find("(", end)
    closing = _closing(rest, opening)
    if not 0 < end < opening < closing:
        raise HloError(f"cannot read the instruction %{name} = {rest[:80]}")
    text = rest[opening + 1 : closing]
    operands = tuple(_NAME.findall(text))
    opcode = rest[end:opening].strip()
    return Instruction(name, opcode, shapes, operands, text, rest[closing + 1 :])


def _closing(text: str, start: int) -> int:
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return -1


def _shape(found: re.Match) -> Shape:
    dims = tuple(int(size) for size in found[2].split(",") if size)
    space = re.search(r"S\((\d+)\)", found[3] or "")
    return Shape(found[1], dims, int(space[1]) if space else HBM)


# ------------------------------------------------------------------------------ how often it runs


def executions(module: Module) -> list[Execution]:
    """Every computation that runs, fused ones too; one entry a place that it is called from.

    Each branch of a conditional counts as if it ran; reducers (`to_apply`) are left out.
    """
    return list(_visit(module, Execution(module.computations[module.entry], 1)))


def _visit(module: Module, execution: Execution) -> Iterator[Execution]:
    yield execution
    for instruction in execution.computation.instructions.values():
        times, unknown, names = execution.times, execution.unknown, []
        if instruction.opcode == "while":
            trips = trip_count(module, execution.computation, instruction)
            times, unknown = times * (1 if trips is None else trips), unknown or trips is None
            names = [instruction.called("body")]
        elif instruction.opcode in ("fusion", "async-start"):
            names = [instruction.called("calls")]
        elif instruction.opcode == "call":
            names = [instruction.called("to_apply")]
        elif instruction.opcode == "conditional":
            branches = instruction.attribute(r"branch_computations=\{([^}]*)\}")
            pair = [instruction.called(f"{which}_computation") for which in ("true", "false")]
            names = _NAME.findall(branches) if branches else pair
        fused = execution.fused or instruction.opcode == "fusion"
        for name in filter(None, names):
            yield from _visit(module, Execution(module.computations[name], times, fused, unknown))


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often the `while` instruction `loop` of `computation` runs its body; None if unknown.

    Understood is a counter that starts at a constant, grows by a constant and runs while it is
    below a constant, each possibly inside a fusion or carried through the loop unchanged.
    """
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
    if known:
        return int(known)
    condition, body = (module.computations[loop.called(key)] for key in ("condition", "body"))
    scope = _Scope(module, condition)
    root, scope = scope.resolve(condition.root)
    if root is None or root.opcode != "compare":
        return None
    direction = root.attribute(r"direction=(\w+)")
    sides = [scope.resolve(name) for name in root.operands]
    if direction == "GT":
        sides, direction = sides[::-1], "LT"
    (counter, _), (limit, _) = sides
    if direction not in ("LT", "LE") or counter is None or counter.opcode != "get-tuple-element":
        return None
    index = int(counter.attribute(r"index=(\d+)"))
    start = _carried(module, computation, loop, index)
    stop = _constant(limit)
    if stop is None and limit is not None and limit.opcode == "get-tuple-element":
        stop = _carried(module, computation, loop, int(limit.attribute(r"index=(\d+)")))
    step = _growth(module, body, index)
    if None in (start, stop, step) or step <= 0:
        return None
    return max(0, -(-(stop + (direction == "LE") - start) // step))


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.text) if re.fullmatch(r"-?\d+", instruction.text) else None


def _carried(module: Module, computation: Computation, loop: Instruction, index: int) -> int | None:
    """The constant that a loop starts its `index`-th carried value with."""
    scope = _Scope(module, computation)
    start, scope = scope.resolve(loop.operands[0])
    if start is None or start.opcode != "tuple":
        return None
    return _constant(scope.resolve(start.operands[index])[0])


def _growth(module: Module, body: Computation, index: int) -> int | None:
    """By how much a round of a loop's body grows its `index`-th carried value."""
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return None
    new, scope = _Scope(module, body).resolve(root.operands[index])
    if new is None or new.opcode != "add":
        return None
    terms = [scope.resolve(name)[0] for name in new.operands]
    known = [value for value in map(_constant, terms) if value is not None]
    old = [t for t in terms if t is not None and t.attribute(r"index=(\d+)") == str(index)]
    return known[0] if len(known) == 1 and len(old) == 1 else None


@dataclasses.dataclass(frozen=True)
class _Scope:
    """Where a name is looked up: a computation, and the call that it is the inside of."""

    module: Module
    computation: Computation
    call: Instruction | None = None
    outer: "_Scope | None" = None

    def resolve(self, name: str) -> tuple[Instruction | None, "_Scope"]:
        """What makes a value, past copies and through fusions, and the scope that it stands in."""
        instruction, scope = self.computation.instructions.get(name), self
        while instruction is not None:
            if instruction.opcode in ("copy", "bitcast", "convert", "reshape"):
                name = instruction.operands[0]
            elif instruction.opcode == "fusion":
                inner = scope.module.computations[instruction.called("calls")]
                scope, name = _Scope(scope.module, inner, instruction, scope), inner.root
            elif instruction.opcode == "parameter" and scope.outer is not None:
                name, scope = scope.call.operands[int(instruction.text)], scope.outer
            else:
                break
            instruction = scope.computation.instructions.get(name)
        return instruction, scope
