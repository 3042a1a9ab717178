"""Extracts the answer from a completion and judges it against the expected one.

Text is parsed and never executed. Every function runs in time linear in the length of a completion, and in bounded time
on the answer that it extracts.
"""

import contextlib
import functools
import itertools
import re
from datetime import datetime
from fractions import Fraction
from typing import NamedTuple

from grpo_jax.text.equality import difference, list_members
from grpo_jax.text.expressions import Tree, parse, tokenize
from grpo_jax.text.notation import FUNCTIONS, LETTERS, MAX_ANSWER_CHARS, TABLES, normalize_notation

MAX_WORDS = 8  # longest answer that consists of words

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_WORDS = re.compile(r"[^\W\d_]+(?:[ \-',./&]+[^\W\d_]+)*[!?.]?")
_SHORT_WORDS = TABLES["words"]["short"].split()
_NAMES = {*FUNCTIONS, *LETTERS, *LETTERS.values(), "inf", "infinity", "and", "or"}
_HEDGES = re.compile(
    rf"\b(?:{TABLES['words']['hedges']})\b|[?≈~]|\\(?:approx|sim|neg|not)\b|或|不|左右|くらい|ぐらい", re.IGNORECASE
)
_SENTENCE = re.compile(rf'^(?:"?(?:(?:{TABLES["words"]["sentence"]})|[=是为有共])"?[\s,:]*)+', re.IGNORECASE)
_EXPECTED_SENTENCE = re.compile(r"(?:the\s+)?(?:final\s+|correct\s+)?answer\s*(?:is|:)\s*:?", re.IGNORECASE)
_CHOICE = re.compile(r"[(\[]?([A-Ja-j])(?:[)\]][.:]?|[.:]|$)\s*(.*)")
_OTHER_CHOICE = re.compile(r"(?:^|\b(?:or|and|not)\b|[,/])\s*\(?[A-J](?:[).:,]|$)|\([A-J]\)|\b[A-J][).:]\s")
_CHOICES = re.compile(r"(?:[A-J]|\([A-J]\))(?:(?:[,;\s]|and)*(?:[A-J]|\([A-J]\)))+")  # such as (A) and (C)
_EXPECTED_CHOICE = re.compile(r"(?:\\text(?:bf|rm)?\s*\{)?\s*\(([A-J])\)\s*\}?[\s~\\]*|([A-J])(?:[.)]\s+|$)")
_TIME = re.compile(r"(\d{1,2})(?::([0-5]\d))?\s*([ap])\.?\s?m\b\.?", re.IGNORECASE)
_DATE = re.compile(r".*\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)\w*\b.*|\d{4}-\d\d?-\d\d?", re.IGNORECASE)


class Verdict(NamedTuple):
    """Whether a completion is correct, and why."""

    correct: bool
    parsed: str | None  # the answer that was read, or None if there is none
    why: str


def _read_tags(text: str) -> str:
    """Returns the content of the last `<answer>...</answer>`; raises ValueError if there is none."""
    start = text.rfind("<answer>")
    end = text.find("</answer>", start)
    if start < 0 or end < 0:
        raise ValueError("no closed <answer>")
    if text.find("</think>", start) >= 0:
        raise ValueError("the answer is inside the thoughts")
    answer = text[start + len("<answer>") : end].strip()
    if not answer:
        raise ValueError("the answer is empty")
    if len(answer) > MAX_ANSWER_CHARS:
        raise ValueError(f"the answer has more than {MAX_ANSWER_CHARS} characters")
    return answer


def find_boxes(text: str) -> list[str]:
    r"""Returns the content of each innermost `\boxed{...}`, or "" for a box that is not closed."""
    contents: list[str | None] = []  # None for a box around another one
    opened: list[tuple[int, int]] = []  # where each open brace group begins, and which box it is, or -1
    for match in re.finditer(_BOXED.pattern + "|[{}]", text):
        if match[0] == "}" and opened:
            start, box = opened.pop()
            if box >= 0:
                contents[box] = text[start : match.start()].strip() if box == len(contents) - 1 else None
        elif match[0] != "}":
            opened.append((match.end(), -1 if match[0] == "{" else len(contents)))
            contents += [""] * (match[0] != "{")
    return [content for content in contents if content is not None]


