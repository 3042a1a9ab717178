"""The entry point: `python -m grpo_jax.main --config=configs/r1zero.py`. It stays short so that the work can be imported.

Checks everything a user can get wrong, starts `jax.distributed` if the environment says that there are several
processes, and runs the config's job: reinforcement learning, or the pretraining of the tiny base model.
"""

import os
from collections.abc import Sequence

import jax

from grpo_jax import config as configs
from grpo_jax import flags
from grpo_jax.processes import check_shared, join_processes, several_processes
from grpo_jax.types import UserError


def main(argv: Sequence[str]) -> None:
    parser = flags.make_parser(
        "Trains a language model with rule-based rewards (GRPO). Run again with the same workdir, it resumes.",
        "python -m grpo_jax.main --config=configs/r1zero.py --workdir=runs/r1zero --config.total_steps=100")
    _, raw, workdir = flags.parse(parser, argv)
    if raw.job == "pretrain":
        from grpo_jax.pretrain import pretrain

        if several_processes(os.environ):
            raise UserError("expected one process for pretraining; found an environment of several; start it alone")
        pretrain(configs.check_pretrain(raw), workdir)
        return
    config = configs.check(raw)
    configs.check_workdir(workdir, raw)
    join_processes(os.environ)

    from grpo_jax.checkpoint import newest_step
    from grpo_jax.setting import check_prompts, prepare
    from grpo_jax.train import train

    setting = prepare(config, training=True)
    configs.check_model(config, setting.model)
    check_prompts(config, setting.tokenizer)
    configs.expect(newest_step(workdir) <= config.total_steps, "total_steps",
                   f"{newest_step(workdir)} or more, which {workdir} has done", config.total_steps,
                   "raise --config.total_steps or choose another --workdir")
    if jax.process_index() == 0:
        configs.write_config(workdir, raw)
    if jax.process_count() > 1:
        check_shared(workdir)
    train(config, setting, workdir)


if __name__ == "__main__":
    flags.run(main)
