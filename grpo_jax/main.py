"""Trains a model: `python -m grpo_jax.main --config=configs/r1zero.py`.

Checks everything that a user can get wrong, joins the processes of a multi-host run, and then runs GRPO or pretrains
the tiny base model.
"""

import os
from collections.abc import Sequence

import jax

from grpo_jax import config as configs
from grpo_jax.config import flags
from grpo_jax.config.rules import check_pretrain
from grpo_jax.errors import UserError
from grpo_jax.parallel.processes import check_shared_workdir, is_multiprocess, join_processes


def main(argv: Sequence[str]) -> None:
    """Runs the entry point with the arguments of a command line, program name excluded."""
    parser = flags.make_parser(
        "Trains a language model with rule-based rewards (GRPO). Run it again with the same workdir to resume.",
        "python -m grpo_jax.main --config=configs/r1zero.py --workdir=runs/r1zero --config.total_steps=100",
    )
    _, raw, workdir = flags.parse_flags(parser, argv)
    if raw.job == "pretrain":
        from grpo_jax.tiny.pretrain import pretrain

        if is_multiprocess(os.environ):
            raise UserError("Pretraining runs in one process; found the variables of several. Start it on its own.")
        pretrain(check_pretrain(raw), workdir)
        return
    cfg = configs.check(raw)
    configs.check_workdir(workdir, cfg)
    join_processes(os.environ)

    # Imported here so that a mistake in the flags is reported without waiting for these imports.
    from grpo_jax.run.checkpoint import newest_step
    from grpo_jax.run.context import build_context, check_prompt_lengths
    from grpo_jax.run.train import train

    context = build_context(cfg, training=True)
    configs.check_model(cfg, context.model_cfg)
    check_prompt_lengths(cfg, context.tokenizer)
    done = newest_step(workdir)
    if done > cfg.total_steps:
        raise UserError(
            f"total_steps must be at least {done}, the number of updates that the run in {workdir} has done; found "
            f"{cfg.total_steps}. Raise --config.total_steps, or choose another --workdir."
        )
    if jax.process_index() == 0:
        configs.write_config(workdir, cfg)
    if jax.process_count() > 1:
        check_shared_workdir(workdir)
    train(cfg, context, workdir)


if __name__ == "__main__":
    flags.run_entry_point(main)