def judge(completion: str, expected: str) -> Verdict:
    """Judges the last `<answer>...</answer>` of a completion against the expected answer, in any notation.

    Numbers, expressions, lists, sets, intervals, matrices, units, dates and words are compared by their meaning. If a
    plain number is expected, unevaluated arithmetic does not match. If one value is expected, an answer with several
    does not match. An expected answer that cannot be read matches nothing.
    """
    try:
        verdict = _judge_answer(_read_tags(completion), expected)
    except ValueError as error:
        return Verdict(False, None, str(error))
    values = f": {verdict.parsed}, not {expected}" if verdict.why == "another value" and len(expected) < 40 else ""
    return verdict._replace(why=verdict.why + values)


def _judge_answer(answer: str, expected: str) -> Verdict:
    """Judges an answer that may contain boxes."""
    try:
        want, spelling = _read_expected(expected)
    except ValueError as error:
        raise ValueError(f"the expected answer cannot be read: {error}") from error
    boxes = list(dict.fromkeys(find_boxes(answer)))
    if not boxes:
        return _judge_text(normalize_notation(answer.removeprefix("####")), want, spelling)
    if "" in boxes:
        raise ValueError("a box is empty or not closed")
    several = want[0] not in ("choice", "text") and len(list_members(want)) > 1
    if len(boxes) > 1 and not several:
        return Verdict(False, ", ".join(boxes), f"{len(boxes)} boxes where one value is expected")
    pattern = "|".join(rf"\\(?:boxed|fbox)\s*\{{\s*{re.escape(box)}\s*\}}" for box in boxes)
    before, *between, behind = (text.split() for text in re.split(pattern, answer))
    near = " ".join([*before[-3:], *itertools.chain(*between), *behind[:3]])
    if (hedge := _HEDGES.search(near)) and not (several and hedge[0] == "or"):
        return Verdict(False, answer, f"hedged: {hedge[0]}")
    verdict = _judge_text(normalize_notation(", ".join(boxes)), want, spelling)
    words = re.findall(r"[^\W\d_]{2,}", _SENTENCE.sub("", " ".join(before + behind)))
    if verdict.correct and len(boxes) == 1 and len(words) < 2 and re.search(r"[\w=+*/^%°-]", near):  # such as a unit
        whole = _judge_text(normalize_notation(_BOXED.sub("{", answer)), want)
        return verdict if whole.correct or whole.why.startswith("it cannot be read") else whole
    return verdict


def _judge_text(text: str, want: Tree, spelling: str = "") -> Verdict:
    """Judges an answer in normalized notation, first as it is, then without the sentence around it."""
    if text == spelling:
        return Verdict(True, text, "equal")
    if want[0] == "choice":
        return _judge_choice(text, *want[1:])
    bare = _SENTENCE.sub("", text)
    hedge = _HEDGES.search(text.removesuffix(bare) if want[0] in ("text", "opaque") else text)
    if hedge and hedge[0] not in spelling and not (hedge[0] == "or" and len(list_members(want)) > 1):
        return Verdict(False, text, f"hedged: {hedge[0]}")
    for reading in dict.fromkeys((text, bare)):
        try:
            got = parse_answer(reading)
            prose = got[0] in ("opaque", "text") and got[0] != want[0]
            why = "it cannot be read" if prose else difference(want, got)
        except ValueError as error:
            why = f"it cannot be read: {error}"
        if not why:
            return Verdict(True, reading, "equal")
    return Verdict(False, text, why)


def _judge_choice(text: str, letter: str, value: Tree | None) -> Verdict:
    """Judges an answer to a question with choices, by the letter or by the value of the choice."""
    bare = text.replace('"', "")
    for reading in dict.fromkeys((bare, _SENTENCE.sub("", bare))):
        if len(letter) > 1 and _CHOICES.fullmatch(reading):
            same = set(re.findall("[A-J]", reading)) == set(letter)
            return Verdict(same, reading, "the same choices" if same else "other choices")
        if choice := _CHOICE.fullmatch(reading):
            named, rest = choice[1].upper(), choice[2]
            if named != letter or _OTHER_CHOICE.search(rest):
                return Verdict(False, bare, "another choice" if named != letter else "several choices")
            if rest and value and not _judge_text(rest, value).correct:
                return Verdict(False, bare, "the letter and the value contradict each other")
            return Verdict(True, named, "the same choice")
    return _judge_text(text, value) if value else Verdict(False, bare, "not one of the choices")


