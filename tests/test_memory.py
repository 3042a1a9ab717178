"""What a rollout needs of a device's memory: counted as it is taken, and refused where it is too much."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import check, default
from grpo_jax.errors import UserError
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import make_mesh, tree_shardings
from grpo_jax.rollout import memory
from grpo_jax.rollout.memory import bytes_per_device, kv_bytes_per_token, plan_rollout, prefill_activation_bytes
from grpo_jax.rollout.sampler import pad_prompts, place_for_rollout, start_rollout
from grpo_jax.rollout.slots import prefill_batch_size, prefill_prompts
from grpo_jax.weights.source import read_model_config
from tests.tiny import CONFIG, params

MODEL = dataclasses.replace(CONFIG, max_positions=1024)


TOTAL = 2**26  # half of it is for prefill
SHORT = int((prefill_activation_bytes(MODEL, 80) + 2**21) / 0.9)


def plan(monkeypatch, *, total=TOTAL, held=0, mesh=None, **rollout):
    monkeypatch.setattr(memory, "device_memory_bytes", lambda: total)
    cfg = default()
    for key, value in rollout.items():
        cfg.rollout[key] = value
    return plan_rollout(check(cfg), MODEL, mesh or make_mesh(devices=jax.devices()[:1]), held)


@pytest.mark.parametrize("dtype, each", [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_a_token_are_those_of_the_cache(dtype, each):
    """2 layers, keys and values of 2 heads of width 8."""
    model_cfg = dataclasses.replace(CONFIG, compute_dtype=dtype)
    assert kv_bytes_per_token(model_cfg) == 2 * 2 * 2 * 8 * each
    assert kv_bytes_per_token(model_cfg, tensor=2) == 2 * 2 * 8 * each
    assert kv_bytes_per_token(model_cfg, tensor=4) == kv_bytes_per_token(
        model_cfg
    )  # two heads are not split over four devices
    placed = place_for_rollout(model_cfg, params())
    state, _ = start_rollout(
        model_cfg,
        placed,
        pad_prompts([[1, 2]]),
        jax.random.key(0),
        np.full((1, 3), 8),
        slots=3,
        columns=40,
        max_tokens=8,
    )
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.kv_cache)) == 3 * 40 * kv_bytes_per_token(model_cfg)


def test_placed_bytes_are_those_of_one_device():
    mesh = make_mesh(1, 4, 2)
    shapes = param_shapes(CONFIG)
    placed = jax.device_put(params(), tree_shardings(mesh, shapes))
    first = jax.devices()[0]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(placed)
        for shard in leaf.addressable_shards
        if shard.device == first
    )
    assert bytes_per_device(shapes, tree_shardings(mesh, shapes)) == held


def test_slots_fill_what_is_left_of_the_memory(monkeypatch):
    """By hand: 64 MiB * 0.9 less prefill, the weights and 16 prompts of 80 tokens, over what a slot takes."""
    made = plan(monkeypatch)
    token = kv_bytes_per_token(MODEL)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params())) * 4
    slot = token * (80 + 56 + 80) + 12 * 48
    assert made.slot_bytes == slot
    assert (
        made.max_slots == (int(0.9 * TOTAL) - weights - 16 * 80 * token - prefill_activation_bytes(MODEL, 80)) // slot
    )
    assert made.slots == min(128, made.max_slots)
    assert made.max_slots - plan(monkeypatch, held=100 * slot).max_slots == 100
    assert plan(monkeypatch, slots=7).slots == 7 and plan(monkeypatch, slots=1000).slots == 128


def test_fewer_slots_than_completions_where_memory_is_short(monkeypatch):
    made = plan(monkeypatch, total=SHORT, max_tokens=400)
    assert 0 < made.slots == made.max_slots < 128


def test_slots_are_a_multiple_of_the_shards(monkeypatch):
    mesh = make_mesh(2, 4, 1)
    assert plan(monkeypatch, mesh=mesh, slots=9).slots == 16
    assert plan(monkeypatch, mesh=mesh).max_slots % 8 == 0


@pytest.mark.parametrize("width, count", [(128, 4), (512, 3)])
def test_prefill_takes_no_more_than_is_planned(width, count):
    """XLA's own count of what `start` needs besides weights, caches and prompts."""
    model_cfg = dataclasses.replace(MODEL, hidden_size=128, intermediate_size=256, num_heads=8, head_dim=16)
    weights = place_for_rollout(model_cfg, params(model_cfg))
    prompts = jax.tree.map(jnp.asarray, pad_prompts([[1] * width] * count))
    memory = jax.jit(lambda w, p: prefill_prompts(model_cfg, w, p)).lower(weights, prompts).compile().memory_analysis()
    assert (
        0.2 * prefill_activation_bytes(model_cfg, width)
        < memory.temp_size_in_bytes * prefill_batch_size(model_cfg, width) / count
    )
    assert memory.temp_size_in_bytes / min(count, prefill_batch_size(model_cfg, width)) < prefill_activation_bytes(
        model_cfg, width
    ) / prefill_batch_size(model_cfg, width)


def test_what_cannot_fit_is_refused_with_the_largest_that_can(monkeypatch):
    most = plan(monkeypatch, total=SHORT).max_slots
    assert plan(monkeypatch, total=SHORT, slots=most).slots == most
    with pytest.raises(
        UserError, match=rf"rollout.slots may be at most {most} .*found {most + 1}, .*Lower rollout.slots"
    ):
        plan(monkeypatch, total=SHORT, slots=most + 1)
    with pytest.raises(UserError, match=r"at most 0 .*Lower rollout.max_tokens or shard the model"):
        plan(monkeypatch, total=SHORT, held=2**22)


def test_a_mesh_splits_weights_heads_and_prompts(monkeypatch):
    """Of 4 shards of rows and 2 of heads each device has a quarter of the prompts and half of the keys and values."""
    mesh = make_mesh(2, 2, 2)
    made = plan(monkeypatch, mesh=mesh, held=1000)
    shapes = param_shapes(MODEL)
    weights = bytes_per_device(shapes, tree_shardings(mesh, shapes, layout="rollout"))
    assert weights < bytes_per_device(shapes, tree_shardings(make_mesh(8, 1, 1), shapes))
    token = kv_bytes_per_token(MODEL) // 2
    slot = token * (80 + 56 + 80) + 12 * 48
    assert made.slot_bytes == slot
    assert (
        made.max_slots
        == (int(0.9 * TOTAL) - 1000 - weights - 4 * 80 * token - prefill_activation_bytes(MODEL, 80, 2)) // slot * 4
    )


def test_memory_of_a_device(monkeypatch, tmp_path):
    """CPU devices share the machine's memory, or what the container has of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**28 < memory.device_memory_bytes() <= machine // 8
    monkeypatch.setattr(memory, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert memory.device_memory_bytes() == machine // 8
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.device_memory_bytes() == machine // 8
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert memory.device_memory_bytes() == 2**27


def test_latent_attention_counts_the_latent():
    model_cfg = read_model_config(Path(__file__).parent / "golden" / "deepseek_v3")
    assert (
        kv_bytes_per_token(model_cfg)
        == model_cfg.num_layers * (model_cfg.latent.kv_lora_rank + model_cfg.latent.qk_rope_head_dim) * 4
    )
