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
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ"
_LOWERED = str.maketrans(_SUPERSCRIPTS, "0123456789+-n")

_COMMAND = re.compile(r"\\(?:([A-Za-z]+) ?|!\s*|([,;:> ]|hspace\{[^{}]*\})|([{}$%#&])|([()\[\]]))")
_SIZED = re.compile(r"\\(?:left|right)(?![A-Za-z])\s*\.?")
_TEXT = re.compile(
    r"\\(?:text(?:rm|bf|it|sf|tt|up|normal)?|math(?:rm|bf|it|sf|tt|normal)|operatorname\*?|[mh]box|emph|boldsymbol)"
    r"\s*\{([^{}]*)\}"
)
_CIRCLE = re.compile(r'\^?\s*\{?\s*°\s*\}?(?:\s*"?([CF])"?(?![A-Za-z]))?')
_EMPHASIS = re.compile(r"(?<![\w*])\*\*(?=\S)([^*]+)(?<=\S)\*\*(?![\w*])|(?<!\w)'([^']+)'(?!\w)|`")
_REPEATING = re.compile(r"(\d*)\.(\d*)\s*\\overline\s*\{?\s*(\d+)\s*\}?")
_MIXED = re.compile(r"(?<![\d.,/])(\d{1,9}) +(\d{1,9}) ?/ ?(\d{1,9})(?![\d.])")
_CURRENCY = re.compile(r"(＄|€|£|¥|\bUSD\b) ?(-?[\d., ]*\d)")

_NUMBERS, _POWERS = TABLES["numbers"], TABLES["powers"]
_DIGITS, _TENS = ("|".join(word for word, n in _NUMBERS.items() if n in range(*ends)) for ends in ((1, 10), (20, 99)))
_NUMBER_WORD = re.compile(
    rf'(?<![\\\w])"?(?:({_TENS})"?[- ]"?({_DIGITS})|({"|".join(_NUMBERS)}))"?(?!\w)', re.IGNORECASE
)
_POWER_WORD = re.compile(rf'(?<=\d)\s*"?({"|".join(_POWERS)})"?(?!\w)', re.IGNORECASE)
_PHRASES = [
    (re.compile(f'"?(?:{phrase})"?'.replace(" ", '"? *"?'), re.IGNORECASE), sign)
    for phrase, sign in TABLES["phrases"].items()
]


def normalize_notation(text: str) -> str:
    """Returns an answer in the notation that `expressions.py` parses.

    Raises:
        ValueError: The text is empty, is too long, or contains control characters or lone surrogates.
    """
    if len(text) > MAX_ANSWER_CHARS:
        raise ValueError(f"more than {MAX_ANSWER_CHARS} characters")
    if not text.isascii():
        text = re.sub("[¼½¾⅐-⅞]", lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("⁄", "/"), text)
        text = re.sub("[₀-₉]+", lambda match: f"_{{{unicodedata.normalize('NFKC', match[0])}}}", text)
        text = re.sub(f"[{_SUPERSCRIPTS}]+", lambda match: f"^{{{match[0].translate(_LOWERED)}}}", text)
        text = unicodedata.normalize("NFKC", text)
    if not text.isprintable():
        text = "".join(c for c in text if unicodedata.category(c) != "Cf")  # such as a zero-width space
        if re.search(r"[^\S\s]|[\0-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]", text):
            raise ValueError("control characters or lone surrogates")
    text = _EMPHASIS.sub(r"\1\2", re.sub("[\"“”]|''", "", text).replace("{,}", ","))
    text = re.sub(r"(?<=[\w}])~(?=[A-Za-z\\])", " ", text)
    if "\\" in text:
        text = _normalize_latex(text)
    text = _SIGNS.sub(lambda match: TABLES["signs"][match[0]], text)
    if text.count("$") % 2:  # dollars, not delimiters of mathematics
        text = re.sub(r"\$(?=\s*-?[\d.])|(?<=\d)\$", "＄", text, count=1)
    text = _CIRCLE.sub(lambda match: f" deg{match[1]}" if match[1] else "°", text.replace("$", ""))
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    if text.upper() != text.lower():  # there are letters
        text = _NUMBER_WORD.sub(lambda match: str(sum(_NUMBERS[word.lower()] for word in match.groups() if word)), text)
        text = _POWER_WORD.sub(lambda match: f"*10^{{{_POWERS[match[1].lower()]}}}", text)
        for phrase, sign in _PHRASES:
            text = phrase.sub(sign, text)
    text = " ".join(_CURRENCY.sub(r"\2 \1", text).split()).strip(" *").rstrip(".,;: \\")
    if not text:
        raise ValueError("empty")
    return text


def _normalize_latex(text: str) -> str:
    text = text.replace(r"\\", "¶" if r"\begin" in text else "\\")  # the end of a row, or a backslash escaped twice
    for _ in range(4):  # nested wrappers
        text = _TEXT.sub(lambda match: re.sub(r'(?<![\\\w])"?([^\W\d_]+)"?', r'"\1"', match[1]), text)
    text = _COMMAND.sub(_rewrite_command, _SIZED.sub("", text))
    return _REPEATING.sub(_write_fraction, text)


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
