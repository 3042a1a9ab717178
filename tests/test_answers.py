"""Extraction, parsing and comparison of answers: every notation, and inputs that are long, hostile or malformed."""

import json
import random
import re
import time
from pathlib import Path

import pytest

from grpo_jax.rewards import accuracy, format
from grpo_jax.text.answers import find_boxes, judge, read_expected

CASES = [
    json.loads(line) for file in sorted(Path(__file__).parent.glob("cases/*answers.jsonl")) for line in file.open()
]
KINDS = sorted({case["id"].split("-")[0] for case in CASES})


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_each_kind_are_judged_as_marked(kind):
    """A case has the expected answer, as a data file writes it, a completion, and whether the completion is right."""
    cases = [case for case in CASES if case["id"].split("-")[0] == kind]
    wrong = [case for case in cases if judge(case["completion"], case["expected"]).correct is not case["right"]]
    assert not wrong


ANSWERS = [case["expected"] for case in CASES if "\\" in case["expected"] or re.search(r"\w[-+/=,]", case["expected"])]
RESPELLINGS = {
    "inline": lambda text: rf"\( {text} \)",
    "dollars": lambda text: f"${text}$",
    "display": lambda text: rf"\[{text}\]",
    "boxed": lambda text: rf"\boxed{{{text}}}",
    "sentence": lambda text: f"The answer is ${text}$.",
    "dfrac": lambda text: text.replace(r"\frac", r"\dfrac"),
    "degrees": lambda text: re.sub(r"\^\{?\\circ\}?", "°", text),
    "text": lambda text: re.sub(r"\\(?:text|mbox|mathrm)\{([^{}]*)\}", r"\1", text),
    "blanks": lambda text: re.sub(r"(?<![A-Za-z\d\\!]) | (?![A-Za-z\d\\])", "", text),
    "sized": lambda text: text.replace(r"\left", "").replace(r"\right", ""),
    "unicode": lambda text: re.sub(r"\\(pi|infty|cup|pm)(?![a-z])", lambda match: SIGNS[match[1]], text).replace(
        "-", "−"
    ),
}
SIGNS = {"pi": "π", "infty": "∞", "cup": "∪", "pm": "±"}


