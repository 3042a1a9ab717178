r"""Parses expressions in LaTeX or plain notation into nested tuples.

An expression is a tuple of its kind and its parts: `2x+1` is ("+", ("*", ("n", 2), ("s", "x")), ("n", 1)), where
numbers are fractions and ("s", name) is a symbol. ("[)", a, b) is an interval, and ("unit", expression, unit) a
quantity. Nothing is evaluated here.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from grpo_jax.text.notation import FUNCTIONS, LETTERS, TABLES

Tree = tuple[Any, ...]

MAX_TOKENS, MAX_DEPTH = 300, 40

UNITS = {name: unit for unit, names in TABLES["units"].items() for name in (unit, *names.split())}
_CURRENCIES = "＄€£¥¢"
_NAMES = {"and": ("o", "and"), "or": ("o", "or"), "to": ("o", ":"), "inf": ("s", "∞"), "infinity": ("s", "∞")}
_NAMES |= {name: ("f", name) for name in FUNCTIONS} | {name: ("s", letter) for name, letter in LETTERS.items()}
_LEVELS = [  # of the grammar, outermost first; a matrix and a row may have one member
    ("matrix", ("¶",)),
    ("row", ("&",)),
    ("list", (",", ";", "and", "or")),
    ("relation", tuple("=<>≤≥≠∈")),
]
_LIST, _RELATION = 2, 3
_CLOSING = {"(": ")]", "[": ")]", "⦃": "⦄", "{": "}", "|": "|", "⌊": "⌋", "⌈": "⌉", "⟦": "⟧"}
_BRACKETED = {"|": "abs", "⌊": "floor", "⌈": "ceil", "{": "set", "⦃": "set"}
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<n>(?:(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)|[1-9]\d{0,2}(?:\ \d{3})+(?!\d|\ \d)|\d+)(?:\.(?!\.)\d*)?|\.\d+)
        (?:[eE][+-]?\d{1,4}(?!\w))?)
    |(?P<w>"[^"]*"|[A-Za-z]+|[Ͱ-Ͽ∞∅]|[^\W\d_A-Za-zͰ-Ͽ]+)
    |\\(?P<f>(?:FUNCTIONS)(?![A-Za-z]))
    |(?P<s>\\[A-Za-z]+(?:\{[^{}]*\})?)
    |(?P<o>\S)
    )""".replace("FUNCTIONS", "|".join(FUNCTIONS)),
    re.VERBOSE,
)


def tokenize(text: str) -> list[tuple[str, str]]:
    """Returns the tokens of an answer in normalized notation, as pairs of kind and text.

    The kinds are n (number), s (symbol), f (function), w (word) and o (operator or bracket).

    Raises:
        ValueError: There are more than `MAX_TOKENS` tokens.
    """
    tokens: list[tuple[str, str]] = []
    for match in _TOKEN.finditer(text):
        kind = str(match.lastgroup)
        written = match[kind]
        if kind == "w":
            spaced = match[0][0] == " " and bool(tokens) and tokens[-1][0] == "n"
            behind = spaced and bool(re.match(r" |$|[,/^]", text[match.end() :]))
            tokens += _read_word(written, behind, text[match.end() : match.end() + 1] != " ")
        else:
            tokens.append((kind, written.removeprefix("\\")))
        if len(tokens) > MAX_TOKENS:
            raise ValueError(f"more than {MAX_TOKENS} symbols")
    return tokens


def _read_word(written: str, behind: bool, last: bool) -> list[tuple[str, str]]:
    r"""Returns the tokens of a run of letters: a name, a word, or a product of symbols.

    Args:
        written: The run of letters, in quotes if it comes from `\text`.
        behind: Whether it follows a number and a space, as a unit does.
        last: Whether no space follows.
    """
    word = written.strip('"')
    lower, quoted = word.lower(), written != word
    if token := _NAMES.get(word, _NAMES.get(lower)):
        return [token]
    if len(word) == 1 and (word.isascii() or word in "∞∅" or word in LETTERS.values()):
        return [("w" if word in UNITS and (quoted or (behind and last)) else "s", word)]
    named = word in UNITS or lower in UNITS or not word.isascii()
    if quoted or len(word) > 3 or named or (behind and re.search("[aeiou]", word)):
        return [("w", word)]
    return [("s", letter) for letter in ([word] if word.isupper() else word)]  # AB names a line


