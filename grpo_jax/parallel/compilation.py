"""The persistent compilation cache: compiled programs are kept on disk and read by later runs."""

from collections.abc import Mapping
from pathlib import Path

import jax

CACHE_BYTES = 4 * 2**30  # the programs that were used least recently are deleted when the folder grows larger


def cache_folder() -> Path:
    """Returns the folder in which compiled programs are kept."""
    return Path.home() / ".cache" / "grpo_jax" / "programs"


def keep_compiled_programs(environ: Mapping[str, str]) -> None:
    """Turns on the persistent compilation cache, unless the environment variable JAX_COMPILATION_CACHE_DIR is set.

    JAX reads the variable itself; if it is empty, nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
