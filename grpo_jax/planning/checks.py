"""What a plan must not show: a misfit, whole gathers and sums, copies of the cache, repeated work."""

import math
import re
from collections.abc import Mapping

import jax

from grpo_jax.learn.logprobs import MAX_VOCAB_BLOCK
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import path_name

MAX_FLOPS_RATIO = 1.1  # products of a program by those that it has to compute
SMALL_BYTES = 2**22  # exchanges of at most this size may be whole; GPUs combine many small ones
ROUNDING = 1.05  # of the sizes of arrays, because what is exchanged may be padded


def matrix_sizes(model_cfg: ModelConfig) -> tuple[list[int], int]:
    """Returns the number of elements of each matrix of a layer, and of the largest matrix of the model."""
    leaves = [
        (path_name(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(model_cfg))
    ]
    layers = [math.prod(shape[1:]) for name, shape in leaves if name.startswith("layers/") and name.endswith("kernel")]
    return layers, max(*layers, *(math.prod(shape) for name, shape in leaves if not name.startswith("layers/")))


def forbidden_exchanges(report: Mapping, model_cfg: ModelConfig) -> list[str]:
    """Returns gathers of more than a matrix, and sums of whole gradients.

    Sums of arrays as small as the smallest matrix are allowed, because that is how a TPU's compiler gathers these.
    """
    layers, largest = matrix_sizes(model_cfg)
    most_updated = max(4 * max(layers), 2 * model_cfg.hidden_size * MAX_VOCAB_BLOCK)  # or a block of the head
    # A rollout's weights are gathered once, in two bytes, and only the part of the device's tensor shard.
    most_placed = 4 * max(max(layers), largest // report["rollout_mesh"]["tensor"])
    found = []
    for name, program in report["programs"].items():
        most = ROUNDING * (most_placed if name == "placement" else most_updated)
        for each in (program.get("counts") or {}).get("collectives", ()):
            is_gather = each["kind"] == "all-gather" and each["bytes"] > most
            is_sum = each["kind"] == "all-reduce" and "fsdp" in each["axes"]
            is_whole_sum = name == "update" and is_sum and each["bytes"] > ROUNDING * 4 * min(layers)
            if each["bytes"] > SMALL_BYTES and (is_gather or is_whole_sum):
                over = "+".join(each["axes"])
                found.append(f"{name}: {each['kind']} of {each['bytes']:,} bytes over {over} {each['op_name']}")
    return found


def violations(report: Mapping, model_cfg: ModelConfig) -> list[str]:
    """Returns what a plan must not show, one line each.

    Args:
        report: The plan, from `grpo_jax.planning.report.plan_report`.
        model_cfg: The architecture of its model.
    """
    found = [f"{name}: {error}" for name, error in report["errors"].items()]
    if not report["fits"] and not found:
        found.append(f"does not fit: peaks {report['peaks']} of {report['budget_bytes']} bytes")
    for name, program in report["programs"].items():
        counts = program.get("counts")
        if counts and name.startswith("decode"):
            of_the_cache = [each for each in counts["copies"] if name.split()[1] in re.findall(r"\d+", each["array"])]
            found += [f"{name}: copies {each['array']}, {each['op_name']}" for each in of_the_cache]
        needed = program.get("needed_product_flops")
        if counts and needed and counts["product_flops"] > MAX_FLOPS_RATIO * needed:
            found.append(f"{name}: {counts['product_flops']:.3g} FLOPs of products where {needed:.3g} are needed")
    return found + forbidden_exchanges(report, model_cfg)
