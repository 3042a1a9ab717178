"""Kills, stops, damages and starves runs of `grpo_jax.main`, and writes docs/reliability.md.

    make torture ARGS="--seed=1 --kills=60 --flips=1000"

Everything that is drawn at random follows from the seed, except for how far a run has come at a given moment. Runs are
tiny, on a CPU. Filling disks takes the rights of root (they are small tmpfs mounts); pass --disks=0 without them.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from random import Random
from signal import SIGINT, SIGTERM, default_int_handler, signal

from tests.torture import damage, interruptions
from tests.torture.runs import FLAGS, REPO, STEPS, Run, read_results
from tests.torture.tally import Tally

COUNTS = {
    "kills": (60, "SIGKILLs at random moments"),
    "borders": (-1, "SIGKILLs at borders between two phases; -1 for every border"),
    "stops": (20, "SIGTERMs at random moments"),
    "interrupts": (5, "Ctrl-Cs at random moments"),
    "flips": (1000, "single-bit flips that are restored"),
    "main-flips": (60, "single-bit flips with which a run is resumed"),
    "damage": (60, "damaged files and folders with which a run is resumed"),
    "disks": (6, "full disks"),
    "pairs": (20, "pairs of starts on one workdir"),
}


def machine() -> str:
    """Describes the machine and the versions."""
    cores = os.cpu_count()
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "orbax-checkpoint"))
    return f"{cores} CPU cores ({platform.machine()}), Python {platform.python_version()}, {packages}"


def torture(folder: Path, seed: int, counts: dict[str, int], tally: Tally) -> None:
    """Does everything, `counts` times each, in a folder."""
    undisturbed = folder / "undisturbed"
    for _ in range(2):  # the first compiles
        workdir = interruptions.new_folder(folder, "undisturbed")
        ended = Run(workdir, f"--config.checkpoint.keep={STEPS}").end()
        if complaint := ended.complaint(0):
            sys.exit(f"an undisturbed run must succeed; {complaint}")
    expected, seconds = read_results(undisturbed), ended.seconds
    tally.worst("seconds that an undisturbed run takes", seconds)
    draws = {name: Random(f"{seed} {name}") for name in COUNTS}
    common = {name: (tally, folder, draw, expected) for name, draw in draws.items()}
    interruptions.kill_at_random(*common["kills"], seconds, counts["kills"])
    borders = counts["borders"]
    if borders:
        interruptions.kill_at_borders(*common["borders"], None if borders < 0 else borders)
    interruptions.stop_at_random(*common["stops"], seconds, SIGTERM, counts["stops"])
    interruptions.stop_at_random(*common["interrupts"], seconds, SIGINT, counts["interrupts"])
    damaged = (tally, undisturbed, folder)
    if counts["flips"]:
        damage.flip_bits(*damaged, draws["flips"], counts["flips"])
    damage.flip_and_resume(*damaged, draws["main-flips"], expected, counts["main-flips"])
    damage.damage_and_resume(*damaged, draws["damage"], expected, counts["damage"])
    damage.fill_disk(*common["disks"], counts["disks"])
    interruptions.start_twice(*common["pairs"], counts["pairs"])


def describe(tally: Tally, command: str, minutes: float) -> str:
    """Returns the page docs/reliability.md."""
    rows = [f"| {what} | {count:,} |" for what, count in tally.counts.items()]
    rows += [f"| largest number of {what} | {value:.1f} |" for what, value in tally.largest.items()]
    values = {
        "command": command,
        "machine": machine(),
        "minutes": f"{minutes:.0f}",
        "rows": "\n".join(rows),
        "failures": "\n".join(f"- {failure}" for failure in tally.failures) or "None.",
        "flags": "\n".join(flag.replace(f"{REPO}/", "") for flag in FLAGS),
    }
    return (Path(__file__).parent / "reliability.md").read_text().format(**values)


def main(argv: list[str]) -> int:
    """Runs the command; returns 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=REPO / "docs" / "reliability.md")
    for name, (count, words) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, help=f"{words} (default: {count})")
    options = parser.parse_args(argv)
    counts = {name: getattr(options, name.replace("-", "_")) for name in COUNTS}
    signal(SIGINT, default_int_handler)  # a shell may ignore it in its background, and the runs would inherit that
    tally, start = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        torture(Path(folder), options.seed, counts, tally)
    flags = shlex.join(flag for flag in argv if not flag.startswith("--out="))
    command = f'make torture ARGS="{flags}"' if flags else "make torture"
    options.out.write_text(describe(tally, command, (time.monotonic() - start) / 60))
    print(f"\n{json.dumps(tally.counts)}\n{len(tally.failures)} failures; wrote {options.out}")
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
