"""Extracts the answer from a completion and compares it with the expected one.

Text is parsed and never evaluated. Every function runs in time linear in the length of its input.
"""

import re
from fractions import Fraction

MAX_ANSWER_CHARS = 200  # a longer answer counts as none, and no problem may expect a longer one

_DIGIT = re.compile(r"\d")
_SPACING = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[!,]")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_RATIO = re.compile(r"()([^/]*)/([^/]*)")  # () stands for the sign, which is part of the numerator


def extract_answer(text: str) -> str | None:
    r"""Returns the content of the last `<answer>...</answer>` in a completion.

    If that content includes `\boxed{...}`, returns the content of the last box instead.

    Returns:
        The answer without surrounding white space, or None if there is no answer, if it is empty, or if the tags hold
        more than `MAX_ANSWER_CHARS` characters.
    """
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    if start < 0:
        return None
    end = text.find("</answer>", start)
    answer: str | None = text[start + len("<answer>") : end].strip()
    if not answer or len(answer) > MAX_ANSWER_CHARS:
        return None
    boxes = list(_BOXED.finditer(answer))
    if boxes:
        answer = read_braced(answer, boxes[-1].end())
    return answer or None


def read_braced(text: str, start: int) -> str | None:
    """Returns the content of a brace group that opens just before `start`, or None if the group is never closed."""
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index].strip()
    return None


def parse_number(text: str) -> Fraction | None:
    r"""Returns the exact value of a written number, or None if the text is anything else.

    Reads integers, decimals, `1,234`, `3/4`, `\frac{3}{4}` and `50%`, but no exponents: 1e5 is compared as a word.
    """
    text = text.strip()
    if len(text) > MAX_ANSWER_CHARS:
        return None
    if text.endswith("%"):
        percent = parse_number(text[:-1].removesuffix("\\"))
        return None if percent is None else percent / 100
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    fraction = _FRACTION.fullmatch(text) or _RATIO.fullmatch(text)
    if not fraction:
        return None
    sign, numerator, denominator = (part.strip() for part in fraction.groups())
    if not _NUMBER.fullmatch(numerator) or not _NUMBER.fullmatch(denominator) or Fraction(denominator) == 0:
        return None
    value = Fraction(numerator) / Fraction(denominator)
    return -value if sign == "-" else value


def normalize_text(text: str) -> str:
    """Returns the text in lower case, with single spaces, without dollar signs around it and without a final period."""
    text = text.strip().strip("$").strip()
    if text.endswith("."):
        text = text[:-1]
    return " ".join(_SPACING.sub("", text).split()).casefold()


def answers_match(answer: str, expected: str) -> bool:
    """Returns whether two answers are equal: as numbers if both are numbers, otherwise as normalized text."""
    answer, expected = normalize_text(answer), normalize_text(expected)
    value, expected_value = parse_number(answer), parse_number(expected)
    if value is not None and expected_value is not None:
        return value == expected_value
    return bool(answer) and answer == expected


def read_expected(answer: str) -> str:
    """Returns an expected answer, or raises a ValueError if no completion could match it."""
    if not answer.strip() or len(answer) > MAX_ANSWER_CHARS or (len(answer.split()) > 8 and not _DIGIT.search(answer)):
        raise ValueError("has an answer that no completion could match")
    return answer
