"""What a plan says that a model needs: FLOPs as traced programs have them, bytes as arrays have them."""

import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import check, default
from grpo_jax.config.flags import load_config
from grpo_jax.learn.update import minibatch_gradients, score_completions
from grpo_jax.model.architecture import LayerConfig
from grpo_jax.model.decoder import compute_logits, hidden_states, init_params, param_shapes
from grpo_jax.model.mask import attention_mask, single_sequence
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.planning import needs
from grpo_jax.planning.models import plan_model
from grpo_jax.planning.programs import RunShapes
from grpo_jax.rollout.memory import training_room
from grpo_jax.rollout.sampler import pad_prompts, place_for_rollout, start_rollout
from grpo_jax.run.stages import pack_rows
from grpo_jax.types import Experience
from grpo_jax.weights.source import read_model_config
from tests.tiny import CONFIG, params

REPO = Path(__file__).parent.parent
GOLDEN = REPO / "tests" / "golden"
PROMPT, COMPLETION = 32, 64


def run_of(model_cfg=CONFIG, slots=8, rollout_sizes=None, kl_coef=0.1, **sizes) -> RunShapes:
    """Returns a run of 4 prompts with 2 completions each, on a mesh without devices."""
    cfg = default()
    cfg.rollout.prompts, cfg.rollout.samples, cfg.train.micro_tokens = 4, 2, 2 * COMPLETION + PROMPT
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_tokens = PROMPT, COMPLETION
    cfg.train.remat, cfg.loss.kl_coef = model_cfg.remat, kl_coef
    mesh = needs.abstract_mesh(**sizes)
    return RunShapes(check(cfg), model_cfg, mesh, needs.abstract_mesh(**(rollout_sizes or sizes)), slots)


def packed(run: RunShapes, completions: int):
    """Returns a batch of completions of full length, packed for one data shard."""
    count = run.cfg.rollout.prompts * run.cfg.rollout.samples
    zeros = np.zeros((count, COMPLETION), np.float32)
    experience = Experience(
        tokens=np.zeros((count, PROMPT + COMPLETION), np.int32),
        prompt_lengths=np.full(count, PROMPT, np.int32),
        mask=zeros == 0,
        sampler_logps=zeros,
        ref_logps=zeros,
        advantages=zeros[:, 0],
        prompt_ids=np.arange(count, dtype=np.int32) // run.cfg.rollout.samples,
        kept=zeros[:, 0] == 0,
    )
    rows = jax.tree.map(lambda x: x[:completions], experience)
    return pack_rows(run.cfg, make_mesh(devices=jax.devices()[:1]), rows, completions)


def product_flops(jaxpr, trips: int) -> int:
    """Returns the FLOPs of all products with weights: those of attention have batch dimensions, these have none.

    Args:
        jaxpr: The traced program.
        trips: How often every loop runs whose length is not known.
    """
    total = 0
    for equation in jaxpr.eqns:
        primitive, given = equation.primitive.name, equation.params
        if primitive == "dot_general" and not any(given["dimension_numbers"][1]):
            contracted = given["dimension_numbers"][0][0]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(shape[axis] for axis in contracted) * equation.outvars[0].aval.size
        if primitive.startswith("ragged_dot"):
            rows, width = equation.invars[0].aval.shape
            total += 2 * rows * width * equation.outvars[0].aval.shape[-1]  # every row meets one expert
        inner = given.get("length", 1) if primitive == "scan" else trips if primitive == "while" else 1
        for value in given.values():
            for sub in value if isinstance(value, tuple | list) else [value]:
                if hasattr(sub, "jaxpr") or hasattr(sub, "eqns"):
                    total += inner * product_flops(getattr(sub, "jaxpr", sub), trips)
    return total


def dense(name: str, **changes):
    return dataclasses.replace(read_model_config(GOLDEN / name), max_positions=1024, **changes)


