"""Compiles the programs of a run, each in a process of its own: a compiler that aborts ends only its own process.

The processes run `python -m grpo_jax.plan` again with the same arguments and `--program=NAME`, and print one JSON object.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import jax

from grpo_jax.planning.programs import RunShapes, run_programs

CUDNN_VERSION = 91000  # what a plan answers where JAX asks the installed cuDNN for its version


def compiler_environment(kind: str, count: int, environ: dict[str, str]) -> dict[str, str]:
    """Returns the environment variables that let a process compile for a topology.

    Args:
        kind: The kind of the topology's devices, such as "v5e" or "cpu".
        count: The number of its devices.
        environ: The environment of this process.
    """
    changes = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if kind == "cpu":
        flags = environ.get("XLA_FLAGS", "")
        changes["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    return environ | changes


def assume_cudnn() -> None:
    """Makes JAX compile cuDNN's attention although no cuDNN is installed."""
    from jax._src.cudnn import fused_attention_stablehlo

    fused_attention_stablehlo.check_cudnn_version = lambda: CUDNN_VERSION


def compile_program(run: RunShapes, name: str) -> dict:
    """Compiles one program in this process.

    Returns:
        A dict of plain values: the digest of the lowered program, the seconds of compilation, the bytes per device that
        the compiler states, and the counts of `grpo_jax.planning.hlo`.
    """
    if jax.devices()[0].platform != run.mesh.devices.flat[0].platform == "gpu":
        assume_cudnn()
    lowered = run_programs(run)[name]()
    start = time.monotonic()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    return {
        "name": name,
        "digest": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
        "seconds": time.monotonic() - start,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
    }


def run_compiler(argv: Sequence[str], name: str, environ: dict[str, str]) -> dict:
    """Compiles one program in a new process and returns the result of `compile_program`, or the error in one line."""
    command = [sys.executable, "-m", "grpo_jax.plan", *argv, f"--program={name}"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    fatal = [line for line in lines if "Check failed" in line or "Error:" in line or line.startswith("error: ")]
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return {"name": name, "error": f"the compiler ended with {how}: {(fatal or lines)[-1].strip()[:300]}"}


def compile_programs(
    argv: Sequence[str], names: Sequence[str], environ: dict[str, str], on_result: Callable[[dict], None]
) -> dict[str, dict]:
    """Compiles programs in processes of their own, as many at a time as there are CPU cores.

    Args:
        argv: The command line of the plan.
        names: The programs.
        environ: The environment of the processes, from `compiler_environment`.
        on_result: Called with each result as soon as it is known.

    Returns:
        The results by name, in the order of `names`.
    """
    results = {}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = [pool.submit(run_compiler, argv, name, environ) for name in names]
        for future in as_completed(futures):
            result = future.result()
            results[result["name"]] = result
            on_result(result)
    return {name: results[name] for name in names}
