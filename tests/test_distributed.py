"""Runs of two processes with two devices each, compared with one process with four devices."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLAGS = [
    f"--config={ROOT}/configs/r1zero.py",
    "--config.rollout.prompts=4",
    "--config.rollout.samples=4",
    "--config.rollout.max_tokens=16",
    "--config.train.minibatches=2",
    "--config.eval.questions=8",
    "--config.checkpoint.every_steps=1",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=2",
]
TIMEOUT_S = 300


def run(logs: Path, workdirs: list[Path], *flags: str, module: str = "grpo_jax.main") -> tuple[list[int], list[str]]:
    """Runs an entry point as one process per workdir and returns the exit codes and outputs."""
    return run_processes(logs, [["-m", module, f"--workdir={workdir}", *FLAGS, *flags] for workdir in workdirs])


def run_processes(logs: Path, arguments: list[list[str]]) -> tuple[list[int], list[str]]:
    """Runs Python with each list of arguments as one process of a run, which has four devices; returns as `run` does.

    Process 1 has a umask of 077, as if no other user could read its files.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    count = len(arguments)
    xla_flags = f"--xla_force_host_platform_device_count={4 // count}"
    xla_flags += " --xla_cpu_enable_concurrency_optimized_scheduler=false"  # as in conftest.py
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags, "PYTHONPATH": str(ROOT)}
    if count > 1:
        environ |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(count)}
    processes, files = [], [logs / f"process-{i}.txt" for i in range(count)]
    try:
        for i, (own, path) in enumerate(zip(arguments, files, strict=True)):
            with open(path, "w") as out:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *own],
                        cwd=logs,
                        env=environ | {"JAX_PROCESS_ID": str(i)},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        umask=0o077 if i else 0o022,
                    )
                )
        deadline = time.monotonic() + TIMEOUT_S
        codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail(f"not finished after {TIMEOUT_S} s:\n" + "\n".join(path.read_text()[-3000:] for path in files))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return codes, [path.read_text() for path in files]


def metrics(workdir: Path) -> list[dict]:
    """Returns the lines of metrics.jsonl without the metrics that depend on the clock."""
    lines = [json.loads(text) for text in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.startswith("time/") and name != "rollout/tokens_per_s"}
        for line in lines
    ]


OWN_ROWS = """
import os

import jax
import numpy as np

from grpo_jax.parallel.mesh import make_mesh, shard_rows
from grpo_jax.parallel.processes import join_processes

join_processes(os.environ)
process = jax.process_index()
batch = {"tokens": np.full((8, 3), process), "lengths": np.full(8, process)}
for leaf in jax.tree.leaves(shard_rows(make_mesh(data=-1), batch)):
    assert leaf.shape[0] == 8 and leaf.addressable_shards
    for shard in leaf.addressable_shards:
        assert (np.asarray(shard.data) == process).all()
"""


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_make_a_batch_from_their_own_rows(tmp_path, count):
    """Each process passes other values. If any were gathered or compared, the arrays would be refused or differ."""
    codes, printed = run_processes(tmp_path, [["-c", OWN_ROWS]] * count)
    assert codes == [0] * count, "\n".join(text[-3000:] for text in printed)


