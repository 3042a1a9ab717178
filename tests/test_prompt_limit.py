"""The prompt limit is derived from the problems, and problems that exceed it are refused or left out."""

import dataclasses

import pytest

from grpo_jax.config import Config
from grpo_jax.errors import UserError
from grpo_jax.run.context import read_base_model
from grpo_jax.run.prompt_limit import fit_prompts
from grpo_jax.tasks.addition import addition_task
from grpo_jax.tasks.problem_list import ProblemList
from grpo_jax.text.problem import Problem


@pytest.fixture(scope="module")
def base():
    return read_base_model(Config())


def asked(*counts: int, first: int = 1) -> list[Problem]:
    """Returns problems whose prompts have 63 + count tokens, with the line of each as its id."""
    return [Problem("w" * count, "1", id=f"q.jsonl line {i}") for i, count in enumerate(counts, start=first)]


def config(*, limit: int = 0, max_tokens: int = 56, questions: int = 256, **task) -> Config:
    cfg = Config()
    rollout = dataclasses.replace(cfg.rollout, max_prompt_tokens=limit, max_tokens=max_tokens)
    section = dataclasses.replace(cfg.task, **task)
    return dataclasses.replace(
        cfg, rollout=rollout, task=section, eval=dataclasses.replace(cfg.eval, questions=questions)
    )


def test_the_limit_of_the_default_run_is_80(base):
    cfg, task, line = fit_prompts(config(), base, addition_task(3))
    assert cfg == config(limit=80) and task(0, seed=0, split="train") == addition_task(3)(0, seed=0, split="train")
    assert line == "Prompts of up to 73 tokens; rollout.max_prompt_tokens 80"


@pytest.mark.parametrize("train, held_out, limit", [((1,), (1,), 64), ((1, 17), (3,), 80), ((1, 2), (18,), 96)])
def test_the_limit_is_the_longest_prompt_of_a_list_rounded_up(base, train, held_out, limit):
    cfg, task, line = fit_prompts(config(questions=1), base, ProblemList(asked(*train), asked(*held_out)))
    assert cfg.rollout.max_prompt_tokens == limit
    longest = 63 + max(train + held_out)
    assert line == f"Prompts of up to {longest} tokens; rollout.max_prompt_tokens {limit}"
    assert (task.train, task.held_out) == (asked(*train), asked(*held_out))


def test_the_limit_leaves_room_for_the_rest_of_an_endless_task(base):
    def task(index, *, seed, split):
        return asked(1 + index % 64)[0]

    assert fit_prompts(config(), base, task)[0].rollout.max_prompt_tokens == 160  # 127 + 63 // 2 = 158


def test_the_limit_of_an_endless_task_does_not_depend_on_the_number_of_held_out_questions(base):
    def task(index, *, seed, split):
        return asked(64 if split == "eval" and index == 300 else 1)[0]

    assert fit_prompts(config(questions=300), base, task)[0].rollout.max_prompt_tokens == 64
    with pytest.raises(
        UserError, match=r"at most .*=64 tokens; 1 of 557 have more: q.jsonl line 1 has 127\. Set .*=127"
    ):
        fit_prompts(config(questions=301), base, task)


def test_the_limit_leaves_room_for_a_completion_in_the_models_positions(base):
    assert fit_prompts(config(max_tokens=440), base, ProblemList(asked(8), asked(1)))[0].rollout.max_prompt_tokens == 72


@pytest.mark.parametrize(
    "keys, counts, says",
    [
        (
            dict(limit=64),
            (1, 26, 2, 1, 3),
            r"at most rollout.max_prompt_tokens=64 tokens; 3 of 6 have more: q.jsonl line 2 has 89, q.jsonl line 3 "
            r"has 65, q.jsonl line 5 has 66\. Set rollout.max_prompt_tokens=89, or leave them out with task.too"
            r"_long=drop\.$",
        ),
        (
            dict(limit=64),
            range(1, 12),
            r"; 10 of 12 have more: (q.jsonl line \d has \d+, ){5}and 5 more\. Set rollout.*=74, ",
        ),
        (
            dict(max_tokens=440),
            (1, 26),
            r"at most 72 tokens, the model's 512 positions minus rollout.max_tokens=440; 1 of 3 have more: q.jsonl "
            r"line 2 has 89\. Set rollout.max_tokens=423, or",
        ),
        (
            dict(limit=64, max_tokens=440),
            (1, 26),
            r"\. Set rollout.max_prompt_tokens=89 and rollout.max_tokens=423, or leave them out with task",
        ),
        (
            {},
            (1, 500),
            r"at most 456 .* q.jsonl line 2 has 563\. Shorten them, or leave them out with task.too_long=drop",
        ),
        (dict(limit=64, too_long="drop"), (2, 3), r"2 of 3 have more: .*\. Set rollout.max_prompt_tokens=66\.$"),
        (
            dict(max_tokens=500, too_long="drop"),
            (2, 3),
            r"at most 12 tokens.* 3 of 3 .*\. Set rollout.max_tokens=446\.$",
        ),
    ],
)
def test_prompts_that_are_too_long_are_listed_with_the_settings_that_would_fit_them(base, keys, counts, says):
    with pytest.raises(UserError, match=says):
        fit_prompts(config(**keys), base, ProblemList(asked(*counts), asked(1)))


@pytest.mark.parametrize("keys", [dict(limit=64), dict(max_tokens=446)])
def test_problems_that_are_too_long_can_be_left_out(base, keys):
    given = ProblemList(asked(1, 30, 1, 40), asked(70, 1, first=7))
    _, task, line = fit_prompts(config(too_long="drop", **keys), base, given)
    assert task.train == [given.train[0], given.train[2]] and task.held_out == [given.held_out[1]]
    assert len(given.train) == 4
    left_out, limit = line.split("\n")
    assert left_out.startswith("3 of 6 prompts have more than 64 tokens and are left out: q.jsonl line 2 has 93, ")
    assert left_out.endswith("; 2 problems for training and 1 held out are left")
    assert limit == "Prompts of up to 64 tokens; rollout.max_prompt_tokens 64"


def test_problems_of_an_endless_task_are_never_left_out(base):
    with pytest.raises(UserError, match=r"problem 0 has 73, .*\. Set rollout.max_prompt_tokens=73\.$"):
        fit_prompts(config(limit=64, too_long="drop"), base, addition_task(3))
