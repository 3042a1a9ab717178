"""Plans lower the programs that training runs, and refuse what they cannot plan."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.planning.topology import compiler_environment

REPO = Path(__file__).parent.parent
# Evaluations in two batches, with more prompts than a rollout has; several micro-batches, slots that are refilled, a
# cache that grows, and a rollout mesh that differs from the mesh.
KEYS = """
    rollout.prompts=4 rollout.samples=4 rollout.max_tokens=60 rollout.max_prompt_tokens=96 rollout.slots=8
    rollout.temperature=3 rollout.mesh.tensor=2 train.micro_tokens=128 mesh.data=2 mesh.fsdp=4
    model.reference_dtype=bfloat16 total_steps=1 eval.questions=11 log.samples=0
""".split()


def test_a_plan_lowers_the_programs_of_a_run(tmp_path):
    """The arguments that a run passes to its jitted functions lower to the same text as those of the plan.

    So do those of its evaluations, which therefore compile nothing.
    """
    command = [sys.executable, "-m", "tests.lowered", str(tmp_path / "run"), *KEYS]
    done = subprocess.run(command, cwd=REPO, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    digests = json.loads(done.stdout.splitlines()[-1])
    planned, run = digests["planned"], digests["run"]
    assert set(planned) == {"placement", "prefill", "decode 128", "decode 156", "scoring", "update"}
    assert [name for name in planned if run[name] != [planned[name]]] == []
    compiled = [digests["compiled"].count(f"jit({name})") for name in ("place", "init_decode", "decode_tokens")]
    assert compiled == [1, 1, 2]


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


def plan(*arguments):
    command = [sys.executable, "-m", "grpo_jax.plan", *arguments]
    return subprocess.run(command, cwd=REPO, env=dict(os.environ), capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/r1zero.py"], "--topology=KIND:SIZES must be given"),
        (["--config=configs/r1zero.py", "--topology=v5e:8"], "--topology must be like v5e:8x8, .*found 'v5e:8'"),
        (["--config=configs/r1zero.py", "--topology=a100:8"], "--topology must be like .*found 'a100:8'"),
        (["--config=configs/r1zero.py", "--topology=v5e:2x2"], "Compiling for v5e needs the extra `plan`"),
        (["--config=configs/r1zero.py", "--topology=cpu:1", "--programs=decode,all"], "--programs must list some of"),
        (["--config=configs/r1zero.py", "--topology=cpu:1", "--suggest"], "--suggest needs the published figures"),
        (
            # With a limit, no prompts are measured, which is announced if it takes long.
            [
                *("--config=configs/r1zero.py", "--topology=cpu:1", "--config.mesh.tensor=3"),
                "--config.rollout.max_prompt_tokens=96",
            ],
            "The product of the mesh sizes",
        ),
    ],
)
def test_a_mistake_ends_with_one_line(arguments, message):
    done = plan(*arguments)
    assert done.returncode == 2 and re.search(f"^error: .*{message}", done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""


@pytest.mark.slow
def test_programs_that_have_not_changed_are_not_compiled_again(tmp_path):
    """The seconds of an earlier plan are replaced, which shows where a result comes from."""
    arguments = "--config=configs/r1zero.py", "--topology=cpu:1", "--json"
    first = json.loads(plan(*arguments).stdout)
    assert first["fits"] and first["platform"] == "cpu"
    for program in first["programs"].values():
        program["seconds"] = 12345.0
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps(first))
    again = json.loads(plan(*arguments, f"--earlier={earlier}", "--config.optim.lr=1e-5").stdout)
    reused = {name for name, program in again["programs"].items() if program["seconds"] == 12345.0}
    assert reused == set(first["programs"]) - {"update"}


@pytest.mark.slow
def test_the_peak_memory_of_a_run_is_as_planned(tmp_path):
    """Within 15%, on two devices."""
    arguments = "--config=configs/r1zero.py", "--config.total_steps=3", "--config.rollout.prompts=32"
    planned = json.loads(plan(*arguments, "--topology=cpu:2", "--json").stdout)["process_bytes"]
    script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)"
    script += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    run = [sys.executable, "-m", "grpo_jax.main", *arguments, f"--workdir={tmp_path / 'run'}"]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    environ = os.environ | {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    done = subprocess.run([sys.executable, "-c", script, *run], cwd=REPO, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert planned == pytest.approx(1024 * int(done.stdout), rel=0.15)
