"""Reads the files of a workdir. The run may still be training, and some files may be missing."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.config.keys import flatten
from grpo_jax.config.workdir import read_config
from grpo_jax.errors import UserError
from grpo_jax.run.metrics import has_step, read_json_lines, read_metrics

MAX_LOG_BYTES = 1 << 27  # of metrics.jsonl and of warnings.jsonl; a line has about 1,500


class RunFiles(NamedTuple):
    """What a run has written."""

    name: str  # the end of the workdir's path, which distinguishes it from the other runs
    workdir: Path
    config: dict[str, Any]  # by dotted name
    updates: list[dict[str, Any]]  # the lines of metrics.jsonl from step 1 on
    evaluations: list[dict[str, Any]]  # the lines of metrics.jsonl with an evaluation
    warnings: list[dict[str, Any]]
    train_samples: dict[int, Path]  # samples/train-STEP.jsonl by step
    eval_samples: dict[int, Path]


def sample_files(workdir: Path, kind: str) -> dict[int, Path]:
    """Returns the files samples/KIND-STEP.jsonl by step, in the order of the steps."""
    matches = ((re.fullmatch(rf"{kind}-(\d+)\.jsonl", path.name), path) for path in workdir.glob("samples/*.jsonl"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def short_names(workdirs: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of the paths, all with the same number of parts, that differ from each other."""
    for count in range(1, max(len(path.parts) for path in workdirs)):
        names = ["/".join(path.parts[-count:]) for path in workdirs]
        if len(set(names)) == len(names):
            return names
    return list(map(str, workdirs))


def check_log_sizes(workdir: Path) -> None:
    """Raises a UserError if a log of a run is too large for a report."""
    for path in (workdir / "metrics.jsonl", workdir / "warnings.jsonl"):
        if path.is_file() and path.stat().st_size > MAX_LOG_BYTES:
            raise UserError(
                f"{path} must have at most {MAX_LOG_BYTES:,} bytes for a report; found {path.stat().st_size:,}. "
                "Copy the workdir and shorten the file."
            )


def read_runs(workdirs: Sequence[str]) -> list[RunFiles]:
    """Reads the files of runs; a workdir that is named twice is read once.

    Raises:
        UserError: A folder has no readable config.json.
    """
    folders = list(dict.fromkeys(Path(workdir).resolve() for workdir in workdirs))
    runs = []
    for name, folder in zip(short_names(folders), folders, strict=True):
        config = flatten(read_config(folder).to_dict())
        check_log_sizes(folder)
        lines = read_metrics(folder)
        updates = [line for line in lines if line["step"] > 0]
        evaluations = [line for line in lines if any(metric.startswith("eval/") for metric in line)]
        found = filter(has_step, read_json_lines(folder / "warnings.jsonl"))
        warnings = [
            {"step": warning["step"], "name": str(warning.get("name")), "text": warning["text"]}
            for warning in found
            if isinstance(warning.get("text"), str)
        ]
        samples = (sample_files(folder, kind) for kind in ("train", "eval"))
        runs.append(RunFiles(name, folder, config, updates, evaluations, warnings, *samples))
    return runs
