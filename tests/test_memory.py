"""Memory estimates of a rollout: they match what is allocated, and plans that do not fit are refused."""

import dataclasses
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from grpo_jax.config import check, default
from grpo_jax.config.flags import load_config, override_key
from grpo_jax.errors import UserError
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import MESH_AXES, make_mesh, make_rollout_mesh
from grpo_jax.planning.models import plan_model
from grpo_jax.rollout import memory
from grpo_jax.rollout.memory import (
    bytes_per_device,
    kv_bytes_per_token,
    plan_rollout,
    prefill_activation_bytes,
    rollout_memory,
    training_room,
)
from grpo_jax.rollout.sampler import pad_prompts, place_for_rollout, start_rollout
from grpo_jax.rollout.slots import prefill_batch_size, prefill_prompts
from grpo_jax.weights.source import read_model_config
from tests.tiny import CONFIG, params

REPO = Path(__file__).parent.parent
GOLDEN = REPO / "tests" / "golden"
MODEL = dataclasses.replace(CONFIG, max_positions=1024)
TOTAL = 2**26  # bytes, half of which prefill may need
SHORT = int((prefill_activation_bytes(MODEL, 80) + 2**21) / 0.9)  # leaves 2 MiB next to prefill


def plan(*, total=TOTAL, held=0, mesh=None, **rollout):
    cfg = default()
    cfg.rollout.max_prompt_tokens = 80
    for key, value in rollout.items():
        cfg.rollout[key] = value
    return plan_rollout(check(cfg), MODEL, mesh or make_mesh(devices=jax.devices()[:1]), held, total)


@pytest.mark.parametrize("dtype, itemsize", [("float32", 4), ("bfloat16", 2)])
def test_bytes_per_token_are_those_of_the_allocated_cache(dtype, itemsize):
    """2 layers, keys and values, 2 heads of width 8."""
    model_cfg = dataclasses.replace(CONFIG, compute_dtype=dtype)
    assert kv_bytes_per_token(model_cfg) == 2 * 2 * 2 * 8 * itemsize
    assert kv_bytes_per_token(model_cfg, tensor=2) == 2 * 2 * 8 * itemsize
    # Two heads are not split over four devices.
    assert kv_bytes_per_token(model_cfg, tensor=4) == kv_bytes_per_token(model_cfg)

    def allocate_cache(placed):
        prompts, limits = pad_prompts([[1, 2]]), np.full((1, 3), 8)
        sizes = dict(slots=3, columns=40, max_tokens=8)
        return start_rollout(model_cfg, placed, prompts, jax.random.key(0), limits, **sizes)[0].kv_cache

    cache = jax.eval_shape(allocate_cache, jax.eval_shape(lambda: place_for_rollout(model_cfg, params())))
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert cache_bytes == 3 * 40 * kv_bytes_per_token(model_cfg)


def test_bytes_per_device_are_those_of_the_placed_parameters():
    mesh = make_mesh(1, 4, 2)
    shapes = param_shapes(CONFIG)
    placed = jax.device_put(jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes), tree_shardings(mesh, shapes))
    shards = [shard for leaf in jax.tree.leaves(placed) for shard in leaf.addressable_shards]
    on_first = sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])
    assert bytes_per_device(shapes, tree_shardings(mesh, shapes)) == on_first


def test_slots_fill_the_memory_that_is_left():
    """By hand: 90% of 64 MiB less prefill, the weights and 16 prompts of 80 tokens, divided by the size of a slot."""
    made = plan()
    token = kv_bytes_per_token(MODEL)
    weights = bytes_per_device(param_shapes(MODEL), tree_shardings(make_mesh(8, 1, 1), param_shapes(MODEL)))
    slot = token * (80 + 56 + 80) + 12 * 48
    assert made.memory.slot_bytes == slot
    free = int(0.9 * TOTAL) - weights - 16 * 80 * token - prefill_activation_bytes(MODEL, 80)
    assert made.free_bytes == free and made.max_slots == free // slot
    assert made.slots == min(128, made.max_slots)
    assert made.max_slots - plan(held=100 * slot).max_slots == 100
    assert plan(slots=7).slots == 7 and plan(slots=1000).slots == 128


