"""Entry points keep compiled programs on disk, where the next run finds them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from grpo_jax import evaluate, export, generate, main
from grpo_jax.parallel import compilation

ROOT = Path(__file__).parent.parent
SETTINGS = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size")
CONFIG = f"--config={ROOT}/configs/r1zero.py"
PRETRAIN = f"--config={ROOT}/configs/pretrain_tiny.py"


@pytest.mark.parametrize("folder", ["", "elsewhere"])
def test_the_cache_that_the_environment_names_is_respected(folder):
    before = [getattr(jax.config, name) for name in SETTINGS]
    compilation.keep_compiled_programs({"JAX_COMPILATION_CACHE_DIR": folder})
    assert [getattr(jax.config, name) for name in SETTINGS] == before


class Called(Exception):
    """Ends an entry point."""


@pytest.mark.parametrize(
    "entry, flags",
    [
        (main, [CONFIG]),
        (main, [PRETRAIN]),
        (evaluate, [CONFIG]),
        (generate, [CONFIG, "--prompt=1 + 1?"]),
        (export, [CONFIG, "--out=out"]),
    ],
)
def test_every_entry_point_keeps_its_programs(monkeypatch, tmp_path, entry, flags):
    def keep(environ):
        assert environ is os.environ
        raise Called

    monkeypatch.setattr(compilation, "keep_compiled_programs", keep)
    with pytest.raises(Called):
        entry.main([*flags, f"--workdir={tmp_path}"])


COMPILING = """
import os
import jax
from grpo_jax.parallel.compilation import keep_compiled_programs

keep_compiled_programs(os.environ)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
jax.jit(lambda x: x * 3 + 1)(2.0)
print(sum(event == "/jax/compilation_cache/cache_hits" for event in events))
"""


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environ |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def compile_in_process() -> str:
        command = [sys.executable, "-c", COMPILING]
        return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout.strip()

    assert compile_in_process() == "0"
    assert list((tmp_path / ".cache" / "grpo_jax" / "programs").glob("*-cache"))
    assert compile_in_process() == "1"