@pytest.mark.slow
def test_two_processes_match_one_and_resume(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    # The first run ends between the two updates of a rollout, so the second must resume with its experience.
    for steps in (1, 3):
        codes, printed = run(tmp_path, [two, two], f"--config.total_steps={steps}", "--config.eval.every_steps=1")
        assert codes == [0, 0], printed[0][-3000:] + printed[1][-3000:]
        assert f"step {steps}/{steps}  reward" in printed[0]
        assert "step " not in printed[1]  # only process 0 prints
        assert (two / "checkpoints" / str(steps) / "commit_success.txt").exists()
    codes, printed = run(tmp_path, [one], "--config.total_steps=3", "--config.eval.every_steps=1")
    assert codes == [0], printed[0][-3000:]

    lines, expected = metrics(two), metrics(one)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    files = [path for path in two.rglob("*") if path.is_file() and (two / "checkpoints") not in path.parents]
    assert {"config.json", "metrics.jsonl", "eval-000003.jsonl"} <= {path.name for path in files}
    assert not [path for path in files if not path.stat().st_mode & 0o004]  # process 0 has written all of them
    for line, expected_line in zip(lines, expected, strict=True):
        assert line == pytest.approx(expected_line, rel=1e-3, abs=1e-5)

    folders = []
    for name, workdirs in (("by-two", [two, two]), ("by-one", [two])):
        codes, printed = run(tmp_path, workdirs, f"--out={tmp_path / name}", module="grpo_jax.export")
        assert codes == [0] * len(workdirs), printed[0][-3000:] + printed[-1][-3000:]
        assert "Wrote" in printed[0] and all("Wrote" not in text for text in printed[1:])
        folders.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert folders[0] == folders[1] and "model.safetensors" in folders[0]


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh_and_another_number_of_processes(tmp_path):
    """It stops between the two updates of a rollout each time, so it resumes with its experience too."""
    elastic, one = tmp_path / "elastic", tmp_path / "one"
    meshes = ["data=2 fsdp=2 tensor=1", "data=1 fsdp=2 tensor=2", "data=4 fsdp=1 tensor=1", "data=1 fsdp=4 tensor=1"]
    for steps, (mesh, processes) in enumerate(zip(meshes, (2, 1, 4, 2), strict=True), start=1):
        axes = [f"--config.mesh.{size}" for size in mesh.split()]
        codes, printed = run(tmp_path, [elastic] * processes, f"--config.total_steps={steps}", *axes)
        assert codes == [0] * processes, "\n".join(text[-3000:] for text in printed)
    codes, printed = run(tmp_path, [one], f"--config.total_steps={len(meshes)}")
    assert codes == [0], printed[0][-3000:]
    lines, expected = ([line for line in metrics(workdir) if line["step"]] for workdir in (elastic, one))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, expected_line in zip(lines, expected, strict=True):
        names = [name for name in expected_line if not name.startswith("eval/")]  # each start evaluates its last step
        assert [line[name] for name in names] == pytest.approx(
            [expected_line[name] for name in names], rel=1e-3, abs=1e-5
        )


@pytest.mark.slow
def test_processes_must_share_the_workdir(tmp_path):
    codes, printed = run(tmp_path, [tmp_path / "a", tmp_path / "b"], "--config.total_steps=1")
    assert codes == [2, 2]
    assert all("error: All processes must share the workdir" in text for text in printed)


UNRELIABLE = """
import os, time

def unreliable(problems, texts, lengths):
    with open("graders", "a") as log:
        log.write(f"{os.getppid()}\\n")
    if len(texts[0]) % 4 == 0:
        time.sleep(1e6)
    return [1 / MOST]
"""


@pytest.mark.slow
@pytest.mark.parametrize("most, codes", [("1", [0, 0]), ("0", [2, 2])], ids=["some fail", "most fail"])
def test_process_0_grades_for_all(tmp_path, most, codes):
    """A completion times out for all processes or for none, and an error of process 0 stops them all."""
    (tmp_path / "mine.py").write_text(UNRELIABLE.replace("MOST", most))
    flags = ['--config.reward.parts=["format", "mine.py:unreliable"]', "--config.reward.deadline=1"]
    found, printed = run(tmp_path, [tmp_path / "run"] * 2, *flags, "--config.total_steps=2")
    assert found == codes, printed[0][-3000:] + printed[1][-3000:]
    assert len(set((tmp_path / "graders").read_text().split())) == 1
    if most == "0":
        assert "error: Reward parts must grade at least half of the completions" in printed[0]
        assert "error: All processes must continue, but process 0 stopped" in printed[1]
    else:
        line = metrics(tmp_path / "run")[1]
        assert line["reward/timeout"] > 0 == line["reward/error"] and line["reward/unreliable"] > 0
        assert "timeout in unreliable" in printed[0] and "timeout in" not in printed[1]


KILLS_ITSELF = """
import os, signal, sys
import grpo_jax.run.train
from grpo_jax.config.flags import run_entry_point
from grpo_jax.main import main
from grpo_jax.run.rollout_progress import RolloutProgress

def kill(*arguments):
    if WHERE == "rollout" or arguments[-1].step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return finish_update(*arguments)

finish_update = grpo_jax.run.train.finish_update
if WHERE == "rollout":
    RolloutProgress.report = kill
else:
    grpo_jax.run.train.finish_update = kill
run_entry_point(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["rollout", "update"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_in_one_line(tmp_path, lost, where):
    """The second update is in flight when the process is lost, or the first rollout."""
    flags = [f"--workdir={tmp_path / 'run'}", *FLAGS, "--config.eval.questions=0"]
    arguments = [["-m", "grpo_jax.main", *flags]] * 2
    arguments[lost] = ["-c", KILLS_ITSELF.replace("WHERE", repr(where)), *flags]
    codes, printed = run_processes(tmp_path, arguments)
    assert codes[lost] == -9 and codes[1 - lost] == 75, printed[1 - lost][-3000:]
    (line,) = [line for line in printed[1 - lost].splitlines() if line.startswith("error: ")]
    assert f"All processes of a run must stay connected; the connection to process {lost} was lost" in line
    assert "Traceback" not in printed[1 - lost] and "    @ " not in printed[1 - lost]  # frames of JAX's C++ code


@pytest.mark.slow
def test_an_exception_in_one_process_ends_the_others(tmp_path):
    raises = KILLS_ITSELF.replace("WHERE", "'update'").replace("os.kill(", "raise OSError(")
    flags = [f"--workdir={tmp_path / 'run'}", *FLAGS, "--config.eval.questions=0"]
    codes, printed = run_processes(tmp_path, [["-m", "grpo_jax.main", *flags], ["-c", raises, *flags]])
    assert codes == [75, 1], printed[0][-3000:] + printed[1][-3000:]
    assert "OSError" in printed[1] and "the connection to process 1 was lost" in printed[0]
    assert "Traceback" not in printed[0]
