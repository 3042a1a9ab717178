"""Runs entry points on the files of tests/hostile.py in this process: `python -m tests.hostile_runs FOLDER`.

Prints a line of JSON for each run: its name, exit code, output, and the peak memory of the process so far in bytes.
"""

import contextlib
import gc
import io
import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from grpo_jax import evaluate, export, generate, load, main, plan, report
from grpo_jax.config import flags
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tokenizer import load_tokenizer
from tests import hostile
from tests.model_folders import FOLDERS

# Folders whose config, or the lack of one, is at fault; a plan does not look at weights.
PLANNED = (
    "family before all",
    "AWQ",
    "NVFP4",
    "data set",
    "dtype int8",
    "workdir of a run",
    "adapter",
    "parts",
    "empty",
)

Run = tuple[str, Callable, list[str], str]  # name, entry point, arguments, what the error says


def runs_on_models(folder: Path) -> Iterator[Run]:
    """Yields a run for each model and GGUF file that is refused; the entry points take turns."""
    cases = {**{f"GGUF {name}": case for name, case in hostile.GGUFS.items()}, **hostile.MODELS}
    cases |= {f"folder {name}": (in_folder(make), says) for name, (make, says) in FOLDERS.items()}
    for n, (name, (make, says)) in enumerate(cases.items()):
        place = folder / f"model-{n}" / "made"
        if says:
            place.mkdir(parents=True)
            flags_of_model = ["--config=r1zero", f"--config.model.path={make(place)}", f"--workdir={place / 'run'}"]
            entry, more = (
                (main.main, []),
                (evaluate.main, ["--base"]),
                (generate.main, ["--base", "--prompt=hello"]),
                (export.main, ["--base", f"--out={place / 'out'}"]),
            )[n % 4]
            yield f"{entry.__module__} {name}", entry, flags_of_model + more, says
            if name.removeprefix("folder ") in PLANNED:
                yield f"plan {name}", plan.main, [*flags_of_model, "--topology=cpu:1"], says


def in_folder(make: Callable[[Path], object]) -> Callable[[Path], Path]:
    """Returns a function that makes a model folder in the folder that it is given, and returns it."""
    return lambda folder: make(folder / "model") or folder / "model"


def runs_on_problems(folder: Path) -> Iterator[Run]:
    """Yields a run for each file of problems that is refused."""
    for n, (name, (make, says)) in enumerate(hostile.PROBLEMS.items()):
        place = folder / f"problems-{n}"
        if says:
            place.mkdir()
            path, config = make(place), ["--config=r1zero", f"--workdir={place / 'run'}"]
            of_main = ["--config.task.name=file", f"--config.task.path={path}"]
            yield f"main {name}", main.main, config + of_main, says
            yield f"evaluate {name}", evaluate.main, [*config, "--base", f"--questions={path}"], says


def runs_on_configs(folder: Path) -> Iterator[Run]:
    """Yields a run for each config file and each workdir."""
    for n, (name, (line, says)) in enumerate(hostile.CONFIGS.items()):
        path = folder / f"config_{n}.py"
        path.write_text(hostile.config_file(line))
        yield f"main {name}", main.main, [f"--config={path}", f"--workdir={folder / 'none'}"], says
    for n, (name, (make, says)) in enumerate((hostile.RUN_CONFIGS | hostile.LOGS).items()):
        place = folder / f"workdir-{n}"
        place.mkdir()
        workdir = f"--workdir={make(place)}"
        of_report = says if name != "key is a section" else ""
        yield f"report {name}", report.main, [workdir, f"--out={place / 'report.html'}"], of_report
        if name in hostile.RUN_CONFIGS:
            yield f"main {name}", main.main, [workdir], says
            yield f"evaluate {name}", evaluate.main, [workdir], says
            yield f"generate {name}", generate.main, [workdir, "--sample=1/0/0"], says
            yield f"export {name}", export.main, [workdir, f"--out={place / 'out'}"], says


def run_all(folder: Path) -> None:
    """Runs everything and prints a line for each run, after one for what the libraries take."""
    load("tiny")
    load_tokenizer(find_model("tiny"))
    show = sys.stdout
    print(json.dumps({"name": "start", "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), file=show)
    for runs in (runs_on_models, runs_on_problems, runs_on_configs):
        for name, entry, argv, says in runs(folder):
            sys.argv = ["entry", *argv]
            code, output = 0, io.StringIO()
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                try:
                    flags.run_entry_point(entry)
                except SystemExit as error:
                    code = error.code
                except BaseException as error:
                    code = repr(error)
            gc.collect()  # an exception keeps what its frames hold
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            line = {"name": name, "code": code, "output": output.getvalue(), "says": says, "peak": peak}
            print(json.dumps(line), file=show, flush=True)


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
