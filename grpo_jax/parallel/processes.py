"""Multi-process runs: whether a process is one of several, and how they connect."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.parallel.connections import watch_processes


def is_multiprocess(environ: Mapping[str, str]) -> bool:
    """Returns whether the environment variables describe a multi-process run.

    Recognized are JAX_COORDINATOR_ADDRESS (with JAX_NUM_PROCESSES and JAX_PROCESS_ID), TPU pods
    (GRPO_JAX_DISTRIBUTED=1, which launch/tpu_pod.sh sets), Slurm and Open MPI.
    """
    tasks = [environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    return bool(
        environ.get("JAX_COORDINATOR_ADDRESS")
        or environ.get("GRPO_JAX_DISTRIBUTED") == "1"
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or any(count.isdigit() and int(count) > 1 for count in tasks)
    )


def join_processes(environ: Mapping[str, str], *, preemptible: bool = False) -> None:
    """Connects to the other processes of a multi-process run; does nothing if there are none or they are connected.

    JAX detects from the cluster what the environment variables leave out.

    Args:
        environ: The environment variables.
        preemptible: Whether the program asks JAX's preemption service when to stop, which receives SIGTERM then.

    Raises:
        UserError: The environment variables are incomplete or not numbers.
    """
    if not is_multiprocess(environ) or jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", preemptible)
    numbers = {name: environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    try:
        jax.distributed.initialize(**{name: int(value) for name, value in numbers.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise UserError(
            "A multi-process run needs JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or a cluster "
            f"that JAX detects; initialization failed with: {error}. Set all three variables."
        ) from None
    watch_processes()


def from_first_process(function: Callable[[], np.ndarray | None], default: np.ndarray) -> np.ndarray:
    """Calls a function on process 0 and returns its result on every process.

    Args:
        function: Returns an array with the shape and dtype of `default`, or None, which stands for `default`.
        default: The result if the function returns None.

    Raises:
        UserError: The function raises a UserError. Every process then raises one.
    """
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = function()
        except UserError as raised:
            error = raised
    values, failed = default if result is None else result, error is not None
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        values, failed = multihost_utils.broadcast_one_to_all((values, failed))
    if failed:
        raise error or UserError("All processes must continue, but process 0 stopped. Read the error that it printed.")
    return values


def check_shared_workdir(workdir: Path) -> None:
    """Checks that all processes see the config.json that process 0 has written into the workdir.

    Raises:
        UserError: Some process does not see it. Every process raises.
    """
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("config.json is written")
    deadline = time.monotonic() + 60  # a network file system may show a new file late
    while not (workdir / "config.json").is_file() and time.monotonic() < deadline:
        time.sleep(1)
    seen = multihost_utils.process_allgather(np.int32((workdir / "config.json").is_file()))
    if not seen.all():
        raise UserError(
            f"All processes must share the workdir {workdir}; {seen.size - seen.sum()} of {seen.size} do not see its "
            "config.json. Choose a --workdir on a file system that all hosts mount."
        )
