"""Compiles the programs of a run, each in a process of its own: a compiler that aborts ends only its own process.

The processes run `python -m grpo_jax.plan` again with the same arguments and `--program=NAME`, and print a JSON object.
"""

import ctypes
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import jax

from grpo_jax.errors import UserError
from grpo_jax.model.blockwise import BLOCK_SIZE
from grpo_jax.parallel.mesh import num_data_shards
from grpo_jax.planning.counts import ProgramCounts, count_program
from grpo_jax.planning.needs import scored_batch, shard_prompts, updated_batch
from grpo_jax.planning.programs import RunShapes, abstract_decode, run_programs, shard_bytes
from grpo_jax.rollout.slots import prefill_batch_size

CUDNN_VERSION = 91000  # the answer to JAX, which asks the installed cuDNN for its version
LISTED_COPY_BYTES = 2**26  # copies of arrays of at least this size are listed


def assume_cudnn() -> None:
    """Makes JAX compile cuDNN's attention although no cuDNN is installed."""
    from jax._src.cudnn import fused_attention_stablehlo

    fused_attention_stablehlo.check_cudnn_version = lambda: CUDNN_VERSION


def program_counts(run: RunShapes, name: str, text: str) -> ProgramCounts:
    """Counts the work of a compiled program: of one token for `decode`, otherwise of the whole program."""
    if name.startswith("decode"):
        sizes = shard_bytes(abstract_decode(run, int(name.split()[1]))[0].kv_cache)
        return count_program(text, run.rollout_mesh.shape, {"refill": 0}, min(sizes), inside="tokens")
    mesh = run.rollout_mesh if name in ("placement", "prefill") else run.mesh
    batch = updated_batch(run) if name == "update" else scored_batch(run)
    scored = batch.completion_tokens / num_data_shards(mesh) / batch.micro_batches
    trips = {"micro_batches": batch.micro_batches, "token_blocks": math.ceil(scored / run.cfg.train.chunk_tokens)}
    width = run.cfg.rollout.max_prompt_tokens if name == "prefill" else batch.width
    prompts = shard_prompts(run)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the attention kernel depends on the platform
        trips["prompt_batches"] = math.ceil(prompts / min(prompts, prefill_batch_size(run.model_cfg, width)))
    trips |= {"refill": 1, "key_blocks": (width / BLOCK_SIZE + 1) / 2}  # one sequence a row, which is the most
    return count_program(text, mesh.shape, trips, LISTED_COPY_BYTES)


def resident_bytes_of_process() -> int:
    """Returns the resident memory of this process."""
    pages = Path("/proc/self/statm")  # only Linux has it
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def trim_heap() -> None:
    """Returns freed memory to the operating system, if the C library can do that (glibc)."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def read_earlier(path: str | None) -> dict[str, dict]:
    """Returns the programs of an earlier plan by their digests; none if there is no such plan.

    Raises:
        UserError: The file is not a plan.
    """
    if path is None:
        return {}
    try:
        programs = json.loads(Path(path).read_text(encoding="utf-8"))["programs"].values()
        return {program["digest"]: program for program in programs if "digest" in program}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--earlier must name a plan that --json printed; found {path}: {error}. Leave it out."
        ) from None


def compile_program(run: RunShapes, name: str, earlier: Mapping[str, dict]) -> dict:
    """Compiles one program in this process, unless it is one of those that were compiled earlier.

    Args:
        run: The run.
        name: The program.
        earlier: Results by digest.

    Returns:
        A dict of plain values: the digest of the lowered program, the seconds of compilation, the bytes per device that
        the compiler states, the fields of `ProgramCounts`, and the memory of this process: `started_bytes` before it
        lowered the program, by how much it grew until the program was compiled (`compiler_bytes`), and how much of
        that is still in use afterwards (`kept_bytes`).
    """
    if jax.devices()[0].platform != run.mesh.devices.flat[0].platform == "gpu":
        assume_cudnn()
    started_bytes = resident_bytes_of_process()
    lowered = run_programs(run)[name]()
    digest = hashlib.sha256(f"{run.mesh.devices.flat[0].device_kind} {lowered.as_text()}".encode()).hexdigest()
    if digest in earlier:
        return earlier[digest] | {"name": name}
    start = time.monotonic()
    compiled = lowered.compile()
    seconds, memory = time.monotonic() - start, compiled.memory_analysis()
    compiler_bytes = max(0, resident_bytes_of_process() - started_bytes)
    trim_heap()
    return {
        "name": name,
        "digest": digest,
        "seconds": seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "started_bytes": started_bytes,
        "compiler_bytes": compiler_bytes,
        "kept_bytes": min(compiler_bytes, max(0, resident_bytes_of_process() - started_bytes)),
        "counts": asdict(program_counts(run, name, compiled.as_text())),
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
