"""Plans lower the programs that training runs, and refuse what they cannot plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

from grpo_jax.planning.topology import compiler_environment

REPO = Path(__file__).parent.parent
# Several micro-batches, slots that are refilled, a cache that grows, and a rollout mesh that differs from the mesh.
KEYS = """
    rollout.prompts=4 rollout.samples=4 rollout.max_tokens=60 rollout.max_prompt_tokens=96 rollout.slots=8
    rollout.temperature=3 rollout.mesh.tensor=2 train.micro_tokens=128 mesh.data=2 mesh.fsdp=4
    model.reference_dtype=bfloat16 total_steps=1 eval.questions=0 log.samples=0
""".split()


def test_a_plan_lowers_the_programs_of_a_run(tmp_path):
    """The arguments that a run passes to its jitted functions lower to the same text as those of the plan."""
    command = [sys.executable, "-m", "tests.lowered", str(tmp_path / "run"), *KEYS]
    done = subprocess.run(command, cwd=REPO, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    digests = json.loads(done.stdout.splitlines()[-1])
    planned, run = digests["planned"], digests["run"]
    assert set(planned) == {"placement", "prefill", "decode 128", "decode 156", "scoring", "update"}
    assert [name for name in planned if run[name] != planned[name]] == []


# Lowers the same Pallas kernel for TPUs from two places in a file.
LOWER_TWICE = """
import jax
from jax.experimental import pallas as pl

def lower(blank_lines):
    names = {"pl": pl, "jax": jax}
    exec("\\n" * blank_lines + SOURCE, names)
    return jax.export.export(jax.jit(names["double"]), platforms=["tpu"])(jax.ShapeDtypeStruct((8, 128), "float32"))

SOURCE = "def kernel(x, out):\\n    out[...] = 2 * x[...]\\ndouble = lambda x: pl.pallas_call(kernel, out_shape=x)(x)"
print(lower(0).mlir_module() == lower(1).mlir_module())
"""


def test_the_digest_of_a_program_does_not_depend_on_line_numbers():
    environ = compiler_environment("v5e:2x2", os.environ)
    done = subprocess.run([sys.executable, "-c", LOWER_TWICE], env=environ, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr[-2000:]
