"""Derives the precision, the mesh, the micro-batch and the optimizer of a run, so that it fits in memory."""

import dataclasses
import math
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from grpo_jax.config.keys import flatten
from grpo_jax.config.rules import build
from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import MESH_AXES
from grpo_jax.rollout.memory import USABLE_FRACTION, best_plan, bytes_per_device
from grpo_jax.run.context import resident_bytes
from grpo_jax.run.derivation import Derivation, Machine

GRADIENT_TREES = {"gpu": 2, "tpu": 3, "cpu": 3}  # float32 gradients that an update holds at its peak, as compiled

# What training does without if memory is short, the cheapest first. Each saving is added to those before it.
SAVINGS = (
    ("", {}),
    ("memory is short, so there is no reference", {"loss.kl_coef": 0.0, "model.reference_dtype": "float32"}),
    ("memory is short, so the optimizer keeps factored moments", {"optim.name": "adafactor", "optim.b2": 0.999}),
)


def choose_memory(chosen: Derivation, model_cfg: ModelConfig, machine: Machine) -> None:
    """Chooses the precision, the mesh, the micro-batch and, if memory is short, what training does without.

    Raises:
        UserError: Training does not fit on the devices.
    """
    is_cpu = machine.platform == "cpu"
    if not is_cpu:
        reason = f"bfloat16 is fast on {machine.name}, and float32 master weights keep small updates"
        precise = {"model.compute_dtype": "bfloat16", "train.chunk_tokens": 2048}
        if chosen["loss.kl_coef"]:
            precise["model.reference_dtype"] = "bfloat16"
        if chosen["optim.name"] == "adamw":
            precise["optim.b2"] = 0.95
        chosen.choose(reason, precise)
        choose_mesh(chosen, model_cfg, machine)
    # Without a list of problems, `fit_prompts` chooses the limit of the prompts later.
    prompt = chosen["rollout.max_prompt_tokens"] or min(512, model_cfg.max_positions)
    sequence = prompt + chosen["rollout.max_tokens"]
    largest = max(1024 if is_cpu else 4096, sequence)
    sizes = sorted({max(sequence, largest >> shift) for shift in range(4)}, reverse=True)
    attempt: dict[str, Any] = {}
    reasons: list[str] = []
    for reason, saving in SAVINGS:
        attempt |= {name: value for name, value in saving.items() if name not in chosen.given}
        reasons += [reason] * bool(reason)
        for size in sizes:
            needed = needed_bytes(
                chosen, attempt | {"rollout.max_prompt_tokens": prompt, "train.micro_tokens": size}, model_cfg, machine
            )
            if needed <= USABLE_FRACTION * machine.memory_bytes:
                if attempt:
                    chosen.choose("; ".join(reasons), attempt)
                reason = f"training then needs about {needed / 2**30:.1f} of {machine.memory_bytes / 2**30:.1f} GiB"
                chosen.choose(reason, {"train.micro_tokens": size})
                return
    raise UserError(
        f"Training must fit in memory; it takes at least {needed / 2**30:.1f} GiB on each {machine.name} device, "
        f"which has {machine.memory_bytes / 2**30:.1f} GiB. Use more devices, a smaller model, or a lower "
        "rollout.max_tokens; `python -m grpo_jax.plan` estimates memory for other devices."
    )


def choose_mesh(chosen: Derivation, model_cfg: ModelConfig, machine: Machine) -> None:
    """Chooses the mesh of an accelerator: parameters are split over all devices, experts of a mixture first."""
    if machine.devices == 1:
        return
    expert = math.gcd(machine.devices, model_cfg.experts.num_experts) if model_cfg.experts else 1
    sizes = {"mesh.data": 1, "mesh.fsdp": -1, "mesh.expert": min(expert, 8), "mesh.tensor": 1}
    if not any(name.startswith("mesh.") for name in chosen.given):  # half of a mesh fits no machine
        chosen.choose(f"the {machine.devices} devices share the training state", sizes)


def needed_bytes(chosen: Derivation, attempt: dict[str, Any], model_cfg: ModelConfig, machine: Machine) -> float:
    """Estimates the most bytes that one device holds during an update, or during a rollout with one slot.

    Args:
        chosen: The derivation so far.
        attempt: Further keys to try.
        model_cfg: The model.
        machine: The devices.
    """
    cfg = build(Config, flatten(dataclasses.asdict(chosen.cfg)) | chosen.values | attempt)
    mesh = planned_mesh(cfg, machine)
    model_cfg = dataclasses.replace(model_cfg, compute_dtype=cfg.model.compute_dtype)
    held = resident_bytes(cfg, model_cfg, mesh, training=True)
    parameters = bytes_per_device(param_shapes(model_cfg, "float32"), tree_shardings(mesh, param_shapes(model_cfg)))
    width, heads = model_cfg.hidden_size, model_cfg.num_heads * model_cfg.head_dim
    size = 2 if cfg.model.compute_dtype == "bfloat16" else 4
    token = model_cfg.num_layers * (width + heads) * size  # what the backward pass keeps
    token += 4 * (4 * model_cfg.intermediate_size + 6 * width + 3 * heads)  # the activations of one layer
    update = held + GRADIENT_TREES[machine.platform] * parameters + cfg.train.micro_tokens * token
    memory = best_plan(cfg, model_cfg, mesh, held, machine.memory_bytes).memory
    rollout = memory.weight_bytes + max(memory.placement_bytes, memory.prompt_bytes + memory.prefill_bytes)
    return max(update, held + rollout + memory.slot_bytes)


def planned_mesh(cfg: Config, machine: Machine) -> AbstractMesh:
    """Returns the mesh that a config names over the devices of a machine, which need not exist."""
    sizes = [cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.expert, cfg.mesh.tensor]
    known = math.prod(size for size in sizes if size > 0)
    sizes = [size if size > 0 else max(1, machine.devices // known) for size in sizes]
    return AbstractMesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
