"""Exports the policy of a run as a Hugging Face folder."""

import shutil
from pathlib import Path

import jax

from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.run.policy import choose_step, restore_policy
from grpo_jax.run.progress import phase, set_bytes
from grpo_jax.weights.reading import load, open_model_tensors
from grpo_jax.weights.source import find_model, read_model_config
from grpo_jax.weights.writing import save


@phase("Exporting the policy")
def export_policy(cfg: Config, workdir: Path, out: Path, *, step: int | None = None, base: bool = False) -> int:
    """Writes a policy of a run to `out`, a Hugging Face folder that appears only once it is complete.

    Args:
        cfg: The run's config.
        workdir: The run.
        out: The folder to write, which must be new or empty.
        step: The number of updates behind the policy; by default that of the newest checkpoint.
        base: Whether to write the model that the run started from instead of the policy.

    Returns:
        The step of the exported policy; 0 for the base model.

    Raises:
        UserError: `out` is not empty or cannot be written, or the run has no such checkpoint.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out must name a new or empty folder, not {out}; found other files there. Choose another.")
    source = find_model(cfg.model.path)
    model_cfg = read_model_config(source)
    open_model_tensors(source, model_cfg)  # raises here, before anything is restored, if the base model is broken
    if not base:
        step = choose_step(workdir, step)
    partial = out.with_name(f"{out.name}.partial")
    if jax.process_index() == 0:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"--out must name a folder that can be written; {out} cannot ({error}). Choose another --out."
            ) from None
    mesh = make_mesh(fsdp=-1)
    with jax.set_mesh(mesh):
        if base:
            with phase("Loading the weights"):
                step, params = 0, load(source, mesh=mesh, on_progress=set_bytes)[1]
        else:
            shapes = param_shapes(model_cfg, cfg.model.param_dtype)
            step, params = restore_policy(workdir, shapes, tree_shardings(mesh, shapes), step)
        save(partial, model_cfg, params)
    if jax.process_index() == 0:
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    return step
