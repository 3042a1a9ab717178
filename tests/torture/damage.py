"""Damages the checkpoints of runs and fills their disks, and resumes them."""

import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from random import Random

from tests.torture.restoring import Restorer
from tests.torture.runs import NEWEST, Run, differences, half_run
from tests.torture.tally import Tally

DAMAGED_TOO = ("checkpoints/reference", "config.json", "metrics.jsonl")  # besides the newest checkpoint


def newest_step(workdir: Path) -> int:
    """Returns the step of the newest checkpoint of a run."""
    return max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def restored_files(workdir: Path) -> list[Path]:
    """Returns all files that are not empty of the newest checkpoint of a run, and of the run's first reference."""
    folders = [workdir / "checkpoints" / name for name in (str(newest_step(workdir)), "reference")]
    files = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return [path for path in files if path.is_file() and path.stat().st_size]


def flip_bit(workdir: Path, draw: Random) -> str:
    """Flips one random bit of a random file among those that a run restores, and returns a description."""
    path = draw.choice(restored_files(workdir))
    data = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"bit {bit} of {path.relative_to(workdir)}"


def flip_bits(tally: Tally, undisturbed: Path, folder: Path, draw: Random, flips: int) -> None:
    """Flips one bit in the newest checkpoint of a run and restores it as training does, again and again."""
    workdir = folder / "restored"
    restorer = Restorer(undisturbed, workdir)
    for _ in range(flips):
        half_run(undisturbed, workdir, draw.choice(NEWEST))
        what = flip_bit(workdir, draw)
        try:
            complaint = restorer.complaint()
        except Exception as error:  # whatever it is, a user would see its traceback
            complaint = f"{type(error).__name__}: {error}"
        if complaint:
            tally.fail(what, complaint)
        tally.count("bit flips, restored")


def resume(
    tally: Tally, workdir: Path, newest: int, expected: dict, what: str, *, may_refuse: bool = False, spared: str = ""
) -> None:
    """Resumes a damaged run, which must end like an undisturbed one or, if `may_refuse`, say why it cannot.

    What has been lost of the file `spared` of the workdir cannot come back, so it is not compared.
    """
    older = [path for path in (workdir / "checkpoints").glob("[0-9]*") if path.name != str(newest)]
    ended = Run(workdir).end()
    complaint = ended.complaint(*((0, 2) if may_refuse else (0,)))
    if not complaint and ended.code == 0:
        complaint = differences(workdir, expected, spared)
    elif not complaint and not all(path.is_dir() for path in older):
        complaint = "a sound checkpoint was lost"
    if complaint:
        tally.fail(what, complaint)


def flip_and_resume(tally: Tally, undisturbed: Path, folder: Path, draw: Random, expected: dict, flips: int) -> None:
    """Flips one bit in the newest checkpoint of a run and resumes it, again and again."""
    for _ in range(flips):
        newest = draw.choice(NEWEST)
        workdir = half_run(undisturbed, folder / "flipped", newest)
        what = flip_bit(workdir, draw)
        resume(tally, workdir, newest, expected, what)
        tally.count("bit flips, resumed")


def remove(path: Path, draw: Random) -> None:
    """Removes a file or folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path: Path, draw: Random) -> None:
    """Leaves a file or folder that is empty."""
    remove(path, draw) if path.is_dir() else path.write_bytes(b"")
    if not path.exists():
        path.mkdir()


def change_kind(path: Path, draw: Random) -> None:
    """Replaces a file by a folder, or a folder by a file."""
    is_folder = path.is_dir()
    remove(path, draw)
    path.touch() if is_folder else path.mkdir()


def truncate(path: Path, draw: Random) -> None:
    """Cuts off the end of a file, or of every file in a folder."""
    for file in [path, *path.rglob("*")]:
        if file.is_file() and file.stat().st_size:
            os.truncate(file, draw.randrange(file.stat().st_size))


def overwrite(path: Path, draw: Random) -> None:
    """Overwrites part of a file, or of every file in a folder, with zeros or random bytes."""
    for file in [path, *path.rglob("*")]:
        if file.is_file() and (size := file.stat().st_size):
            start = draw.randrange(size)
            length = draw.randint(1, size - start)
            with file.open("r+b") as opened:
                opened.seek(start)
                opened.write(draw.choice([bytes(length), draw.randbytes(length)]))


def swap(path: Path, draw: Random) -> None:
    """Swaps a file or folder of a checkpoint with that of the one before."""
    parts = list(path.parts)
    if "checkpoints" in parts and (step := parts.index("checkpoints") + 1) and parts[step].isdigit():
        parts[step] = str(int(parts[step]) - 1)
    other, aside = Path(*parts), path.with_name("aside")
    if other != path and other.exists():
        path.rename(aside)
        other.rename(path)
        aside.rename(other)


KINDS = (remove, empty, change_kind, truncate, overwrite, swap)


def damage_and_resume(tally: Tally, undisturbed: Path, folder: Path, draw: Random, expected: dict, count: int) -> None:
    """Damages a file or a folder of a run in one of several ways and resumes it, again and again."""
    for n in range(count):
        newest, kind = draw.choice(NEWEST), KINDS[n % len(KINDS)]
        workdir = half_run(undisturbed, folder / "damaged", newest)
        checkpoint = workdir / "checkpoints" / str(newest)
        inside = [checkpoint, *sorted(checkpoint.rglob("*"))]
        items = [path for path in inside if checkpoint in (path, path.parent)]
        target = draw.choice([draw.choice(inside), draw.choice(items), workdir / draw.choice(DAMAGED_TOO)])
        name = str(target.relative_to(workdir))
        kind(target, draw)
        # Without its config, a run cannot resume. Lines that were lost do not come back.
        spared = name if name == "metrics.jsonl" else ""
        what = f"{kind.__name__} of {name}"
        resume(tally, workdir, newest, expected, what, may_refuse=name == "config.json", spared=spared)
        tally.count("kinds of damage, resumed")


@contextmanager
def small_disk(folder: Path, size: int):
    """Mounts a file system of `size` bytes on a folder, which takes the rights of root."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill_disk(tally: Tally, folder: Path, draw: Random, expected: dict, count: int) -> None:
    """Runs on disks that are too small, and goes on when they have grown."""
    full = 0
    while full < count:
        size, disk = int(10 ** draw.uniform(5, 8)), folder / "disk"
        with small_disk(disk, size):
            ended = Run(disk / "run").end()
            if ended.code == 0:
                continue  # it was large enough
            what, complaint = f"disk of {size} bytes", ended.complaint(2)
            if complaint:
                tally.fail(what, complaint)
            subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
            complaint = Run(disk / "run").end().complaint(0) or differences(disk / "run", expected)
            if complaint:
                tally.fail(f"{what} that has grown", complaint)
            full += 1
            tally.count("full disks")
            tally.worst("seconds until a run on a full disk ends", ended.seconds)
