"""Evaluation: filters reach the sampler, each problem has its own draws, and what a context counts of memory."""

import jax
import pytest

from grpo_jax.config import check, default
from grpo_jax.rollout.sampler import place_for_rollout
from grpo_jax.run.context import build_context
from grpo_jax.run.evaluation import evaluate
from grpo_jax.text.problem import Problem
from grpo_jax.weights.model_io import load

QUESTIONS = [Problem(f"What is {i} + 1?", str(i + 1), {}) for i in range(11)]


def cfg(**evaluated):
    raw = default()
    raw.rollout.max_tokens = 6
    raw.rollout.prompts, raw.rollout.samples = 4, 2
    for key, value in evaluated.items():
        raw["eval"][key] = value
    return check(raw)


@pytest.fixture(scope="module")
def context():
    return build_context(cfg())


def completions(context, questions=QUESTIONS, **evaluated):
    with jax.set_mesh(context.mesh):
        placed = place_for_rollout(context.model_cfg, load(context.source, mesh=context.mesh)[1], context.mesh)
        _, records = evaluate(cfg(**evaluated), context, placed, questions, jax.random.key(0))
    return [record["completion"] for record in records]


def test_filters_reach_the_sampler(context):
    likeliest = completions(context, temperature=0.0)
    assert len(likeliest) == 11
    assert completions(context, top_k=1, top_p=0.9, min_p=0.1) == likeliest
    assert completions(context) != likeliest


def test_a_problem_has_its_own_draws_whatever_the_slots(context):
    """The same question 16 times, 8 at a time or all: 16 draws, not one repeated."""
    questions = [QUESTIONS[0]] * 16
    few = completions(context, questions)
    assert context.rollout_plan.slots == 8 and len(set(few[:8])) > 1 and few[:8] != few[8:]
    assert completions(context._replace(rollout_plan=context.rollout_plan._replace(slots=16)), questions) == few


def test_training_holds_optimizer_and_reference_too(context):
    """Beside the policy: two moments, and a copy of the parameters if there is a KL term. Some bytes are counters."""
    size = 4 * 853_120
    plain = context.rollout_plan.free_bytes
    assert 3 * size <= plain - build_context(cfg(), training=True).plan.free_bytes < 3 * size + 100
    raw = default()
    raw.loss.kl_coef, raw.rollout.max_tokens, raw.rollout.prompts, raw.rollout.samples = 0.0, 6, 4, 2
    assert 2 * size <= plain - build_context(check(raw), training=True).plan.free_bytes < 2 * size + 100
