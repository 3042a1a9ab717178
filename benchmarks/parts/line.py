"""Extrapolates times linearly."""

from collections.abc import Sequence


def extrapolate(counts: Sequence[float], seconds: Sequence[float], count: float) -> float:
    """Returns the seconds that `count` units of work take, given the seconds that two other counts take."""
    each = (seconds[1] - seconds[0]) / (counts[1] - counts[0])
    return seconds[1] + (count - counts[1]) * each
