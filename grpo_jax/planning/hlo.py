"""Compiled programs as text: their computations and instructions, and how often each instruction runs.

XLA prints the program of one device. The bodies of loops and fusions are computations of their own, called by name.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class ArrayShape(NamedTuple):
    """An array that an instruction returns."""

    text: str  # as printed, such as "bf16[32,1536]{1,0:T(8,128)(2,1)}"
    dims: tuple[int, ...]
    bytes: int  # with the padding of its tiles
    on_chip: bool  # in a TPU core's own memory rather than in HBM


def required_match(pattern: str, text: str) -> re.Match:
    """Returns the first match of a pattern that compiled programs are known to hold.

    Raises:
        ValueError: There is none.
    """
    if match := re.search(pattern, text):
        return match
    raise ValueError(f"Expected {pattern!r} in the text of a compiled program; found {text[:300]!r}.")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[ArrayShape, ...]  # of the result; a tuple's elements, flattened
    operands: tuple[str, ...]  # names of instructions of the same computation
    arguments: str  # the text between the parentheses: operands, or the value of a constant
    attributes: str  # the text after them

    @property
    def op_name(self) -> str:
        """Returns the path of JAX's name scopes and primitives that the instruction comes from, or ""."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def called(self, attribute: str) -> list[str]:
        """Returns the names of the computations in an attribute such as `calls` or `branch_computations`."""
        match = re.search(rf"\b{attribute}=({{[^}}]*}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", match[1]) if match else []


