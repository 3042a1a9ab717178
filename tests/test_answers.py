"""Extraction, parsing and comparison of answers: every notation, and inputs that are long, hostile or malformed."""

import time
from fractions import Fraction

import pytest

from grpo_jax.rewards import accuracy, format
from grpo_jax.text.answers import answers_match, extract_answer, parse_number


@pytest.mark.parametrize(
    "written, value",
    [
        ("72", 72),
        ("007", 7),
        ("+72", 72),
        ("-72", -72),
        ("3.50", Fraction(7, 2)),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("1,234", 1234),
        ("-1,234,567.5", Fraction(-2469135, 2)),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"\tfrac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{1}{2}", Fraction(-1, 2)),
        (r"\frac{-1}{2}", Fraction(-1, 2)),
        ("50%", Fraction(1, 2)),
        (r"12.5\%", Fraction(1, 8)),
        ("٣٤", 34),  # digits of any script
        ("", None),
        ("-", None),
        (".", None),
        ("%", None),
        ("--5", None),
        ("1,23", None),  # commas separate groups of three digits
        ("1 234", None),
        ("1 2", None),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        ("1/2/3", None),
        (r"\frac{1}{\frac{2}{3}}", None),
        ("²", None),  # str.isdigit is True, but int() raises
        ("½", None),
        ("1+1", None),
        ("2**9999999", None),
        ("1e5", None),  # compared as a word
        ("0x10", None),
        ("1_000", None),
        ("inf", None),
        ("nan", None),
        ('__import__("os")', None),
    ],
)
def test_written_numbers_are_parsed_exactly(written, value):
    assert parse_number(written) == value


@pytest.mark.parametrize(
    "answer, expected, match",
    [
        ("72", "72", True),
        ("72", "73", False),
        ("72.0", "72", True),
        ("3.50", "3.5", True),
        ("1,234", "1234", True),
        ("1234", "1,234", True),
        ("72.", "72", True),  # a final period
        ("$72$", "72", True),
        ("$1,234.50", "1234.5", True),
        ("0.75", "3/4", True),
        (r"\frac{3}{4}", "0.75", True),
        (r"$-\dfrac{1}{2}$", "-1/2", True),
        ("50%", "0.5", True),
        ("50%", "50", False),
        ("0.3333", "1/3", False),  # close is not equal
        ("Blue Whale", "blue  whale.", True),
        ("STRASSE", "straße", True),
        ("blue", "blue whale", False),
        ("72 apples", "72", False),
        ("72 73", "72", False),  # two numbers
        ("72, 73", "73", False),
        ("1+1", "2", False),
        ("1e5", "100000", False),
        ("1e5", "1E5", True),
        ('__import__("os")', "0", False),
        ("1/0", "1/0", True),  # equal as words
        ("1/0", "0", False),
        (r"\left( 1, 2 \right)", "( 1, 2 )", True),
        (r"\leftarrow", r"\rightarrow", False),
        (r"\leftarrow", "arrow", False),
        ("", "", False),
        ("$", "$", False),
        (".", "", False),
    ],
)
def test_answers_match_as_numbers_or_else_as_words(answer, expected, match):
    assert answers_match(answer, expected) is match


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>72</answer>", "72"),
        ("<think> 1 </think> <answer> 72 </answer>", "72"),
        ("<answer>\n72\n</answer> and more", "72"),
        ("<answer>1</answer> <answer>2</answer>", "2"),  # the last one counts
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("<answer>1</answer> or so </answer>", "1"),  # the text around the answer is ignored
        (r"<answer>\boxed{72}</answer>", "72"),
        (r"<answer>It is \boxed{ 72 }.</answer>", "72"),
        (r"<answer>\boxed{1} \fbox{2}</answer>", "2"),
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
        ("<answer>" + "7" * 200 + "</answer>", "7" * 200),
        ("<answer>" + "7" * 201 + "</answer>", None),  # too long to be an answer
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
    assert len(text) < 220 and accuracy([text], ["5"]).tolist() == [0]
    assert not file.exists()
