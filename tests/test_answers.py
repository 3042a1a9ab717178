"""Extraction, parsing and comparison of answers: every notation, and inputs that are long, hostile or malformed."""

import json
import time
from pathlib import Path

import pytest

from grpo_jax.rewards import accuracy, format
from grpo_jax.text.answers import extract_answer, judge

CASES = [
    json.loads(line) for file in sorted(Path(__file__).parent.glob("cases/*answers.jsonl")) for line in file.open()
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_each_kind_of_answer_is_judged_as_marked(case):
    """The cases name their kind: what the data file expects, what the completion says, whether it is right, and why."""
    assert judge(case["completion"], case["expected"]).correct is case["right"]


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>72</answer>", "72"),
        ("<think> 1 </think> <answer> 72 </answer>", "72"),
        ("<answer>\n72\n</answer> and more", "72"),
        ("<answer>1</answer> <answer>2</answer>", "2"),  # the last one counts
        ("<answer>1</answer> <answer>2", None),  # and is not closed
        ("<think> <answer>1</answer> </think>", None),  # in the thoughts
        ("<think> <answer>1</answer> </think> <answer>2</answer>", "2"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("<answer>1</answer> or so </answer>", "1"),  # the text around the answer is ignored
        (r"<answer>\boxed{72}</answer>", "72"),
        (r"<answer>It is \boxed{ 72 }.</answer>", "72"),
        (r"<answer>\boxed{1} \fbox{1}</answer>", "1"),
        (r"<answer>\boxed{1} \fbox{2}</answer>", r"\boxed{1} \fbox{2}"),  # two values
        (r"<answer>\boxed{\frac{3}{4}}</answer>", r"\frac{3}{4}"),  # nested braces
        (r"<answer>\boxed{72</answer>", None),
        (r"<answer>\boxed{}</answer>", None),
        (r"\boxed{72}", None),  # a box without tags
        ("72", None),
        ("", None),
        ("<answer></answer>", None),
        ("<answer>  \n </answer>", None),
        ("<answer>72", None),
        ("72</answer>", None),
        ("</answer>72<answer>", None),
        ("<Answer>72</Answer>", None),
        ("<answer>" + "7" * 500 + "</answer>", "7" * 500),
        ("<answer>" + "7" * 501 + "</answer>", None),  # too long to be an answer
    ],
)
def test_answer_is_what_the_last_tags_hold(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "junk",
    [
        "<answer>",
        "</answer>",
        "<answer></answer>",
        "</answer><answer>",
        "<think>",
        "{",
        "}",
        "9",
        "%",
        " ",
        r"\boxed{",
        r"\frac{",
        "<",
        "$",
        ",",
        "1,111",
    ],
)
def test_ten_megabytes_are_graded_in_linear_time(junk):
    """Quadratic time would exceed the limit, far above what linear time needs, well before the largest size."""
    for size in (10**5, 10**6, 10**7):
        text = junk * (size // len(junk))
        start = time.monotonic()
        texts = [text, f"<answer>{text}</answer>", f"<think>{text}</think> <answer>5</answer>"]
        accuracy(texts, ["5"] * 3), format(texts)
        assert time.monotonic() - start < 20


@pytest.mark.parametrize("junk", ["9", "%", "-", "{", "5%", r"\frac{"])
def test_malformed_expected_answers_are_graded_without_errors(junk):
    """Expected answers come from files. Python raises in int() of more than 4300 digits, and in deep recursion."""
    long = junk * 10_000
    assert accuracy(["<answer>5</answer>"], [long]).tolist() == [0]
    assert accuracy(["<answer>5</answer>"], ["5" + long]).tolist() == [0]


def test_answers_are_never_evaluated(tmp_path):
    file = tmp_path / "evaluated"
    text = f"<answer>__import__('pathlib').Path({str(file)!r}).touch() or 5</answer>"
    assert len(text) < 500 and accuracy([text], ["5"]).tolist() == [0]
    assert not file.exists()
