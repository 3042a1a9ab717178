"""Compares a parsed answer with the expected one, exactly if both are rational and numerically otherwise.

Time and memory are bounded: a computation whose operands or result exceed the limits below is refused.
"""

import math
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import mpmath

from grpo_jax.text.expressions import UNITS, Tree

MAX_BITS, MAX_FACTORIAL, MAX_LOG, MAX_MEMBERS = 20_000, 1000, 10_000, 40
MP = mpmath.mp.clone()
MP.dps = 150  # significant digits of values that are not rational
TOLERANCE = MP.mpf(10) ** -120  # relative

_CONSTANTS = {("s", "π"): +MP.pi, ("s", "e"): +MP.e, ("s", "i"): MP.mpc(0, 1)}
_INFINITY: Tree = ("s", "∞")
_UNORDERED = ("list", "set", "∪", "∩")
_ORDERED = ("()", "(]", "[)", "[]", "matrix", "row", "relation", ":", "∖")
_NO_VALUE = (ValueError, ArithmeticError, TypeError, KeyError)


def _bounded(value: Any, limit: int) -> Any:
    if abs(value) > limit:
        raise ValueError("the value is too large")
    return value


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        _bounded(exponent * max(base.numerator.bit_length(), base.denominator.bit_length()), MAX_BITS)
        return base ** int(exponent)
    _bounded(exponent * MP.log(abs(base)) if base else 0, MAX_LOG)
    return MP.power(base, exponent)


def _root(value: Any, index: Any) -> Any:
    odd = isinstance(index, Fraction) and index.denominator == 1 == index.numerator % 2
    return -_power(-value, 1 / index) if odd and value < 0 else _power(value, 1 / index)


def _factorial(value: Any) -> Any:
    whole = isinstance(_bounded(value, MAX_FACTORIAL), Fraction) and value.denominator == 1
    return Fraction(math.factorial(int(value))) if whole else MP.gamma(value + 1)


def _function(name: str) -> Callable[[Any], Any]:
    return lambda value: getattr(MP, name)(_bounded(value, MAX_LOG))


_OPERATIONS: dict[str, Any] = {
    **{name: _function(name) for name in "sin cos tan cot sec csc sinh cosh tanh exp".split()},
    **{f"arc{name}": _function(f"a{name}") for name in ("sin", "cos", "tan")},
    "+": lambda *terms: sum(terms),
    "neg": operator.neg,
    "*": lambda *factors: math.prod(factors),
    "/": lambda top, bottom: top * (1 / bottom),  # mpmath before 1.4 cannot divide a Fraction, or subtract from it
    "^": _power,
    "root": _root,
    "!": _factorial,
    "binom": lambda n, k: _factorial(n) / (_factorial(k) * _factorial(n - k)),
    "%": lambda value: value / 100,
    "°": lambda value: value * MP.pi / 180,
    "mixed": operator.add,
    "abs": abs,
    "floor": lambda value: Fraction(int(MP.floor(value))),
    "ceil": lambda value: Fraction(int(MP.ceil(value))),
    "ln": MP.log,
    "log": lambda value, base=10: MP.log(value) / MP.log(base),
}


def value_at(tree: Tree, point: Mapping[Tree, Any]) -> Any:
    """Evaluates an expression whose symbols have the values in `point`.

    Raises:
        ValueError, ArithmeticError, TypeError, KeyError: The expression has no value, or computing it exceeds a limit.
    """
    kind, *parts = tree
    if kind == "n":
        return parts[0]
    if kind in ("s", "_", "'"):
        return point[tree]
    value = _OPERATIONS[kind](*[value_at(part, point) for part in parts])
    if isinstance(value, Fraction):
        _bounded(value.numerator.bit_length() + value.denominator.bit_length(), MAX_BITS)
    return value


def free_symbols(tree: Any) -> set[Tree]:
    """Returns the symbols of an expression, with their subscripts."""
    if not isinstance(tree, tuple) or tree in _CONSTANTS:
        return set()
    return {tree} if tree[:1] in (("s",), ("_",), ("'",)) else set().union(*map(free_symbols, tree))


def points(*trees: Tree) -> Iterator[dict[Tree, Any]]:
    """Yields points at which to compare expressions: integers, positive fractions, then fractions of both signs."""
    symbols, draw = sorted(free_symbols(trees), key=repr), random.Random(0)
    for lowest, denominator in ((2, 1), (2, 1), (8, 7), (-90, 7)) if symbols else ((2, 1),):
        yield _CONSTANTS | {symbol: Fraction(draw.randint(lowest, 90) or 1, denominator) for symbol in symbols}


def close(one: Any, other: Any) -> bool:
    """Returns whether two values are equal: exactly if both are rational, otherwise within `TOLERANCE`."""
    if isinstance(one, Fraction) and isinstance(other, Fraction):
        return one == other
    gap = one + -other
    return bool(MP.isfinite(gap) and abs(gap) <= TOLERANCE * (abs(one) + abs(other)))


