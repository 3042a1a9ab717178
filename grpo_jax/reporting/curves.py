"""Reduces metrics to curves of at most `MAX_POINTS` points, and averages the curves of runs that differ in their seed.

A curve is a dict of lists of equal length, `steps` and `values`. If its elements stand for several points or runs, it
also has their smallest and largest values, `low` and `high`. A value that is not finite is None.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from grpo_jax.reporting.runs import RunFiles

MAX_POINTS = 500
DIGITS = 5  # significant digits of a value; more would not be visible


class Point(NamedTuple):
    """A value of a curve, with the range of the values that it averages."""

    step: int
    value: float
    low: float
    high: float


def rounded(value: float) -> float | int:
    """Returns the value with `DIGITS` significant digits, as an integer if it is one."""
    value = float(f"{value:.{DIGITS}g}")
    return int(value) if value.is_integer() else value


def mean_point(points: Sequence[Point], step: int) -> Point | None:
    """Returns the mean of the points' values with their common range, or None if there are none."""
    if not points:
        return None
    mean = math.fsum(point.value for point in points) / len(points)
    return Point(step, mean, min(point.low for point in points), max(point.high for point in points))


def read_points(lines: Iterable[dict[str, Any]], metric: str) -> list[tuple[int, Point | None]]:
    """Returns the steps and points of a metric. A point is None if its value is not finite."""
    values = ((line["step"], line[metric]) for line in lines if metric in line)
    return [(step, Point(step, value, value, value) if is_number(value) else None) for step, value in values]


def is_number(value: Any) -> bool:
    """Returns whether a value read from JSON is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def reduce_points(points: Sequence[tuple[int, Point | None]]) -> dict[str, list]:
    """Returns the curve of points, in which neighbors are merged if there are more than `MAX_POINTS`."""
    width = max(1, -(-len(points) // MAX_POINTS))
    chunks = [points[start : start + width] for start in range(0, len(points), width)]
    steps = [chunk[len(chunk) // 2][0] for chunk in chunks]
    merged = [
        mean_point([point for _, point in chunk if point], step) for step, chunk in zip(steps, chunks, strict=True)
    ]
    curve = {"steps": steps, "values": [point and rounded(point.value) for point in merged]}
    if any(point and point.low < point.high for point in merged):
        curve |= {"low": [point and rounded(point.low) for point in merged]}
        curve |= {"high": [point and rounded(point.high) for point in merged]}
    return curve


def metric_names(runs: Iterable[RunFiles]) -> list[str]:
    """Returns the names of all metrics of the runs, sorted."""
    lines = (line for run in runs for line in (*run.updates, *run.evaluations))
    return sorted({name for line in lines for name in line} - {"step"})


def all_points(run: RunFiles, metric: str) -> list[tuple[int, Point | None]]:
    """Returns the points of a metric of a run."""
    return read_points(run.evaluations if is_of_evaluations(metric) else run.updates, metric)


def is_of_evaluations(metric: str) -> bool:
    """Returns whether a metric is logged for evaluated steps only, including step 0."""
    return metric.startswith("eval/") or metric == "time/eval_s"


def run_curves(run: RunFiles) -> dict[str, dict[str, list]]:
    """Returns the curve of each metric of a run by name."""
    points = {metric: all_points(run, metric) for metric in metric_names([run])}
    return {metric: reduce_points(of_metric) for metric, of_metric in points.items() if of_metric}


def seed_groups(runs: Sequence[RunFiles]) -> list[list[int]]:
    """Returns groups of indices of runs whose configs differ only in the seed; a group has at least two runs."""
    groups = defaultdict(list)
    for index, run in enumerate(runs):
        groups[repr(sorted((key, value) for key, value in run.config.items() if key != "seed"))].append(index)
    return [group for group in groups.values() if len(group) > 1]


def mean_curves(runs: Sequence[RunFiles]) -> dict[str, dict[str, list]]:
    """Returns the mean of each metric over runs, with the range over the runs, for the steps that all runs have."""
    curves = {}
    for metric in metric_names(runs):
        of_runs = [dict(all_points(run, metric)) for run in runs]
        steps = sorted(set.intersection(*(set(points) for points in of_runs)))
        known = [(step, [points[step] for points in of_runs if points[step]]) for step in steps]
        points = [(step, mean_point(of_step, step)) for step, of_step in known]
        if points:
            curves[metric] = reduce_points(points)
    return curves
