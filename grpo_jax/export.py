"""Writes a run's policy as a Hugging Face folder, which `transformers` and what builds on it load."""

import os
from collections.abc import Sequence
from pathlib import Path

import jax

from grpo_jax.errors import UserError
from grpo_jax.parallel.processes import join_processes
from grpo_jax.run.export import export_policy


def main(argv: Sequence[str]) -> None:
    from grpo_jax import config as configs
    from grpo_jax.config import flags

    parser = flags.make_parser(
        __doc__, "python -m grpo_jax.export --workdir=runs/r1zero --out=exported --step=40", of_a_run=True
    )
    parser.add_argument("--out", metavar="DIR", type=os.path.expanduser, help="the folder to write; it must be new")
    parser.add_argument("--step", type=int, metavar="N", help="the update after which; default: the newest checkpoint")
    options, raw, workdir = flags.parse_flags(parser, argv)
    if not options.out:
        raise UserError("expected a folder to write; found none; pass --out=DIR")
    if options.base and options.step is not None:
        raise UserError("expected --base or --step; found both; leave one out")
    out = Path(options.out).resolve()
    join_processes(os.environ)
    step = export_policy(configs.check(raw), workdir, out, step=options.step, base=options.base)
    if jax.process_index() == 0:
        print(f"wrote {'the base model' if options.base else f'the policy of step {step}'} to {options.out}")


if __name__ == "__main__":
    from grpo_jax.config.flags import run_entry_point

    run_entry_point(main)
