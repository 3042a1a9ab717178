"""Extrapolates times along a straight line."""

from collections.abc import Sequence


def extrapolate(counts: Sequence[float], seconds: Sequence[float], count: float) -> float:
    """Returns the seconds of `count` pieces of work, given the seconds of two other numbers of pieces."""
    each = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
    return seconds[1] + (count - counts[1]) * each
