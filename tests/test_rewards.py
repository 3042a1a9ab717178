"""Accuracy and format rewards of hand-written completions, and grading in processes that have no JAX."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.rewards import accuracy, format
from grpo_jax.rewards.parts import reward_parts
from grpo_jax.rewards.verify import is_well_formed

WELL_FORMED = "<think> 1 + 1 = 2 </think> <answer> 2 </answer>"


@pytest.mark.parametrize(
    "text, well_formed",
    [
        (WELL_FORMED, True),
        (f" \n\t{WELL_FORMED}\n\n ", True),  # white space at either end
        ("<think>a</think><answer>2</answer>", True),
        ("<think>a</think>\n\n<answer>2</answer>", True),
        ("<think></think><answer>2</answer>", True),  # the content does not matter
        ("<think>a</think><answer></answer>", True),
        ("<think> a < b > c {x} <b>2</b> </think> <answer> nothing </answer>", True),
        ("", False),
        ("2", False),
        (f"So: {WELL_FORMED}", False),
        (f"{WELL_FORMED} Done.", False),
        (f"{WELL_FORMED}<|endoftext|>", False),
        ("<think> a </think> so <answer> 2 </answer>", False),
        (f"{WELL_FORMED} {WELL_FORMED}", False),
        ("<think> <think> a </think> <answer> 2 </answer>", False),
        ("<think> a </think> </think> <answer> 2 </answer>", False),
        ("<think> a </think> <answer> 2 </answer> </answer>", False),
        ("<think> a </think> <answer> <answer> 2 </answer>", False),
        ("<think> a <answer> 2 </answer>", False),
        ("a </think> <answer> 2 </answer>", False),
        ("<think> a </think> <answer> 2", False),
        ("<think> a </think> 2 </answer>", False),
        ("<answer> 2 </answer> <think> a </think>", False),
        ("<think> <answer> 2 </answer> </think>", False),
        ("<think> a <answer> 2 </think> </answer>", False),
        ("</think> a <think> <answer> 2 </answer>", False),
        ("<think> a </think> </answer> 2 <answer>", False),
        ("<Think> a </Think> <Answer> 2 </Answer>", False),
        ("<think > a </think> <answer> 2 </answer>", False),
    ],
)
def test_format_requires_each_tag_once_in_order_and_nothing_outside(text, well_formed):
    assert is_well_formed(text) is well_formed
    np.testing.assert_array_equal(format([text]), [float(well_formed)])


@pytest.mark.parametrize(
    "text, expected, parts",
    [
        (WELL_FORMED, "2", (1, 1)),
        (WELL_FORMED, "3", (0, 1)),
        ("I say <answer> 2 </answer>, no doubt", "2", (1, 0)),  # correct but malformed
        ("<think> hm <answer> 2.0 </answer>", "2", (1, 0)),
        ("<think> 2 </think> <answer> 3 </answer>", "2", (0, 1)),  # only the answer counts
        ("<think> 2 </think> 2", "2", (0, 0)),
        ("", "2", (0, 0)),
        ("<think></think><answer></answer>", "", (0, 1)),  # an empty answer is never correct
    ],
)
def test_accuracy_and_format_are_independent(text, expected, parts):
    graded = reward_parts([text], [expected])
    assert (graded["accuracy"][0], graded["format"][0], graded["total"][0]) == (*parts, sum(parts))


def test_rewards_are_float32_per_completion_and_total_is_their_sum():
    texts = [WELL_FORMED, "<answer> 2 </answer>", WELL_FORMED, "nothing"]
    parts = reward_parts(texts, ["2", "2", "5", "2"])
    np.testing.assert_array_equal(parts["accuracy"], [1, 1, 0, 0])
    np.testing.assert_array_equal(parts["format"], [1, 0, 1, 0])
    np.testing.assert_array_equal(parts["total"], [2, 1, 1, 0])
    assert sorted(parts) == ["accuracy", "format", "total"]
    assert all(part.dtype == np.float32 and part.shape == (4,) for part in parts.values())


def test_no_completions_give_empty_rewards():
    assert all(part.dtype == np.float32 and part.shape == (0,) for part in reward_parts([], []).values())


@pytest.mark.parametrize("answers", [[], ["2"], ["2", "2", "2"]])
def test_as_many_answers_as_texts_are_required(answers):
    with pytest.raises(ValueError):
        accuracy([WELL_FORMED, WELL_FORMED], answers)
    with pytest.raises(ValueError):
        reward_parts([WELL_FORMED, WELL_FORMED], answers)


BLOCK_JAX = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "grain"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""

GRADE_AND_READ = """
import importlib, pkgutil, sys
import grpo_jax
from grpo_jax.rewards import accuracy, format
from grpo_jax.tasks import read_problems

for package in ("text", "tasks", "rewards"):
    folder = importlib.import_module(f"grpo_jax.{package}").__path__
    for module in pkgutil.iter_modules(folder, f"grpo_jax.{package}."):
        importlib.import_module(module.name)

(problem,) = read_problems(sys.argv[1])
assert grpo_jax.tasks.addition.addition_task(0, "train", 3)(0).answer.isdigit()
assert "User: 1 + 1?. Assistant:" in grpo_jax.text.prompt.format_prompt(problem.question)
assert grpo_jax.text.stops.build_stop_table(3, (1,)).tolist() == [[0, -1, 0]]
text = "<think> 1 + 1 = 2 </think> <answer> 2 </answer>"
assert accuracy([text], [problem.answer]).tolist() == format([text]).tolist() == [1.0]
loaded = {"jax", "jaxlib", "grain", "flax", "transformers"} & set(sys.modules)
assert not loaded, loaded
"""


@pytest.mark.parametrize("prelude", [BLOCK_JAX, ""], ids=["blocked", "installed"])
def test_grading_and_reading_problems_never_import_jax(tmp_path, prelude):
    (tmp_path / "problems.jsonl").write_text('{"question": "1 + 1?", "answer": 2}\n')
    root = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", prelude + GRADE_AND_READ, str(tmp_path / "problems.jsonl")],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