MODELS = {
    "untied": CONFIG,
    "tied": dataclasses.replace(CONFIG, tie_embeddings=True),
    "qwen2": dense("qwen2"),
    "gemma3": dense("gemma3", num_kv_heads=2),  # with a single head, attention's products have no batch dimension
    "deepseek_v3": dense("deepseek_v3"),
    "qwen3_moe": dense("qwen3_moe"),
}


@pytest.mark.parametrize("remat", ["layers", "matmuls", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_products_of_an_update_are_those_of_the_traced_program(name, remat):
    run = run_of(dataclasses.replace(MODELS[name], remat=remat, attention="plain"))
    batch = packed(run, 2)
    assert batch.tokens.shape == (1, needs.full_batch(run.cfg, 1, 2).width)
    gradient = partial(minibatch_gradients, run.model_cfg, temperature=1.0, loss=run.cfg.loss, chunk_tokens=COMPLETION)
    traced = jax.make_jaxpr(gradient)(param_shapes(run.model_cfg), batch)
    run = run._replace(cfg=dataclasses.replace(run.cfg, rollout=dataclasses.replace(run.cfg.rollout, prompts=1)))
    assert needs.updated_batch(run).micro_batches == 1
    assert product_flops(traced.jaxpr, trips=2) == needs.update_work(run).products


@pytest.mark.parametrize("name", ["untied", "deepseek_v3"])
def test_products_of_scoring_are_those_of_the_traced_program(name):
    run = run_of(dataclasses.replace(MODELS[name], attention="plain"))
    batch = packed(run, 8)
    assert int(batch.num_micro_batches) == needs.scored_batch(run).micro_batches == 4
    score = partial(score_completions, run.model_cfg, temperature=1.0, chunk_tokens=2 * COMPLETION)
    traced = jax.make_jaxpr(score)(param_shapes(run.model_cfg), batch)
    once = needs.forward_work(run, needs.scored_batch(run)).products / 4
    assert product_flops(traced.jaxpr, trips=1) == once


@pytest.mark.parametrize("window", [0, 40])
def test_keys_are_those_of_the_mask(window):
    """Of 4 packed rows, each of which holds one prompt and its 2 completions."""
    layers = (LayerConfig(), LayerConfig(window=window))
    run = run_of(dataclasses.replace(CONFIG, layers=layers))
    batch, full = packed(run, 8), needs.scored_batch(run)
    segments = jax.tree.map(jnp.asarray, batch.segments)
    pairs = sum(int(attention_mask(segments, segments, layer.window or 2**30).sum()) for layer in layers)
    assert (full.prompts, full.completion_tokens, full.tokens) == (4, 8 * COMPLETION, (batch.segments.prompt > 0).sum())
    assert needs.forward_work(run, full).attention == pairs * 4 * CONFIG.num_heads * CONFIG.head_dim


def test_a_mesh_divides_the_work_of_an_update():
    alone, split = needs.update_work(run_of()), needs.update_work(run_of(fsdp=2, tensor=2))
    assert split.attention == alone.attention / 4
    assert split.products == alone.products / 4


def test_model_flops_do_not_count_what_is_computed_again():
    kept = needs.update_work(run_of(), remat=False)
    assert kept.products == 3 * needs.forward_work(run_of(), needs.updated_batch(run_of())).products
    assert needs.update_work(run_of()).products > kept.products


@pytest.mark.parametrize("sizes", [dict(), dict(data=2), dict(data=2, tensor=2)])
def test_bytes_of_rollout_weights_are_those_of_the_placed_arrays(sizes):
    run = run_of(rollout_sizes=sizes)
    mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    shards = [x for leaf in jax.tree.leaves(place_for_rollout(CONFIG, params(), mesh)) for x in leaf.addressable_shards]
    assert needs.run_memory(run).rollout_weights == sum(x.data.nbytes for x in shards if x.device == jax.devices()[0])


def test_bytes_of_a_rollout_are_those_of_its_arrays():
    prompts, limits = pad_prompts([[1] * PROMPT] * 4), np.full((4, 2), COMPLETION)
    options = dict(slots=6, columns=PROMPT + COMPLETION, max_tokens=COMPLETION)
    placed = place_for_rollout(CONFIG, params())
    run = run_of(slots=6)  # whose evaluations need room for 6 prompts
    room = training_room(run.cfg, slots=6, shards=1)
    state, queue = start_rollout(CONFIG, placed, prompts, jax.random.key(0), limits, **options, room=room)
    memory = needs.run_memory(run)
    for expected, arrays in (
        (memory.cache, state.kv_cache),
        (memory.prompt_kv, queue.prompt_kv),
        (memory.completions, (state.tokens, state.logps)),
    ):
        assert expected == sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    split = needs.run_memory(run_of(slots=6, rollout_sizes=dict(data=2, tensor=2)))
    assert (split.cache, split.prompt_kv, split.completions) == (
        memory.cache // 4,
        memory.prompt_kv // 4,
        memory.completions // 2,
    )


def test_bytes_of_the_state_are_those_of_its_arrays():
    """AdamW's two moments, the policy and the gradient in float32; the reference in the dtype of the config."""
    memory = needs.run_memory(run_of(fsdp=1))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(CONFIG)))
    assert (memory.gradients, memory.reference) == (4 * count, 4 * count)
    assert 12 * count <= memory.state < 12 * count + 64  # and a few counters
    assert needs.run_memory(run_of(kl_coef=0.0)).reference == 0
    assert needs.run_memory(run_of(fsdp=4)).gradients < count + 4 * 4 * 32 * 9  # norms are replicated


