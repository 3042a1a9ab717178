"""What a rollout needs of a device's memory, counted before any of it is taken."""

import math
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.architecture import ModelConfig
from grpo_jax.mesh import row_shards, shardings
from grpo_jax.model import causal_mask, hidden_states, param_shapes
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
    """The memory of one device. CPU devices share the machine's, or what the container may use of it."""
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
        lambda params: hidden_states(config, params, one, one, causal_mask(1, 1)), param_shapes(config))
    split = lambda leaf: tensor if leaf.shape[2] % tensor == 0 else 1
    return sum(leaf.size * leaf.dtype.itemsize // split(leaf) for leaf in jax.tree.leaves(kv))


def plan_rollout(config, model: ModelConfig, mesh, held_bytes: int) -> Plan:
    """The slots that a config asks for, or with `rollout.slots` 0 as many as fit and are of use.

    Args:
      held_bytes: what one device holds during a rollout, besides the rollout's own.
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
    most = max(0, free // slot) * shards
    wanted = rollout.slots or min(rollout.prompts * rollout.samples, max(most, shards))
    wanted = -(-wanted // shards) * shards
    if wanted > most:
        gib = lambda count: f"{count / 2**30:.2f} GiB"
        raise UserError(
            f"expected rollout.slots of at most {most}; found {wanted}: on each of {shards} device(s) a slot takes "
            f"{gib(slot)} ({rollout.max_prompt_tokens} + {rollout.max_tokens} tokens of {token / 1024:.1f} KiB), and of "
            f"{gib(total)} {gib(max(free, 0))} are left beside {gib(held_bytes)} of state and {gib(weight_bytes)} of "
            f"weights; " + ("lower rollout.slots, or set it to 0" if most else
                            "lower rollout.max_tokens, or spread the model over more devices"))
    return Plan(wanted, most, slot, max(free, 0))
