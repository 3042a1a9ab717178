"""The default run: how long it takes until the tiny base model adds.

Runs `configs/r1zero.py` without a preset in a temporary folder, with an evaluation every EVAL_EVERY updates instead of
only at the start and at the end, until an evaluation on held-out sums reaches the goal. Every evaluation is a line:

accuracy    fraction of held-out sums with the right answer
goal        the accuracy at which this ends
updates     updates so far
seconds     since the start of the run: compilation, evaluations and checkpoints included
steps_s     seconds of the updates alone, with their rollouts and their compilation; step_s is the median of one
tok_s       completion tokens per second of a median step
ok          only on the last line: whether the run reached the goal, rather than its last update
"""

import runpy
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpo_jax.run.metrics import read_metrics
from grpo_jax.run.train import train
from parts.shapes import device_name  # noqa: F401

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "r1zero.py"
EVAL_EVERY = 4  # updates
GOAL, SMALL_GOAL = 0.95, 0.4
POLL_S = 0.05


def make_config(small: bool):
    """Returns the config of the default run with more evaluations; with `small`, of fewer questions."""
    cfg = runpy.run_path(str(CONFIG))["get_config"]()
    cfg.eval.every_steps = EVAL_EVERY
    if small:
        cfg.eval.questions = 128
    return cfg


def start_training(cfg, workdir: Path) -> tuple[threading.Thread, list[Exception]]:
    """Starts a run in a thread that does not keep the process alive.

    Returns:
        The thread, and a list that will hold the exception if one ends the run.
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
    """Returns the measurements of a run from its lines in metrics.jsonl, the last of which has an evaluation."""
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
    """Yields the evaluations of a run until one reaches the goal, the run ends or the time is over.

    Raises:
        Exception: The one that ended the run.
    """
    start, known = time.monotonic(), 0
    thread, failures = start_training(cfg, workdir)
    while seconds_left() > POLL_S:
        ended = not thread.is_alive()  # before its lines are read, or the last one could be missed
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
    """Yields the evaluations of the default run up to the goal."""
    # The thread goes on until the process ends, and may write while the folder is removed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        goal = SMALL_GOAL if small else GOAL
        yield from measure_until(goal, make_config(small), Path(folder) / "run", seconds_left)
