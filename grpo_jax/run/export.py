"""Writes a run's policy as a Hugging Face folder."""

import shutil
from pathlib import Path

import jax

from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import make_mesh, tree_shardings
from grpo_jax.run.checkpoint import choose_step, restore_policy
from grpo_jax.weights.model_io import load, open_model_tensors, save
from grpo_jax.weights.source import find_model, read_model_config


def export_policy(cfg: Config, workdir: Path, out: Path, *, step: int | None = None, base: bool = False) -> int:
    """Writes the policy of a run after update `step` (the newest by default), or the model it began with; its step.

    The folder appears when all of it is written.

    Raises:
      UserError: there is something at `out`, or no such checkpoint.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"expected a new folder at {out}; found other files there; choose another --out")
    source = find_model(cfg.model.path)
    model_cfg = read_model_config(source)
    open_model_tensors(source, model_cfg)  # its mistakes, before anything is restored
    if not base:
        step = choose_step(workdir, step)
    unfinished = out.with_name(f"{out.name}.partial")
    if jax.process_index() == 0:
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"expected a folder that can be written at {out}; found: {error}; choose another --out"
            ) from None
    mesh = make_mesh(fsdp=-1)
    with jax.set_mesh(mesh):
        if base:
            step, params = 0, load(source, mesh=mesh)[1]
        else:
            shapes = param_shapes(model_cfg, cfg.model.param_dtype)
            step, params = restore_policy(workdir, shapes, tree_shardings(mesh, shapes), step)
        save(unfinished, model_cfg, params)
    if jax.process_index() == 0:
        if out.is_dir():
            out.rmdir()
        unfinished.rename(out)
    return step
