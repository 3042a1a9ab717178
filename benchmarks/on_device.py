"""Checks that the code computes the right numbers on this machine, measures its speed, and says what to improve first.

Meant for the first minutes on an accelerator; needs neither a network nor a downloaded model. Every part runs in its
own process and gets a share of --budget; the time that it does not use goes to later parts. A part that fails, crashes
or takes too long does not stop the others. Prints one JSON line per measurement as soon as it is known, and progress on
stderr. The parts, in the order in which they run:

{parts}

Every line has `part`. The first line, of the part "versions", has the versions of Python and of the packages that
matter. A measurement has `device`, the name of the device, and the fields that the docstring of its part explains in
benchmarks/parts/. Instead of these, a line may have

left_out  the measurements that were not made
reason    why not

The last line of a part has

status    done, failed, late (it took longer than its share), or absent (this machine cannot run it)
reason    why it failed or is absent
seconds   its time, without imports

The last line of all, of the part "summary", has

right     whether `ok` is true in every line that has it; missing if none has
aims      the figures that have an aim, from the farthest below it to the farthest above it: name, measured, aim
mend      the name of the first of these, if it is below its aim
parts     the status of every part
seconds   total time

The exit code is 0 if every part is done or absent and every `ok` is true, and 3 otherwise.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from parts import json_line

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent
WHEELS = ROOT / ".wheels"  # filled by `make wheels`

# Modules that the parts import, and the packages that provide them.
REQUIRED = {
    "jax": "jax",
    "flax": "flax",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "jaxtyping": "jaxtyping",
    "tqdm": "tqdm",
    "ml_collections": "ml_collections",
    "mpmath": "mpmath",
    "tensorboardX": "tensorboardX",
}


class Part(NamedTuple):
    """A part of the command."""

    share: int  # seconds of a budget of 240; in proportion for other budgets
    small_share: int  # the same with --small: about twice the seconds that two CPU cores need
    measures: str


PARTS = {
    "right": Part(35, 60, "errors of logits, tokens, an update and attention; drift between sampler and trainer"),
    "learn": Part(40, 80, "the default run: seconds until it answers 95% of held-out sums correctly"),
    "flags": Part(20, 15, "a decode step with different XLA flags"),
    "rollout": Part(45, 15, "decode tokens per second, and the fraction of the memory bandwidth that is used"),
    "update": Part(25, 25, "model FLOPs utilization (MFU) of an update, relative to the rate of a large matmul"),
    "step": Part(55, 35, "a whole step of 32 prompts x 16 completions of 1,024 tokens: speed, and where time goes"),
    "peer": Part(20, 10, "the same step with `generate` of transformers and AdamW in torch"),
}
PEER_AIM = 3.0  # how many times as fast as the peer's a step ought to be


def make_parser():
    """Builds the command-line parser."""
    from grpo_jax.config.flags import OneLineParser

    parts = "\n".join(f"{name:9} {part.measures}" for name, part in PARTS.items())
    parser = OneLineParser(
        description=__doc__.format(parts=parts),
        epilog="example:\n  python benchmarks/on_device.py --only right rollout | tee on_device.jsonl",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", metavar="PART", choices=PARTS, nargs="+", action="extend", help="run only these parts"
    )
    parser.add_argument("--budget", metavar="SECONDS", type=float, default=240, help="time for all parts; default: 240")
    parser.add_argument("--small", action="store_true", help="small shapes, for a CPU")
    return parser


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect the measurements."""
    found = {"python": sys.version.split()[0]}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def start_worker(name: str, small: bool, env: dict[str, str]) -> subprocess.Popen:
    """Starts the process of a part. It imports its modules and then waits for `run_part`."""
    return subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "worker.py"), name, *(["--small"] if small else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,  # so that `end_worker` also kills the processes that the part starts
    )


def end_worker(worker: subprocess.Popen) -> None:
    """Kills the process of a part and those that it has started."""
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    worker.wait()


def describe_exit(code: int) -> str:
    """Describes how a process ended, given its return code."""
    return f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def run_part(worker: subprocess.Popen, name: str, seconds: float) -> list[dict[str, Any]]:
    """Lets a part measure for at most `seconds` in its waiting process. Prints its lines and returns them."""
    start, lines = time.time(), []

    def report(text: str) -> None:
        try:
            lines.append(json.loads(text))
        except ValueError:  # an incomplete line, such as the last one of a killed process
            return
        print(text, end="", flush=True)

    def follow() -> None:
        for text in worker.stdout:
            report(text)

    reader = threading.Thread(target=follow)
    reader.start()
    try:
        worker.stdin.write(f"{start + seconds}\n")
        worker.stdin.flush()
        worker.wait(seconds)
        ending = {"status": "failed", "reason": f"the process {describe_exit(worker.returncode)}; see stderr"}
    except subprocess.TimeoutExpired:
        ending = {"status": "late"}
    except BrokenPipeError:
        ending = {"status": "failed", "reason": "the process ended before it measured anything"}
    finally:
        end_worker(worker)
        reader.join()
    if not lines or "status" not in lines[-1]:
        report(json_line({"part": name, **ending, "seconds": time.time() - start}))
    return lines


