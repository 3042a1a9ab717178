"""Writes the policy of a run as a Hugging Face folder, which `transformers`, vLLM and others load."""

import os
from collections.abc import Sequence
from pathlib import Path

from grpo_jax import config as configs
from grpo_jax.config import flags
from grpo_jax.errors import UserError
from grpo_jax.run.progress import announce, mute, phase


@phase("Starting")
def main(argv: Sequence[str]) -> None:
    """Runs the entry point with the arguments of a command line, program name excluded."""
    parser = flags.make_parser(
        __doc__, "python -m grpo_jax.export --workdir=runs/r1zero --out=exported --step=40", of_a_run=True
    )
    parser.add_argument("--out", metavar="DIR", type=flags.path_flag, help="the folder to write, new or empty")
    options, raw, workdir, _ = flags.parse_flags(parser, argv)
    if not options.out:
        raise UserError("--out must name the folder to write; found none. Pass --out=DIR.")
    cfg, out = configs.check(raw), Path(options.out).resolve()

    # Imported here so that a mistake in the flags is reported without waiting for these imports.
    import jax

    from grpo_jax.parallel.compilation import keep_compiled_programs
    from grpo_jax.parallel.processes import join_processes
    from grpo_jax.run.export import export_policy

    keep_compiled_programs(os.environ)
    join_processes(os.environ)
    mute(jax.process_index() != 0)
    step = export_policy(cfg, workdir, out, step=options.step, base=options.base)
    announce(f"Wrote {'the base model' if options.base else f'the policy after step {step}'} to {options.out}")


if __name__ == "__main__":
    flags.run_entry_point(main)
