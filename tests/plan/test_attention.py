"""On TPUs, decoding leaves the KV cache in place, and prompts are prefilled without a mask that v5p cannot compile."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from grpo_jax.config import check, default
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.planning.compiling import assume_cudnn, program_counts
from grpo_jax.planning.programs import RunShapes, run_programs
from grpo_jax.planning.topology import compiler_environment, topology_devices
from tests.tiny import CONFIG

ROOT = Path(__file__).parents[2]


def compile_rollout(topology: str, name: str, tensor: int, changed: dict) -> None:
    """Compiles a program of a rollout of a small model. Prints the copies of its cache and its text."""
    assume_cudnn()
    cfg = default()
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_tokens, cfg.rollout.prompts, cfg.rollout.samples = 512, 512, 32, 8
    widths = dict(hidden_size=512, intermediate_size=1024, num_heads=8, num_kv_heads=2, head_dim=128, vocab_size=4096)
    layers = CONFIG.layers if name == "prefill" else CONFIG.layers[:1]  # prefill needs only the last layer's keys
    options = widths | dict(layers=layers, max_positions=2048, compute_dtype="bfloat16") | changed
    model_cfg = replace(CONFIG, **options)
    mesh = make_mesh(1, -1, tensor, devices=topology_devices(topology))
    run = RunShapes(check(cfg), model_cfg, mesh, mesh, slots=64)
    text = run_programs(run)[name]().compile().as_text()
    print("copies:", program_counts(run, name, text).copies, text)


def run_compile_rollout(topology: str, name: str, tensor: int = 1, **changed) -> str:
    """Returns what `compile_rollout` prints in a new process: a compiler that aborts ends its process."""
    call = f"compile_rollout({topology!r}, {name!r}, {tensor}, {changed})"
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
        ("v5e:2x2", 1, dict(head_dim=64)),  # values fill half of a tile's lanes
        ("v6e:2x2", 2, {}),  # one key head a chip
        ("v5p:2x2x1", 4, {}),  # key heads that tensor does not divide
    ],
)
def test_decoding_copies_no_cache(topology, tensor, changed):
    printed = run_compile_rollout(topology, "decode 1024", tensor, **changed)
    assert printed.startswith("copies: () ") and "tpu_custom_call" in printed


def test_prompts_are_prefilled_on_v5p():
    """Several prompts a shard, in tiles of 512 columns."""
    assert "splash" in run_compile_rollout("v5p:2x2x1", "prefill")
