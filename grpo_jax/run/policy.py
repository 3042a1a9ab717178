"""Loads the policy of a run for the entry points that read it: evaluation, generation and export."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.run.arrays import Damaged, restore_arrays
from grpo_jax.run.checkpoint import checkpoints_folder, read_meta, saved_steps
from grpo_jax.run.context import RunContext, load_base_model
from grpo_jax.run.progress import phase


def choose_step(workdir: Path, step: int | None = None) -> int:
    """Returns `step` if the run has a checkpoint of it, or the newest step if `step` is None.

    Raises:
        UserError: The run has no checkpoint yet, or none of that step.
    """
    steps = saved_steps(workdir)
    if not steps:
        raise UserError(
            f"The run must have saved a checkpoint; found none in {checkpoints_folder(workdir)}. Train first, or wait "
            "for the first one."
        )
    if step is not None and step not in steps:
        raise UserError(
            f"--step must be one of the steps kept in {checkpoints_folder(workdir)} ({', '.join(map(str, steps))}); "
            f"found {step}. Choose one of them, or leave --step out for the newest."
        )
    return steps[-1] if step is None else step


@contextmanager
def refusing_damage(workdir: Path, step: int) -> Iterator[None]:
    """Turns `Damaged`, if it is raised while a checkpoint is read, into a UserError."""
    try:
        yield
    except Damaged as error:
        raise UserError(
            f"The checkpoint of step {step} must be undamaged, but {error}. Choose another with --step=N; python -m "
            f"grpo_jax.check --workdir={workdir} shows which are sound."
        ) from None


def restore_policy(workdir: Path, shapes, shardings, step: int | None = None) -> tuple[int, Any]:
    """Restores the policy of a run onto the mesh.

    Args:
        workdir: The run.
        shapes: The parameters as a tree of jax.ShapeDtypeStruct.
        shardings: Their shardings.
        step: The number of updates behind the policy; by default, that of the newest checkpoint.

    Returns:
        (step, params): The step of the checkpoint and the parameters.

    Raises:
        UserError: The run has no checkpoint yet, or none of that step, or it is damaged.
    """
    step = choose_step(workdir, step)
    item = checkpoints_folder(workdir) / str(step) / "policy"
    with refusing_damage(workdir, step):
        return step, restore_arrays(item, read_meta(workdir, step)["digests"]["policy"], shapes, shardings)


@phase("Loading the policy")
def load_policy(
    cfg: Config, context: RunContext, workdir: Path, *, base: bool = False, step: int | None = None
) -> tuple[int, Any]:
    """Loads a policy of a run onto the mesh.

    Args:
        cfg: The run's config.
        context: The run's context.
        workdir: The run.
        base: Whether to load the model that the run started from instead.
        step: The number of updates behind the policy; by default, that of the newest checkpoint.

    Returns:
        (step, params): The number of updates behind the policy (0 for the base model), and its parameters.

    Raises:
        UserError: The run has no checkpoint yet, or none of that step, or it is damaged.
    """
    if base:
        return 0, load_base_model(cfg, context)
    shapes = param_shapes(context.model_cfg, cfg.model.param_dtype)
    return restore_policy(workdir, shapes, tree_shardings(context.mesh, shapes), step)
