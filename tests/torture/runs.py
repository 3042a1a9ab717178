"""Tiny runs of `grpo_jax.main`, each in a process of its own, and the results that they leave behind."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax

from tests.outside.files import read_checkpoint

REPO = Path(__file__).parent.parent.parent
STEPS = 10
FLAGS = [
    f"--config={REPO}/configs/r1zero.py",
    f"--config.total_steps={STEPS}",
    "--config.rollout.prompts=4",
    "--config.rollout.samples=2",
    "--config.rollout.max_tokens=12",
    "--config.train.minibatches=2",
    "--config.train.epochs=2",
    "--config.reference.every_updates=5",  # later checkpoints have references of their own
    "--config.loss.kl_coef=0.1",
    "--config.eval.questions=4",
    "--config.eval.every_steps=4",
    "--config.log.every_steps=1",
    "--config.log.samples=-1",
    "--config.checkpoint.every_steps=1",
]
TIMEOUT_S = 300.0
logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns when items of a checkpoint are read one by one
HUNG = 124
NEWEST = (3, 6)  # updates that damaged runs have done: some of a rollout's; only after 6 there is another reference
KEPT = 3  # checkpoints of a damaged run

# Calls `main` like `python -m grpo_jax.main`. At each border between two phases, writes it down, and kills the process
# at the border that the environment variable TORTURE_KILL_AT names.
WITH_BORDERS = """
import os, signal
from grpo_jax.config.flags import run_entry_point
from grpo_jax.main import main
from grpo_jax.run.progress import Progress

time_innermost, path = Progress.time_innermost, ["outside"]

def at_border(self):
    path.append(self.phases[-1][0] if self.phases else "outside")
    step = next((detail for name, detail, _ in self.phases if name == "Training"), "")
    border = f"{path[-2]} | {path[-1]} | {step}"
    with open(os.environ["TORTURE_BORDERS"], "a") as file:
        print(border, file=file)
    if border == os.environ.get("TORTURE_KILL_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    time_innermost(self)

Progress.time_innermost = at_border
run_entry_point(main)
"""


class Ended(NamedTuple):
    """How a process has ended."""

    code: int  # negative if a signal ended it, `HUNG` if it took too long
    output: str  # stdout and stderr
    seconds: float  # since it was started

    def complaint(self, *codes: int) -> str:
        """Returns what is wrong with the end, or "" if it has one of these exit codes and nothing unusual in it."""
        if "Traceback" in self.output or "Fatal Python error" in self.output:
            return f"exit code {self.code} with a traceback:\n{self.output[-2000:]}"
        if self.code not in codes:
            return f"exit code {self.code} instead of {codes}:\n{self.output[-2000:]}"
        if self.code == 2 and len([line for line in self.output.splitlines() if line.startswith("error: ")]) != 1:
            return f"exit code 2 without one line that says why:\n{self.output[-2000:]}"
        return ""


class Run:
    """A process that runs `grpo_jax.main`."""

    def __init__(self, workdir: Path, *flags: str, program: str = "", **environ: str):
        """Starts the process, or one that runs `program` instead."""
        command = [sys.executable, *(["-c", program] if program else ["-m", "grpo_jax.main"])]
        environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(REPO)} | environ
        self.out, self.start = tempfile.TemporaryFile("w+"), time.monotonic()
        self.process = subprocess.Popen(
            [*command, f"--workdir={workdir}", *FLAGS, *flags],
            cwd=workdir.parent,
            env=environ,
            stdout=self.out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that signals reach the harness's own children only
        )

    def signal_after(self, seconds: float, number: int) -> None:
        """Sends a signal `seconds` after the start, unless the process has ended by then."""
        try:
            self.process.wait(max(0.0, self.start + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.send_signal(number)

    def end(self) -> Ended:
        """Waits for the end of the process; one that takes too long is killed."""
        try:
            code = self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = HUNG
        seconds = time.monotonic() - self.start
        self.out.seek(0)
        return Ended(code, self.out.read(), seconds)


def has_clock(name: str) -> bool:
    """Returns whether a metric depends on the clock."""
    return name.startswith("time/") or name.endswith("_per_s")


def read_lines(path: Path) -> list[dict]:
    """Returns the objects of a JSONL file without what depends on the clock."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not has_clock(name)} for line in lines]


def read_results(workdir: Path) -> dict[str, object]:
    """Returns all that a run has computed: metrics, samples, and the bytes of the arrays of its last checkpoint."""
    results: dict[str, object] = {"metrics.jsonl": read_lines(workdir / "metrics.jsonl")}
    for path in sorted((workdir / "samples").iterdir()):
        results[f"samples/{path.name}"] = read_lines(path)
    for item in ("policy", "optimizer", "reference"):
        tree = read_checkpoint(workdir / "checkpoints" / str(STEPS) / item)
        for path, array in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{item}/{jax.tree_util.keystr(path, simple=True, separator='/')}"
            results[name] = (array.dtype.str, array.shape, array.tobytes())
    return results


def half_run(undisturbed: Path, workdir: Path, newest: int) -> Path:
    """Copies a finished run, without what it has saved after `newest` updates, as if it had been killed then."""
    shutil.rmtree(workdir, ignore_errors=True)
    steps = range(newest - KEPT + 1, newest + 1)

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name.isdigit() and int(name) not in steps]

    return shutil.copytree(undisturbed, workdir, ignore=left_out)


def differences(workdir: Path, expected: dict[str, object], spared: str = "") -> str:
    """Returns what a finished run has computed otherwise than an undisturbed one, "" if nothing.

    The result `spared` is not compared.
    """
    try:
        found = read_results(workdir)
    except (OSError, ValueError) as error:
        return f"the results cannot be read: {type(error).__name__}: {error}"
    names = [name for name in sorted({*found, *expected} - {spared}) if found.get(name) != expected.get(name)]
    return f"{', '.join(names[:5])} differ ({len(names)} in all)" if names else ""