def test_a_plan_describes_itself_in_one_line():
    made = plan(slots=7)
    made = made._replace(memory=made.memory._replace(slot_bytes=2**19), max_slots=50499)
    assert str(made) == "7 decode slots, 0.5 MiB of KV cache each (up to 50,499 would fit)"


def test_little_memory_gives_fewer_slots_than_sequences():
    made = plan(total=SHORT, max_tokens=400)
    assert 0 < made.slots == made.max_slots < 128


def test_slots_are_a_multiple_of_the_data_shards():
    mesh = make_mesh(2, 4, 1)
    assert plan(mesh=mesh, slots=9).slots == 16
    assert plan(mesh=mesh).max_slots % 8 == 0
    uneven = plan(mesh=mesh, prompts=9, samples=2)  # 18 sequences; a shard has at most 2 prompts
    assert uneven.slots == 24 and uneven.memory.prompt_bytes == 2 * 80 * uneven.memory.token_bytes


@pytest.mark.parametrize("width, count", [(128, 4), (512, 3)])
def test_prefill_needs_no_more_memory_than_estimated(width, count):
    """Compared with XLA's own count of the temporaries of a prefill."""
    model_cfg = dataclasses.replace(MODEL, hidden_size=128, intermediate_size=256, num_heads=8, head_dim=16)
    placed = jax.eval_shape(lambda: place_for_rollout(model_cfg, params(model_cfg)))
    prompts = jax.tree.map(jnp.asarray, pad_prompts([[1] * width] * count))
    batch = min(count, prefill_batch_size(model_cfg, width))
    lowered = jax.jit(prefill_prompts, static_argnums=(0, 3)).lower(model_cfg, placed, prompts, batch, count)
    temporaries = lowered.compile().memory_analysis().temp_size_in_bytes
    estimate, batch_size = prefill_activation_bytes(model_cfg, width), prefill_batch_size(model_cfg, width)
    assert 0.2 * estimate < temporaries * batch_size / count
    assert temporaries / min(count, batch_size) < estimate / batch_size


def test_more_slots_than_fit_are_refused_with_the_largest_number_that_fits():
    most = plan(total=SHORT).max_slots
    assert plan(total=SHORT, slots=most).slots == most
    with pytest.raises(UserError, match=rf"may be at most {most} .*; found {most + 1}, .*\. Lower rollout.slots or"):
        plan(total=SHORT, slots=most + 1)
    with pytest.raises(UserError, match=r"at most 0 .*\. Use at least 2 devices, with mesh.fsdp=2. Keep less state"):
        plan(total=SHORT, held=2**22)


def test_a_mesh_splits_weights_heads_and_prompts():
    """With 4 data and 2 tensor shards a device holds a quarter of the prompts and half of the keys and values."""
    mesh = make_mesh(2, 2, 2)
    made = plan(mesh=mesh, held=1000)
    shapes = param_shapes(MODEL)
    weights = bytes_per_device(shapes, tree_shardings(mesh, shapes, layout="rollout"))
    assert weights < bytes_per_device(shapes, tree_shardings(make_mesh(8, 1, 1), shapes))
    token = kv_bytes_per_token(MODEL) // 2
    slot = token * (80 + 56 + 80) + 12 * 48 // 2
    assert made.memory.slot_bytes == slot
    free = int(0.9 * TOTAL) - 1000 - weights - 4 * 80 * token - prefill_activation_bytes(MODEL, 80, 2)
    assert made.max_slots == free // slot * 4


