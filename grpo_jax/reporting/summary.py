"""Describes a run: in a sentence, by key numbers before and after, where its time goes, and how its config differs."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_jax.reporting.curves import is_number
from grpo_jax.reporting.runs import RunFiles
from grpo_jax.run.metrics import evaluation_scores

EDGE = 0.05  # fraction of the updates that count as the beginning and as the end of a run


def values_of(lines: Sequence[dict[str, Any]], metric: str) -> list[float]:
    """Returns the finite values of a metric."""
    return [line[metric] for line in lines if is_number(line.get(metric))]


def mean(values: Sequence[float]) -> float | None:
    """Returns the mean, or None if there are no values."""
    return sum(values) / len(values) if values else None


def duration(seconds: float) -> str:
    """Formats seconds in the largest unit that gives a number of at least 1."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def describe_progress(run: RunFiles) -> str:
    """Returns a sentence about a run and its progress."""
    config, done = run.config, run.updates[-1]["step"] if run.updates else 0
    model = Path(str(config.get("model.path"))).name
    task = str(config.get("task.name"))
    if task == "file" and config.get("task.path"):
        task = Path(str(config["task.path"])).name
    seconds = sum(values_of(run.updates, "time/step_s")) + sum(values_of(run.evaluations, "time/eval_s"))
    updates = f"{done} of {config.get('total_steps')} updates"
    rollout = f"{config.get('rollout.prompts')} prompts x {config.get('rollout.samples')} completions"
    return (
        f"{model} learns {task} from rewards alone: {updates} in {duration(seconds)}, with rollouts of {rollout}, "
        f"seed {config.get('seed')}."
    )


def key_numbers(run: RunFiles) -> list[dict[str, Any]]:
    """Returns the numbers that sum up a run, each with its `label`, its values `before` and `after`, and a `note`."""
    evaluations, updates = run.evaluations, run.updates
    numbers = []
    if evaluations:
        first, last = evaluations[0], evaluations[-1] if len(evaluations) > 1 else {}
        steps = f"steps {first['step']:,} and {last['step']:,}" if last else f"step {first['step']:,}"
        note = f"held-out problems, {steps}"
        for label, score in evaluation_scores(first).items():
            numbers.append({"label": label, "before": score, "after": last.get(f"eval/{label}"), "note": note})
        length = {"before": first.get("eval/length_mean"), "after": last.get("eval/length_mean")}
        numbers.append({"label": "length in tokens", "note": note} | length)
    if updates:
        count = max(1, round(EDGE * len(updates)))
        before, after = (mean(values_of(lines, "reward/mean")) for lines in (updates[:count], updates[-count:]))
        note = "first and last update" if count == 1 else f"first and last {count} updates"
        numbers.append({"label": "reward in training", "before": before, "after": after, "note": note})
    return numbers


def time_shares(run: RunFiles) -> dict[str, Any]:
    """Returns where the time of an update goes.

    Returns:
        `seconds`, the mean seconds of each metric time/NAME_s per update by NAME; `updates`, the number of updates that
        they are averaged over; `skipped`, the number of updates that are left out because they compile programs; and
        `tokens_per_s`, the mean over these updates.
    """
    fed = (run.config.get("train.minibatches") or 1) * (run.config.get("train.epochs") or 1)
    skipped = fed if len(run.updates) > 2 * fed else 0
    lines = run.updates[skipped:]
    names = {name for line in lines for name in line if name.startswith("time/")}
    seconds = {name[len("time/") :].removesuffix("_s"): sum(values_of(lines, name)) / len(lines) for name in names}
    speed = mean(values_of(lines, "rollout/tokens_per_s"))
    return {"seconds": seconds, "updates": len(lines), "skipped": skipped, "tokens_per_s": speed}


def config_table(runs: Sequence[RunFiles], base: dict[str, Any]) -> list[list[Any]]:
    """Returns a row for each config key: the key, whether it differs from the base, its base value, and each run's."""

    def show(config: dict[str, Any], key: str) -> str:
        return json.dumps(config[key], ensure_ascii=False, default=str) if key in config else "(no such key)"

    keys = list(dict.fromkeys(key for config in (base, *(run.config for run in runs)) for key in config))
    rows = [[key, show(base, key), *(show(run.config, key) for run in runs)] for key in keys]
    return [[key, any(value != before for value in values), before, *values] for key, before, *values in rows]


def redraw_command(run: RunFiles) -> str:
    """Returns the command that draws a recorded sample again, up to the name of the sample."""
    return f"python -m grpo_jax.generate --workdir={shlex.quote(str(run.workdir))} --sample="
