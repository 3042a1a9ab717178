"""What a rollout needs of a device's memory: counted as it is taken, and refused where it is too much."""

import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax import memory
from grpo_jax.config import check, default
from grpo_jax.memory import placed_bytes, plan_rollout, token_bytes
from grpo_jax.mesh import make_mesh, shardings
from grpo_jax.model import param_shapes
from grpo_jax.sampler import begin, pad_prompts, place_for_rollout
from grpo_jax.source import read_model_config
from grpo_jax.types import UserError
from tests.tiny import CONFIG, params

MODEL = dataclasses.replace(CONFIG, max_positions=1024)


def plan(monkeypatch, *, total=2**24, held=0, mesh=None, **rollout):
    monkeypatch.setattr(memory, "device_bytes", lambda: total)
    config = default()
    for key, value in rollout.items():
        config.rollout[key] = value
    return plan_rollout(check(config), MODEL, mesh or make_mesh(devices=jax.devices()[:1]), held)


@pytest.mark.parametrize("dtype, each", [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_a_token_are_those_of_the_cache(dtype, each):
    """2 layers, keys and values of 2 heads of width 8."""
    config = dataclasses.replace(CONFIG, compute_dtype=dtype)
    assert token_bytes(config) == 2 * 2 * 2 * 8 * each
    assert token_bytes(config, tensor=2) == 2 * 2 * 8 * each
    assert token_bytes(config, tensor=4) == token_bytes(config)  # two heads are not split over four devices
    placed = place_for_rollout(config, params())
    state, _ = begin(config, placed, pad_prompts([[1, 2]]), jax.random.key(0), np.full((1, 3), 8), slots=3, columns=40,
                     sampled=8)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.kv)) == 3 * 40 * token_bytes(config)


def test_placed_bytes_are_those_of_one_device():
    mesh = make_mesh(1, 4, 2)
    shapes = param_shapes(CONFIG)
    placed = jax.device_put(params(), shardings(mesh, shapes))
    first = jax.devices()[0]
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(placed) for shard in leaf.addressable_shards
               if shard.device == first)
    assert placed_bytes(shapes, shardings(mesh, shapes)) == held


def test_slots_fill_what_is_left_of_the_memory(monkeypatch):
    """By hand: 16 MiB * 0.9 less the weights and 16 prompts of 80 tokens, over what a slot takes."""
    made = plan(monkeypatch)
    token = token_bytes(MODEL)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params())) * 4
    slot = token * (80 + 56 + 80) + 12 * 48
    assert made.slot_bytes == slot
    assert made.most == (int(0.9 * 2**24) - weights - 16 * 80 * token) // slot
    assert made.slots == min(128, made.most)
    assert made.most - plan(monkeypatch, held=100 * slot).most == 100
    assert plan(monkeypatch, slots=7).slots == 7


def test_fewer_slots_than_completions_where_memory_is_short(monkeypatch):
    made = plan(monkeypatch, total=2**21, max_tokens=400)
    assert 0 < made.slots == made.most < 128


def test_slots_are_a_multiple_of_the_shards(monkeypatch):
    mesh = make_mesh(2, 4, 1)
    assert plan(monkeypatch, mesh=mesh, slots=9).slots == 16
    assert plan(monkeypatch, mesh=mesh).most % 8 == 0


def test_what_cannot_fit_is_refused_with_the_largest_that_can(monkeypatch):
    most = plan(monkeypatch, total=2**21).most
    assert plan(monkeypatch, total=2**21, slots=most).slots == most
    with pytest.raises(UserError, match=rf"rollout.slots of at most {most}; found {most + 1}: .*lower rollout.slots"):
        plan(monkeypatch, total=2**21, slots=most + 1)
    with pytest.raises(UserError, match="at most 0; .*lower rollout.max_tokens, or spread the model"):
        plan(monkeypatch, total=2**21, held=2**21)


def test_a_mesh_splits_weights_heads_and_prompts(monkeypatch):
    """Of 4 shards of rows and 2 of heads each device has a quarter of the prompts and half of the keys and values."""
    mesh = make_mesh(2, 2, 2)
    made = plan(monkeypatch, mesh=mesh, held=1000)
    shapes = param_shapes(MODEL)
    weights = placed_bytes(shapes, shardings(mesh, shapes, gathered=True))
    assert weights < placed_bytes(shapes, shardings(make_mesh(8, 1, 1), shapes))
    token = token_bytes(MODEL) // 2
    slot = token * (80 + 56 + 80) + 12 * 48
    assert made.slot_bytes == slot
    assert made.most == (int(0.9 * 2**24) - 1000 - weights - 4 * 80 * token) // slot * 4


def test_memory_of_a_device(monkeypatch, tmp_path):
    """CPU devices share the machine's memory, or what the container has of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**28 < memory.device_bytes() <= machine // 8
    monkeypatch.setattr(memory, "CONTAINER", tmp_path / "memory.max")
    assert memory.device_bytes() == machine // 8
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.device_bytes() == machine // 8
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert memory.device_bytes() == 2**27


def test_latent_attention_counts_the_latent():
    config = read_model_config(Path(__file__).parent / "golden" / "deepseek_v3")
    assert token_bytes(config) == config.num_layers * (config.latent.kv_rank + config.latent.rope_width) * 4
