"""Accuracy and format of hand-written completions, reward parts, and grading in processes without JAX."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import config
from grpo_jax.errors import UserError
from grpo_jax.rewards import accuracy, accuracy_part, format
from grpo_jax.rewards.length import overlong_penalty
from grpo_jax.rewards.parts import Rewards, grade_texts, resolve_parts, shape_overlong, weigh_parts
from grpo_jax.rewards.verify import is_well_formed
from grpo_jax.tasks import Problem

WELL_FORMED = "<think> 1 + 1 = 2 </think> <answer> 2 </answer>"


@pytest.mark.parametrize(
    "text, well_formed",
    [
        (WELL_FORMED, True),
        (f" \n\t{WELL_FORMED}\n\n ", True),  # white space at either end
        ("<think>a</think><answer>2</answer>", True),
        ("<think>a</think>\n\n<answer>2</answer>", True),
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
    "text",
    [
        "<think></think><answer>2</answer>",
        "<think> \n </think> <answer>2</answer>",
        "<think>a</think><answer></answer>",
        "<think> reasoning process here </think> <answer> 2 </answer>",
        "<think> a </think> <answer> answer here </answer>",
        "<think> ... </think> <answer> 2 </answer>",
    ],
)
def test_empty_tags_and_the_template_itself_are_well_formed_only_if_allowed(text):
    assert format([text]) == 0 and format([text], empty=True) == 1


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
        ("<think> a </think><answer></answer>", "", (0, 0)),  # an empty answer is never correct
    ],
)
def test_accuracy_and_format_are_independent(text, expected, parts):
    assert (accuracy([text], [expected])[0], format([text])[0]) == parts


@pytest.mark.parametrize("answers", [[], ["2"], ["2", "2", "2"]])
def test_accuracy_requires_one_answer_per_text(answers):
    with pytest.raises(ValueError):
        accuracy([WELL_FORMED, WELL_FORMED], answers)


def grade(parts, weights=None, texts=("a", "bb", "cccc")):
    """Grades texts whose length in tokens is their number of characters."""
    problems = [Problem(f"q{i}", "2", {"i": i}) for i in range(len(texts))]
    lengths = np.array([len(text) for text in texts], np.int32)
    graded = {label: grade_texts(label, part, problems, texts, lengths) for label, part in parts.items()}
    return weigh_parts(graded, weights or [1.0] * len(parts))


def resolve(*parts, language="en", format_empty=False, max_tokens=56, cache=0):
    """Resolves reward parts with the settings that they read."""
    raw = config.default()
    raw.reward.parts, raw.reward.weights, raw.reward.language = parts, (1.0,) * len(parts), language
    raw.reward.format_empty = format_empty
    raw.rollout.max_tokens, raw.rollout.overlong_cache = max_tokens, cache
    return resolve_parts(config.check(raw))


def test_rewards_are_float32_per_completion_and_total_is_their_weighted_sum():
    texts = [WELL_FORMED, "<answer> 2 </answer>", "<think>a</think><answer>5</answer>", "nothing"]
    rewards = grade(resolve("format", "accuracy"), [0.5, 2.0], texts)
    assert list(rewards.parts) == ["format", "accuracy"]  # in the order of the config
    np.testing.assert_array_equal(rewards.parts["accuracy"], [1, 1, 0, 0])
    np.testing.assert_array_equal(rewards.parts["format"], [1, 0, 1, 0])
    np.testing.assert_array_equal(rewards.total, [2.5, 2, 0.5, 0])
    assert all(part.dtype == np.float32 and part.shape == (4,) for part in (*rewards.parts.values(), rewards.total))


def test_no_completions_give_empty_rewards():
    rewards = grade(resolve("accuracy", "format", "language"), texts=())
    assert all(part.dtype == np.float32 and part.shape == (0,) for part in (*rewards.parts.values(), rewards.total))


def test_a_part_gets_the_problem_the_text_and_the_length_of_each_completion():
    def part(problems, texts, lengths):
        assert isinstance(problems, list) and isinstance(texts, list) and lengths.dtype.kind == "i"
        return [100 * p.metadata["i"] + 10 * len(text) + n for p, text, n in zip(problems, texts, lengths, strict=True)]

    assert grade({"part": part}).total.tolist() == [11, 122, 244]


def test_a_part_from_a_file_is_labeled_with_its_function_name(tmp_path):
    (tmp_path / "my.py").write_text("def short(problems, texts, lengths): return -1.0 * lengths")
    parts = resolve("accuracy", f"{tmp_path}/my.py:short")
    assert list(parts) == ["accuracy", "short"] and parts["accuracy"] is accuracy_part
    assert grade(parts, [1, 0.5]).total.tolist() == [-0.5, -1, -2]


@pytest.mark.parametrize("empty", [True, False])
def test_the_format_part_reads_from_the_config_whether_tags_may_be_empty(empty):
    texts = ("<think></think> <answer></answer>", "<think>a</think> <answer>b</answer>", "<think>")
    assert grade(resolve("format", format_empty=empty), texts=texts).parts["format"].tolist() == [empty, 1, 0]


@pytest.mark.parametrize("target, fractions", [("en", [1, 0.5, 0]), ("ru", [0, 0.5, 1])])
def test_the_language_part_reads_its_language_from_the_config(target, fractions):
    rewards = grade(resolve("accuracy", "language", language=target), texts=("one", "two два", "<think> три"))
    assert rewards.parts["language"].tolist() == fractions


@pytest.mark.parametrize(
    "max_tokens, cache, penalties",
    [
        (5, 4, [0, -0.25, -0.75]),  # falls after 1 token
        (5, 1, [0, 0, 0]),  # the longest has 4
        (4, 2, [0, 0, -1]),
        (3, 2, [0, -0.5, -1]),
    ],
)
def test_the_length_part_reads_the_limit_and_the_cache_from_the_config(max_tokens, cache, penalties):
    rewards = grade(resolve("length", max_tokens=max_tokens, cache=cache), [0.1])  # of 1, 2 and 4 tokens
    assert list(rewards.parts) == ["length"] and rewards.parts["length"].tolist() == penalties
    np.testing.assert_array_equal(rewards.total, np.float32(0.1) * np.float32(penalties))


@pytest.mark.parametrize(
    "length, penalty",
    [
        (0, 0),
        (16383, 0),
        (16384, 0),  # L - C
        (16385, -1 / 4096),
        (18432, -0.5),
        (20479, -4095 / 4096),
        (20480, -1),  # L
        (20481, -1),
        (10**9, -1),
    ],
)
def test_the_overlong_penalty_falls_linearly_over_the_cache(length, penalty):
    (returned,) = returns = overlong_penalty(np.array([length], np.int32), 20480, 4096)
    assert returned == penalty and returns.dtype == np.float32  # all of these are exact in float32
    assert not np.signbit(returned) or penalty < 0  # no -0.0 in samples


def test_the_whole_length_may_be_the_cache():
    lengths = np.array([0, 1, 2, 3, 4, 5], np.uint32)  # unsigned lengths do not wrap
    assert overlong_penalty(lengths, 4, 4).tolist() == [0, -0.25, -0.5, -0.75, -1, -1]


def shaped(overlong):
    """Shapes the rewards of completions of 2, 6, 7, 8 and 8 tokens, where 4 tokens of 8 are the cache."""
    parts = {"accuracy": np.array([1, 1, 0, 1, 0], np.float32)}
    rewards = Rewards(parts, np.array([2, 2, -0.5, 2, -3], np.float32))
    # The fourth stops with its last token. The last one is truncated.
    truncated, lengths = np.array([False, False, False, False, True]), np.array([2, 6, 7, 8, 8], np.int32)
    result = shape_overlong(rewards, overlong, truncated, lengths, 8, 4)
    assert rewards.total.tolist() == [2, 2, -0.5, 2, -3] and list(rewards.parts) == ["accuracy"]  # not changed in place
    assert result.total.dtype == np.float32 and result.parts["accuracy"] is parts["accuracy"]
    return result


def test_overlong_zero_sets_the_total_of_truncated_completions_to_0():
    rewards = shaped("zero")
    assert rewards.total.tolist() == [2, 2, -0.5, 2, 0] and list(rewards.parts) == ["accuracy"]


def test_overlong_soft_adds_the_penalty_to_the_total_and_to_the_parts():
    rewards = shaped("soft")
    assert list(rewards.parts) == ["accuracy", "overlong"] and rewards.parts["overlong"].dtype == np.float32
    assert rewards.parts["overlong"].tolist() == [0, -0.5, -0.75, -1, -1]
    assert rewards.total.tolist() == [2, 1.5, -1.25, 1, -4]


@pytest.mark.parametrize("overlong", ["keep", "mask"])
def test_overlong_keep_and_mask_do_not_change_rewards(overlong):
    rewards = shaped(overlong)
    assert rewards.total.tolist() == [2, 2, -0.5, 2, -3] and list(rewards.parts) == ["accuracy"]


def test_a_part_cannot_change_what_the_next_one_sees():
    def spoil(problems, texts, lengths):
        problems.clear(), texts.clear()
        lengths[:] = 0
        return np.zeros(3)

    def count(problems, texts, lengths):
        return len(problems) + len(texts) + lengths

    assert grade({"spoil": spoil, "count": count}).total.tolist() == [7, 8, 10]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 2, 3],
        (1.0, 2, 3),
        np.array([1, 2, 3], np.int8),
        jnp.array([1.0, 2, 3]),
        jnp.array([1.0, 2, 3], jnp.bfloat16),
        [jnp.float32(i) for i in (1, 2, 3)],
    ],
    ids=["list", "tuple", "numpy", "jax", "jax bfloat16", "jax scalars"],
)
def test_a_part_may_return_any_sequence_of_numbers(returned):
    rewards = grade({"part": lambda *_: returned})
    assert rewards.parts["part"].tolist() == [1, 2, 3] and rewards.parts["part"].dtype == np.float32
    assert grade({"part": lambda *_: [True, np.bool_(False), True]}).total.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "returned, found",
    [
        (None, "found None. Return an array of shape (3,)"),
        (1.5, "found float. Return"),
        ("abc", "it raised ValueError: could not convert string to float: 'abc'. Correct"),
        ({"a": 1}, "not 'dict'. Correct"),
        pytest.param((x for x in (1, 2, 3)), "not 'generator'", id="generator"),
        ([1, 2], "found an array of shape (2,). Return"),
        ([[1], [2], [3]], "found an array of shape (3, 1). Return"),
        ([0, float("nan"), float("inf")], "found nan at index 1. Return a finite number there"),
        (np.array([0, 1, -np.inf], np.float32), "found -inf at index 2"),
        ([0, 1e39, 0], "found 1e+39 at index 1"),  # infinity in float32
        ([0, 1, 10**400], "int too large to convert to float. Correct"),
        ([0, None, 1], "found None at index 1"),
        ([0.5, 1, "a"], "could not convert string to float: 'a'. Correct"),
        ([0, 1j, 0], "not 'complex'. Correct"),
        ([1, [2], [3, 4]], "inhomogeneous shape after 1 dimensions"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_part_must_return_one_finite_number_per_text(returned, found):
    with pytest.raises(UserError) as raised:
        grade({"accuracy": accuracy_part, "mine": lambda *_: returned})
    message = str(raised.value)
    assert message.startswith("The reward part 'mine' must return 3 finite numbers, one for each text")
    assert found in message and "\n" not in message and len(message) < 400


def test_an_exception_in_a_part_is_reported_with_its_location():
    def failing(problems, texts, lengths):
        return [json.loads(text)["score"] / 0 for text in texts]

    line = failing.__code__.co_firstlineno + 1
    with pytest.raises(UserError) as raised:
        grade({"failing": failing}, texts=('{"score": 1}',))
    says = "'failing' must return 1 finite number, one for each text, but it raised ZeroDivisionError: division by zero"
    assert f"{says} ({__file__}:{line}). Correct that function." in str(raised.value)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    with pytest.raises(
        UserError, match=r"but it raised TypeError: .*takes 0 positional arguments but 3 were given\. Correct"
    ):
        grade({"part": lambda: 5})


def test_the_error_for_an_unknown_part_says_how_to_resume():
    """A run of grpo_jax.train stores only the names of its Python functions, so other commands cannot find them."""
    with pytest.raises(UserError) as raised:
        resolve("accuracy", "formatt")
    message = str(raised.value)
    names = "'accuracy', 'format', 'language', 'length'"
    assert f"reward.parts must be {names}, module:function or path/file.py:function; found" in message
    assert "'formatt'. Did you mean 'format'? To resume a run of grpo_jax.train with rewards=...," in message


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
import numpy as np
import grpo_jax
from tokenizers import Tokenizer, models
from grpo_jax.rewards import accuracy, format, language
from grpo_jax.rewards.parts import resolve_parts, shape_overlong, weigh_parts
from grpo_jax.rewards.pool import Grader
from grpo_jax.tasks import read_problems

for package in ("text", "tasks", "rewards"):
    folder = importlib.import_module(f"grpo_jax.{package}").__path__
    for module in pkgutil.iter_modules(folder, f"grpo_jax.{package}."):
        importlib.import_module(module.name)

(problem,) = read_problems(sys.argv[1])
assert grpo_jax.tasks.addition.addition_task(3)(0, seed=0, split="train").answer.isdigit()
assert "User: 1 + 1?. Assistant:" in grpo_jax.text.prompt.format_prompt(problem.question)
assert grpo_jax.text.stops.build_stop_table(3, (1,)).tolist() == [[0, -1, 0]]
text = "<think> so 1 + 1 = 2 </think> <answer> 2 </answer>"
assert accuracy([text], [problem.answer]).tolist() == format([text]).tolist() == language([text]).tolist() == [1.0]
raw = grpo_jax.config.default()
raw.reward.parts, raw.reward.weights = ("accuracy", "format", "language", "length"), (1.0, 1.0, 1.0, 1.0)
raw.rollout.overlong_cache = 8
cfg, lengths = grpo_jax.config.check(raw), np.array([52])
tokenizer = Tokenizer(models.WordLevel({text: 0, "?": 1}, unk_token="?"))
grades = Grader(cfg, resolve_parts(cfg), tokenizer, ()).grade([problem], np.zeros((1, 1), int), np.array([1]))
assert (grades.texts, grades.scores["accuracy"].tolist()) == ([text], [1.0])
parts = {label: part([problem], [text], lengths) for label, part in resolve_parts(cfg).items()}
rewards = weigh_parts(parts, cfg.reward.weights)
assert rewards.total.tolist() == [2.5]
assert shape_overlong(rewards, "soft", lengths > 56, lengths, 56, 8).total.tolist() == [2.0]
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
