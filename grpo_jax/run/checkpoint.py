"""Restores a run from its newest sound checkpoint, after verifying that everything in it is what was saved.

    WORKDIR/checkpoints/reference      the reference at the start of the run, written with the first checkpoint
    WORKDIR/checkpoints/STEP/policy    parameters, in `model.param_dtype`
                            /optimizer
                            /meta      step (which also fixes the position in the problem stream), random key, number
                                       of skipped updates, metrics of the current rollout and of the step, the run's
                                       config, and the digests of all arrays
                            /experience  the current rollout, if some of its updates are still to come
                            /reference   the reference, if the policy has replaced it
    WORKDIR/checkpoints/damaged-STEP   a checkpoint that was found to be damaged and was set aside

A checkpoint is sound if its metadata and all of its arrays, including those of its reference, have the digests that
were computed before it was saved. It can be restored onto any mesh.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from grpo_jax.errors import UserError
from grpo_jax.foreign import read_json_file
from grpo_jax.run.arrays import (
    Damaged,
    error_line,
    find_damage,
    raise_if_damaged,
    restore_arrays,
    restore_on_host,
)
from grpo_jax.run.digests import digest_arrays
from grpo_jax.run.progress import announce
from grpo_jax.types import Experience, TrainState


class RestoredRun(NamedTuple):
    """The contents of a checkpoint."""

    state: TrainState
    meta: dict[str, Any]
    experience: Experience | None  # the current rollout, if some of its updates are still to come


def checkpoints_folder(workdir: Path) -> Path:
    """Returns the folder that holds a run's checkpoints."""
    return Path(workdir).absolute() / "checkpoints"


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps of a run's checkpoints in ascending order, sound or not, except those that were set aside."""
    folder = checkpoints_folder(workdir)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))


def hash_meta(meta: dict[str, Any]) -> str:
    """Returns the SHA-256 of the metadata of a checkpoint, without the field that holds this hash."""
    content = {name: value for name, value in meta.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_meta(workdir: Path, step: int) -> dict[str, Any]:
    """Returns the metadata of a checkpoint without restoring it.

    Raises:
        Damaged: It cannot be read, or differs from what was saved.
    """
    path = checkpoints_folder(workdir) / str(step) / "meta" / "metadata"
    try:
        meta = read_json_file(path)
        is_sound = meta["sha256"] == hash_meta(meta) and meta["step"] == step
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, KeyError):
            raise Damaged("its metadata has no hash, as in runs of earlier versions of grpo_jax") from None
        raise Damaged(f"its metadata cannot be read ({error_line(error)})") from None
    if not is_sound:
        raise Damaged("its metadata differs from what was saved")
    return meta


def newest_step(workdir: Path) -> int:
    """Returns the step of a run's newest checkpoint whose metadata is sound; 0 if there is none."""
    for step in reversed(saved_steps(workdir)):
        with contextlib.suppress(Damaged):
            return read_meta(workdir, step)["step"]
    return 0


def newest_meta(workdir: Path) -> tuple[int, dict[str, Any]]:
    """Returns the step of a run's newest checkpoint whose metadata is sound, and its metadata; (0, {}) for a new run.

    Raises:
        UserError: There are checkpoints, but the metadata of none is sound.
    """
    damaged = {}
    for step in reversed(saved_steps(workdir)):
        try:
            return step, read_meta(workdir, step)
        except Damaged as error:
            damaged[step] = str(error)
    refuse_without_sound(workdir, damaged)
    return 0, {}


def refuse_without_sound(workdir: Path, damaged: dict[int, str]) -> None:
    """Raises a UserError if there are damaged checkpoints and no sound ones; `damaged` has the newest one first."""
    if damaged:
        step, damage = next(iter(damaged.items()))
        raise UserError(
            f"A run can only be resumed from a sound checkpoint, but none in {checkpoints_folder(workdir)} is sound; "
            f"the newest one (step {step}) is damaged: {damage}. Restore one from a backup, or use another --workdir."
        )


