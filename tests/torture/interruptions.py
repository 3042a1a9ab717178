"""Kills and stops runs at random moments and at every border between two phases, and starts them twice."""

import shutil
import signal
from pathlib import Path
from random import Random

from tests.torture.runs import STEPS, WITH_BORDERS, Run, differences, read_lines
from tests.torture.tally import Tally

KILLS_PER_RUN = 3
STOPPED = {signal.SIGTERM: 75, signal.SIGINT: 130}  # exit codes
SIGNAL_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


def new_folder(folder: Path, name: str) -> Path:
    """Returns the path of a folder that does not exist."""
    shutil.rmtree(folder / name, ignore_errors=True)
    return folder / name


def finish(tally: Tally, workdir: Path, expected: dict, what: str) -> None:
    """Runs to the end and compares the results with those of an undisturbed run."""
    complaint = Run(workdir).end().complaint(0) or differences(workdir, expected)
    if complaint:
        tally.fail(what, complaint)
    tally.count("runs compared")


def kill_at_random(tally: Tally, folder: Path, draw: Random, expected: dict, seconds: float, kills: int) -> None:
    """Kills runs at random moments of the `seconds` that an undisturbed run takes, several times each."""
    killed = 0
    while killed < kills:
        workdir, moments = new_folder(folder, "killed"), []
        for _ in range(min(KILLS_PER_RUN, kills - killed)):
            every, moment = draw.choice([1, 2, 3]), draw.uniform(0, seconds)
            run = Run(workdir, f"--config.checkpoint.every_steps={every}")
            run.signal_after(moment, signal.SIGKILL)
            ended = run.end()
            if complaint := ended.complaint(0, -signal.SIGKILL):
                tally.fail(f"started after kills at {moments}", complaint)
            if ended.code == 0:
                break
            moments.append(round(moment, 2))
            killed += 1
            tally.count("SIGKILLs at random moments")
        finish(tally, workdir, expected, f"killed after {moments} s")


def kill_at_borders(tally: Tally, folder: Path, draw: Random, expected: dict, count: int | None) -> None:
    """Kills runs at the borders between two phases: at `count` of them, or at all."""
    workdir, log = new_folder(folder, "borders"), folder / "borders.txt"
    log.unlink(missing_ok=True)
    Run(workdir, program=WITH_BORDERS, TORTURE_BORDERS=str(log)).end()
    borders = list(dict.fromkeys(log.read_text().splitlines()))
    chosen = (
        range(len(borders)) if count is None else sorted(draw.sample(range(len(borders)), min(count, len(borders))))
    )
    workdir, passed = new_folder(folder, "borders"), []
    for border in [borders[n] for n in chosen]:
        for _ in range(2):  # a run that has gone past this border is finished; then a new one reaches it
            environ = {"TORTURE_BORDERS": str(log), "TORTURE_KILL_AT": border}
            ended = Run(workdir, program=WITH_BORDERS, **environ).end()
            if complaint := ended.complaint(0, -signal.SIGKILL):
                tally.fail(f"started after kills at {passed}", complaint)
            if ended.code == 0:
                if complaint := differences(workdir, expected):
                    tally.fail(f"killed at {passed}", complaint)
                tally.count("runs compared")
                workdir, passed = new_folder(folder, "borders"), []
            if ended.code == -signal.SIGKILL:
                passed.append(border)
                tally.count("SIGKILLs at borders of phases")
                break
    finish(tally, workdir, expected, f"killed at {passed}")


def stop_at_random(
    tally: Tally, folder: Path, draw: Random, expected: dict, seconds: float, number: signal.Signals, count: int
) -> None:
    """Sends a signal at random moments of the `seconds` that an undisturbed run takes, which saves and ends the run."""
    stopped, name = 0, SIGNAL_NAMES[number]
    while stopped < count:
        workdir, moments = new_folder(folder, "stopped"), []
        for _ in range(min(KILLS_PER_RUN, count - stopped)):
            moment = draw.uniform(0, seconds)
            run = Run(workdir, f"--config.checkpoint.every_steps={STEPS}")  # so that only the signal saves
            run.signal_after(moment, number)
            ended = run.end()
            # While Python was still starting, or already exiting.
            outside = "Training in" not in ended.output or "Wrote metrics.jsonl" in ended.output
            if complaint := ended.complaint(0, STOPPED[number], *({-number} if outside else ())):
                tally.fail(f"{name} after {moment:.2f} s", complaint)
            if ended.code == 0:
                break
            if complaint := lost_updates(workdir):
                tally.fail(f"{name} after {moment:.2f} s", complaint)
            moments.append(round(moment, 2))
            stopped += 1
            tally.count(f"{name}s")
            tally.worst(f"seconds from {name} to the exit", ended.seconds - moment)
        finish(tally, workdir, expected, f"{name} after {moments} s")


def lost_updates(workdir: Path) -> str:
    """Returns which updates of a stopped run no checkpoint has; "" if none but, at most, the last."""
    metrics, folder = workdir / "metrics.jsonl", workdir / "checkpoints"
    logged = max((line["step"] for line in read_lines(metrics)), default=0) if metrics.exists() else 0
    saved = max((int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()), default=0)
    return f"updates {saved + 1} to {logged} were lost" if logged > saved else ""


def start_twice(tally: Tally, folder: Path, draw: Random, expected: dict, pairs: int) -> None:
    """Starts two processes on one workdir, up to two seconds apart. One must train, and the other be refused."""
    for _ in range(pairs):
        workdir, gap = new_folder(folder, "twice"), draw.uniform(0, 2)
        first = Run(workdir)
        first.signal_after(gap, 0)
        second = Run(workdir)
        ended = sorted((first.end(), second.end()))
        complaints = [ended[0].complaint(0), ended[1].complaint(2)]
        if complaint := "; ".join(filter(None, complaints)) or differences(workdir, expected):
            tally.fail(f"two starts {gap:.2f} s apart", complaint)
        tally.count("double starts")
