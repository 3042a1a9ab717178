"""Answers: found in a completion, brought to one form, compared. Text is parsed, never evaluated.

Every function takes time linear in its text.
"""

import re
from fractions import Fraction

MAX_ANSWER_CHARS = 200  # a longer answer is no answer, and a question may not ask for one

_SPACING = re.compile(r"\\(?:left|right)(?![A-Za-z])|\\[!,]")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_FRACTION = re.compile(r"([+-]?)\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")


def extract_answer(text: str) -> str | None:
    """What stands in the last `<answer>...</answer>` of a completion; None without one, or if it is too long.

    If that holds `\\boxed{...}`, what is in the last such box.
    """
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    if start < 0:
        return None
    end = text.find("</answer>", start)
    answer = text[start + len("<answer>") : end].strip()
    boxes = list(_BOXED.finditer(answer)) if len(answer) <= MAX_ANSWER_CHARS else []
    if boxes:
        answer = read_braced(answer, boxes[-1].end())
    if answer is None or not answer or len(answer) > MAX_ANSWER_CHARS:
        return None
    return answer


def read_braced(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes the one before it; None if none does."""
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index].strip()
    return None


def parse_number(text: str) -> Fraction | None:
    """The value of a written number: integer, decimal, `1,234`, `3/4`, `\\frac{3}{4}`, `50%`; None for all else."""
    text = text.strip()
    if len(text) > MAX_ANSWER_CHARS:
        return None
    if text.endswith("%"):
        whole = parse_number(text[:-1].removesuffix("\\"))
        return None if whole is None else whole / 100
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
    if _NUMBER.fullmatch(text):
        return Fraction(text.removesuffix("."))
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        sign, top, bottom = fraction.groups()
    elif text.count("/") == 1:
        sign, (top, bottom) = "", text.split("/")
    else:
        return None
    if not _NUMBER.fullmatch(top.strip()) or not _NUMBER.fullmatch(bottom.strip()):
        return None
    low = Fraction(bottom.strip().removesuffix("."))
    return None if low == 0 else Fraction(top.strip().removesuffix(".")) / low * (-1 if sign == "-" else 1)


def normalize_text(text: str) -> str:
    """One spelling for answers that are words: no dollar signs, no final full stop, single spaces, lower case."""
    text = text.strip().strip("$").strip()
    if text.endswith("."):
        text = text[:-1]
    return " ".join(_SPACING.sub("", text).split()).casefold()


def answers_match(found: str, expected: str) -> bool:
    """Equal as numbers if both are numbers, else equal as words."""
    found, expected = normalize_text(found), normalize_text(expected)
    left, right = parse_number(found), parse_number(expected)
    if left is not None and right is not None:
        return left == right
    return bool(found) and found == expected
