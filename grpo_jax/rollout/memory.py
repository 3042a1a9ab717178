"""Estimates the device memory that a rollout needs, before allocating any of it."""

import dataclasses
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from grpo_jax.config.schema import Config, RolloutMeshSection
from grpo_jax.errors import UserError
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import hidden_states, param_shapes
from grpo_jax.model.mask import single_sequence
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import num_data_shards, rollout_axis_sizes
from grpo_jax.rollout.sampler import QueueRoom, cache_sizes, needed_room
from grpo_jax.rollout.slots import num_score_columns, prefill_batch_size

USABLE_FRACTION = 0.9  # of a device's memory is planned for; the rest is left for XLA's own needs

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class RolloutMemory(NamedTuple):
    """What a rollout takes of one device's memory on a given mesh, in bytes."""

    weight_bytes: int  # the copy of the policy
    placement_bytes: int  # temporaries while the copy is made, before there are slots
    prompt_bytes: int  # the prefilled KV of the prompts
    prefill_bytes: int  # temporaries of prefilling
    token_bytes: int  # the KV of one token
    columns: int  # of the KV cache at its largest
    slot_bytes: int  # of one slot: its KV cache, the prefilled KV of a prompt, and the logits


class NoRoomError(UserError):
    """A rollout does not fit in the memory of the devices.

    Attributes:
        reason: What the rollout takes and what is free, without what to do about it.
    """

    def __init__(self, reason: str, fixes: str):
        """Builds the error from its parts."""
        super().__init__(f"{reason} {fixes}")
        self.reason = reason


class RolloutPlan(NamedTuple):
    """The mesh of rollouts, how many decode slots to use across all devices, and how much memory they take of each."""

    tensor: int  # size of the mesh axis `tensor` in rollouts
    expert: int  # size of the mesh axis `expert` in rollouts
    slots: int
    max_slots: int  # the largest number of slots that fits
    free_bytes: int  # memory of one device that is available for slots
    memory: RolloutMemory

    def __str__(self) -> str:
        """Describes the plan in one line for the console."""
        each = mebibytes(self.memory.slot_bytes)
        return f"{self.slots} decode slots, {each} of KV cache each (up to {self.max_slots:,} would fit)"


