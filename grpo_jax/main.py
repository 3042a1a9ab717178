"""The entry point: `python -m grpo_jax.main --config=configs/r1zero.py`. It stays short so that the work can be imported.

Checks everything a user can get wrong, starts `jax.distributed` if the environment says that there are several
processes, and runs the config's job: reinforcement learning, or the pretraining of the tiny base model.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from grpo_jax import config as configs
from grpo_jax import flags
from grpo_jax.types import UserError


def several_processes(environ: Mapping[str, str]) -> bool:
    """Whether the environment says that this process is one of several.

    JAX_COORDINATOR_ADDRESS (with JAX_NUM_PROCESSES and JAX_PROCESS_ID), a TPU pod (launch/tpu_pod.sh sets
    GRPO_JAX_DISTRIBUTED=1), Slurm or Open MPI.
    """
    tasks = [environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    return bool(
        environ.get("JAX_COORDINATOR_ADDRESS")
        or environ.get("GRPO_JAX_DISTRIBUTED") == "1"
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or any(count.isdigit() and int(count) > 1 for count in tasks))


def start_distributed(environ: Mapping[str, str]) -> None:
    """Joins the other processes; what the environment does not say, JAX finds out from the cluster.

    Raises:
      UserError: the environment says too little, or something else than numbers.
    """
    # Its service would keep SIGTERM from ending the processes, and nothing here listens to it.
    jax.config.update("jax_enable_preemption_service", False)
    numbers = {name: environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    try:
        jax.distributed.initialize(**{name: int(value) for name, value in numbers.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise UserError(f"expected JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or a cluster that JAX "
                        f"knows; found: {error}; set all three") from None


def check_shared(workdir: Path) -> None:
    """Checks that all processes see the workdir that process 0 has just written into.

    Raises:
      UserError: on all of them, if one does not.
    """
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("config.json is written")
    end = time.monotonic() + 60  # a network file system may show a new file late
    while not (workdir / "config.json").is_file() and time.monotonic() < end:
        time.sleep(1)
    seen = multihost_utils.process_allgather(np.int32((workdir / "config.json").is_file()))
    if not seen.all():
        raise UserError(f"expected all processes to see one {workdir}; found {seen.size - seen.sum()} of {seen.size} "
                        "without its config.json; choose a --workdir on a file system that all hosts mount")


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
    if several_processes(os.environ):
        start_distributed(os.environ)

    from grpo_jax.checkpoint import newest_step
    from grpo_jax.mesh import row_shards
    from grpo_jax.setting import check_prompts, prepare
    from grpo_jax.train import train

    setting = prepare(config)
    configs.check_model(config, setting.model)
    configs.check_mesh(config, row_shards(setting.mesh))
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
