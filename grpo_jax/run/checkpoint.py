"""Orbax checkpoints of a run.

    WORKDIR/checkpoints/reference      the frozen reference, written once
    WORKDIR/checkpoints/STEP/policy    parameters, in `model.param_dtype`
                            /optimizer
                            /meta      step (which is the position in the problems too), key, updates left out, the
                                       rollout's metrics
                            /experience  the rollout under way, if its updates were not all done

Saving is asynchronous; all processes call it. A checkpoint restores onto any mesh.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from grpo_jax.errors import UserError
from grpo_jax.types import Experience, TrainState

logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every save at INFO


class RestoredRun(NamedTuple):
    """What a checkpoint holds."""

    state: TrainState
    meta: dict[str, Any]
    experience: Experience | None  # of the unfinished rollout


def checkpoints_folder(workdir: Path) -> Path:
    """Where a run's checkpoints are."""
    return Path(workdir).absolute() / "checkpoints"


def open_checkpoint_manager(workdir: Path, keep: int) -> ocp.CheckpointManager:
    """The manager of a run's checkpoints, which keeps the newest `keep`. Close it to wait for the last save."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    return ocp.CheckpointManager(
        checkpoints_folder(workdir), options=options, item_names=("policy", "optimizer", "meta", "experience")
    )


def save_checkpoint(
    manager: ocp.CheckpointManager, state: TrainState, meta: dict, experience: Experience | None
) -> None:
    """Begins to save a checkpoint under the state's step; the arrays may be donated right after."""
    items = {
        "policy": ocp.args.StandardSave(state.params),
        "optimizer": ocp.args.StandardSave(state.opt_state),
        "meta": ocp.args.JsonSave(meta | {"skipped": int(state.skipped)}),
    }
    if experience is not None:
        items["experience"] = ocp.args.StandardSave(vars(experience))
    manager.save(meta["step"], args=ocp.args.Composite(**items))


def abstract_arrays(tree, places):
    """Shapes and shardings to restore into."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def restore_checkpoint(manager: ocp.CheckpointManager, shapes: TrainState, places: TrainState) -> RestoredRun | None:
    """The newest checkpoint, placed on the mesh; None if there is none.

    Args:
      shapes, places: the state's jax.ShapeDtypeStruct and shardings.
    """
    step = manager.latest_step()
    if step is None:
        return None
    items = {
        "policy": ocp.args.StandardRestore(abstract_arrays(shapes.params, places.params)),
        "optimizer": ocp.args.StandardRestore(abstract_arrays(shapes.opt_state, places.opt_state)),
        "meta": ocp.args.JsonRestore(),
    }
    unfinished = (manager.directory / str(step) / "experience").exists()
    if unfinished:
        items["experience"] = ocp.args.StandardRestore()
    found = manager.restore(step, args=ocp.args.Composite(**items))
    experience = Experience(**jax.tree.map(np.asarray, dict(found["experience"]))) if unfinished else None
    scalar = lambda value, place: jax.device_put(np.int32(value), place)
    state = TrainState(
        scalar(step, places.step), found["policy"], found["optimizer"], scalar(found["meta"]["skipped"], places.skipped)
    )
    return RestoredRun(state, found["meta"], experience)


def saved_steps(workdir: Path) -> list[int]:
    """The steps of a run's checkpoints, in order."""
    return (
        sorted(ocp.utils.checkpoint_steps(checkpoints_folder(workdir))) if checkpoints_folder(workdir).is_dir() else []
    )


def newest_step(workdir: Path) -> int:
    """The step of a run's newest checkpoint; 0 without one."""
    return max(saved_steps(workdir), default=0)


def choose_step(workdir: Path, step: int | None = None) -> int:
    """The step of the checkpoint asked for, the newest by default.

    Raises:
      UserError: the run has no checkpoint yet, or not that one.
    """
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(
            f"expected a checkpoint in {checkpoints_folder(workdir)}; found none; "
            "train first, or wait for the run's first checkpoint"
        )
    if step is not None and step not in steps:
        raise UserError(
            f"expected a step that {checkpoints_folder(workdir)} has kept ({', '.join(map(str, steps))}); found {step}"
        )
    return steps[-1] if step is None else step


def restore_policy(workdir: Path, shapes, places, step: int | None = None) -> tuple[int, Any]:
    """The policy of a run after an update, the newest by default, and its step.

    Raises:
      UserError: as `choose_step`.
    """
    step = choose_step(workdir, step)
    with ocp.StandardCheckpointer() as checkpointer:
        return step, checkpointer.restore(
            checkpoints_folder(workdir) / str(step) / "policy", abstract_arrays(shapes, places)
        )


def save_reference(workdir: Path, params) -> None:
    """Writes the reference of a run that begins."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(checkpoints_folder(workdir) / "reference", params, force=True)


def restore_reference(workdir: Path, shapes, places):
    """The frozen reference of a run."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(checkpoints_folder(workdir) / "reference", abstract_arrays(shapes, places))