def compare_with_peer(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the aim of the whole step in a list, which is empty unless both `step` and `peer` have a speed."""
    speeds = {line["part"]: line["step_tok_s"] for line in lines if line.get("step_tok_s")}
    if not {"step", "peer"} <= speeds.keys():
        return []
    ratio = speeds["step"] / speeds["peer"]
    return [{"name": "tokens per second of a step, as a multiple of the peer's", "measured": ratio, "aim": PEER_AIM}]


def summarize(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the summary, given the lines of all parts."""
    aims = [line["aim"] for line in lines if "aim" in line] + compare_with_peer(lines)
    aims = [aim for aim in aims if aim["measured"] is not None]  # None means that it is not finite
    aims.sort(key=lambda aim: aim["measured"] / aim["aim"])
    verdicts = [line["ok"] for line in lines if "ok" in line]
    return {
        "part": "summary",
        **({"right": all(verdicts)} if verdicts else {}),
        "aims": aims,
        **({"mend": aims[0]["name"]} if aims and aims[0]["measured"] < aims[0]["aim"] else {}),
        "parts": {line["part"]: line["status"] for line in lines if "status" in line},
    }


def run_parts(names: list[str], small: bool, budget: float, env: dict[str, str]) -> list[dict[str, Any]]:
    """Runs parts one after another and returns their lines. While one measures, the next one imports its modules."""
    deadline = time.monotonic() + budget
    lines, workers = [], [start_worker(names[0], small, env)]
    try:
        for i, name in enumerate(names):
            workers += [start_worker(following, small, env) for following in names[i + 1 : i + 2]]
            shares = [PARTS[later].small_share if small else PARTS[later].share for later in names[i:]]
            seconds = max(1.0, (deadline - time.monotonic()) * shares[0] / sum(shares))
            print(f"{name}: {PARTS[name].measures} (at most {seconds:.0f} s)", file=sys.stderr, flush=True)
            lines += run_part(workers[i], name, seconds)
    finally:
        for worker in workers:
            end_worker(worker)
    return lines


def main(argv: Sequence[str]) -> None:
    """Runs the command.

    Raises:
        UserError: A flag is wrong.
    """
    from grpo_jax.errors import UserError

    # --only=A B and --only A B mean the same.
    argv = [piece for argument in argv for piece in argument.split("=", 1 if argument.startswith("--only=") else 0)]
    flags = make_parser().parse_args(argv)
    if not 0 < flags.budget < float("inf"):
        raise UserError(f"--budget must be a positive number of seconds; found {flags.budget}. Change it.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    start, names = time.monotonic(), [name for name in PARTS if name in (flags.only or PARTS)]
    print(json_line({"part": "versions"} | versions()), end="", flush=True)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        env = {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/programs",  # shared by the parts, like the results of autotuning
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **os.environ,
            "TMPDIR": folder,  # so that nothing is left of a part that is killed
            # Absolute, because a part may start processes in another folder.
            "PYTHONPATH": os.pathsep.join(map(os.path.abspath, [*filter(None, inherited), *package_paths()])),
        }
        lines = run_parts(names, flags.small, flags.budget, env)
    summary = summarize(lines)
    print(json_line(summary | {"seconds": time.monotonic() - start}), end="", flush=True)
    failed = any(status in ("failed", "late") for status in summary["parts"].values())
    sys.exit(3 if failed or not summary.get("right", True) else 0)


def package_paths() -> list[str]:
    """Returns the import paths of grpo_jax, which need not be installed, and of the packages from `make wheels`."""
    return [str(ROOT), *map(str, sorted(WHEELS.glob("*-none-any.whl")))]  # pure Python can be imported from a wheel


def find_packages() -> None:
    """Makes all packages importable, or exits with an error that names the missing ones."""
    sys.path += package_paths()
    missing = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(
            f"error: The parts need {', '.join(REQUIRED.values())}; found no {', '.join(missing)}. Run `make install` "
            "if this machine has a network; otherwise run `make wheels` elsewhere and copy the folder .wheels here.",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    find_packages()
    from grpo_jax.config.flags import run_entry_point

    run_entry_point(main)
