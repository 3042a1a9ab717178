"""What a rollout needs of a device's memory, counted before any of it is taken."""

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
from grpo_jax.parallel.mesh import num_row_shards, tree_shardings
from grpo_jax.rollout.slots import prefill_batch_size, score_columns

USABLE_FRACTION = 0.9  # of a device's memory may be planned for; the rest is for what XLA puts aside

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class RolloutPlan(NamedTuple):
    """The slots of a rollout, of all devices together, and what they take of one device."""

    slots: int
    most: int  # the largest number that fits
    slot_bytes: int  # of one slot: its cache, a prompt's and the logits
    free_bytes: int  # for slots, of one device

    def __str__(self):
        return f"{self.slots} slots of {self.slot_bytes / 2**20:,.1f} MiB; {self.most:,} would fit"


def device_memory_bytes() -> int:
    """The memory of one device, the least of all processes'. CPU devices share what the machine or container has."""
    mine = local_device_memory_bytes()
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.asarray(mine // 2**20, np.int32)).min()) * 2**20


def local_device_memory_bytes() -> int:
    """The memory of a device of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CGROUP_LIMIT.is_file() and CGROUP_LIMIT.read_text().strip().isdigit():
        machine = min(machine, int(CGROUP_LIMIT.read_text()))
    return machine // jax.local_device_count()


def bytes_per_device(shapes, places) -> int:
    """What a tree of jax.ShapeDtypeStruct takes of one device."""
    size = lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(size, shapes, places)))


def kv_bytes_per_token(model_cfg: ModelConfig, tensor: int = 1) -> int:
    """What the keys and values of one token take in a cache, all layers; heads are split over `tensor` devices."""
    one = jnp.zeros((1, 1), jnp.int32)
    _, kv = jax.eval_shape(
        lambda params: hidden_states(model_cfg, params, one, single_sequence(one)), param_shapes(model_cfg)
    )
    split = lambda leaf: tensor if leaf.shape[2] % tensor == 0 else 1
    return sum(leaf.size * leaf.dtype.itemsize // split(leaf) for leaf in jax.tree.leaves(kv))


def prefill_activation_bytes(model_cfg: ModelConfig, width: int, tensor: int = 1) -> int:
    """What prefilling prompts of T columns takes for a while: scores and their softmax, and what a layer makes of x."""
    heads = model_cfg.num_heads // tensor if model_cfg.num_heads % tensor == 0 else model_cfg.num_heads
    wide = max(model_cfg.intermediate_size, model_cfg.hidden_size)
    return (
        prefill_batch_size(model_cfg, width)
        * width
        * 4
        * (2 * heads * score_columns(model_cfg, width) + 2 * wide + 8 * model_cfg.hidden_size)
    )


def plan_rollout(cfg: Config, model_cfg: ModelConfig, mesh, held_bytes: int, *, strict: bool = True) -> RolloutPlan:
    """The slots that a config asks for, or with `rollout.slots` 0 as many as fit and are of use.

    Args:
      held_bytes: what one device holds during a rollout, besides the rollout's own.
      strict: refuse a `rollout.slots` that does not fit, instead of taking what fits.
    Raises:
      UserError: fewer slots fit.
    """
    shards, tensor = num_row_shards(mesh), mesh.shape["tensor"]
    rollout = cfg.rollout
    weights = param_shapes(model_cfg, model_cfg.compute_dtype)
    weight_bytes = bytes_per_device(weights, tree_shardings(mesh, weights, layout="rollout"))
    token = kv_bytes_per_token(model_cfg, tensor)
    prompts = token * rollout.max_prompt_tokens
    logits = 3 * 4 * model_cfg.vocab_size  # float32, and what drawing makes of them
    slot = token * (rollout.max_prompt_tokens + rollout.max_tokens) + prompts + logits
    total = device_memory_bytes()
    free = int(USABLE_FRACTION * total) - held_bytes - weight_bytes - prompts * -(-rollout.prompts // shards)
    free = max(0, free - prefill_activation_bytes(model_cfg, rollout.max_prompt_tokens, tensor))
    most = free // slot * shards
    rows = rollout.prompts * rollout.samples
    wanted = min(rollout.slots or rows, rows)
    if not (rollout.slots and strict):
        wanted = min(wanted, max(most, shards))
    wanted = -(-wanted // shards) * shards
    if wanted > most:
        mib = lambda count: f"{count / 2**20:,.1f} MiB"
        raise UserError(
            f"expected rollout.slots of at most {most}; found {wanted}: on each of {shards} device(s) a slot takes "
            f"{mib(slot)} ({rollout.max_prompt_tokens} + {rollout.max_tokens} tokens of {token / 1024:.1f} KiB), and of "
            f"{mib(total)} {mib(free)} are left beside {mib(held_bytes)} of state and {mib(weight_bytes)} of "
            f"weights; "
            + (
                "lower rollout.slots, or set it to 0"
                if most
                else "lower rollout.max_tokens, or spread the model over more devices"
            )
        )
    return RolloutPlan(wanted, most, slot, free)
