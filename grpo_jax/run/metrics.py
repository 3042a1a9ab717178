"""Reads and writes the logs of a run, metrics.jsonl and samples/, and formats the lines of the console.

A metric is a float named `group/quantity[/stat]`. Line `step` of metrics.jsonl describes the update of that number; the
line of step 0 holds the evaluation before the first update.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpo_jax.config.workdir import replace_file
from grpo_jax.errors import UserError
from grpo_jax.foreign import open_regular, parse_json, read_lines
from grpo_jax.run.progress import announce

NOT_PARTS = ("length_mean", "timeout", "error", "kl")  # metrics in reward/ and eval/ that are not reward parts

NUMBER = (int, float, type(None))  # in JSON; null stands for a number that is not finite

# In a line without this, a number has at most 18 digits and an exponent of two.
HUGE_NUMBER = re.compile(rb"[0-9]{19}|[eE]\+?[0-9]{3}")
NO_CONSTANTS = {"parse_constant": lambda name: None}  # NaN and infinity
NO_HUGE_NUMBERS = NO_CONSTANTS | {
    "parse_int": lambda text: int(text) if len(text) < 19 else None,
    "parse_float": lambda text: float(text) if abs(float(text)) < 1e100 else None,
}


def is_list_of(kind: type | tuple[type, ...]) -> Callable[[Any], bool]:
    """Returns a predicate that accepts a list of the given types."""
    return lambda value: isinstance(value, list) and all(isinstance(element, kind) for element in value)


RECORD_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("prompt_id", "sample_id", "length"), lambda value: type(value) is int and 0 <= value < 2**31),
    **dict.fromkeys(("prompt", "completion", "expected", "parsed", "why"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("reward", "advantage"), lambda value: isinstance(value, NUMBER)),
    **dict.fromkeys(("tokens", "update_steps"), is_list_of(int)),
    **dict.fromkeys(("logps", "policy_logps", "ref_logps"), is_list_of(NUMBER)),
    "pieces": is_list_of(str),
    "question": lambda value: isinstance(value, str | list),
    "rewards": lambda value: isinstance(value, dict) and is_list_of(NUMBER)(list(value.values())),
}


class LogFile:
    """A file of a run that only grows, such as metrics.jsonl. Nothing is buffered, so a killed run leaves all of it."""

    def __init__(self, path: Path):
        """Names the file, which is created when something is appended."""
        self.path, self.descriptor = path, None

    def append(self, content: bytes) -> None:
        """Appends all of `content` or nothing.

        Raises:
            OSError: It could not be written.
        """
        if self.descriptor is None:
            self.descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        size, left = os.fstat(self.descriptor).st_size, content
        try:
            while left:
                left = left[os.write(self.descriptor, left) :]
        except OSError:
            os.ftruncate(self.descriptor, size)
            raise

    def append_json(self, value: dict[str, Any]) -> None:
        """Appends a line of JSON, and raises as `append` does."""
        self.append((json.dumps(value) + "\n").encode())

    def close(self) -> None:
        """Closes the file."""
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def truncate_logs(workdir: Path, step: int, line: dict[str, Any] | None = None) -> None:
    """Removes what is after `step` from the logs and samples/, so that a resumed run logs each step once.

    Lines that cannot be read are removed, too. `line` is that of `step` as its checkpoint has it; it is written
    again if metrics.jsonl lacks it.
    """
    set_aside_other_kinds(workdir)
    for path in (workdir / "metrics.jsonl", workdir / "warnings.jsonl"):
        is_metrics = path.stem == "metrics"
        if path.is_file() or (is_metrics and line):
            kept = [line for line in read_json_lines(path) if has_step(line) and line["step"] <= step]
            if is_metrics and line and not any(other["step"] == step for other in kept):
                kept.append(line)
            replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    for sample_file in (workdir / "samples").glob("*.jsonl*"):
        match = re.fullmatch(r"(?:train|eval)-(\d+)\.jsonl(\.partial)?", sample_file.name)  # others are the user's
        if match and (int(match[1]) > step or match[2]):
            sample_file.unlink()


def set_aside_other_kinds(workdir: Path) -> None:
    """Renames a folder that has the name of a file of a run, and a file that has the name of a folder of a run."""
    for name in ("metrics.jsonl", "warnings.jsonl", "samples", "tensorboard"):
        path = workdir / name
        if path.exists() and not (path.is_file() if path.suffix else path.is_dir()):
            numbered = (path.with_name(f"damaged-{name}-{n}") for n in itertools.count(1))
            aside = path.rename(next(other for other in numbered if not other.exists()))
            announce(
                f"warning: {path} must be a {'file' if path.suffix else 'folder'}, so it was renamed to {aside.name}."
            )


def read_json_lines(path: Path, max_bytes: float = float("inf")) -> Iterator[dict[str, Any]]:
    """Yields the objects in a file of JSON lines, or none if there is no such file.

    Lines that are broken or not complete, such as the last one of a file that is being written, are left out.

    Args:
        path: The file.
        max_bytes: The most bytes to read; the first line is always read.
    """
    if not path.is_file():
        return
    size = 0
    with open_regular(path) as file:  # bytes, because a text file would also split lines at characters of a completion
        try:
            for line in read_lines(file):
                if size and size + len(line) > max_bytes:
                    break
                size += len(line)
                if isinstance(value := parse_line(line), dict):
                    yield value
        except ValueError as error:
            raise UserError(f"{path} must hold the JSON lines of a run, but {error}. Restore it.") from None


def parse_line(line: bytes) -> Any:
    """Returns the value of a line of JSON, or None if it has none; numbers that are not finite or are huge are None."""
    options = NO_HUGE_NUMBERS if HUGE_NUMBER.search(line) else NO_CONSTANTS
    try:
        return parse_json(line.decode("utf-8", "surrogatepass"), **options)
    except ValueError:
        return None


def has_step(line: dict[str, Any]) -> bool:
    """Returns whether a line of a log says which step it belongs to."""
    return type(line.get("step")) is int and 0 <= line["step"] < 2**31


def read_metrics(workdir: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl that can be read, without values that are neither numbers nor null."""
    lines = filter(has_step, read_json_lines(workdir / "metrics.jsonl"))
    return [{name: value for name, value in line.items() if isinstance(value, NUMBER)} for line in lines]


