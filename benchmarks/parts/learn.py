"""Measures how long the default run takes until the tiny base model can add.

Runs `configs/r1zero.py` without a preset in a temporary folder, evaluates it on held-out sums every EVAL_EVERY updates,
and ends when the accuracy reaches the goal. There is one line per evaluation:

accuracy    fraction of held-out sums that are answered correctly
goal        the accuracy at which this part ends
updates     updates so far
seconds     time since the start of the run, including compilation, evaluations and checkpoints
steps_s     time of all steps so far, including their rollouts and compilation; step_s is the median
tok_s       completion tokens per second: mean completion tokens of a step / step_s
ok          only in the last line: whether the run reached the goal within its updates
"""

import runpy
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorboardX  # noqa: F401  (so that the time of importing it is not measured)
from transformers import CONFIG_MAPPING, AutoTokenizer  # noqa: F401  (likewise)

from grpo_jax.run.metrics import read_metrics
from grpo_jax.run.train import train
from parts.shapes import device_name  # noqa: F401

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "r1zero.py"
EVAL_EVERY = 4  # updates
GOAL, SMALL_GOAL = 0.95, 0.4
POLL_S = 0.05
RESERVE_S = 0.5  # before the end of the part, to report and to remove the files


def make_config(small: bool):
    """Returns the config of the default run with more evaluations, and smaller ones if `small` is set."""
    cfg = runpy.run_path(str(CONFIG))["get_config"]()
    cfg.eval.every_steps = EVAL_EVERY
    if small:
        cfg.eval.questions = 128
    return cfg


def start_training(cfg, workdir: Path) -> tuple[threading.Thread, list[Exception]]:
    """Starts a run in a daemon thread.

    Returns:
        The thread, and a list to which the exception is added if one ends the run.
    """
    failures = []

    def run() -> None:
        try:
            train(cfg, workdir=workdir)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, failures


def describe(cfg, lines: list[dict]) -> dict[str, Any]:
    """Returns the measurements of a run, given its lines of metrics.jsonl up to an evaluation."""
    fields = {"accuracy": lines[-1]["eval/accuracy"], "updates": lines[-1]["step"]}
    updates = [line for line in lines if line["step"] > 0]
    if not updates:
        return fields
    step_s = statistics.median(line["time/step_s"] for line in updates)
    length = statistics.mean(line["rollout/length_mean"] for line in updates)
    return fields | {
        "steps_s": sum(line["time/step_s"] for line in updates),
        "step_s": step_s,
        "tok_s": cfg.rollout.prompts * cfg.rollout.samples * length / step_s,
    }


def measure_until(goal: float, cfg, workdir: Path, seconds_left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yields the evaluations of a run until one reaches the goal, the run ends or there is no time left.

    Raises:
        Exception: The exception that ended the run.
        RuntimeError: The run ended before its last evaluation.
    """
    start, known = time.monotonic(), 0
    thread, failures = start_training(cfg, workdir)
    while seconds_left() > RESERVE_S:
        ended = not thread.is_alive()  # read before the lines, so that none of a run that has ended is missed
        lines = read_metrics(workdir) if (workdir / "metrics.jsonl").is_file() else []
        for count in range(known + 1, len(lines) + 1):
            if "eval/accuracy" not in lines[count - 1]:
                continue
            fields = describe(cfg, lines[:count]) | {"goal": goal, "seconds": time.monotonic() - start}
            reached = fields["accuracy"] >= goal
            is_last = reached or fields["updates"] == cfg.total_steps
            yield fields | ({"ok": reached} if is_last else {})
            if is_last:
                return
        known = len(lines)
        if failures:
            raise failures[0]
        if ended:
            raise RuntimeError(f"the run ended after {known} lines of metrics.jsonl, without its last evaluation")
        time.sleep(POLL_S)
    yield {"left_out": f"the updates until an accuracy of {goal}", "reason": "no time"}


def measure(small: bool, seconds_left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yields the evaluations of the default run until one reaches the goal."""
    # The thread runs until the process ends, and may write to the folder while it is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        goal = SMALL_GOAL if small else GOAL
        yield from measure_until(goal, make_config(small), Path(folder) / "run", seconds_left)