def read_expected(answer: str) -> Tree:
    r"""Parses an expected answer.

    Removes what data sets put around it: a rationale before `####`, a solution whose last `\boxed{}` holds the answer,
    tags, "The answer is". A choice, such as `(A) 133`, becomes ("choice", letter, value), where the value may be None.

    Raises:
        ValueError: No answer could match it, because it is empty, malformed or prose. The message gives the reason.
    """
    return _read_expected(answer)[0]


@functools.lru_cache(maxsize=1 << 17)
def _read_expected(answer: str) -> tuple[Tree, str]:
    """Returns (tree, text): an expected answer parsed, and in normalized notation."""
    text = answer.strip().rpartition("####")[2].strip()
    text = _read_tags(text) if "<answer>" in text else text
    boxes = find_boxes(text)
    text = (boxes[-1] if boxes else _EXPECTED_SENTENCE.split(text)[-1]).strip()
    plain = re.sub(r"\\[a-z]+|[${}]", "", text).strip()
    if _CHOICES.fullmatch(plain) and not plain.isalpha():
        return ("choice", "".join(re.findall("[A-J]", plain)), None), ""
    if choice := _EXPECTED_CHOICE.match(text):
        try:
            value = parse_answer(normalize_notation(text[choice.end() :]))
        except ValueError:
            value = None  # no text, or prose: only the letter counts
        return ("choice", choice[1] or choice[2], value), ""
    if text.casefold() == "nan":
        raise ValueError("not a number")
    text = normalize_notation(text)
    return parse_answer(text), text


def parse_answer(text: str) -> Tree:
    """Parses an answer in normalized notation: a time, a date, words or an expression.

    Raises:
        ValueError: The answer is prose of more than `MAX_WORDS` words, malformed or too long.
    """
    if text.isdecimal():
        return ("n", Fraction(text))
    bare = text.replace('"', "")
    if time := _TIME.fullmatch(bare):
        return ("time", (int(time[1]) % 12 + 12 * (time[3] in "pP")) * 60 + int(time[2] or 0))
    if _DATE.fullmatch(bare) and (date := _read_date(bare)):
        return date
    words = re.findall(r"[^\W\d_]+", re.sub(r"\\[A-Za-z]+", " ", bare))
    long = [word for word in words if len(word) > 2 or word.lower() in _SHORT_WORDS or not word.isascii()]
    long = [word for word in long if word not in _NAMES]
    if len(long) > MAX_WORDS:
        raise ValueError(f"prose of {len(words)} words")
    if not (long and _WORDS.fullmatch(bare)):
        try:
            return parse(text)
        except ValueError as error:
            if text.count("{") != text.count("}"):
                raise ValueError("unbalanced {") from error
            if re.search(r'[\\"⦃{]', text):
                return ("opaque", "".join(value for _, value in tokenize(text)))
            if not long:
                raise
    key = re.sub(r"^(?:the|an?) (?=\w)|[!?.]$", "", bare, flags=re.IGNORECASE)
    return ("text", re.sub(r"[^\W\d_]+", lambda match: _fold_word(match[0]), key).replace(" ", ""))


def _fold_word(word: str) -> str:
    """Lowers the case of a word, except of short ones such as AB, where case matters."""
    plain = len(word) > 3 or word[1:].islower() or word.lower() in _SHORT_WORDS
    return word.casefold() if plain else word


def _read_date(text: str) -> Tree | None:
    """Parses a date, such as March 5, 2024 or 5 March; returns None for any other text."""
    text = " ".join(re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|\bof\b|\bthe\b|[,.]", " ", text).replace("Sept ", "Sep ").split())
    year = bool(re.search(r"\d{4}", text))
    for layout in ("%Y-%m-%d", "%B %d %Y", "%d %B %Y", "%b %d %Y", "%d %b %Y"):
        with contextlib.suppress(ValueError):
            return ("date", datetime.strptime(text if year else f"{text} 2000", layout), year)
    return None
