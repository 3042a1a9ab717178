"""Rollouts on a mesh of their own draw what they draw on the mesh of the updates."""

import jax
import numpy as np

from grpo_jax.config import check, default
from grpo_jax.rewards.parts import accuracy_part, format_part
from grpo_jax.rollout.sampler import place_for_rollout, rollout_placement
from grpo_jax.run.context import build_context, read_base_model
from grpo_jax.run.evaluation import evaluate
from grpo_jax.run.stages import draw_completions
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import encode_prompts
from grpo_jax.weights.reading import load

PROBLEMS = [Problem(f"What is {i} + 1?", str(i + 1), {}) for i in range(4)]


def draw_and_evaluate(tensor: int):
    """Trains on fsdp 8 and samples with `tensor`; returns a rollout, the records of an evaluation, and the context."""
    raw = default()
    raw.rollout.max_prompt_tokens, raw.rollout.max_tokens, raw.rollout.prompts, raw.rollout.samples = 80, 8, 4, 4
    raw.mesh.data, raw.mesh.fsdp, raw.rollout.mesh.tensor = 1, 8, tensor
    cfg = check(raw)
    base = read_base_model(cfg)
    context = build_context(cfg, base, reward_parts={"accuracy": accuracy_part, "format": format_part})
    prompts = encode_prompts(base.prompt_format, PROBLEMS, range(4), 80)
    with jax.set_mesh(context.mesh):
        params, key = load(context.source, mesh=context.mesh)[1], jax.random.key(1)
        rollout = draw_completions(cfg, context, params, prompts, key)
        placed = place_for_rollout(context.model_cfg, params, context.rollout_mesh)
        _, records = evaluate(cfg, context, placed, PROBLEMS, key)
    return rollout, records, context


def test_a_rollout_mesh_changes_no_draw_and_compiles_the_placement_once():
    rollout_placement.cache_clear()  # another test in this process may have placed the same model on the same mesh
    (own, own_records, context), (same, same_records, _) = draw_and_evaluate(tensor=2), draw_and_evaluate(tensor=1)
    assert context.mesh.shape["tensor"] == 1 and context.rollout_mesh.shape["tensor"] == 2
    np.testing.assert_array_equal(own.tokens, same.tokens)
    np.testing.assert_allclose(own.logps, same.logps, atol=1e-4)
    assert [record["completion"] for record in own_records] == [record["completion"] for record in same_records]
    assert rollout_placement(context.model_cfg, context.rollout_mesh)._cache_size() == 1
