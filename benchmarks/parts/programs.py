"""Compiles the programs that the parts measure."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


def start_compiling(lowered: list) -> list[Future[tuple[Any, float]]]:
    """Starts to compile lowered programs, all at the same time.

    Returns:
        A future per program, whose result is the compiled program and the seconds that compiling it took.
    """

    def compile_timed(program):
        start = time.perf_counter()
        return program.compile(), time.perf_counter() - start

    pool = ThreadPoolExecutor(len(lowered))
    futures = [pool.submit(compile_timed, program) for program in lowered]
    pool.shutdown(wait=False)
    return futures


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Returns whether the device ran out of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)