def set_aside(workdir: Path, name: str) -> str:
    """Renames a damaged folder in checkpoints/, on process 0, and returns its new name."""
    folder = checkpoints_folder(workdir)
    taken = {path.name for path in folder.iterdir()}
    names = (f"damaged-{name}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, len(taken) + 3))))
    new = next(new for new in names if new not in taken)
    if jax.process_index() == 0:
        (folder / name).rename(folder / new)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{name} is set aside")
    return new


def restore_step(workdir: Path, step: int, shapes: TrainState, shardings: TrainState) -> RestoredRun:
    """Restores a checkpoint, apart from its reference, onto the mesh.

    Args:
        workdir: The run.
        step: The step of the checkpoint.
        shapes: The train state as a tree of jax.ShapeDtypeStruct.
        shardings: Its shardings.

    Raises:
        Damaged: It is not sound. Every process raises.
    """
    folder, meta, damage = checkpoints_folder(workdir) / str(step), {}, ""
    try:
        meta = read_meta(workdir, step)
    except Damaged as error:
        damage = str(error)
    raise_if_damaged(damage)
    digests, experience = meta["digests"], None
    if "experience" in digests:
        experience = Experience(**restore_on_host(folder / "experience", digests["experience"]))
    state = TrainState(
        step=jax.device_put(np.int32(step), shardings.step),
        params=restore_arrays(folder / "policy", digests["policy"], shapes.params, shardings.params),
        opt_state=restore_arrays(folder / "optimizer", digests["optimizer"], shapes.opt_state, shardings.opt_state),
        skipped=jax.device_put(np.int32(meta["skipped"]), shardings.skipped),
        is_reference=jax.device_put(np.bool_(meta["is_reference"]), shardings.is_reference),
    )
    return RestoredRun(state, meta, experience)


def restore_newest(workdir: Path, restore: Callable[[int], Any]) -> Any:
    """Restores the newest sound checkpoint of a run, and sets aside newer ones, which are damaged.

    Args:
        workdir: The run.
        restore: Restores the checkpoint of a step, or raises Damaged on every process.

    Returns:
        The value that `restore` returns, or None if the run has no checkpoint.

    Raises:
        UserError: There are checkpoints, but none is sound.
    """
    damaged: dict[int, str] = {}
    for step in reversed(saved_steps(workdir)):
        try:
            restored = restore(step)
        except Damaged as error:
            damaged[step] = str(error)
            continue
        for bad, damage in damaged.items():
            announce(
                f"The checkpoint of step {bad} is damaged: {damage}. It is kept as "
                f"{checkpoints_folder(workdir) / set_aside(workdir, str(bad))}, and the run continues from step {step}."
            )
        return restored
    refuse_without_sound(workdir, damaged)
    return None


def restore_reference(
    workdir: Path,
    step: int,
    is_replaced: bool,
    digests: dict[str, str],
    shapes: Any,
    shardings: Any,
    load_base: Callable[[], Any],
) -> Any:
    """Restores the reference of a checkpoint onto the mesh, from any copy that has its digests.

    Args:
        workdir: The run.
        step: The step of the checkpoint.
        is_replaced: Whether the policy has replaced the initial reference, so that the checkpoint has its own.
        digests: The digest of each array of the reference by name.
        shapes: The reference as a tree of jax.ShapeDtypeStruct.
        shardings: Its shardings.
        load_base: Loads the base model as a reference.

    Raises:
        Damaged: There is no sound copy, and the base model is a different one. Every process raises.
    """
    folder = checkpoints_folder(workdir)
    first, *others = [folder / name / "reference" for name in ("", *map(str, reversed(saved_steps(workdir))))]
    home = folder / str(step) / "reference" if is_replaced else first
    damage = ""
    for item in dict.fromkeys((home, first, *others)):
        try:
            reference, source = restore_arrays(item, digests, shapes, shardings), f"a copy in {item}"
            break
        except Damaged as error:
            damage = damage or str(error)
    else:
        reference, source = load_base(), "the base model"
        if digest_arrays(reference) != digests:
            raise Damaged(f"{damage}, there is no sound copy, and model.path has other weights")
    if source != f"a copy in {home}":
        announce(f"The reference in {home} is damaged: {damage}. The run continues with {source}.")
        if home == first and first.exists():
            set_aside(workdir, "reference")
    return reference


def read_back(workdir: Path, step: int, share: slice = slice(None)) -> Iterator[str]:
    """Reads a checkpoint on the host, and yields for each part what is wrong with it, or "" if nothing is.

    Args:
        workdir: The run.
        step: The step of the checkpoint.
        share: Which of its arrays to read; all by default. They do not include the initial reference.
    """
    folder = checkpoints_folder(workdir) / str(step)
    try:
        digests = read_meta(workdir, step)["digests"]
    except Damaged as error:
        yield str(error)
        return
    if not (folder / "reference").exists():
        digests.pop("reference", None)
    arrays = [(item, name) for item, names in digests.items() for name in names]
    for item, name in arrays[share]:
        yield find_damage(folder / item, name, digests[item][name])


def damage_of(workdir: Path, step: int) -> str:
    """Returns what is wrong with a checkpoint, or "" if nothing is. Does not read the initial reference."""
    return next(filter(None, read_back(workdir, step)), "")


def initial_reference_damage(workdir: Path) -> str | None:
    """Returns what is wrong with the initial reference ("" if nothing is), or None if no sound checkpoint needs it."""
    folder = checkpoints_folder(workdir)
    for step in saved_steps(workdir):
        with contextlib.suppress(Damaged):
            digests = read_meta(workdir, step)["digests"].get("reference", {})
            if digests and not (folder / str(step) / "reference").exists():
                return next(filter(None, (find_damage(folder / "reference", *pair) for pair in digests.items())), "")
    return None
