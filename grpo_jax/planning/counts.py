"""Counts what a compiled program does on each device: products, bytes, collectives, copies and kernels."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from grpo_jax.planning.flops import flops_of, stated_cost
from grpo_jax.planning.hlo import (
    ArrayShape,
    Computation,
    Execution,
    Instruction,
    Program,
    call_target,
    executions,
    loop_trips,
    parse_program,
)


@dataclass(frozen=True)
class Collective:
    """An exchange between devices. Equal ones are one item."""

    kind: str  # "all-gather", "all-reduce", "reduce-scatter", "all-to-all" or "collective-permute", among others
    axes: tuple[str, ...]  # of the mesh, over which devices exchange data
    devices: int  # that take part in one exchange
    bytes: int  # of the whole array that is gathered or reduced; else of a device's part
    sent_bytes: float  # by a device each time, if the devices form a ring
    count: float  # how often it runs
    op_name: str  # where the first one comes from


@dataclass(frozen=True)
class ArrayCopy:
    """A copy of a large array, to another layout or place. Equal ones are one item."""

    array: str  # type, sizes and layout of the result
    bytes: int
    count: float
    op_name: str


@dataclass(frozen=True)
class ProgramCounts:
    """The work of one device."""

    product_flops: float  # of matrix products except attention's; a multiplication and an addition are 2
    attention_flops: float  # of the products of queries, keys, probabilities and values
    bytes: float  # read from and written to the device's memory
    collectives: tuple[Collective, ...]  # the most bytes first
    copies: tuple[ArrayCopy, ...]  # the most bytes first
    kernels: float  # operations that are started
    host_reads: float  # predicates of loops and conditionals, which a GPU's host waits for
    unknown: tuple[str, ...]  # loops counted as one trip and kernels counted as no FLOPs, by op_name


COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Instructions that neither start an operation nor move data. What they call is counted by itself.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "optimization-barrier", "domain"),
    *("while", "conditional", "call", "call-start", "async-start", "async-update", "partition-id", "replica-id"),
    *("add-dependency", "opt-barrier"),
}
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "PrepareAsyncCallStart", "PrepareAsyncCallDone", "Sharding"}
MOVES = {"copy", "transpose", "reshape", "concatenate", "slice", "dynamic-slice", "pad", "reverse"}


def is_free(instruction: Instruction) -> bool:
    """Returns whether an instruction stands for no operation of its own."""
    done = instruction.opcode.endswith("-done")
    return done or instruction.opcode in FREE or call_target(instruction) in FREE_CALLS


def result_bytes(shape: ArrayShape) -> int:
    """Returns the bytes of a result that lie in the device's memory."""
    return 0 if shape.on_chip else shape.bytes


def is_later_step(instruction: Instruction) -> bool:
    """Returns whether an instruction continues a collective that another one began.

    TPUs fuse steps of a collective into the products that run meanwhile, and repeat its instruction in each fusion.
    """
    return bool(re.search(r'"async_collective_fusion_config":\{"flag_start":"\d', instruction.attributes))


def kind_of_collective(instruction: Instruction) -> str:
    """Returns the kind of a collective that an instruction begins, such as "all-gather", or ""."""
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in COLLECTIVES and not is_later_step(instruction) else ""


def is_bitcast(fused: Computation) -> bool:
    """Returns whether a fused computation returns its operand as it is."""
    return all(instruction.opcode in ("parameter", "bitcast") for instruction in fused.instructions.values())


def bytes_read(program: Program, computation: Computation, value: Instruction, whole: int) -> int:
    """Returns how many of the `whole` bytes of a value its users in a fused computation read."""
    total = whole if value.name == computation.root.name else 0
    for user in computation.users(value):
        first = user.operands[0] == value.name
        fused = program.computations[user.called("calls")[0]] if user.opcode == "fusion" else None
        if user.opcode == "bitcast" or (fused and is_bitcast(fused)):
            total += bytes_read(program, computation, user, whole)
        elif user.opcode in ("slice", "dynamic-slice", "gather") and first:
            total += user.shapes[0].bytes
        elif user.opcode in ("dynamic-update-slice", "scatter") and first:
            continue  # written in place
        elif user.opcode == "tuple" or is_later_step(user):
            continue  # handed on
        elif fused:
            parameters = [fused.parameter(index) for index, name in enumerate(user.operands) if name == value.name]
            total += sum(bytes_read(program, fused, parameter, whole) for parameter in parameters)
        else:
            return whole
    return min(total, whole)


