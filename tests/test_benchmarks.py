"""The benchmarks run and count what they say; no time is judged here."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.source import find_model

ROOT = Path(__file__).parent.parent
SMALL = ["--prompts=2", "--samples=2", "--prompt_tokens=8", "--new_tokens=4", "--repeats=1"]


def run(name: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, f"benchmarks/{name}.py", *argv], cwd=ROOT, capture_output=True, text=True)


def test_a_rollout_is_one_json_line_with_what_is_promised():
    made = run("rollout", f"--model={find_model('tiny')}", "--random", *SMALL, "--slots=2", "--lengths=lognormal",
               "--compare", "--new_tokens=12")
    assert made.returncode == 0, made.stderr
    (line,) = made.stdout.splitlines()
    found = json.loads(line)
    for name in ("gen_tok_s", "generate_s", "decode_ms", "limit_fraction", "peak_rss_gib", "seconds", "limit_ms",
                 "matmul_ms", "bytes_ms", "read_gb_s", "square_gflop_s", "draw_fraction", "static_tok_s", "speedup"):
        assert isinstance(found[name], (int, float)), name
    assert found["parameters"] == 853_120 and found["rows"] == 2 and found["dtype"] == "float32"
    assert found["limit_ms"] == max(found["matmul_ms"], found["bytes_ms"])
    assert found["kv_bytes_per_slot"] == 4 * 2 * 2 * 32 * 4 * (32 + 12)  # layers, k and v, heads, width, float32, columns


@pytest.mark.parametrize("argv, message", [
    (["--model=nowhere/at/all"], "nowhere/at/all"), (["--model=tiny", "--prompts=0"], "--prompts of 1 or more"),
    (["--model=tiny", "--slots=99"], "at most prompts"), ([], "--model"), (["--model=tiny", "--dtype=int8"], "--dtype"),
])
def test_a_mistake_is_one_line(argv, message):
    made = run("rollout", *argv)
    assert made.returncode == 2 and not made.stdout
    (line,) = made.stderr.splitlines()
    assert line.startswith("error: expected") and message in line


@pytest.mark.parametrize("argv, message", [
    (["--model=tiny", "--slots=0"], "--slots of 1 or more"), (["--model=tiny", "--devices=a"], "--devices"),
    (["--model=tiny", "--new_tokens=99999"], "at most 512 positions"), (["--model=nowhere/at/all"], "nowhere/at/all"),
])
def test_a_mistake_about_layouts_is_one_line(argv, message):
    made = run("layouts", *argv)
    assert made.returncode == 2 and not made.stdout
    (line,) = made.stderr.splitlines()
    assert line.startswith("error: expected") and message in line


def test_help_explains_every_number():
    text = run("rollout", "--help").stdout
    for name in ("limit_fraction", "decode_ms", "peak_rss_gib", "draw_fraction", "example:"):
        assert name in text


COMMANDS = re.findall(r"```bash\npython (benchmarks/.*?)\n```", (ROOT / "docs" / "performance.md").read_text())
SHORT = {"benchmarks/rollout.py": [*SMALL, "--slots=4", f"--model={find_model('tiny')}"],
         "benchmarks/layouts.py": ["--prompts=1", "--samples=2", "--new_tokens=2", "--model=tiny"]}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_on_performance_runs(command):
    script, *argv = shlex.split(command)
    made = subprocess.run([sys.executable, script, *argv, *SHORT[script]], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout).get("unexplained", 0) == 0


@pytest.mark.slow
def test_layouts_draw_the_same():
    made = run("layouts", "--model=tiny", "--prompts=3", "--samples=4", "--new_tokens=6", "--slots=2,12", "--devices=1,2")
    assert made.returncode == 0, made.stderr
    (line,) = made.stdout.splitlines()
    found = json.loads(line)
    assert found["sequences"] == 12 and found["layouts"] == 4 and found["unexplained"] == 0
