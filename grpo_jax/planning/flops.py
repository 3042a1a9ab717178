"""FLOPs of the products in a compiled program: `dot`, convolutions, cuBLAS calls, and attention kernels by formula.

A multiplication and an addition are two FLOPs.
"""

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from itertools import product

from grpo_jax.planning.hlo import Computation, Execution, Instruction, call_target, required_match

# Parts of an op_name that do not say which module an operation belongs to.
STRUCTURE = re.compile(
    r"shard_map|while|body|cond|closed_call|checkpoint|rematted_computation|branch_\w+|\w+\(\)|jit\(\w+\)"
)


def axes_in(text: str, attribute: str) -> list[int]:
    """Returns the axes in an attribute such as `lhs_contracting_dims={1,2}`."""
    match = re.search(rf"\b{attribute}={{([\d,]*)}}", text)
    return [int(axis) for axis in re.findall(r"\d+", match[1])] if match else []


def dot_flops(dot: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of a `dot`."""
    left = computation.operand(dot, 0).shapes[0].dims
    contracted = math.prod(left[axis] for axis in axes_in(dot.attributes, "lhs_contracting_dims"))
    return 2.0 * math.prod(dot.shapes[0].dims) * contracted


@cache
def window_positions(size: int, out: int, window: int, stride: int, low: int, dilation: int, spread: int) -> int:
    """Counts the pairs of output and window positions that meet an element of the input, along one axis.

    Args:
        size: Elements of the input.
        out: Elements of the output.
        window: Elements of the window.
        stride: Distance between two outputs.
        low: Padding before the input.
        dilation: Distance between two elements of the input.
        spread: Distance between two elements of the window.
    """
    positions = (o * stride + w * spread - low for o, w in product(range(out), range(window)))
    return sum(p % dilation == 0 and 0 <= p // dilation < size for p in positions)


def convolution_flops(conv: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of a `convolution`, the form that products have on TPUs. Padding is not counted."""
    left, right = (computation.operand(conv, i).shapes[0].dims for i in (0, 1))
    out = conv.shapes[0].dims
    labels = required_match(r"dim_labels=(\w+)_(\w+)->(\w+)", conv.attributes)
    fields = dict(re.findall(r"(\w+)=([\w\-]+)", (re.search(r"window={([^}]*)}", conv.attributes) or [""] * 2)[1]))
    rank = len(left) - 2

    def per_axis(field: str, default: str) -> list[list[int]]:
        values = fields[field].split("x") if field in fields else [default] * rank
        return [list(map(int, re.findall(r"-?\d+", value.replace("_", " ")))) for value in values]

    steps = zip(*(per_axis(name, "1") for name in ("size", "stride", "lhs_dilate", "rhs_dilate")), strict=True)
    pairs = 1
    for axis, ((window,), (stride,), (dilation,), (spread,)), (low, *_) in zip(
        map(str, range(rank)), steps, per_axis("pad", "0_0"), strict=True
    ):
        size, result = left[labels[1].index(axis)], out[labels[3].index(axis)]
        pairs *= window_positions(size, result, window, stride, low, dilation, spread)
    groups = re.search(r"batch_group_count=(\d+)", conv.attributes)
    batch = left[labels[1].index("b")] // int(groups[1] if groups else 1)
    return 2.0 * pairs * batch * right[labels[2].index("i")] * out[labels[3].index("f")]


def gemm_flops(call: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of a cuBLAS call."""
    numbers = required_match(r'"dot_dimension_numbers":(\{[^}]*\})', call.attributes)
    contracted = json.loads(numbers[1])["lhs_contracting_dimensions"]
    left = computation.operand(call, 0).shapes[0].dims
    return 2.0 * math.prod(call.shapes[0].dims) * math.prod(left[int(axis)] for axis in contracted)


def splash_flops(call: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of a kernel of Pallas' splash attention, for the tiles that a causal mask does not empty."""
    operands = [computation.instructions[name].shapes[0] for name in call.operands]
    tiles = next((shape.dims[-2:] for shape in operands if shape.text.startswith("s8[")), (1, 1))
    queries, keys, values = [shape.dims for shape in operands if len(shape.dims) > 2 and shape.text[0] in "bf"][:3]
    share = (tiles[0] + 1) / (2 * tiles[0]) if tiles[0] == tiles[1] else 1.0
    pairs = share * math.prod(queries[:-1]) * keys[-2]
    widths = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2)}  # products as wide as the keys, and as the values
    by_keys, by_values = widths[required_match(r"splash_\w+_(fwd|dq|dkv)_", call.op_name)[1]]
    return 2.0 * pairs * (by_keys * queries[-1] + by_values * values[-1])


def cudnn_flops(call: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of cuDNN's attention. It skips tiles if it makes the mask, not if the mask is an array."""
    (n, length, heads, width), (_, columns, _, _) = (computation.operand(call, i).shapes[0].dims for i in (0, 1))
    causal = re.search(r'"mask_type": ?"\w*CAUSAL"', call.attributes)
    products = 5 if call_target(call).endswith("Backward") else 2
    return 2.0 * products * n * heads * length * columns * width * (0.5 if causal else 1.0)


def token_attention_flops(call: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of `grpo_jax.model.token_attention` if all columns of the cache are in use."""
    columns = computation.operand(call, 3).shapes[0].dims[-1]
    return 2.0 * 2 * math.prod(call.shapes[0].dims) * columns


def stated_cost(call: Instruction) -> dict[str, float]:
    """Returns what a Pallas kernel's `cost_estimate` states, such as {"flops": 8.0, "bytes_accessed": 24.0}, or {}."""
    estimate = re.search(r'"cost_estimate":(\{[^}]*\})', call.attributes)
    return {name: float(value) for name, value in json.loads(estimate[1]).items()} if estimate else {}


def is_attention(op_name: str, scopes: Mapping[str, float]) -> bool:
    """Returns whether a product belongs to attention itself, not to a projection or another layer."""
    path, _, _ = op_name.rpartition("/")
    _, module, rest = path.rpartition("attention")
    words = [word for word in rest.split("/") if word.strip(")")]
    return bool(module) and all(STRUCTURE.fullmatch(word) or word.strip("()") in scopes for word in words)


def flops_of(step: Execution, scopes: Mapping[str, float]) -> tuple[float, float] | None:
    """Returns the FLOPs of an instruction's products and of its attention, or None if they are not known."""
    instruction, computation, target = step.instruction, step.computation, call_target(step.instruction)
    if "fmha" in target:
        return 0.0, cudnn_flops(instruction, computation)
    if target in ("tpu_custom_call", "__gpu$xla.gpu.triton"):
        if "splash" in instruction.op_name:
            return 0.0, splash_flops(instruction, computation)
        if "token_attention" in instruction.op_name:
            return 0.0, token_attention_flops(instruction, computation)
        cost = stated_cost(instruction)
        return (cost["flops"], 0.0) if cost else None
    if target.startswith("__cublas"):
        flops = gemm_flops(instruction, computation)
    elif instruction.opcode in ("dot", "ragged-dot"):
        flops = dot_flops(instruction, computation)
    elif instruction.opcode == "convolution":
        flops = convolution_flops(instruction, computation)
    else:
        return 0.0, 0.0
    return (0.0, flops) if is_attention(instruction.op_name, scopes) else (flops, 0.0)