def is_logged(workdir: Path, step: int) -> bool:
    """Returns whether metrics.jsonl has the line of a step."""
    return any(line["step"] == step for line in read_metrics(workdir))


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


def encode_samples(step: int, records: list[dict]) -> bytes:
    """Encodes completions with their prompts, ids and rewards as one JSON object per line.

    Each record gets the step as its first field. Non-finite floats become null. Metadata may hold other values that
    JSON cannot represent, which become strings.
    """
    lines = [json.dumps(as_json({"step": step} | record), ensure_ascii=False, default=str) for record in records]
    # backslashreplace writes a lone surrogate as JSON's escape.
    return "".join(line + "\n" for line in lines).encode(errors="backslashreplace")


def samples_path(workdir: Path, kind: str, step: int) -> Path:
    """Returns the path samples/KIND-STEP.jsonl."""
    return workdir / "samples" / f"{kind}-{step:06d}.jsonl"


def write_samples(workdir: Path, kind: str, step: int, records: list[dict]) -> None:
    """Writes completions to samples/KIND-STEP.jsonl (see `encode_samples`)."""
    if records:
        path = samples_path(workdir, kind, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, encode_samples(step, records))


def read_samples(workdir: Path, kind: str, step: int) -> list[dict]:
    """Returns the records of samples/KIND-STEP.jsonl that can be read; none if there is no such file."""
    return list(filter(is_record, read_json_lines(samples_path(workdir, kind, step))))


def is_record(value: dict[str, Any]) -> bool:
    """Returns whether the fields of a sample that are there and not null are of their types."""
    return all(fits(value[name]) for name, fits in RECORD_FIELDS.items() if value.get(name) is not None)


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
    for label, name in scores.items():
        values = (line.get(name) for line in (first, last))
        shown = (f"{value:.3f}" if isinstance(value, int | float) else "-" for value in values)
        rows += [f"{label:24}" + "".join(f"{text:>10}" for text in shown)]
    shared = next((question for question in before if question in after), None)
    if shared:
        rows += ["", f"question  {before[shared].get('question')}"]
        rows += [
            f"{name:10}{records[shared]['completion'].strip()}"
            for name, records in (("before", before), ("after", after))
        ]
    return "\n".join(rows)


def read_evaluation(workdir: Path, step: int) -> dict[str, dict]:
    """Returns the records of an evaluation by question, prompt and expected answer; empty if its file is gone."""
    fields = ("question", "prompt", "expected")
    records = (record for record in read_samples(workdir, "eval", step) if isinstance(record.get("completion"), str))
    return {str([record.get(name) for name in fields]): record for record in records}


def describe_unlike(first: dict, last: dict, before: dict[Any, dict], after: dict[Any, dict]) -> str:
    """Describes what two evaluations differ in, apart from the policy; returns "" if they do not differ.

    Args:
        first: The metrics of the one.
        last: The metrics of the other.
        before: The records of the one by question.
        after: The records of the other.
    """
    settings = [
        name
        for name in first
        if name.startswith("eval/sampling/") and first[name] != last.get(name, first[name])
        if None not in (first[name], last.get(name))
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
