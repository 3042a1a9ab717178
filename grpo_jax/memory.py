"""What a rollout needs of a device's memory, counted before any of it is taken."""

import math
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.architecture import ModelConfig
from grpo_jax.attend import alone
from grpo_jax.mesh import row_shards, shardings
from grpo_jax.model import hidden_states, param_shapes
from grpo_jax.slots import prefill_rows, scored_columns
from grpo_jax.types import UserError

SPARE = 0.9  # of a device's memory may be planned for; the rest is for what XLA puts aside

CONTAINER = Path("/sys/fs/cgroup/memory.max")


class Plan(NamedTuple):
    """The slots of a rollout, of all devices together, and what they take of one device."""

    slots: int
    most: int  # the largest number that fits
    slot_bytes: int  # of one slot: its cache, a prompt's and the logits
    free_bytes: int  # for slots, of one device

    def __str__(self):
        return f"{self.slots} slots of {self.slot_bytes / 2**20:,.1f} MiB; {self.most:,} would fit"


def device_bytes() -> int:
    """The memory of one device, the least of all processes'. CPU devices share what the machine or container has."""
    mine = local_device_bytes()
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.asarray(mine // 2**20, np.int32)).min()) * 2**20


def local_device_bytes() -> int:
    """The memory of a device of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if CONTAINER.is_file() and CONTAINER.read_text().strip().isdigit():
        machine = min(machine, int(CONTAINER.read_text()))
    return machine // jax.local_device_count()


def placed_bytes(shapes, places) -> int:
    """What a tree of jax.ShapeDtypeStruct takes of one device."""
    size = lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(size, shapes, places)))


def token_bytes(config: ModelConfig, tensor: int = 1) -> int:
    """What the keys and values of one token take in a cache, all layers; heads are split over `tensor` devices."""
    one = jnp.zeros((1, 1), jnp.int32)
    _, kv = jax.eval_shape(
        lambda params: hidden_states(config, params, one, alone(one)), param_shapes(config))
    split = lambda leaf: tensor if leaf.shape[2] % tensor == 0 else 1
    return sum(leaf.size * leaf.dtype.itemsize // split(leaf) for leaf in jax.tree.leaves(kv))


def prefill_bytes(config: ModelConfig, width: int, tensor: int = 1) -> int:
    """What prefilling prompts of T columns takes for a while: scores and their softmax, and what a layer makes of x."""
    heads = config.num_heads // tensor if config.num_heads % tensor == 0 else config.num_heads
    wide = max(config.intermediate_size, config.hidden_size)
    return prefill_rows(config, width) * width * 4 * (2 * heads * scored_columns(config, width) + 2 * wide + 8 * config.hidden_size)


def plan_rollout(config, model: ModelConfig, mesh, held_bytes: int, *, strict: bool = True) -> Plan:
    """The slots that a config asks for, or with `rollout.slots` 0 as many as fit and are of use.

    Args:
      held_bytes: what one device holds during a rollout, besides the rollout's own.
      strict: refuse a `rollout.slots` that does not fit, instead of taking what fits.
    Raises:
      UserError: fewer slots fit.
    """
    shards, tensor = row_shards(mesh), mesh.shape["tensor"]
    rollout = config.rollout
    weights = param_shapes(model, model.compute_dtype)
    weight_bytes = placed_bytes(weights, shardings(mesh, weights, gathered=True))
    token = token_bytes(model, tensor)
    prompts = token * rollout.max_prompt_tokens
    logits = 3 * 4 * model.vocab_size  # float32, and what drawing makes of them
    slot = token * (rollout.max_prompt_tokens + rollout.max_tokens) + prompts + logits
    total = device_bytes()
    free = int(SPARE * total) - held_bytes - weight_bytes - prompts * -(-rollout.prompts // shards)
    free = max(0, free - prefill_bytes(model, rollout.max_prompt_tokens, tensor))
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
            f"weights; " + ("lower rollout.slots, or set it to 0" if most else
                            "lower rollout.max_tokens, or spread the model over more devices"))
    return Plan(wanted, most, slot, free)
