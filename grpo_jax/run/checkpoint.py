"""Saves and restores a run with Orbax.

    WORKDIR/checkpoints/reference      the reference at the start of the run, written once
    WORKDIR/checkpoints/STEP/policy    parameters, in `model.param_dtype`
                            /optimizer
                            /meta      step (which also fixes the position in the problem stream), random key, number
                                       of skipped updates, metrics of the current rollout, the run's config
                            /experience  the current rollout, if some of its updates are still to come
                            /reference   the reference, if the policy has replaced it

Saving is asynchronous, and every process must call it. A checkpoint can be restored onto any mesh.
"""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from grpo_jax.types import Experience, TrainState


class RestoredRun(NamedTuple):
    """The contents of a checkpoint."""

    state: TrainState
    meta: dict[str, Any]
    experience: Experience | None  # the current rollout, if some of its updates are still to come


def checkpoints_folder(workdir: Path) -> Path:
    """Returns the folder that holds a run's checkpoints."""
    return Path(workdir).absolute() / "checkpoints"


def open_checkpoint_manager(workdir: Path, keep: int) -> ocp.CheckpointManager:
    """Opens the manager of a run's checkpoints, which keeps the newest `keep`.

    Closing the manager waits for the last save to finish.
    """
    # Orbax logs every save at INFO, and a failed one as several tracebacks besides the exception.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    newest = ocp.checkpoint_managers.LatestN(keep)
    # If folders were created in the background and the disk failed, Orbax's other threads would wait for minutes.
    no_waiting = ocp.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=newest, enable_async_checkpointing=True, async_options=no_waiting
    )
    items = ("policy", "optimizer", "meta", "experience", "reference")
    return ocp.CheckpointManager(checkpoints_folder(workdir), options=options, item_names=items)


def save_checkpoint(
    manager: ocp.CheckpointManager, state: TrainState, meta: dict, experience: Experience | None, reference: Any
) -> None:
    """Starts to save a checkpoint as step `meta["step"]`. The arrays may be donated right after the call.

    Pass None for `experience` or `reference` if there is nothing to save.
    """
    items = {
        "policy": ocp.args.StandardSave(state.params),
        "optimizer": ocp.args.StandardSave(state.opt_state),
        "meta": ocp.args.JsonSave(meta | {"skipped": int(state.skipped), "is_reference": bool(state.is_reference)}),
    }
    if experience is not None:
        items["experience"] = ocp.args.StandardSave(vars(experience))
    if reference is not None:
        items["reference"] = ocp.args.StandardSave(reference)
    manager.save(meta["step"], args=ocp.args.Composite(**items))


def abstract_arrays(shapes, shardings):
    """Returns a tree of jax.ShapeDtypeStruct with shardings, as Orbax needs to restore into."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def restore_checkpoint(manager: ocp.CheckpointManager, shapes: TrainState, shardings: TrainState) -> RestoredRun | None:
    """Restores the newest checkpoint onto the mesh, or returns None if the run has none.

    Args:
        manager: The manager of the run's checkpoints.
        shapes: The train state as a tree of jax.ShapeDtypeStruct.
        shardings: Its shardings.
    """
    step = manager.latest_step()
    if step is None:
        return None
    items = {
        "policy": ocp.args.StandardRestore(abstract_arrays(shapes.params, shardings.params)),
        "optimizer": ocp.args.StandardRestore(abstract_arrays(shapes.opt_state, shardings.opt_state)),
        "meta": ocp.args.JsonRestore(),
    }
    has_experience = (manager.directory / str(step) / "experience").exists()
    if has_experience:
        items["experience"] = ocp.args.StandardRestore()
    restored = manager.restore(step, args=ocp.args.Composite(**items))
    state = TrainState(
        step=jax.device_put(np.int32(step), shardings.step),
        params=restored["policy"],
        opt_state=restored["optimizer"],
        skipped=jax.device_put(np.int32(restored["meta"]["skipped"]), shardings.skipped),
        is_reference=jax.device_put(np.bool_(restored["meta"]["is_reference"]), shardings.is_reference),
    )
    experience = Experience(**jax.tree.map(np.asarray, dict(restored["experience"]))) if has_experience else None
    return RestoredRun(state, restored["meta"], experience)


def saved_steps(workdir: Path) -> list[int]:
    """Returns the steps of a run's checkpoints in ascending order."""
    folder = checkpoints_folder(workdir)
    return sorted(ocp.path.step.checkpoint_steps(folder)) if folder.is_dir() else []


def newest_step(workdir: Path) -> int:
    """Returns the step of a run's newest checkpoint, or 0 if it has none."""
    return max(saved_steps(workdir), default=0)


def read_meta(workdir: Path, step: int) -> dict[str, Any]:
    """Returns the metadata of a run's checkpoint, empty if there is none, without restoring the checkpoint."""
    path = checkpoints_folder(workdir) / str(step) / "meta" / "metadata"
    return json.loads(path.read_text()) if path.is_file() else {}


def save_reference(workdir: Path, params) -> None:
    """Saves the reference of a new run."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(checkpoints_folder(workdir) / "reference", params, force=True)


def restore_reference(workdir: Path, step: int, shapes, shardings):
    """Restores the reference of a checkpoint onto the mesh: the one saved in it, or else the run's first reference."""
    folder = checkpoints_folder(workdir)
    replaced = folder / str(step) / "reference"
    with ocp.StandardCheckpointer() as checkpointer:
        path = replaced if replaced.exists() else folder / "reference"
        return checkpointer.restore(path, abstract_arrays(shapes, shardings))