@pytest.mark.parametrize("respelling", RESPELLINGS)
def test_no_respelling_of_an_expected_answer_is_lost(respelling):
    lost = []
    for expected in dict.fromkeys(ANSWERS):
        if not any(sign in expected for sign in ("box", "####", "<answer>", "$", r"\(", r"\[")):  # not wrapped yet
            answer = RESPELLINGS[respelling](expected)
            verdict = judge(f"<think> a </think> <answer> {answer} </answer>", expected)
            lost += [] if verdict.correct else [(expected, answer, verdict.why)]
    assert not lost


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("", "empty"),
        (" \n", "empty"),
        ("$$", "empty"),
        (r"\boxed{}", "empty"),
        (r"\boxed{72", "empty"),
        ("####", "empty"),
        ("nan", "not a number"),
        ("NaN", "not a number"),
        ("\ud83d", "lone surrogates"),
        ("7\x002", "control characters"),
        (r"\frac{3}{4", "unbalanced {"),
        ("The cat sat on the mat and looked at the dog.", "prose of 11 words"),
        ("7" * 501, "more than 500 characters"),
        ("x" + "+x" * 200, "more than 300 symbols"),
        ("<answer>72", "no closed <answer>"),
        ("+", "it ends unexpectedly"),
    ],
)
def test_expected_answers_that_nothing_could_match_are_refused_with_the_reason(answer, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_expected(answer)
    assert not judge(f"<answer>{answer}</answer>", answer).correct  # being equal as text is not enough


@pytest.mark.parametrize(
    "completion, expected, parsed, why",
    [
        ("<answer> 72.0 </answer>", "72", "72.0", "equal"),
        ("<answer> 27 </answer>", "72", "27", "another value: 27, not 72"),
        ("<answer> 84/12 </answer>", "7", "84/12", "unevaluated arithmetic"),
        ("<answer> 5, 72 </answer>", "72", "5, 72", "2 values where one is expected"),
        ("<answer> 5 cm </answer>", "5 m", "5 cm", "another unit"),
        ("<answer> 5 or 72 </answer>", "72", "5 or 72", "hedged: or"),
        ("<answer> (B) </answer>", "A", "(B)", "another choice"),
        ("<answer> 72", "72", None, "no closed <answer>"),
        ("<answer> </answer>", "72", None, "the answer is empty"),
        ("<think> <answer> 72 </answer> </think>", "72", None, "the answer is inside the thoughts"),
    ],
)
def test_a_verdict_says_what_was_read_and_why(completion, expected, parsed, why):
    assert judge(completion, expected)[1:] == (parsed, why)


HOSTILE = [
    *(
        "5^{5^{5^{5^5}}}",
        "9^{9^{9^{9^{9^9}}}}",
        "10^{10^{10}}",
        "((((9999!)!)!)!)!",
        "1000!" * 40,
        "1000!^{1000!}",
        "999999999!",
    ),
    *(r"\binom{1000000}{500000}", "e^{e^{e^{e^e}}}", r"\sin(10^{4000})", r"\tan(e^{9999})", r"\exp(\exp(\exp(10)))"),
    *(
        r"\sqrt" * 90 + "5",
        r"\frac" * 90,
        "(" * 240 + "5" + ")" * 240,
        "{" * 240 + "5" + "}" * 240,
        "|" * 499,
        "-" * 490 + "5",
    ),
    *(
        "5" + "!" * 290,
        "5" + "%" * 290,
        "x" * 290,
        "x^" * 140 + "x",
        "1/" * 140 + "1",
        "1," * 140 + "1",
        "1 or " * 90 + "5",
    ),
    *(
        "9" * 499,
        "0." + "9" * 490,
        "1e9999",
        "1e-9999",
        "1e999999",
        "9" * 400 + "^{" + "9" * 50 + "}",
        r"\pm" * 150 + "5",
    ),
    *(r"\begin{pmatrix}" * 25, r"\begin{pmatrix}" + "&" * 400, r"\text{" * 70 + "6" + "}" * 70, r"\boxed{" * 60 + "5"),
    *(
        "5\x00",
        "\x1b[31m5",
        "\ud800",
        "5\udfff",
        "open('x','w')",
        "lambda: 5",
        "5 if True else 3",
        "int('5')",
        "5 # 5",
        "0x5",
        "5_0",
    ),
    *("{{7*7-44}}", "%s%n", "'; DROP TABLE x", *(sign.join(map(str, range(99))) for sign in (" ", ", ", " or ", "\n"))),
    *(
        r"\boxed{1}\boxed{5}",
        "x=5" + ",x=5" * 90,
        "any number",
        "answer here",
        "...",
        "?",
        "n",
        r"\infty",
        "NaN",
        "5/0",
        "0/0",
    ),
    *(
        r"(-\infty,\infty)",
        r"\mathbb{R}",
        "x=x",
        "5=x=6",
        r"5\ne 6",
        "[5,6]",
        "(5)(1)",
        "5^1",
        r"\sqrt{25}",
        "|-5|",
        "5 mod 7",
    ),
    *(r"\log(0)", r"\ln 0", r"-\log(0)", r"\frac{1}{\log 0}", "5 cm^{}"),  # infinite, or a power that is not a number
]


@pytest.mark.parametrize("answer", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_earn_nothing_and_are_judged_in_bounded_time(answer):
    for expected in ("5", r"2\sqrt{3}", "x^2", "(1, 2)", answer):
        if expected is not answer:
            assert not judge(f"<think> a </think> <answer> {answer} </answer>", expected).correct
        else:
            judge(f"<answer>{answer}</answer>", expected)


@pytest.mark.parametrize("seed", range(4))
def test_any_text_is_judged_without_errors(seed):
    parts = [
        part
        for case in CASES
        for part in re.findall(r"\\?[A-Za-z]+|\d+|\S", case["expected"] + case["completion"][39:-10])
    ]
    draw = random.Random(seed)
    for length in (2, 5, 20, 100) * 100:
        text = draw.choice(("", " ")).join(draw.choices(parts, k=length))
        assert judge(f"<answer>{text}</answer>", draw.choice(CASES)["expected"]).why
        assert judge("<answer>72</answer>", text).why and judge(f"<answer>{text}</answer>", text).why


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer>72</answer>", "72"),
        ("<think> 1 </think> <answer> 72 </answer>", "72"),
        ("<answer>\n72\n</answer> and more", "72"),
        ("<answer>1</answer> <answer>2</answer>", "2"),  # the last one counts
        ("<answer>1</answer> <answer>2", None),  # the last tag is not closed
        ("<think> <answer>1</answer> </think>", None),  # inside the thoughts
        ("<think> <answer>1</answer> </think> <answer>2</answer>", "2"),
        ("<answer>1 <answer>2</answer>", "2"),
        ("<answer>1</answer> or so </answer>", "1"),  # the text around the answer is ignored
        (r"<answer>\boxed{72}</answer>", "72"),
        (r"<answer>It is \boxed{ 72 }.</answer>", "72"),
        (r"<answer>\boxed{1} \fbox{1}</answer>", "1"),
        (r"<answer>\boxed{1} \fbox{2}</answer>", "1, 2"),  # two values
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
    assert judge(text, "72").parsed == answer


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


@pytest.mark.parametrize(
    "text, contents",
    [
        (r"\boxed{1} and \boxed {{2}, 3 }", ["1", "{2}, 3"]),
        (r"\boxed{1 + \boxed{2}} } \fbox{3}", ["2", "3"]),
        (r"{\boxed{1} \boxed{2 \boxed{3}", ["1", "", "3"]),
        (r"\boxed{" * 100_000 + "}" * 100_000, [""]),
    ],
)
def test_boxes_are_found_in_one_pass(text, contents):
    assert find_boxes(text) == contents