@pytest.mark.parametrize("tensor", [1, 2, 5])
def test_a_rollout_at_its_peak_holds_the_logits_of_its_part_of_the_vocabulary(tensor):
    """Three arrays of 4 bytes for each of 8 slots and 48 ids, which 5 does not divide."""
    run = run_of(rollout_sizes=dict(tensor=tensor))
    memory = needs.run_memory(run)
    held = sum(memory._replace(gradients=0))
    assert needs.phase_peaks(run)["rollout"] == held + 8 * 12 * (24 if tensor == 2 else 48)


def test_the_least_bytes_of_a_decode_step():
    """By hand: weights without the embedding's unused rows, 8 slots of 96 columns, and logits written and read."""
    run = run_of()
    kv = 2 * 2 * 2 * 8 * 4  # keys and values of 2 layers, 2 heads of width 8
    weights = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(CONFIG)))
    unused = 4 * 48 * 32 * (1 - 8 / 48)
    assert needs.decode_bytes(run, 96) == int(weights - unused) + 8 * (96 * kv + 2 * 4 * 48)
    tied = run._replace(model_cfg=MODELS["tied"])
    assert needs.decode_bytes(tied, 96) == weights - 4 * 48 * 32 + 8 * (96 * kv + 2 * 4 * 48)


def test_a_decode_step_reads_only_the_experts_that_its_tokens_choose():
    """Two of 5 experts per token: 8 tokens that choose at random leave (3/5)^8 of an expert unread, and one 3/5."""
    run = run_of(MODELS["qwen3_moe"], slots=1)
    experts = run.model_cfg.experts
    layers = sum(layer.use_experts for layer in run.model_cfg.layers)
    placed = 4 * layers * experts.num_experts * 3 * 32 * experts.intermediate_size
    embeddings, logits = 7 * 4 * 32, 7 * 2 * 4 * 96  # of the 7 tokens more
    more = needs.decode_bytes(run._replace(slots=8), 0) - needs.decode_bytes(run, 0)
    assert more == pytest.approx(placed * (0.6 - 0.6**8) + embeddings + logits, abs=1)


