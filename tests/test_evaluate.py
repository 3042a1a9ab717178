"""Evaluation: filters reach the sampler, each problem has its own draws, and what a setting counts of memory."""

import jax
import pytest

from grpo_jax.config import check, default
from grpo_jax.evaluate import evaluate
from grpo_jax.sampler import place_for_rollout
from grpo_jax.setting import prepare
from grpo_jax.types import Problem
from grpo_jax.weights import load

QUESTIONS = [Problem(f"What is {i} + 1?", str(i + 1), {}) for i in range(11)]


def config(**evaluated):
    raw = default()
    raw.rollout.max_tokens = 6
    raw.rollout.prompts, raw.rollout.samples = 4, 2
    for key, value in evaluated.items():
        raw["eval"][key] = value
    return check(raw)


@pytest.fixture(scope="module")
def setting():
    return prepare(config())


def completions(setting, questions=QUESTIONS, **evaluated):
    with jax.set_mesh(setting.mesh):
        placed = place_for_rollout(setting.model, load(setting.source, mesh=setting.mesh)[1], setting.mesh)
        _, records = evaluate(config(**evaluated), setting, placed, questions, jax.random.key(0))
    return [record["completion"] for record in records]


def test_filters_reach_the_sampler(setting):
    likeliest = completions(setting, temperature=0.0)
    assert len(likeliest) == 11
    assert completions(setting, top_k=1, top_p=0.9, min_p=0.1) == likeliest
    assert completions(setting) != likeliest


def test_a_problem_has_its_own_draws_whatever_the_slots(setting):
    """The same question 16 times, 8 at a time or all: 16 draws, not one repeated."""
    questions = [QUESTIONS[0]] * 16
    few = completions(setting, questions)
    assert setting.plan.slots == 8 and len(set(few[:8])) > 1 and few[:8] != few[8:]
    assert completions(setting._replace(plan=setting.plan._replace(slots=16)), questions) == few


def test_training_holds_optimizer_and_reference_too(setting):
    """Beside the policy: two moments, and a copy of the parameters if there is a KL term. Some bytes are counters."""
    size = 4 * 853_120
    plain = setting.plan.free_bytes
    assert 3 * size <= plain - prepare(config(), training=True).plan.free_bytes < 3 * size + 100
    raw = default()
    raw.loss.kl_coef, raw.rollout.max_tokens, raw.rollout.prompts, raw.rollout.samples = 0.0, 6, 4, 2
    assert 2 * size <= plain - prepare(check(raw), training=True).plan.free_bytes < 2 * size + 100
