"""What a plan says that a model needs: FLOPs as traced programs have them, bytes as arrays have them."""

import dataclasses
import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import check, default
from grpo_jax.learn.update import minibatch_gradients, score_completions
from grpo_jax.model.architecture import LayerConfig
from grpo_jax.model.decoder import hidden_states, param_shapes
from grpo_jax.model.mask import attention_mask
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.planning import needs
from grpo_jax.planning.programs import RunShapes, abstract_decode
from grpo_jax.rollout.sampler import rollout_placement
from grpo_jax.run.stages import pack_rows
from grpo_jax.types import Experience
from grpo_jax.weights.source import read_model_config
from tests.tiny import CONFIG, params

GOLDEN = Path(__file__).parent / "golden"
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
def test_bytes_of_a_rollout_are_those_of_its_arrays(sizes):
    """On the devices of a mesh, whose shards are those of the mesh without devices."""
    run = run_of(rollout_sizes=sizes)
    mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    placed = rollout_placement(CONFIG, mesh)(params())
    state, queue = abstract_decode(run, PROMPT + COMPLETION)

    def bytes_of(tree):
        shards = jax.tree.map(lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize, tree)
        return sum(jax.tree.leaves(shards))

    memory = needs.run_memory(run)
    assert memory.rollout_weights == bytes_of(placed)
    assert memory.cache == bytes_of(state.kv_cache)
    assert memory.prompt_kv == bytes_of(queue.prompt_kv)
    assert memory.completions == bytes_of((state.tokens, state.logps))


def test_bytes_of_the_state_are_those_of_its_arrays():
    """AdamW's two moments, the policy and the gradient in float32; the reference in the dtype of the config."""
    memory = needs.run_memory(run_of(fsdp=1))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(CONFIG)))
    assert (memory.gradients, memory.reference) == (4 * count, 4 * count)
    assert 12 * count <= memory.state < 12 * count + 64  # and a few counters
    assert needs.run_memory(run_of(kl_coef=0.0)).reference == 0
    assert needs.run_memory(run_of(fsdp=4)).gradients < count + 4 * 4 * 32 * 9  # norms are replicated


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
    run = run_of(MODELS["qwen3_moe"], slots=1)
    experts = run.model_cfg.experts
    placed = 3 * 4 * run.model_cfg.num_layers * experts.num_experts * 32 * experts.intermediate_size
    chosen = experts.num_experts_per_token / experts.num_experts
    everything = needs.decode_bytes(run._replace(slots=8), 0) - 8 * 2 * 4 * 96
    one = needs.decode_bytes(run, 0) - 2 * 4 * 96
    assert everything - one == pytest.approx(placed * ((1 - chosen) - (1 - chosen) ** 8), rel=1e-2)


def test_products_of_a_decode_step_are_those_of_the_traced_program():
    run = run_of(MODELS["qwen2"], slots=8)
    state, _ = abstract_decode(run, 96)

    def step(params, cache, tokens):
        from grpo_jax.model.decoder import compute_logits
        from grpo_jax.model.mask import single_sequence

        hidden, _ = hidden_states(run.model_cfg, params, tokens, single_sequence(tokens), cache, layout="rollout")
        return compute_logits(run.model_cfg, params, hidden)

    placed = jax.eval_shape(rollout_placement(run.model_cfg, None), param_shapes(run.model_cfg))
    traced = jax.make_jaxpr(step)(placed, state.kv_cache, jnp.zeros((8, 1), jnp.int32))
    assert product_flops(traced.jaxpr, trips=1) == needs.decode_work(run, 96).products