def test_products_of_a_decode_step_are_those_of_the_traced_program():
    run = run_of(MODELS["qwen2"], slots=8)
    placed = jax.eval_shape(lambda: place_for_rollout(run.model_cfg, init_params(run.model_cfg, jax.random.key(0))))
    tokens, segments = jnp.zeros((8, 1), jnp.int32), single_sequence(jnp.zeros((8, 1), jnp.int32))
    kv_shapes = jax.eval_shape(lambda weights: hidden_states(run.model_cfg, weights, tokens, segments)[1], placed)
    cache = jax.tree.map(
        lambda x: jnp.zeros([96 if size == 1 and axis > 2 else size for axis, size in enumerate(x.shape)]), kv_shapes
    )

    def step(weights):
        hidden, _ = hidden_states(run.model_cfg, weights, tokens, segments, cache, layout="rollout")
        return compute_logits(run.model_cfg, weights, hidden)

    traced = jax.make_jaxpr(step)(placed)
    assert product_flops(traced.jaxpr, trips=1) == needs.decode_work(run, 96).products


@pytest.mark.parametrize("tensor", [1, 2])
def test_prefilling_computes_only_the_keys_and_values_of_the_last_layer(tensor):
    """By hand: a whole layer of width 32, 4 heads of queries and 2 of keys, and the keys and values of another."""
    run = run_of(rollout_sizes=dict(tensor=tensor))
    key_values, rest = 2 * 32 * 2 * 8, 2 * 32 * 4 * 8 + 3 * 32 * 48
    work = needs.prefill_work(run)
    assert work.products == 4 * PROMPT * 2 * (2 * key_values + rest) / tensor
    assert work.attention == 4 * PROMPT * (PROMPT + 1) / 2 * 4 * 4 * 8 / tensor
    latent = dataclasses.replace(MODELS["deepseek_v3"], layers=MODELS["deepseek_v3"].layers[:1])
    assert needs.matrices(latent, 1).prefilled == 32 * (20 + 8)  # the compressed vector and the rotary part of the key


def test_a_cached_latent_is_both_keys_and_values():
    """By hand: 8 slots, 3 layers, 10 columns, 4 heads; a query meets 20 + 8 numbers, and a probability meets 20."""
    assert needs.decode_work(run_of(MODELS["deepseek_v3"]), 10).attention == 8 * 3 * 10 * 2 * 4 * (28 + 20)


def test_a_chip_reads_the_experts_that_the_tokens_of_its_whole_expert_axis_choose():
    """With one token on each of 5 chips, which hold one of 5 experts each, (3/5)^5 of that expert is not read."""
    whole = run_of(MODELS["qwen3_moe"], slots=1)
    split = run_of(MODELS["qwen3_moe"], slots=5, rollout_sizes=dict(expert=5))
    experts = whole.model_cfg.experts
    layers = sum(layer.use_experts for layer in whole.model_cfg.layers)
    placed = 4 * layers * experts.num_experts * 3 * 32 * experts.intermediate_size
    saved = needs.decode_bytes(whole, 96) - needs.decode_bytes(split, 96)
    assert saved == pytest.approx(placed * (0.4 - (1 - 0.6**5) / 5), abs=1)


@pytest.mark.parametrize("preset, plan", [("0.5b", "0.5b-v5e-2x2"), ("7b", "7b-v5e-8x8"), ("32b", "32b-v5p-4x4x4")])
def test_the_temporaries_of_an_update_are_about_those_of_the_compiled_program(preset, plan):
    compiled = json.loads((REPO / f"docs/plans/r1zero-qwen2.5-{plan}.json").read_text(encoding="utf-8"))
    cfg = check(load_config(f"{REPO}/configs/r1zero.py:qwen2.5-{preset}"))
    mesh, rollout_mesh = (needs.abstract_mesh(**compiled[name]) for name in ("mesh", "rollout_mesh"))
    run = RunShapes(cfg, plan_model(cfg), mesh, rollout_mesh, compiled["slots"])
    assert needs.update_temporaries(run) == pytest.approx(compiled["programs"]["update"]["temp_bytes"], rel=0.15)