def equal_values(want: Tree, got: Tree) -> bool:
    """Returns whether two expressions are equal at all points where the first is real, or complex if it contains i."""
    tested = 0
    for point in points(want, got):
        try:
            value = value_at(want, point)
            real = isinstance(value, Fraction) or abs(MP.im(value)) <= TOLERANCE * abs(value)
        except _NO_VALUE:
            continue
        if not real and len(point) > len(_CONSTANTS) and "'i'" not in repr(want):
            continue
        try:
            if not close(value, value_at(got, point)):
                return False
        except _NO_VALUE:
            return False
        tested += 1
    return tested > 0


def equivalent_relations(want: Tree, got: Tree) -> bool:
    """Returns whether two equations or inequalities are equivalent: their differences have a constant ratio."""
    ratios = []
    for point in points(want[2:], got[2:]):
        try:
            differences = [value_at(left, point) + -value_at(right, point) for _, _, left, right in (want, got)]
            ratios.append(differences[1] / differences[0])
        except _NO_VALUE:
            continue
    same = len(ratios) > 1 and ratios[0] != 0 and all(close(ratios[0], ratio) for ratio in ratios)
    return want[1] == got[1] and same and (want[1] in "=≠" or close(ratios[0], abs(ratios[0])))


def plain_value(tree: Tree) -> Fraction | None:
    r"""Returns the value of a number in plain notation, or None for anything else, such as unevaluated arithmetic.

    Integers, decimals, fractions in lowest terms, mixed numbers, percentages and scientific notation are plain.
    """
    kind, *parts = tree
    if kind == "n":
        return Fraction(parts[0])
    if kind == "/" and all(part[0] == "n" or (part[0] == "neg" and part[1][0] == "n") for part in parts):
        top, bottom = (value_at(part, {}) for part in parts)
        lowest = top.denominator == bottom.denominator == math.gcd(int(top), int(bottom)) == 1 and bottom
        return Fraction(top / bottom) if lowest else None
    if kind == "^" and parts[0] == ("n", 10):
        exponent = plain_value(parts[1])
        whole = exponent is not None and exponent.denominator == 1 and abs(exponent) < MAX_BITS // 4
        return Fraction(10) ** int(exponent or 0) if whole else None
    scientific = kind == "*" and len(parts) == 2 and parts[0][0] in ("n", "neg") and parts[1][0] == "^"
    if scientific or kind == "mixed" or (kind in ("neg", "%") and parts[0][0] != kind):
        values = [plain_value(part) for part in parts]
        return None if None in values else Fraction(_OPERATIONS[kind](*values))
    return None


def difference(want: Tree, got: Tree) -> str:
    """Returns how an answer differs from the expected one, or "" if they are equal."""
    if want == got or want[0] == got[0] == "n":
        return "" if want == got else "another value"
    if "time" in (want[0], got[0]):
        one, other = _minutes(want), _minutes(got)
        return "" if one == other or (want[0] == ":" and one == other % 720) else "another time"
    if any(_choose_sign(tree, "±") != tree for tree in (want, got)):
        return _compare_members(list_members(want), list_members(got))
    relations = _ascending(want), _ascending(got)
    (name, want), (other_name, got) = split_name(want), split_name(got)
    if free_symbols(want) - {_INFINITY} and all(len(tree) == 4 and tree[0] == "relation" for tree in relations):
        return "" if equivalent_relations(*relations) else "another relation"
    if name and other_name and name != other_name:
        return "another variable"
    (unit, want), (other_unit, got) = split_unit(want), split_unit(got)
    if unit and other_unit and _contradict(unit, other_unit):
        return "another unit"
    if bool(unit) != bool(other_unit) and equal_values(_with_letters(want, unit), _with_letters(got, other_unit)):
        return ""
    members, other_members = list_members(want), list_members(got)
    if len(members) > 1 or len(other_members) > 1:
        return _compare_members(members, other_members, want[0] == "list" and all(part[0] == "s" for part in members))
    want, got = members[0], other_members[0]
    plain = plain_value(want)
    if want == got or (plain is not None and plain == plain_value(got)):
        return ""
    if plain is not None and plain_value(got) is None and equal_values(want, got):
        return "unevaluated arithmetic"
    if want[0] == "+" and [term[0] for term in want[1:]] == ["n", "neg"] and want[2][1][0] == "n":  # a range: 10-20
        want = (":", want[1], want[2][1])
    if want[0] in _UNORDERED and want[0] == got[0]:
        return _compare_members(want[1:], got[1:])
    if want[0] in _ORDERED:
        start = 2 if want[0] == "relation" else 1
        same = want[:start] == got[:start] and len(want) == len(got)
        return "" if same and not any(map(difference, want[start:], got[start:])) else "another value"
    return "" if plain is None and equal_values(want, got) else "another value"


