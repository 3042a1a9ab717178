r"""Rewrites answers into one notation, so that a single grammar can parse them.

For example, `\dfrac{3}{4}` becomes `\frac{3}{4}`, `\gamma` becomes that letter, and `5\text{ cm}` becomes `5 "cm"`:
quotes mark the words of `\text`. `notation.toml` lists equivalent spellings.
"""

import re
import tomllib
import unicodedata
from fractions import Fraction
from pathlib import Path
from typing import Any

MAX_ANSWER_CHARS = 500  # a longer answer counts as none, and no problem may expect a longer one

TABLES: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
GREEK = "alpha beta gamma delta epsilon zeta eta theta iota kappa mu nu xi rho sigma tau upsilon phi chi psi omega pi"
LETTERS = {name: unicodedata.lookup(f"greek small letter {name}") for name in GREEK.split()} | {"lambda": "λ"}
LETTERS |= {name.title(): letter.upper() for name, letter in LETTERS.items()}
FUNCTIONS = set(TABLES["words"]["functions"].split())
_COMMANDS = TABLES["commands"] | LETTERS
_SIGNS = re.compile("|".join(map(re.escape, TABLES["signs"])))

_COMMAND = re.compile(r"\\(?:([A-Za-z]+) ?|!\s*|([,;:> ]|hspace\{[^{}]*\})|([{}$%#&])|([()\[\]]))")
_TEXT = re.compile(
    r"\\(?:text(?:rm|bf|it|sf|tt|up|normal)?|math(?:rm|bf|it|sf|tt|normal)|operatorname\*?|[mh]box|emph|boldsymbol)"
    r"\s*\{([^{}]*)\}"
)
_REPEATING = re.compile(r"(\d*)\.(\d*)\s*\\overline\s*\{?\s*(\d+)\s*\}?")

_NUMBERS, _POWERS = TABLES["numbers"], TABLES["powers"]
_DIGITS, _TENS = ("|".join(word for word, n in _NUMBERS.items() if n in range(*ends)) for ends in ((1, 10), (20, 99)))
_NUMBER_WORD = re.compile(
    rf'(?<![\\\w])"?(?:({_TENS})"?[- ]"?({_DIGITS})|({"|".join(_NUMBERS)}))"?(?!\w)', re.IGNORECASE
)
_POWER_WORD = re.compile(rf'(?<=\d)\s*"?({"|".join(_POWERS)})"?(?!\w)', re.IGNORECASE)
_RULES = {
    stage: [(re.compile(pattern.replace(" ", '"? *"?'), re.IGNORECASE), new) for pattern, new in rules.items()]
    for stage, rules in TABLES["rules"].items()
}


def normalize_notation(text: str) -> str:
    """Returns an answer in the notation that `expressions.py` parses.

    Raises:
        ValueError: The text is empty, is too long, or contains control characters or lone surrogates.
    """
    if len(text) > MAX_ANSWER_CHARS:
        raise ValueError(f"more than {MAX_ANSWER_CHARS} characters")
    if text.isdecimal() and text.isascii():
        return text
    if not text.isascii() or not set("\"'`*~").isdisjoint(text):
        text = unicodedata.normalize("NFKC", _apply_rules("first", text))
    if not text.isprintable():
        text = "".join(c for c in text if unicodedata.category(c) != "Cf")  # such as a zero-width space
        if re.search(r"[\0-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]", text):
            raise ValueError("control characters or lone surrogates")
    if "\\" in text:
        text = _normalize_latex(text)
    text = _SIGNS.sub(lambda match: TABLES["signs"][match[0]], " ".join(text.split()))
    text = _apply_rules("last", text)
    if text.upper() != text.lower():  # there are letters
        text = _NUMBER_WORD.sub(lambda match: str(sum(_NUMBERS[word.lower()] for word in match.groups() if word)), text)
        text = _POWER_WORD.sub(lambda match: f"*10^{{{_POWERS[match[1].lower()]}}}", text)
    text = " ".join(text.split()).strip(" *").rstrip(".,;: \\")
    if not text:
        raise ValueError("empty")
    return text


def _normalize_latex(text: str) -> str:
    text = text.replace(r"\\", "¶" if r"\begin" in text else "\\")  # the end of a row, or a backslash escaped twice
    for _ in range(4):  # nested wrappers
        text = _TEXT.sub(lambda match: re.sub(r'(?<![\\\w])"?([^\W\d_]+)"?', r'"\1"', match[1]), text)
    text = _COMMAND.sub(_rewrite_command, _apply_rules("latex", text))
    return _REPEATING.sub(_write_fraction, text)


def _apply_rules(stage: str, text: str) -> str:
    for pattern, new in _RULES[stage]:
        text = pattern.sub(new, text)
    return text


def _rewrite_command(match: re.Match[str]) -> str:
    name, space, escaped, _ = match.groups()
    if name and name not in _COMMANDS and name[:-1] in {*_COMMANDS, *FUNCTIONS}:  # as in \piR
        return f"{_COMMANDS.get(name[:-1], chr(92) + name[:-1])} {name[-1]}"
    if name:
        return str(_COMMANDS.get(name, match[0]))
    return " " if space else {"{": "⦃", "}": "⦄", "$": "＄"}.get(escaped, escaped or "")


def _write_fraction(match: re.Match[str]) -> str:
    """Writes a repeating decimal as a fraction in lowest terms."""
    whole, fixed, period = match.groups()
    return f"({Fraction(f'{whole or 0}.{fixed}0') + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))})"
