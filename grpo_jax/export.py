"""Writes a run's policy as a Hugging Face folder, which `transformers` and what builds on it load."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax

from grpo_jax.checkpoint import choose_step, restore_policy
from grpo_jax.mesh import make_mesh, shardings
from grpo_jax.model import param_shapes
from grpo_jax.processes import join_processes
from grpo_jax.source import find_model, read_model_config
from grpo_jax.types import UserError
from grpo_jax.weights import load, open_checkpoint, save


def export(config, workdir: Path, out: Path, *, step: int | None = None, base: bool = False) -> int:
    """Writes the policy of a run after update `step` (the newest by default), or the model it began with; its step.

    The folder appears when all of it is written.

    Raises:
      UserError: there is something at `out`, or no such checkpoint.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"expected a new folder at {out}; found other files there; choose another --out")
    source = find_model(config.model.path)
    model = read_model_config(source)
    open_checkpoint(source, model)  # its mistakes, before anything is restored
    if not base:
        step = choose_step(workdir, step)
    unfinished = out.with_name(f"{out.name}.partial")
    if jax.process_index() == 0:
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"expected a folder that can be written at {out}; found: {error}; "
                            "choose another --out") from None
    mesh = make_mesh(fsdp=-1)
    with jax.set_mesh(mesh):
        if base:
            step, params = 0, load(source, mesh=mesh)[1]
        else:
            shapes = param_shapes(model, config.model.param_dtype)
            step, params = restore_policy(workdir, shapes, shardings(mesh, shapes), step)
        save(unfinished, model, params)
    if jax.process_index() == 0:
        if out.is_dir():
            out.rmdir()
        unfinished.rename(out)
    return step


def main(argv: Sequence[str]) -> None:
    from grpo_jax import config as configs
    from grpo_jax import flags

    parser = flags.make_parser(
        __doc__, "python -m grpo_jax.export --workdir=runs/r1zero --out=exported --step=40", of_a_run=True)
    parser.add_argument("--out", metavar="DIR", help="the folder to write; it must be new")
    parser.add_argument("--step", type=int, metavar="N", help="the update after which; default: the newest checkpoint")
    options, raw, workdir = flags.parse(parser, argv)
    if not options.out:
        raise UserError("expected a folder to write; found none; pass --out=DIR")
    if options.base and options.step is not None:
        raise UserError("expected --base or --step; found both; leave one out")
    out = Path(options.out).resolve()
    join_processes(os.environ)
    step = export(configs.check(raw), workdir, out, step=options.step, base=options.base)
    if jax.process_index() == 0:
        print(f"wrote {'the base model' if options.base else f'the policy of step {step}'} to {options.out}")


if __name__ == "__main__":
    from grpo_jax.flags import run

    run(main)
