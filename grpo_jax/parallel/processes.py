"""Several processes that run one program: whether there are any, and how they find one another."""

import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from grpo_jax.errors import UserError


def is_multiprocess(environ: Mapping[str, str]) -> bool:
    """Whether the environment says that this process is one of several.

    JAX_COORDINATOR_ADDRESS (with JAX_NUM_PROCESSES and JAX_PROCESS_ID), a TPU pod (launch/tpu_pod.sh sets
    GRPO_JAX_DISTRIBUTED=1), Slurm or Open MPI.
    """
    tasks = [environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    return bool(
        environ.get("JAX_COORDINATOR_ADDRESS")
        or environ.get("GRPO_JAX_DISTRIBUTED") == "1"
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or any(count.isdigit() and int(count) > 1 for count in tasks)
    )


def join_processes(environ: Mapping[str, str]) -> None:
    """Joins the other processes, if there are any; what the environment does not say, JAX finds out from the cluster.

    Raises:
      UserError: the environment says too little, or something else than numbers.
    """
    if not is_multiprocess(environ):
        return
    # Its service would keep SIGTERM from ending the processes, and nothing here listens to it.
    jax.config.update("jax_enable_preemption_service", False)
    numbers = {name: environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    try:
        jax.distributed.initialize(**{name: int(value) for name, value in numbers.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"expected JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or a cluster that JAX "
            f"knows; found: {error}; set all three"
        ) from None


def check_shared_workdir(workdir: Path) -> None:
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
        raise UserError(
            f"expected all processes to see one {workdir}; found {seen.size - seen.sum()} of {seen.size} "
            "without its config.json; choose a --workdir on a file system that all hosts mount"
        )
