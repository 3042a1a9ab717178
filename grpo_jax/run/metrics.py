"""Reads and writes the logs of a run, metrics.jsonl and samples/, and formats the lines of the console.

A metric is a float named `group/quantity[/stat]`. Line `step` of metrics.jsonl describes the update of that number; the
line of step 0 holds the evaluation before the first update.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

NOT_PARTS = ("length_mean", "timeout", "error", "kl")  # metrics in reward/ and eval/ that are not reward parts


def truncate_logs(workdir: Path, step: int) -> None:
    """Removes what is after `step` from the logs and samples/, so that a resumed run logs each step once."""
    for path in (workdir / "metrics.jsonl", workdir / "warnings.jsonl"):
        if path.is_file():
            kept = [line for line in read_lines(path) if line["step"] <= step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
            partial.replace(path)
    for sample_file in (workdir / "samples").glob("*.jsonl"):
        match = re.fullmatch(r"(?:train|eval)-(\d+)", sample_file.stem)  # files of other names are the user's
        if match and int(match[1]) > step:
            sample_file.unlink()


def read_metrics(workdir: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl, without a last line that a crash left incomplete."""
    return read_lines(workdir / "metrics.jsonl")


def read_lines(path: Path) -> list[dict]:
    """Returns the lines of a log, without a last line that a crash left incomplete."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def finite_or_none(metrics: dict[str, float]) -> dict[str, float | None]:
    """Returns metrics as floats, sorted by name. Non-finite values become None: JSON has no NaN or infinity."""
    return {name: float(value) if math.isfinite(value) else None for name, value in sorted(metrics.items())}


def as_json(value: Any) -> Any:
    """Replaces non-finite floats with None, and converts the keys of dicts to strings, as JSON requires."""
    if isinstance(value, dict):
        return {str(name): as_json(element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_samples(workdir: Path, kind: str, step: int, records: list[dict]) -> None:
    """Writes completions with their prompts, ids and rewards to samples/KIND-STEP.jsonl, one JSON object per line.

    Each record gets the step as its first field. Non-finite floats become null. Metadata may hold other values that
    JSON cannot represent, which become strings.
    """
    if not records:
        return
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(as_json({"step": step} | record), ensure_ascii=False, default=str) for record in records]
    path = workdir / "samples" / f"{kind}-{step:06d}.jsonl"
    # backslashreplace writes a lone surrogate as JSON's escape.
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")


def read_samples(workdir: Path, kind: str, step: int) -> list[dict]:
    """Reads the records of samples/KIND-STEP.jsonl."""
    # Not str.splitlines, which would also split at the Unicode line separators that a completion may contain.
    with open(workdir / "samples" / f"{kind}-{step:06d}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def console_line(step: int, total_steps: int, metrics: dict[str, float]) -> str:
    """Formats the metrics of a training step as one line for the console."""
    rewards = {name.removeprefix("reward/"): value for name, value in metrics.items() if name.startswith("reward/")}
    shown = [f"reward {rewards.pop('mean'):.2f}"]
    shown += [f"{label} {value:.2f}" for label, value in rewards.items() if label not in NOT_PARTS]
    shown += [f"tokens {metrics['rollout/length_mean']:5.1f}"]
    shown += [f"cut off {metrics['rollout/truncated_frac']:3.0%}"]
    shown += [f"equal groups {metrics['groups/zero_variance_frac']:3.0%}"]
    shown += [f"KL {metrics['policy/kl_ref']:.4f}"] if "policy/kl_ref" in metrics else []
    shown += [f"{metrics['rollout/tokens_per_s']:,.0f} tokens/s", f"{metrics['time/step_s']:.1f} s"]
    shown += ["no signal"] if metrics["optim/no_signal"] else []
    return f"step {step:>{len(str(total_steps))}}/{total_steps}  " + "  ".join(shown)


def evaluation_scores(metrics: dict[str, float]) -> dict[str, float]:
    """Returns the mean of each reward part in an evaluation, by label."""
    labels = [name.removeprefix("eval/") for name in metrics if name.startswith("eval/")]
    return {label: metrics[f"eval/{label}"] for label in labels if label not in NOT_PARTS and "/" not in label}


def evaluation_line(metrics: dict[str, float]) -> str:
    """Formats the metrics of an evaluation for the console."""
    shown = [f"{label} {score:.3f}" for label, score in evaluation_scores(metrics).items()]
    return "  ".join([*shown, f"tokens {metrics['eval/length_mean']:.1f}"])


def describe_finished_run(workdir: Path, steps: int) -> str:
    """Returns a text that says that a run has done all its updates, and what can be done next."""
    return (
        f"The run in {workdir} is finished: it has done all {steps} updates. To train further, add "
        f"--config.total_steps=N with an N of more than {steps}. To use the policy: python -m grpo_jax.evaluate, "
        f".generate or .export --workdir={workdir}; to look at the run: python -m grpo_jax.report --workdir={workdir}"
    )


def before_and_after(workdir: Path) -> str:
    """Formats a table of a run's first and last evaluation, and a completion of each for the same question.

    If the two evaluations differ in more than the policy, a line above the table says in what.
    """
    evaluations = [line for line in read_metrics(workdir) if "eval/length_mean" in line]
    if not evaluations:
        return "No evaluation, because no problems were held out"
    first, last = evaluations[0], evaluations[-1]
    before, after = (read_evaluation(workdir, line["step"]) for line in (first, last))
    unlike = describe_unlike(first, last, before, after)
    rows = ["", unlike] if unlike else []
    rows += ["", f"{'':24}{'before':>10}{'after':>10}", f"{'step':24}{first['step']:>10}{last['step']:>10}"]
    scores = {label: f"eval/{label}" for label in evaluation_scores(first)} | {"length (tokens)": "eval/length_mean"}
    rows += [f"{label:24}{first[name]:>10.3f}{last[name]:>10.3f}" for label, name in scores.items()]
    shared = next((question for question in before if question in after), None)
    if shared:
        rows += ["", f"question  {before[shared]['question']}"]
        rows += [f"{'before':10}{before[shared]['completion'].strip()}"]
        rows += [f"{'after':10}{after[shared]['completion'].strip()}"]
    return "\n".join(rows)


def read_evaluation(workdir: Path, step: int) -> dict[str, dict]:
    """Returns the records of an evaluation by question, prompt and expected answer; empty if its file is gone."""
    if not (workdir / "samples" / f"eval-{step:06d}.jsonl").is_file():
        return {}
    fields = ("question", "prompt", "expected")
    return {str([record.get(name) for name in fields]): record for record in read_samples(workdir, "eval", step)}


def describe_unlike(first: dict, last: dict, before: dict[Any, dict], after: dict[Any, dict]) -> str:
    """Describes what two evaluations differ in, apart from the policy; returns "" if they do not differ.

    Args:
        first: The metrics of the one.
        last: The metrics of the other.
        before: The records of the one by question.
        after: The records of the other.
    """
    settings = [
        name for name in first if name.startswith("eval/sampling/") and first[name] != last.get(name, first[name])
    ]
    unlike = [f"eval.{name.rpartition('/')[2]} ({first[name]:g} and {last[name]:g})" for name in settings]
    if before and after and before.keys() != after.keys():
        shared = len(before.keys() & after.keys())
        unlike.append(f"questions ({len(before)} and {len(after)} different ones, {shared} in both)")
    if not unlike:
        return ""
    return (
        f"The two evaluations are not comparable: they differ in {', '.join(unlike)}. Evaluate both with the same "
        "settings: python -m grpo_jax.evaluate --workdir=DIR, and again with --base."
    )