class Computation(NamedTuple):
    """The instructions of a function, of a fusion, or of a loop's body or condition, by name."""

    instructions: dict[str, Instruction]
    root: Instruction

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        """Returns the instruction that computes an operand."""
        return self.instructions[instruction.operands[index]]

    def parameter(self, index: int) -> Instruction:
        """Returns a parameter."""
        wanted = str(index)
        return next(i for i in self.instructions.values() if i.opcode == "parameter" and i.arguments == wanted)

    def users(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions that take the result of this one."""
        return [user for user in self.instructions.values() if instruction.name in user.operands]


class Program(NamedTuple):
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str


class Execution(NamedTuple):
    """An instruction of a program, and how often a device executes it."""

    instruction: Instruction
    computation: Computation  # that holds it
    times: float
    fusion: Instruction | None  # the instruction that it is fused into, if it is


# The elements' width in bits, where it is not the first number of the type's name.
ELEMENT_BITS = {"pred": 8, "token": 0, "opaque": 0}


def parse_shapes(text: str) -> tuple[ArrayShape, ...]:
    """Parses the type of a result, such as `(f32[8]{0}, s32[])`."""
    shapes = []
    for match in re.finditer(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?", text):
        dtype, sizes, layout = match[1], re.findall(r"\d+", match[2]), match[3] or ""
        dims = tuple(map(int, sizes))
        width = re.search(r"\d+", dtype)
        bits = ELEMENT_BITS.get(dtype, int(width[0]) if width else 0)
        order, _, tiling = layout.partition(":")
        padded = [dims[int(axis)] for axis in re.findall(r"\d+", order)] or list(dims[::-1])  # innermost axis first
        if tile := re.match(r"T\(([\d,]+)\)", tiling):
            for axis, size in enumerate(map(int, tile[1].split(",")[::-1])):
                if axis < len(padded):
                    padded[axis] = -(-padded[axis] // size) * size
        shapes.append(ArrayShape(match[0], dims, math.prod(padded) * bits // 8, bool(re.search(r"S\([1-9]", layout))))
    return tuple(shapes)


def closing_parenthesis(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"Unbalanced parentheses in {text[start : start + 80]!r}.")


def parse_instruction(name: str, text: str) -> Instruction:
    """Parses an instruction from the text after `name =`."""
    end = closing_parenthesis(text, 0) + 1 if text.startswith("(") else text.index(" ")
    start = text.index("(", end)
    stop = closing_parenthesis(text, start)
    opcode, arguments = text[end:start].strip(), text[start + 1 : stop]
    operands = () if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, opcode, parse_shapes(text[:end]), operands, arguments, text[stop + 1 :])


def parse_program(text: str) -> Program:
    """Parses what `compiled.as_text()` of `jax.stages.Compiled` returns.

    Raises:
        ValueError: The text holds no entry computation.
    """
    computations, entry = {}, ""
    lines: dict[str, str] = {}
    current, last, root = "", "", ""
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current, lines, last, root = match[2], {}, "", ""
            entry = current if match[1] else entry
        elif current and (line == "}" or line.startswith("}, execution_thread")):
            parsed = {name: parse_instruction(name, rest) for name, rest in lines.items()}
            computations[current] = Computation(parsed, parsed[root])
            current = ""
        elif current and (match := re.match(r"  (ROOT )?%?([\w.\-]+) = (.*)", line)):
            last = match[2]
            lines[last], root = match[3], last if match[1] else root
        elif current and last:
            lines[last] += line  # an attribute may hold several lines
    if not entry:
        raise ValueError("The text of a compiled program must have an ENTRY computation.")
    return Program(computations, entry)


def call_target(instruction: Instruction) -> str:
    """Returns what a custom call calls, or "" for other instructions."""
    match = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return match[1] if match and instruction.opcode == "custom-call" else ""


def uncopied(computation: Computation, name: str) -> Instruction:
    """Returns the instruction of this name, or the one that it copies."""
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.operand(instruction, 0)
    return instruction


def constant_value(computation: Computation, name: str) -> int | None:
    """Returns the value of an instruction that is an integer constant or a copy of one, else None."""
    instruction = uncopied(computation, name)
    constant = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments)
    return int(instruction.arguments) if constant else None


def compared_operands(program: Program, condition: Computation) -> tuple[str, ...]:
    """Returns the two values of a loop's condition of the form `counter < end`, or () for others."""
    compare, sides = condition.root, condition.root.operands
    if compare.opcode == "fusion":
        fused = program.computations[compare.called("calls")[0]]
        compare = fused.root
        if any(fused.instructions[side].opcode != "parameter" for side in compare.operands):
            return ()
        sides = tuple(sides[int(fused.instructions[side].arguments)] for side in compare.operands)
    return sides if compare.opcode == "compare" and "direction=LT" in compare.attributes else ()


def counted_trips(program: Program, caller: Computation, loop: Instruction) -> int | None:
    """Returns the trips of a loop that counts in constant steps from a constant to a constant, else None."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = (program.computations[loop.called(name)[0]] for name in ("condition", "body"))
    sides, initial = compared_operands(program, condition), caller.operand(loop, 0)
    counter = condition.instructions[sides[0]] if sides else condition.root
    if counter.opcode != "get-tuple-element" or {initial.opcode, body.root.opcode} != {"tuple"}:
        return None
    index = int(required_match(r"index=(\d+)", counter.attributes)[1])
    start, end = constant_value(caller, initial.operands[index]), constant_value(condition, sides[1])
    increment = uncopied(body, body.root.operands[index])
    steps = [constant_value(body, name) for name in increment.operands] if increment.opcode == "add" else []
    step = next((value for value in steps if value), None)
    return None if start is None or end is None or step is None else -(-(end - start) // step)


def loop_scope(loop: Instruction, scopes: Mapping[str, float]) -> str | None:
    """Returns which of the scopes a loop is in directly, not through the body of another loop."""
    words = re.findall(r"\w+", loop.op_name.rsplit("/body/", 1)[-1])
    return next((word for word in reversed(words) if word in scopes), None)


def loop_trips(program: Program, caller: Computation, loop: Instruction, trips: Mapping[str, float]) -> float | None:
    """Returns how often a loop's body runs: a count in the program, else that of its scope, else None."""
    counted = counted_trips(program, caller, loop)
    if counted is not None:
        return counted
    scope = loop_scope(loop, trips)
    return None if scope is None else trips[scope]


def executions(program: Program, trips: Mapping[str, float], inside: str = "") -> Iterator[Execution]:
    """Yields every instruction that a device executes, and how often.

    Args:
        program: The program.
        trips: The trips of loops that the program does not count, by the `jax.named_scope` around the loop. The body of
            a loop that is not among them runs once. Every branch of a conditional counts.
        inside: The scope of a loop, of which one trip is counted instead of the whole program.

    Raises:
        ValueError: No loop has the scope `inside`.
    """

    def run(name: str, times: float, fusion: Instruction | None = None) -> Iterator[Execution]:
        computation = program.computations[name]
        for instruction in computation.instructions.values():
            yield Execution(instruction, computation, times, fusion)
            if instruction.opcode == "while":
                count = loop_trips(program, computation, instruction, trips)
                count = 1 if count is None else count
                yield from run(instruction.called("condition")[0], times * (count + 1))
                yield from run(instruction.called("body")[0], times * count)
            elif instruction.opcode == "conditional":
                branches = instruction.called("branch_computations")
                for attribute in ("true_computation", "false_computation"):
                    branches = branches + instruction.called(attribute)
                for branch in branches:
                    yield from run(branch, times)
            elif instruction.opcode == "fusion":
                yield from run(instruction.called("calls")[0], times, fusion or instruction)
            elif instruction.opcode in ("call", "call-start", "async-start"):
                for callee in instruction.called("to_apply") + instruction.called("calls"):
                    yield from run(callee, times)

    if not inside:
        yield from run(program.entry, 1)
        return
    loops = [
        step.instruction
        for step in run(program.entry, 1)
        if step.instruction.opcode == "while" and loop_scope(step.instruction, {inside: 1}) == inside
    ]
    if not loops:
        raise ValueError(f"The program has no loop in the scope {inside!r}.")
    for loop in loops:
        yield from run(loop.called("condition")[0], 1)
        yield from run(loop.called("body")[0], 1)
