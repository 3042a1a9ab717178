"""The entry point: `python -m grpo_jax.main --config=configs/r1zero.py`. It stays short so that the work can be imported.

Checks everything a user can get wrong, starts `jax.distributed` if the environment says that there are several
processes, and runs the config's job: reinforcement learning, or the pretraining of the tiny base model.
"""

import os
from collections.abc import Mapping, Sequence

import jax

from grpo_jax import config as configs
from grpo_jax import flags


def several_processes(environ: Mapping[str, str]) -> bool:
    """Whether the environment says that this process is one of several.

    JAX_COORDINATOR_ADDRESS (with JAX_NUM_PROCESSES and JAX_PROCESS_ID), a TPU pod (launch/tpu_pod.sh sets
    GRPO_JAX_DISTRIBUTED=1), Slurm or Open MPI.
    """
    tasks = [environ.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")]
    return bool(
        environ.get("JAX_COORDINATOR_ADDRESS")
        or environ.get("GRPO_JAX_DISTRIBUTED") == "1"
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or any(count.isdigit() and int(count) > 1 for count in tasks))


def start_distributed(environ: Mapping[str, str]) -> None:
    """Joins the other processes; what the environment does not say, JAX finds out from the cluster."""
    numbers = {name: environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    jax.distributed.initialize(**{name: int(value) for name, value in numbers.items() if value is not None})


def main(argv: Sequence[str]) -> None:
    parser = flags.make_parser(
        "Trains a language model with rule-based rewards (GRPO). Run again with the same workdir, it resumes.",
        "python -m grpo_jax.main --config=configs/r1zero.py --workdir=runs/r1zero --config.total_steps=100")
    _, raw, workdir = flags.parse(parser, argv)
    if raw.job == "pretrain":
        from grpo_jax.pretrain import pretrain

        pretrain(configs.check_pretrain(raw), workdir)
        return
    config = configs.check(raw)
    configs.check_workdir(workdir, raw)
    if several_processes(os.environ):
        start_distributed(os.environ)

    from grpo_jax.evaluate import held_out_problems
    from grpo_jax.mesh import row_shards
    from grpo_jax.setting import check_prompts, prepare
    from grpo_jax.train import train

    setting = prepare(config)
    configs.check_model(config, setting.model)
    configs.check_mesh(config, row_shards(setting.mesh))
    check_prompts(config, setting.tokenizer)
    held_out_problems(config)  # raises if nothing can be held out
    if jax.process_index() == 0:
        configs.write_config(workdir, raw)
    train(config, setting, workdir)


if __name__ == "__main__":
    flags.run(main)
