"""Builds what a plan is made of: the config, the model and the meshes of a run on devices that need not be there."""

from collections.abc import Sequence

import jax

from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.parallel.mesh import make_mesh, make_rollout_mesh, num_data_shards
from grpo_jax.planning.models import plan_model
from grpo_jax.planning.programs import RunShapes
from grpo_jax.rollout.memory import NoRoomError, plan_rollout, rollout_meshes
from grpo_jax.run.context import read_base_model, resident_bytes
from grpo_jax.run.prompt_limit import fit_prompts
from grpo_jax.tasks.streams import resolve_task


def with_prompt_limit(cfg: Config) -> Config:
    """Returns the config with the prompt limit of the run, which the problems determine if the config does not.

    Raises:
        UserError: They have to be measured, but they or the model's tokenizer cannot be read.
    """
    if cfg.rollout.max_prompt_tokens:
        return cfg
    plan_model(cfg)  # raises here if the model itself is at fault
    try:
        return fit_prompts(cfg, read_base_model(cfg), resolve_task(cfg, graded=False))[0]
    except UserError as error:
        raise UserError(
            f"{error} Or set rollout.max_prompt_tokens: a plan then needs neither problems nor a tokenizer."
        ) from None


def plan_inputs(cfg: Config, devices: Sequence[jax.Device], memory_bytes: int) -> tuple[RunShapes, str]:
    """Returns the shapes of a run, and why its rollout does not fit, which is empty if it does.

    A rollout that does not fit has one slot on each data shard.

    Args:
        cfg: A checked config.
        devices: The devices.
        memory_bytes: The memory of one device.

    Raises:
        UserError: The model or the mesh does not fit the config.
    """
    cfg = with_prompt_limit(cfg)
    model_cfg = plan_model(cfg)
    mesh = make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor, cfg.mesh.expert, devices)
    held_bytes = resident_bytes(cfg, model_cfg, mesh, training=True)
    try:
        plan = plan_rollout(cfg, model_cfg, mesh, held_bytes, memory_bytes)
    except NoRoomError as error:
        largest = rollout_meshes(cfg, model_cfg, mesh)[-1]
        rollout_mesh = make_rollout_mesh(mesh, largest.shape["tensor"], largest.shape["expert"])
        return RunShapes(cfg, model_cfg, mesh, rollout_mesh, num_data_shards(rollout_mesh)), error.reason
    return RunShapes(cfg, model_cfg, mesh, make_rollout_mesh(mesh, plan.tensor, plan.expert), plan.slots), ""