def _compare_members(want: Sequence[Tree], got: Sequence[Tree], ordered: bool = False) -> str:
    """Compares several values. Their order matters if `ordered`, or if only the expected ones have variable names."""
    if len(want) != len(got) or len(want) > MAX_MEMBERS:
        values = f"{len(got)} value{'s' * (len(got) > 1)}"
        return f"{values} where {f'{len(want)} are' if len(want) > 1 else 'one is'} expected"
    named = len({split_name(member)[0] for member in want}) > 1 and not any(split_name(member)[0] for member in got)
    if named or ordered:
        return "another value" if any(map(difference, want, got)) else ""
    left = list(got)
    for member in want:
        match = next((other for other in left if not difference(member, other)), None)
        if match is None:
            return "one of the values differs"
        left.remove(match)
    return ""


def _minutes(tree: Tree) -> Fraction:
    """Returns a time such as 3:30 PM or 15:30 in minutes since midnight, or -1 for anything else."""
    clock = tree[0] == ":" and len(tree) == 3 and tree[1][0] == tree[2][0] == "n"
    return Fraction(tree[1][1] * 60 + tree[2][1] if clock else tree[1] if tree[0] == "time" else -1)


def split_name(tree: Tree) -> tuple[str, Tree]:
    """Splits `x = 5` or `x > 5` into the name and the value or interval. The name is "" if there is none."""
    if tree[0] != "relation":
        return "", tree
    _, signs, *sides = _ascending(tree)
    named = [is_name(side) for side in sides]
    closed = not free_symbols(tuple(side for side in sides if not is_name(side))) - {_INFINITY}
    if set(signs) == {"="} and is_name(sides[-1]) and closed:
        sides = sides[::-1]
    if set(signs) == {"="} or signs == "∈":
        head = sides[0][1] if sides[0][0] == "*" else sides[0]  # f of f(x)
        first = is_name(sides[0]) and not free_symbols(head) & free_symbols(tuple(sides[1:]))
        if first or not free_symbols(tuple(sides)):
            last = split_unit(sides[-1])[1]
            same = all(equal_values(last, side) or not difference(last, side) for side in sides[first:-1])
            return (repr(sides[0]) if first else "", sides[-1] if same else ("unequal", tree))
    elif set(signs) <= set("<≤") and closed and named in ([True, False], [False, True], [False, True, False]):
        left, low = ("(", ("neg", _INFINITY)) if named[0] else ("[" if signs[0] == "≤" else "(", sides[0])
        right, high = (")", _INFINITY) if named[-1] else ("]" if signs[-1] == "≤" else ")", sides[-1])
        return repr(sides[named.index(True)]), (left + right, low, high)
    return "", ("relation", signs, *sides)


def _ascending(tree: Tree) -> Tree:
    """Rewrites a relation with > as one with <."""
    if tree[0] != "relation" or tree[1][0] not in ">≥":
        return tree
    return ("relation", tree[1][::-1].translate(str.maketrans(">≥<≤", "<≤>≥")), *tree[:1:-1])


def is_name(tree: Tree) -> bool:
    """Returns whether an expression names a value: x, a_1, f(x) or (x, y)."""
    if tree[0] in ("*", "()"):
        return all(map(is_name, tree[1:]))
    return tree[0] in ("s", "_", "'") and bool(free_symbols(tree)) and tree != _INFINITY


def split_unit(tree: Tree) -> tuple[str, Tree]:
    """Returns the unit of a quantity, or "" if it has none, and the expression before it."""
    if tree[0] == "°":
        return "°", tree[1]
    if tree[0] == "neg" and tree[1][0] == "°":
        return "°", ("neg", tree[1][1])
    return (tree[2], tree[1]) if tree[0] == "unit" else ("", tree)


def _with_letters(tree: Tree, unit: str) -> Tree:
    """Multiplies an expression by the letters of its unit, which may be symbols, as in `5 m`."""
    for word in unit.split():
        letter, _, power = word.partition("^")
        tree = ("*", tree, ("^", ("s", letter), ("n", Fraction(power if power.isdecimal() else 1))))
    return tree


def _contradict(one: str, other: str) -> bool:
    """Returns whether two units differ. Unknown units agree if they have a word in common."""
    known = all(word == "/" or word.partition("^")[0] in UNITS for word in f"{one} {other}".split())
    return one != other and (known or not set(one.split()) & set(other.split()))


def list_members(tree: Tree) -> list[Tree]:
    """Returns the values of a list, a set with several members or an expression with ±, or else the tree itself."""
    if tree[0] in ("list", "set"):
        members = [member for item in tree[1:] for member in (list_members(item) if item[0] != "set" else [item])]
        return members if len(members) > 1 else [tree]
    signed = [_choose_sign(tree, plus) for plus in "±∓"]
    return [tree] if signed[0] == tree else signed


def _choose_sign(tree: Any, plus: str) -> Any:
    """Replaces the sign `plus`, which is ± or ∓, by + and the other one by -."""
    if not isinstance(tree, tuple) or tree[:1] in (("n",), ("s",)):
        return tree
    kind, *parts = (_choose_sign(part, plus) for part in tree) if tree else (None,)
    return (parts[0] if kind == plus else ("neg", *parts)) if kind in ("±", "∓") else (kind, *parts) if tree else ()
