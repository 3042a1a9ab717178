"""On TPUs, decoding leaves the KV cache in place, and prompts are prefilled without a mask that v5p cannot compile."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.config import check, default
from grpo_jax.model.cache import KV, write_token
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.planning.compiling import assume_cudnn, program_counts
from grpo_jax.planning.programs import RunShapes, run_programs
from grpo_jax.planning.topology import compiler_environment, topology_devices
from tests.tiny import CONFIG

ROOT = Path(__file__).parents[2]


def compile_rollout(topology: str, name: str, tensor: int, layers: int, changed: dict) -> None:
    """Compiles a program of a rollout of a small model. Prints the copies of its cache and its text."""
    assume_cudnn()
    cfg = default()
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_tokens, cfg.rollout.prompts, cfg.rollout.samples = 512, 512, 32, 8
    widths = dict(hidden_size=512, intermediate_size=1024, num_heads=8, num_kv_heads=2, head_dim=128, vocab_size=4096)
    options = widths | dict(layers=CONFIG.layers[:layers], max_positions=2048, compute_dtype="bfloat16") | changed
    model_cfg = replace(CONFIG, **options)
    mesh = make_mesh(1, -1, tensor, devices=topology_devices(topology))
    run = RunShapes(check(cfg), model_cfg, mesh, mesh, slots=64)
    text = run_programs(run)[name]().compile().as_text()
    print("copies:", program_counts(run, name, text).copies, text)


def run_compile_rollout(topology: str, name: str, tensor: int = 1, layers: int = 1, **changed) -> str:
    """Returns what `compile_rollout` prints."""
    return in_new_process(f"compile_rollout({topology!r}, {name!r}, {tensor}, {layers}, {changed})", topology)


def in_new_process(call: str, topology: str) -> str:
    """Returns what a call of this module prints in a new process: a compiler that aborts ends its process."""
    process = subprocess.run(
        [sys.executable, "-c", f"from tests.plan.test_attention import *; {call}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=compiler_environment(topology, os.environ),
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.parametrize(
    "topology, tensor, changed",
    [
        ("v5e:1x1", 1, dict(head_dim=64)),  # values fill half of a tile's lanes, on a slice of one chip
        ("v6e:2x2", 2, {}),  # one key head a chip
        ("v5p:2x2x1", 4, {}),  # key heads that tensor does not divide
    ],
)
def test_decoding_copies_no_cache(topology, tensor, changed):
    printed = run_compile_rollout(topology, "decode 1024", tensor, **changed)
    assert printed.startswith("copies: () ") and "tpu_custom_call" in printed


def compile_write(topology: str, rows: int, columns: int) -> None:
    """Compiles the kernel that writes a token, for one KV head of width 128 a chip."""
    shapes = [(rows, 1, 128, columns), (rows, 1, columns, 128), (rows, 1, 128, 1), (rows, 1, 1, 128)]
    mesh = make_mesh(devices=topology_devices(topology)[:1])
    everywhere = jax.NamedSharding(mesh, jax.P())
    k, v, new_k, new_v = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=everywhere) for shape in shapes)
    positions = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=everywhere)
    with jax.set_mesh(mesh):
        jax.jit(write_token).lower(KV(k, v), KV(new_k, new_v), positions).compile()


@pytest.mark.parametrize("rows, columns", [(1024, 256), (8, 40)])
def test_the_cache_may_have_many_rows_or_less_than_a_tile_of_columns(rows, columns):
    """A chip has semaphores for fewer than 512 copies at a time, and copies in HBM begin at multiples of a tile."""
    in_new_process(f"compile_write('v5e:2x2', {rows}, {columns})", "v5e:2x2")


def test_prompts_are_prefilled_on_v5p():
    """Several prompts a shard, in tiles of 512 columns. Only the keys of the last of two layers are needed."""
    assert "splash" in run_compile_rollout("v5p:2x2x1", "prefill", layers=2)
