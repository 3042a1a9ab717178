"""Evaluation: filters reach the sampler, each problem has its own draws, and a context counts the memory in use."""

import jax
import pytest

from grpo_jax.config import check, default
from grpo_jax.rewards.parts import accuracy_part, format_part
from grpo_jax.rollout.sampler import place_for_rollout
from grpo_jax.run.context import build_context, read_base_model
from grpo_jax.run.evaluation import evaluate
from grpo_jax.text.problem import Problem
from grpo_jax.weights.reading import load

SAME_QUESTIONS = [Problem("What is 7 + 1?", "8", {})] * 16
PARAM_BYTES = 4 * 853_120  # of the tiny model in float32


def make_config(*, kl_coef=0.001, **eval_keys):
    raw = default()
    raw.loss.kl_coef = kl_coef
    raw.rollout.max_prompt_tokens, raw.rollout.max_tokens = 80, 6
    raw.rollout.prompts, raw.rollout.samples = 4, 2
    for key, value in eval_keys.items():
        raw["eval"][key] = value
    return check(raw)


@pytest.fixture(scope="module")
def context():
    parts = {"accuracy": accuracy_part, "format": format_part}
    return build_context(make_config(), read_base_model(make_config()), reward_parts=parts)


@pytest.fixture(scope="module")
def placed_params(context):
    with jax.set_mesh(context.mesh):
        return place_for_rollout(context.model_cfg, load(context.source, mesh=context.mesh)[1], context.rollout_mesh)


def draw_completions(context, placed_params, problems=SAME_QUESTIONS, **eval_keys):
    with jax.set_mesh(context.mesh):
        _, records = evaluate(make_config(**eval_keys), context, placed_params, problems, jax.random.key(0))
    return [record["completion"] for record in records]


def test_temperature_and_filters_reach_the_sampler(context, placed_params):
    """With a temperature near 0, and with top_k=1, only the most likely token is drawn. The last batch is not full."""
    problems = [Problem(f"What is {i} + 1?", str(i + 1), {}) for i in range(11)]
    likeliest = draw_completions(context, placed_params, problems, temperature=1e-5)
    assert len(likeliest) == 11
    assert draw_completions(context, placed_params, problems, top_k=1, top_p=0.9, min_p=0.1) == likeliest
    assert draw_completions(context, placed_params, problems) != likeliest


def test_each_problem_has_its_own_draws(context, placed_params):
    """One question is asked 16 times, in two batches of 8. No batch repeats the random keys of another."""
    completions = draw_completions(context, placed_params)
    assert context.rollout_plan.slots == 8
    assert len(set(completions[:8])) > 1 and completions[:8] != completions[8:]


@pytest.mark.parametrize("kl_coef, copies", [(0.001, 3), (0.0, 2)])
def test_training_counts_the_optimizer_state_and_the_reference(context, kl_coef, copies):
    """Besides the policy there are two moments and, with a KL term, the reference. The few extra bytes are counters."""
    cfg = make_config(kl_coef=kl_coef)
    training = build_context(cfg, read_base_model(cfg), training=True)
    extra = context.rollout_plan.free_bytes - training.rollout_plan.free_bytes
    assert copies * PARAM_BYTES <= extra < copies * PARAM_BYTES + 100