def test_cpu_devices_divide_the_memory_of_the_machine_or_container(monkeypatch, tmp_path):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**28 < memory.device_memory_bytes() <= machine // 8
    monkeypatch.setattr(memory, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert memory.device_memory_bytes() == machine // 8
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.device_memory_bytes() == machine // 8
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert memory.device_memory_bytes() == 2**27


def test_latent_attention_caches_only_the_latent():
    model_cfg = read_model_config(GOLDEN / "deepseek_v3")
    latent = model_cfg.latent
    assert kv_bytes_per_token(model_cfg) == model_cfg.num_layers * (latent.kv_lora_rank + latent.qk_rope_head_dim) * 4


def abstract_mesh(platform: str, **sizes: int) -> AbstractMesh:
    """Returns a mesh of devices that are not there."""
    device = make_mesh(devices=jax.devices()[:1]).abstract_mesh.abstract_device
    sizes = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    device = type(device)(device_kind=platform, num_cores=1, platform=platform)
    return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), abstract_device=device)


def plan_7b(mesh: AbstractMesh, memory_gib: float, state_gib: float = 106.2, **keys):
    """Plans rollouts of 32 x 16 completions of 512 + 4,096 tokens of Qwen2.5-7B, whose state is split over fsdp.

    The state is 7.6e9 parameters and two moments in float32, and the reference in bfloat16.
    """
    cfg = load_config(f"{REPO}/configs/r1zero.py:qwen2.5-7b")
    cfg.rollout.max_tokens = 4096
    for key, value in keys.items():
        override_key(cfg, key.replace("__", "."), str(value))
    held = int(state_gib * 2**30) // (mesh.shape["fsdp"] * mesh.shape["tensor"])
    cfg = check(cfg)
    return plan_rollout(cfg, plan_model(cfg), mesh, held, int(memory_gib * 2**30))


def test_a_rollout_splits_weights_over_tensor_until_its_slots_fit():
    """14.2 GiB of weights and as much while they are placed leave no room on a chip of 15.75 GiB; a quarter does."""
    assert plan_7b(abstract_mesh("tpu", fsdp=64), 15.75)[:3] == (4, 1, 512)
    assert plan_7b(abstract_mesh("tpu", fsdp=16, tensor=4), 15.75)[:3] == (4, 1, 512)
    assert plan_7b(abstract_mesh("tpu", fsdp=8), 95.74)[:3] == (1, 1, 512)
    assert plan_7b(abstract_mesh("gpu", fsdp=8), 79.1)[:3] == (1, 1, 512)


def test_a_rollout_mesh_may_be_given():
    assert plan_7b(abstract_mesh("tpu", fsdp=64), 15.75, rollout__mesh__tensor=4).tensor == 4
    assert plan_7b(abstract_mesh("tpu", fsdp=8), 95.74, rollout__mesh__tensor=2).tensor == 2
    with pytest.raises(UserError, match=r"must divide the 8 devices; found 3 and 0\. Set them to 0"):
        plan_7b(abstract_mesh("tpu", fsdp=8), 95.74, rollout__mesh__tensor=3)


def test_a_mixture_splits_its_experts_first():
    """Experts are split without copies of the cache or of the attention weights."""
    mesh, total = make_mesh(1, 8), 2**26
    model_cfg = dataclasses.replace(read_model_config(GOLDEN / "qwen3_moe_plain"), max_positions=1024)
    cfg = default()
    cfg.rollout.max_prompt_tokens, cfg.rollout.slots = 80, 8
    cfg = check(cfg)
    split = make_rollout_mesh(mesh, tensor=1, expert=2).abstract_mesh
    whole, halves = (rollout_memory(cfg, model_cfg, each, mesh.abstract_mesh) for each in (mesh.abstract_mesh, split))
    assert halves.weight_bytes < whole.weight_bytes and halves.slot_bytes == whole.slot_bytes
    held = int(0.9 * total) - whole.weight_bytes - whole.prompt_bytes - whole.prefill_bytes - whole.slot_bytes + 1
    assert plan_rollout(cfg, model_cfg, mesh, held, total)[:2] == (1, 2)


