"""What is wrong with a compiled run besides its memory: whole gathers and sums, copies of the cache, repeated work."""

import math
from collections.abc import Mapping

import jax

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import path_name

MAX_FLOPS_RATIO = 1.1  # products of a program by those that it has to compute
SMALL_BYTES = 2**22  # of biases and norms, whose gradients are summed whole


def largest_matrix_bytes(model_cfg: ModelConfig) -> int:
    """Returns the bytes of the largest matrix of a layer in float32, the most that one gather should bring together."""
    leaves = jax.tree_util.tree_leaves_with_path(param_shapes(model_cfg))
    sizes = [math.prod(leaf.shape[1:]) for path, leaf in leaves if path_name(path).startswith("layers/")]
    return 4 * max(sizes)


def violations(report: Mapping, model_cfg: ModelConfig) -> list[str]:
    """Returns what a plan must not show, one line each.

    Args:
        report: The plan, from `grpo_jax.planning.report.plan_report`.
        model_cfg: The architecture of its model.
    """
    found = [f"{name}: {error}" for name, error in report["errors"].items()]
    if not report["fits"] and not found:
        found.append(f"does not fit: peaks {report['peaks']} of {report['budget_bytes']} bytes")
    most = largest_matrix_bytes(model_cfg)
    for name, program in report["programs"].items():
        counts = program.get("counts")
        if not counts:
            continue
        for each in counts["collectives"]:
            what = f"{name}: {each['kind']} of {each['bytes']:,} bytes over {'+'.join(each['axes'])}, {each['op_name']}"
            if each["kind"] == "all-gather" and each["bytes"] > most:
                found.append(what)
            is_sum = each["kind"] == "all-reduce" and "fsdp" in each["axes"]
            if name == "update" and is_sum and each["bytes"] > SMALL_BYTES:
                found.append(what)
        if name.startswith("decode"):
            found += [f"{name}: copies {each['array']}, {each['op_name']}" for each in counts["copies"]]
        needed = program.get("needed_product_flops")
        if needed and counts["product_flops"] > MAX_FLOPS_RATIO * needed:
            found.append(f"{name}: {counts['product_flops']:.3g} FLOPs of products where {needed:.3g} are needed")
    return found