def bytes_written(program: Program, computation: Computation, value: Instruction) -> list[int]:
    """Returns the bytes that are written for each result of an instruction: only the update, if it is in place."""
    if value.opcode == "bitcast":
        return bytes_written(program, computation, computation.operand(value, 0))
    if value.opcode == "tuple":
        return [sum(bytes_written(program, computation, computation.instructions[name])) for name in value.operands]
    if value.opcode == "parameter" or is_later_step(value):
        return [0 for _ in value.shapes]  # handed on
    if value.opcode in ("dynamic-update-slice", "scatter"):
        update = 1 if value.opcode == "dynamic-update-slice" else (len(value.operands) + 1) // 2
        return [computation.operand(value, update).shapes[0].bytes]
    if value.opcode == "fusion":
        fused = program.computations[value.called("calls")[0]]
        return bytes_written(program, fused, fused.root)
    if call_target(value) == "__gpu$xla.gpu.triton":  # a kernel writes little of the arrays that it changes in place
        aliases = re.search(r"output_to_operand_aliasing={(.*?)}, \w+=", value.attributes)
        in_place = {int(index) for index in re.findall(r"{(\d+)}: ", aliases[1])} if aliases else set()
        return [0 if index in in_place else shape.bytes for index, shape in enumerate(value.shapes)]
    return [shape.bytes for shape in value.shapes]


def bytes_moved(program: Program, step: Execution) -> int:
    """Returns the bytes that one execution of an instruction reads from the device's memory and writes to it."""
    instruction, computation = step.instruction, step.computation
    operands = [computation.instructions[name].shapes for name in instruction.operands]
    if instruction.opcode == "copy-start":
        return sum(result_bytes(shape) for shape in instruction.shapes[:2])
    if instruction.opcode == "slice-start":
        source, target = instruction.shapes[0], instruction.shapes[len(operands)]
        return target.bytes * ((not source.on_chip) + (not target.on_chip))
    if kind_of_collective(instruction):
        return 2 * sum(result_bytes(shape) for shapes in operands for shape in shapes)
    if cost := stated_cost(instruction):
        return int(cost["bytes_accessed"])
    alone = Computation({instruction.name: instruction}, instruction)
    total = 0
    for name, shapes in dict(zip(instruction.operands, operands, strict=True)).items():
        if len(shapes) == 1 and not shapes[0].on_chip:
            total += bytes_read(program, alone, computation.instructions[name], shapes[0].bytes)
    written = bytes_written(program, computation, instruction)
    return total + sum(size for size, shape in zip(written, instruction.shapes, strict=False) if not shape.on_chip)


def replica_groups(attributes: str, mesh_axes: Mapping[str, int]) -> list[tuple[int, ...]]:
    """Parses the groups of devices that exchange data, or the pairs of a permutation, in any of XLA's notations."""
    everyone = range(math.prod(mesh_axes.values()))
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes):
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", match[1])]
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=(\S+)", attributes):
        ids, width = device_list(match[2]), int(match[1])
        return [tuple(ids[i : i + width]) for i in range(0, len(ids), width)]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", attributes):
        return mesh_groups(*match.groups())
    return [tuple(everyone)]