@pytest.mark.parametrize(
    "training, sampling, counted",
    [((8, 1), (8, 1), False), ((1, 8), (1, 8), True), ((1, 1, 8), (1, 1, 8), False), ((1, 8), (1, 1, 8), True)],
    ids=["whole", "gathered", "in place", "exchanged"],
)
def test_placing_weights_takes_memory_unless_every_device_has_its_own(training, sampling, counted):
    cfg = default()
    cfg.rollout.max_prompt_tokens = 80
    meshes = [make_mesh(*sizes).abstract_mesh for sizes in (sampling, training)]
    made = rollout_memory(check(cfg), MODEL, *meshes)
    assert made.placement_bytes == counted * made.weight_bytes


def test_refusals_name_what_helps():
    """Each of the settings that a refusal names first then fits."""
    v5e_64 = abstract_mesh("tpu", fsdp=64)
    with pytest.raises(
        UserError, match=r"at most 0 .*weights\. Set rollout\.mesh\.tensor=4 and rollout\.mesh\.expert=1\."
    ):
        plan_7b(v5e_64, 15.75, rollout__mesh__tensor=1)
    with pytest.raises(UserError, match=r"at most \d+ .*Lower rollout\.slots or set it to 0\.$"):
        plan_7b(v5e_64, 15.75, rollout__max_tokens=32000, rollout__slots=512)
    assert plan_7b(v5e_64, 15.75, rollout__max_tokens=32000).slots < 512
    with pytest.raises(UserError, match=r"Set mesh\.data=1 and mesh\.fsdp=64\."):
        plan_7b(abstract_mesh("tpu", data=16, fsdp=4), 15.75)
    with pytest.raises(UserError, match=r"Use at least 16 devices, with mesh\.fsdp=16\. Keep less state"):
        plan_7b(abstract_mesh("tpu", fsdp=4), 15.75)
    assert plan_7b(abstract_mesh("tpu", fsdp=16), 15.75).tensor == 4


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_completions_that_a_refusal_proposes_fit(platform):
    """A slot of 80 + 944 tokens does not fit. The cache of a TPU has 256 columns then, and that of a GPU 280."""
    token, shapes = kv_bytes_per_token(MODEL), param_shapes(MODEL)
    weights = bytes_per_device(shapes, tree_shardings(make_mesh(8, 1, 1), shapes))
    other = weights + prefill_activation_bytes(MODEL, 80) + token * 80 * (16 + 1) + 3 * 4 * 48
    room = dict(mesh=abstract_mesh(platform), total=math.ceil((other + 280 * token) / 0.9))
    tokens = {"tpu": 256 - 80, "gpu": 280 - 80}[platform]
    with pytest.raises(UserError, match=rf"at most 0 .*\. Lower rollout\.max_tokens to {tokens}\. Use at least 2"):
        plan(**room, max_tokens=944)
    assert plan(**room, max_tokens=tokens).slots == 1


@pytest.mark.parametrize(
    "slots, questions, prompts",
    [(8, 11, 4), (9, 11, 5), (16, 11, 6), (100, 12, 6), (100, 200, 8), (8, 1, 2), (8, 0, 2)],
)
def test_a_run_has_room_for_a_question_in_every_slot_of_a_shard(slots, questions, prompts):
    """On 2 shards, each of which samples 8 sequences of 2 prompts."""
    cfg = default()
    cfg.rollout.prompts, cfg.rollout.samples, cfg.eval.questions = 4, 4, questions
    assert training_room(check(cfg), slots, shards=2) == (prompts, 8, 2)


def test_the_copy_of_the_weights_is_as_large_as_planned():
    model_cfg = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    cfg = default()
    cfg.rollout.max_prompt_tokens = 80
    for tensor in (1, 2, 4):
        mesh = make_rollout_mesh(make_mesh(1, 8), tensor=tensor, expert=1)
        shapes = jax.eval_shape(lambda mesh=mesh: place_for_rollout(model_cfg, params(), mesh))
        placed = bytes_per_device(shapes, tree_shardings(mesh, shapes, layout="rollout"))
        planned = rollout_memory(check(cfg), model_cfg, mesh.abstract_mesh, mesh.abstract_mesh).weight_bytes
        assert planned <= placed <= 1.1 * planned  # norms keep float32
