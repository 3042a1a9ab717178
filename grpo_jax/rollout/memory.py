"""Estimates the device memory that a rollout needs, before allocating any of it."""

import math
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import hidden_states, param_shapes
from grpo_jax.model.mask import single_sequence
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import num_data_shards
from grpo_jax.rollout.slots import num_score_columns, prefill_batch_size

USABLE_FRACTION = 0.9  # of a device's memory is planned for; the rest is left for XLA's own needs

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class RolloutPlan(NamedTuple):
    """How many decode slots to use across all devices, and how much memory they take per device."""

    slots: int
    max_slots: int  # the largest number of slots that fits
    slot_bytes: int  # memory of one slot: its KV cache, the prefilled KV of a prompt, and the logits
    free_bytes: int  # memory of one device that is available for slots

    def __str__(self) -> str:
        """Describes the plan in one line for the console."""
        each = mebibytes(self.slot_bytes)
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
    mlp_width = max(model_cfg.intermediate_size, model_cfg.hidden_size)
    floats_per_token = 2 * heads * num_score_columns(model_cfg, width) + 2 * mlp_width + 8 * model_cfg.hidden_size
    return prefill_batch_size(model_cfg, width) * width * 4 * floats_per_token


def plan_rollout(cfg: Config, model_cfg: ModelConfig, mesh, held_bytes: int, *, strict: bool = True) -> RolloutPlan:
    """Chooses the number of decode slots: `rollout.slots`, or if that is 0, as many as fit and can be used.

    Args:
        cfg: The config of the run.
        model_cfg: The model.
        mesh: The device mesh.
        held_bytes: Bytes that one device holds during a rollout in addition to the rollout's own data.
        strict: Raise if `rollout.slots` slots do not fit; otherwise use as many as fit.

    Raises:
        UserError: There is not enough memory.
    """
    rollout = cfg.rollout
    shards, tensor = num_data_shards(mesh), mesh.shape["tensor"]
    weights = param_shapes(model_cfg, model_cfg.compute_dtype)
    weight_bytes = bytes_per_device(weights, tree_shardings(mesh, weights, layout="rollout"))
    token_bytes = kv_bytes_per_token(model_cfg, tensor)
    prompt_bytes = token_bytes * rollout.max_prompt_tokens
    logit_bytes = 3 * 4 * model_cfg.vocab_size  # float32 logits and what sampling derives from them
    slot_bytes = token_bytes * (rollout.max_prompt_tokens + rollout.max_tokens) + prompt_bytes + logit_bytes
    total_bytes = device_memory_bytes()
    free_bytes = int(USABLE_FRACTION * total_bytes) - held_bytes - weight_bytes
    free_bytes -= prompt_bytes * -(-rollout.prompts // shards)
    free_bytes = max(0, free_bytes - prefill_activation_bytes(model_cfg, rollout.max_prompt_tokens, tensor))
    max_slots = free_bytes // slot_bytes * shards
    sequences = rollout.prompts * rollout.samples
    slots = min(rollout.slots or sequences, sequences)
    if not (rollout.slots and strict):
        slots = min(slots, max(max_slots, shards))
    slots = -(-slots // shards) * shards
    if slots > max_slots:
        fix = "rollout.slots or set it to 0" if max_slots else "rollout.max_tokens or shard the model over more devices"
        raise UserError(
            f"rollout.slots may be at most {max_slots} to fit in memory; found {slots}, over {shards} data shard(s). A "
            f"slot takes {mebibytes(slot_bytes)} ({rollout.max_prompt_tokens} + {rollout.max_tokens} tokens of "
            f"{token_bytes / 1024:.1f} KiB), and {mebibytes(free_bytes)} of a device's {mebibytes(total_bytes)} are "
            f"free next to {mebibytes(held_bytes)} of state and {mebibytes(weight_bytes)} of weights. Lower {fix}."
        )
    return RolloutPlan(slots, max_slots, slot_bytes, free_bytes)


def mebibytes(count: int) -> str:
    """Formats a number of bytes in MiB."""
    return f"{count / 2**20:,.1f} MiB"