def device_memory_bytes() -> int:
    """Returns the memory of one device, the smallest over all processes.

    CPU devices divide the memory of the machine, or of the container if that has less.
    """
    local_bytes = local_device_memory_bytes()
    if jax.process_count() == 1:
        return local_bytes
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.asarray(local_bytes // 2**20, np.int32)).min()) * 2**20


def local_device_memory_bytes() -> int:
    """Returns the memory of one device of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CGROUP_LIMIT.is_file() and CGROUP_LIMIT.read_text().strip().isdigit():
        host_bytes = min(host_bytes, int(CGROUP_LIMIT.read_text()))
    return host_bytes // jax.local_device_count()


def bytes_per_device(shapes, shardings) -> int:
    """Returns the bytes that a tree of `jax.ShapeDtypeStruct` occupies on one device under the given shardings."""
    sizes = jax.tree.map(lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, shapes, shardings)
    return sum(jax.tree.leaves(sizes))


@lru_cache  # tracing the model takes a good part of a second
def kv_bytes_per_token(model_cfg: ModelConfig, tensor: int = 1) -> int:
    """Returns the bytes of one token's keys and values in all layers, with heads split over `tensor` devices."""
    token, shapes = jnp.zeros((1, 1), jnp.int32), param_shapes(model_cfg)
    _, kv = jax.eval_shape(lambda params: hidden_states(model_cfg, params, token, single_sequence(token)), shapes)
    # Heads that `tensor` does not divide are replicated.
    return sum(x.size * x.dtype.itemsize // (tensor if x.shape[2] % tensor == 0 else 1) for x in jax.tree.leaves(kv))


def prefill_activation_bytes(model_cfg: ModelConfig, width: int, tensor: int = 1) -> int:
    """Returns a bound on the temporary memory of prefilling prompts of T = `width` columns on one device.

    It covers the attention scores and their softmax, and the activations of one layer, in float32.
    """
    heads = model_cfg.num_heads // tensor if model_cfg.num_heads % tensor == 0 else model_cfg.num_heads
    mlp_width = max(model_cfg.intermediate_size // tensor, model_cfg.hidden_size)
    floats_per_token = 2 * heads * num_score_columns(model_cfg, width) + 2 * mlp_width + 8 * model_cfg.hidden_size
    return prefill_batch_size(model_cfg, width) * width * 4 * floats_per_token


def training_room(cfg: Config, slots: int, shards: int) -> QueueRoom:
    """Returns the room of all rollouts of a training run, which is enough for a held-out question in every slot.

    Evaluations then run the programs of training. The prompts take the memory that `RolloutMemory.slot_bytes` counts.

    Args:
        cfg: The config of the run.
        slots: Number of decode slots over all data shards.
        shards: Number of data shards.
    """
    room = needed_room(cfg.rollout.prompts, cfg.rollout.samples, shards)
    questions = min(-(-slots // shards), -(-cfg.eval.questions // shards), room.sequences)
    return room._replace(prompts=max(room.prompts, questions))


@lru_cache
def rollout_memory(
    cfg: Config, model_cfg: ModelConfig, mesh: AbstractMesh, training_mesh: AbstractMesh
) -> RolloutMemory:
    """Returns the memory that a rollout on `mesh` takes of each device, if `training_mesh` is that of the updates."""
    rollout, tensor = cfg.rollout, mesh.shape["tensor"]
    weights = param_shapes(model_cfg, model_cfg.compute_dtype)
    split_bytes = bytes_per_device(weights, tree_shardings(mesh, weights))
    weight_bytes = bytes_per_device(weights, tree_shardings(mesh, weights, layout="rollout"))
    token_bytes = kv_bytes_per_token(model_cfg, tensor)
    prompt_bytes = token_bytes * rollout.max_prompt_tokens
    vocab_shard = model_cfg.vocab_size // (tensor if model_cfg.vocab_size % tensor == 0 else 1)
    logit_bytes = 3 * 4 * vocab_shard  # float32 logits and what sampling derives from them
    with jax.sharding.use_abstract_mesh(mesh):  # the attention kernel and the cache depend on the platform
        prefill_bytes = prefill_activation_bytes(model_cfg, rollout.max_prompt_tokens, tensor)
        columns = cache_sizes(rollout.max_prompt_tokens, rollout.max_prompt_tokens + rollout.max_tokens)[-1]
    return RolloutMemory(
        weight_bytes=weight_bytes,
        # All weights are exchanged or gathered at the same time, unless every device has its own already.
        placement_bytes=weight_bytes if split_bytes < weight_bytes or mesh != training_mesh else 0,
        prompt_bytes=prompt_bytes * -(-rollout.prompts // num_data_shards(mesh)),
        prefill_bytes=prefill_bytes,
        token_bytes=token_bytes,
        columns=columns,
        slot_bytes=token_bytes * columns + prompt_bytes + logit_bytes,
    )


def rollout_meshes(cfg: Config, model_cfg: ModelConfig, mesh: Mesh | AbstractMesh) -> list[AbstractMesh]:
    """Returns the meshes that `rollout.mesh` allows over the devices of `mesh`, the least split weights first.

    Raises:
        UserError: There are none.
    """
    count = mesh.size
    divisors = [size for size in range(1, count + 1) if count % size == 0]

    def allowed(given: int, training: int, split: int) -> list[int]:
        larger = [size for size in divisors if size % training == 0 and split % size == 0]
        return [given] if given else sorted({training, *larger})

    tensors = allowed(cfg.rollout.mesh.tensor, mesh.shape["tensor"], model_cfg.num_heads)
    experts = allowed(
        cfg.rollout.mesh.expert, mesh.shape["expert"], model_cfg.experts.num_experts if model_cfg.experts else 1
    )
    pairs = [(expert, tensor) for expert in experts for tensor in tensors if count % (expert * tensor) == 0]
    if not pairs:
        raise UserError(
            f"The product of rollout.mesh.tensor and rollout.mesh.expert must divide the {count} devices; found "
            f"{cfg.rollout.mesh.tensor} and {cfg.rollout.mesh.expert}. Set them to 0 to have them chosen."
        )
    pairs.sort(key=lambda pair: (math.prod(pair), pair[1]))  # experts first: splitting them copies no part of the cache
    return [mesh.abstract_mesh.update(axis_sizes=rollout_axis_sizes(mesh, t, e)) for e, t in pairs]


def best_plan(
    cfg: Config, model_cfg: ModelConfig, mesh: Mesh | AbstractMesh, held_bytes: int, memory_bytes: int
) -> RolloutPlan:
    """Returns the plan on the first of `rollout_meshes` where all usable slots fit, else on the one with most slots.

    The arguments are those of `plan_rollout`.
    """
    sequences, usable_bytes = cfg.rollout.prompts * cfg.rollout.samples, int(USABLE_FRACTION * memory_bytes)
    wanted = min(cfg.rollout.slots or sequences, sequences)

    def plan_on(rollout_mesh: AbstractMesh) -> RolloutPlan:
        memory = rollout_memory(cfg, model_cfg, rollout_mesh, mesh.abstract_mesh)
        shape, shards = rollout_mesh.shape, num_data_shards(rollout_mesh)
        free_bytes = usable_bytes - held_bytes - memory.weight_bytes
        fits = free_bytes >= memory.placement_bytes
        free_bytes = max(0, free_bytes - memory.prompt_bytes - memory.prefill_bytes) if fits else 0
        max_slots = free_bytes // memory.slot_bytes * shards
        slots = -(-min(wanted, max(max_slots, shards)) // shards) * shards
        return RolloutPlan(shape["tensor"], shape["expert"], slots, max_slots, free_bytes, memory)

    plans = [plan_on(each) for each in rollout_meshes(cfg, model_cfg, mesh)]
    return next((plan for plan in plans if plan.max_slots >= wanted), max(plans, key=lambda plan: plan.max_slots))


def plan_rollout(
    cfg: Config,
    model_cfg: ModelConfig,
    mesh: Mesh | AbstractMesh,
    held_bytes: int,
    memory_bytes: int,
    *,
    strict: bool = True,
) -> RolloutPlan:
    """Chooses the mesh of rollouts, as `rollout.mesh` allows, and the number of decode slots.

    The number of slots is `rollout.slots`, or if that is 0, as many as fit and can be used. Nothing is asked of the
    devices, so those of the mesh need not be there.

    Args:
        cfg: The config of the run.
        model_cfg: The model.
        mesh: The mesh of the updates. Its devices determine the platform.
        held_bytes: Bytes that one device holds during a rollout in addition to the rollout's own data.
        memory_bytes: The memory of one device.
        strict: Raise if `rollout.slots` slots do not fit; otherwise use as many as fit.

    Raises:
        NoRoomError: There is not enough memory.
    """
    plan = best_plan(cfg, model_cfg, mesh, held_bytes, memory_bytes)
    shards = mesh.size // plan.tensor
    if cfg.rollout.slots and strict:
        wanted = min(cfg.rollout.slots, cfg.rollout.prompts * cfg.rollout.samples)
        plan = plan._replace(slots=-(-wanted // shards) * shards)
    if plan.slots <= plan.max_slots:
        return plan
    fixes = fixes_for(cfg, model_cfg, mesh, held_bytes, memory_bytes, plan)
    raise NoRoomError(
        f"rollout.slots may be at most {plan.max_slots} to fit in memory; found {plan.slots}, over {shards} data "
        f"shard(s). A slot takes {mebibytes(plan.memory.slot_bytes)} ({cfg.rollout.max_prompt_tokens} + "
        f"{cfg.rollout.max_tokens} tokens of {plan.memory.token_bytes / 1024:.1f} KiB), and "
        f"{mebibytes(plan.free_bytes)} of a device's {mebibytes(memory_bytes)} are free next to "
        f"{mebibytes(held_bytes)} of state and {mebibytes(plan.memory.weight_bytes)} of weights.",
        fixes,
    )


def fixes_for(
    cfg: Config,
    model_cfg: ModelConfig,
    mesh: Mesh | AbstractMesh,
    held_bytes: int,
    memory_bytes: int,
    plan: RolloutPlan,
) -> str:
    """Returns what to do about a plan that does not fit, the cheapest first; the other arguments are its own."""
    data, fsdp, expert, tensor = mesh.axis_sizes
    any_mesh = dataclasses.replace(cfg.rollout, slots=0, mesh=RolloutMeshSection())
    free_choice = dataclasses.replace(cfg, rollout=any_mesh)

    def fitting(data: int, fsdp: int, held_bytes: int) -> RolloutPlan | None:
        other = mesh.abstract_mesh.update(axis_sizes=(data, fsdp, expert, tensor))
        best = best_plan(free_choice, model_cfg, other, held_bytes, memory_bytes)
        return best if best.max_slots > plan.max_slots else None

    fixes = ["Lower rollout.slots or set it to 0."] if plan.max_slots else []
    if best := fitting(data, fsdp, held_bytes):
        fixes.append(f"Set rollout.mesh.tensor={best.tensor} and rollout.mesh.expert={best.expert}.")
    elif data > 1 and fitting(1, data * fsdp, held_bytes // data):
        fixes.append(f"Set mesh.data=1 and mesh.fsdp={data * fsdp}.")
    if not fixes:
        memory, prompt = plan.memory, cfg.rollout.max_prompt_tokens
        logit_and_prompt_bytes = memory.slot_bytes - memory.token_bytes * memory.columns
        columns = (plan.free_bytes - logit_and_prompt_bytes) // memory.token_bytes
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the cache of a TPU has columns that hold no token
            lengths = (size for size in range(columns, prompt, -1) if cache_sizes(prompt, size)[-1] <= columns)
            tokens = next(lengths, 0) - prompt
        if tokens > 0:
            fixes.append(f"Lower rollout.max_tokens to {tokens}.")
        more = (2**i for i in range(1, 11) if fitting(data, fsdp * 2**i, held_bytes >> i))
        if factor := next(more, 0):
            fixes.append(f"Use at least {mesh.size * factor} devices, with mesh.fsdp={fsdp * factor}.")
        fixes.append("Keep less state: optim.mu_dtype, model.reference_dtype, loss.kl_coef=0, optim.name=adafactor.")
    return " ".join(fixes)


def mebibytes(count: int) -> str:
    """Formats a number of bytes in MiB."""
    return f"{count / 2**20:,.1f} MiB"