def transposed_iota(sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    """Returns the numbers 0, 1, ... of an array of these sizes, read after its axes are brought into this order."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    return [
        sum(index * strides[axis] for index, axis in zip(place, order, strict=True))
        for place in product(*(range(sizes[axis]) for axis in order))
    ]


def device_list(text: str) -> list[int]:
    """Parses `0,2,1,3`, or `[2,4]T(1,0)`: the numbers 0, 1, ... of a transposed array of these sizes."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        return [int(device) for device in text.split(",")]
    sizes = [int(size) for size in match[1].split(",")]
    return transposed_iota(sizes, [int(axis) for axis in match[2].split(",")] if match[2] else range(len(sizes)))


def mesh_groups(mesh: str, device_ids: str | None, axes: str) -> list[tuple[int, ...]]:
    """Returns the groups of `mesh['a'=2,'b'=4] {'a','b':(1)2}`: devices that differ in these (parts of) axes only."""
    sizes, grouped = [], []
    for name, size in re.findall(r"'([^']+)'=(\d+)", mesh):
        part = re.search(rf"'{re.escape(name)}'(?::\((\d+)\)(\d+))?", axes)
        before, inner = (int(part[1]), int(part[2])) if part and part[1] else (1, int(size) if part else 1)
        sizes += [before, inner, int(size) // (before * inner)]
        grouped += [False, True, False]
    split = [axis for axis in range(len(sizes)) if not grouped[axis]] + [i for i in range(len(sizes)) if grouped[i]]
    ids, width = transposed_iota(sizes, split), math.prod(size for size, g in zip(sizes, grouped, strict=True) if g)
    devices = device_list(device_ids) if device_ids else range(len(ids))
    return [tuple(devices[i] for i in ids[start : start + width]) for start in range(0, len(ids), width)]


def axes_of_groups(groups: Sequence[Sequence[int]], mesh_axes: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ."""
    varying, stride = [], math.prod(mesh_axes.values())
    for axis, size in mesh_axes.items():
        stride //= size
        if any(len({device // stride % size for device in group}) > 1 for group in groups):
            varying.append(axis)
    return tuple(varying)


def read_collective(step: Execution, mesh_axes: Mapping[str, int]) -> Collective:
    """Describes a collective that runs `step.times` times."""
    instruction, kind = step.instruction, kind_of_collective(step.instruction)
    groups = replica_groups(instruction.attributes, mesh_axes)
    operands = [shape for name in instruction.operands for shape in step.computation.instructions[name].shapes]
    size = sum(shape.bytes for shape in operands)
    devices = max(map(len, groups), default=1)
    if kind == "all-gather":
        size *= devices
    if step.fusion and kind == "all-reduce" and sum(shape.bytes for shape in step.fusion.shapes) < size:
        kind = "reduce-scatter"  # TPUs fuse an all-reduce with the slice that a device keeps
    ring = (devices - 1) / devices * size
    sent = {"all-reduce": 2 * ring, "collective-permute": float(size)}.get(kind, ring)
    op_name = instruction.op_name or (step.fusion.op_name if step.fusion else "")
    return Collective(kind, axes_of_groups(groups, mesh_axes), devices, size, sent, step.times, op_name)


def is_copy(program: Program, instruction: Instruction) -> bool:
    """Returns whether an instruction only moves data, not counting loads into a TPU core's own memory."""
    if instruction.opcode == "copy-start":
        return not instruction.shapes[0].on_chip
    if instruction.opcode == "fusion":
        fused = program.computations[instruction.called("calls")[0]].instructions.values()
        return all(
            inner.opcode in MOVES or is_free(inner) or not any(shape.dims for shape in inner.shapes) for inner in fused
        )
    return instruction.opcode in MOVES


def merge(items: list) -> tuple:
    """Adds up the counts of items that are equal except for their count and op_name; the most bytes come first."""
    merged: dict = {}
    for item in items:
        key = replace(item, count=0, op_name="")
        first = merged.setdefault(key, replace(item, count=0))
        merged[key] = replace(first, count=first.count + item.count)
    return tuple(sorted(merged.values(), key=lambda item: -item.bytes * item.count))


def count_program(
    text: str, mesh_axes: Mapping[str, int], trips: Mapping[str, float], min_copy_bytes: int, inside: str = ""
) -> ProgramCounts:
    """Counts the work of a compiled program on one device.

    Args:
        text: What `compiled.as_text()` returns, for TPUs, NVIDIA GPUs or CPUs.
        mesh_axes: The sizes of the mesh's axes, in its order.
        trips: How often the body of a loop runs if the program does not know, by the `jax.named_scope` around it, such
            as {"tokens": 1024, "refill": 0.1}.
        min_copy_bytes: The smallest size of a copied array that is listed.
        inside: The scope of a loop: counts one trip of it instead of the whole program.

    Raises:
        ValueError: The text is not a program, or has no loop in the scope `inside`.
    """
    program = parse_program(text)
    product_flops = attention_flops = moved = kernels = host_reads = 0.0
    collectives: list[Collective] = []
    copies: list[ArrayCopy] = []
    unknown: dict[str, None] = {}
    for step in executions(program, trips, inside):
        if not step.times:
            continue
        instruction = step.instruction
        known = flops_of(step, trips)
        if known is None:
            unknown[instruction.op_name] = None
        else:
            product_flops += step.times * known[0]
            attention_flops += step.times * known[1]
        if kind_of_collective(instruction):
            collectives.append(read_collective(step, mesh_axes))
        if instruction.opcode == "while":
            count = loop_trips(program, step.computation, instruction, trips)
            if count is None:
                unknown[instruction.op_name] = None
            if "known_trip_count" not in instruction.attributes:
                host_reads += step.times * ((1 if count is None else count) + 1)
        elif instruction.opcode == "conditional":
            host_reads += step.times
        if step.fusion or is_free(instruction):
            continue
        kernels += step.times
        moved += step.times * bytes_moved(program, step)
        if is_copy(program, instruction):
            results = instruction.shapes[:1] if instruction.opcode == "copy-start" else instruction.shapes
            large = [shape for shape in results if shape.bytes >= min_copy_bytes]
            copies += [ArrayCopy(shape.text, shape.bytes, step.times, instruction.op_name) for shape in large]
    return ProgramCounts(
        product_flops,
        attention_flops,
        moved,
        merge(collectives),
        merge(copies),
        kernels,
        host_reads + bool(inside),
        tuple(unknown),
    )