def parse(text: str) -> Tree:
    """Parses an answer in normalized notation; several values become ("list", *values).

    Raises:
        ValueError: The text does not follow the grammar, is too long or is nested too deeply.
    """
    parser = Parser(tokenize(text))
    tree = parser.level(_LIST)
    if parser.kind:
        raise ValueError(f"unexpected {parser.take()}")
    return tree


class Parser:
    """A recursive-descent parser: each method reads one level of the grammar, or raises ValueError."""

    def __init__(self, tokens: Sequence[tuple[str, str]]) -> None:
        """Starts at the first token. Two empty tokens are appended as an end marker."""
        self.tokens, self.at, self.depth = [*tokens, ("", ""), ("", "")], 0, 0

    @property
    def kind(self) -> str:
        """The kind of the next token, "" at the end."""
        return self.tokens[self.at][0]

    @property
    def sign(self) -> str:
        """The next token if it is an operator or bracket, otherwise ""."""
        kind, value = self.tokens[self.at]
        return value if kind == "o" else ""

    def take(self) -> str:
        """Returns the next token and advances."""
        if not self.kind:
            raise ValueError("it ends unexpectedly")
        self.at += 1
        return self.tokens[self.at - 1][1]

    def accept(self, *signs: str) -> str:
        """Takes the next token if it is one of these operators, otherwise returns ""."""
        return self.take() if self.sign and self.sign in signs else ""

    def expect(self, *signs: str) -> str:
        """Takes an operator that must come next."""
        if self.sign not in signs:
            raise ValueError(f"missing {signs[0]}")
        return self.take()

    def level(self, index: int) -> Tree:
        """Reads one of `_LEVELS`, or a quantity below them."""
        if index == len(_LEVELS):
            return self.quantity()
        kind, allowed = _LEVELS[index]
        parts, signs = [self.level(index + 1)], []
        while (sign := self.accept(*allowed)) or (index == _LIST and parts[-1][0] == "unit" and self.kind == "n"):
            while index == _LIST and self.accept("and", "or"):  # after a comma
                pass
            signs.append(sign)  # "" between the units of 5 ft 3 in
            parts.append(self.level(index + 1))
        if not signs and index >= _LIST:
            return parts[0]
        return (kind, "".join(signs), *parts) if index == _RELATION else (kind, *parts)

    def quantity(self) -> Tree:
        """Reads a sum, ratio, range or union, and the unit after it."""
        tree, joint = self.sum(), self.accept("∪", "∩", "∖", ":")
        if joint:
            tree = (joint, tree, self.sum())
            while self.accept(joint):
                tree = (*tree, self.sum())
        unit = canonical_unit(self.unit())
        return ("unit", tree, unit) if unit else tree

    def unit(self) -> list[str]:
        """Reads the words of a unit, with `/` and powers between them."""
        words: list[str] = []
        while True:
            following = self.tokens[self.at + 1][0]
            behind = words and (self.kind == "s" or (self.sign == "/" and following in ("w", "s")))
            if self.kind == "w" or behind or (self.sign and self.sign in _CURRENCIES):
                words.append(self.take())
            elif words and self.accept("^"):
                power = self.argument()
                if power[0] not in ("n", "neg"):
                    raise ValueError("the power of a unit is not a number")
                words[-1] += f"^{power[1]}"
            else:
                return words

    def sum(self) -> Tree:
        """Reads terms with signs."""
        terms: list[Tree] = []
        while (sign := self.accept("+", "-", "±", "∓")) or not terms:
            term = self.product()
            terms.append(term if sign in ("", "+") else ({"-": "neg"}.get(sign, sign), term))
        return terms[0] if len(terms) == 1 else ("+", *terms)

    def product(self) -> Tree:
        """Reads factors, with or without a sign between them."""
        tree = self.power()
        while True:
            if sign := self.accept("*", "/"):
                negative = self.accept("-")
                tree = (sign, tree, ("neg", self.power()) if negative else self.power())
            elif self.kind in ("n", "s", "f") or (
                self.sign in ("(", "{", "⌊", "⌈") and self.tokens[self.at + 1][0] != "w"
            ):
                if self.kind == self.tokens[self.at - 1][0] == "n":
                    raise ValueError("two numbers side by side")
                tree = (*tree, self.power()) if tree[0] == "*" else ("*", tree, self.power())
            else:
                return tree

    def power(self) -> Tree:
        """Reads a factor with what follows it: powers, subscripts, factorials, percent and degree signs, primes."""
        tree = self.primary()
        while sign := self.accept("^", "_", "!", "%", "°", "'"):
            tree = (sign, tree, self.argument()) if sign in "^_" else (sign, tree)
        return tree

    def argument(self) -> Tree:
        """Reads the factor after `^` or `_`, which may have a sign."""
        return ("neg", self.primary()) if self.accept("-") else self.primary()

    def part(self) -> Tree:
        r"""Reads an argument as LaTeX does: a group in braces, or one digit or command, as in `\frac34`."""
        kind, value = self.tokens[self.at]
        if kind == "n" and len(value) > 1:
            self.tokens[self.at], value = (kind, value[1:]), value[0]
            return ("n", Fraction(value))
        return self.primary()

    def primary(self) -> Tree:
        """Reads a number, a symbol, a function with its arguments, or something in brackets."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        read = {"n": self.number, "f": self.function, "o": self.bracketed}.get(self.kind, self.symbol)
        tree = read(self.take())
        self.depth -= 1
        return tree

    def number(self, written: str) -> Tree:
        """Reads a number, or a mixed number."""
        mantissa, _, exponent = written.replace(",", "").replace(" ", "").lower().partition("e")
        number = ("n", Fraction(mantissa) * Fraction(10) ** int(exponent or 0))
        if self.tokens[self.at] != ("f", "frac"):
            return number
        fraction = self.primary()
        mixed = fraction[1][0] == fraction[2][0] == "n" and fraction[1][1] < fraction[2][1]
        return ("mixed" if mixed else "*", number, fraction)

    def symbol(self, name: str) -> Tree:
        """Reads a symbol, a word that stands for one or an unknown command with its argument."""
        if self.tokens[self.at - 1][0] == "w" and len(name) > 1 and self.sign not in ("=", "∈"):
            raise ValueError(f"unexpected {name[:20]}")
        return ("s", name)

    def bracketed(self, opening: str) -> Tree:
        """Reads a group, tuple, interval, set or absolute value."""
        if opening not in _CLOSING:
            raise ValueError(f"unexpected {opening}")
        items: tuple[Tree, ...] = ()
        if opening == "⟦" or not self.sign or self.sign not in _CLOSING[opening]:
            items = (self.level(0),) if opening == "⟦" else self.items()
        closing = self.expect(*_CLOSING[opening])
        if len(items) == 1 and opening + closing in ("()", "[]", "{}", "⟦⟧"):
            return items[0]
        return (_BRACKETED.get(opening, opening + closing), *items)

    def items(self) -> tuple[Tree, ...]:
        """Reads the items between brackets."""
        tree = self.level(_LIST)
        return tree[1:] if tree[0] == "list" else (tree,)

    def function(self, name: str) -> Tree:
        """Reads the arguments of a function."""
        if name in ("frac", "binom"):
            return ("/" if name == "frac" else name, self.part(), self.part())
        if name == "sqrt":
            index: Tree = ("n", Fraction(2))
            if self.accept("["):
                index = self.level(_RELATION)
                self.expect("]")
            return ("root", self.primary(), index)
        options: dict[str, Tree] = {}
        while sign := self.accept("_", "^"):
            behind = self.tokens[self.at + 1]  # \log_25 is \log_2 5
            one_digit = sign == "_" and behind[0] in ("", "o") and behind[1] not in ("(", "{")
            options[sign] = self.part() if one_digit else self.argument()
        argument = self.primary() if self.sign == "(" else self.factors()
        if options.get("^") == ("neg", ("n", 1)):
            return ("arc" + name, argument)
        tree = (name, argument, options["_"]) if "_" in options else (name, argument)
        return ("^", tree, options["^"]) if "^" in options else tree

    def factors(self) -> Tree:
        """Reads an argument without brackets, such as 2x."""
        tree = self.power()
        while self.kind in ("n", "s"):
            tree = ("*", tree, self.power())
        return tree


def canonical_unit(words: Sequence[str]) -> str:
    """Returns the words after a number in one spelling, such as `cm^2` for square centimeters."""
    text = " ".join(words)
    for phrase, spelling in TABLES["unit_phrases"].items() if words else ():
        text = re.sub(phrase, spelling, text)
    unit = []
    for word in text.split():
        name, caret, power = word.partition("^")
        singular = name.lower().removesuffix("s") if len(name) > 3 else name
        unit.append(UNITS.get(name, UNITS.get(singular, UNITS.get(name.lower(), singular))) + caret + power)
    return " ".join(unit)
