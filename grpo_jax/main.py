"""Trains a model: `python -m grpo_jax.main --config=configs/r1zero.py`.

Checks everything that a user can get wrong, joins the processes of a multi-host run, and then runs GRPO or pretrains
the tiny base model.
"""

import contextlib
import os
from collections.abc import Sequence

from grpo_jax import config as configs
from grpo_jax.config import flags
from grpo_jax.config.rules import check_pretrain
from grpo_jax.errors import UserError
from grpo_jax.run.progress import announce, phase


@phase("Starting")
def main(argv: Sequence[str]) -> None:
    """Runs the entry point with the arguments of a command line, program name excluded."""
    parser = flags.make_parser(
        "Trains a language model with rule-based rewards (GRPO). --workdir=DIR alone resumes the run in DIR.",
        "python -m grpo_jax.main --config=configs/r1zero.py --workdir=runs/r1zero --config.total_steps=100",
    )
    parser.add_argument(
        "--accept-changed-files",
        action="store_true",
        help="resume even if files that the run reads have changed since it was started",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the plan, three prompts with their expected answers and one group of completions; write nothing",
    )
    options, raw, workdir, given = flags.parse_flags(parser, argv)
    is_pretraining = raw.job == "pretrain"
    cfg = check_pretrain(raw) if is_pretraining else configs.check(raw)
    if is_pretraining and options.dry_run:
        raise UserError("--dry-run shows the prompts and answers of a run; pretraining has none. Leave it out.")
    if not is_pretraining:
        configs.check_workdir(workdir, cfg)
        announce(f"Dry run for {workdir}" if options.dry_run else f"Training in {workdir}")
        if cfg.task.name == "file":
            announce(f"Reading {cfg.task.path}")

    # Imported here so that a mistake in the flags is reported without waiting for these imports.
    from grpo_jax.parallel.compilation import keep_compiled_programs
    from grpo_jax.parallel.processes import is_multiprocess

    keep_compiled_programs(os.environ)
    if is_pretraining:
        from grpo_jax.run.lock import WorkdirLock
        from grpo_jax.tiny.pretrain import pretrain

        if is_multiprocess(os.environ):
            raise UserError("Pretraining runs in one process; found the variables of several. Start it on its own.")
        with contextlib.closing(WorkdirLock(workdir)) as lock:
            lock.take()
            pretrain(cfg, workdir)
        return
    if options.dry_run:
        from grpo_jax.run.dry_run import dry_run

        dry_run(raw, workdir, given=given, accept_changed_files=options.accept_changed_files)
        return

    from grpo_jax.run.train import train

    train(raw, workdir=workdir, accept_changed_files=options.accept_changed_files, given=given)


if __name__ == "__main__":
    flags.run_entry_point(main)
