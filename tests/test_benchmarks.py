"""The benchmarks run and count what they say; no time is judged here."""

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.weights.source import find_model

ROOT = Path(__file__).parent.parent
SMALL = ["--prompts=2", "--samples=2", "--prompt_tokens=8", "--new_tokens=4", "--repeats=1"]
CUT = ["--samples=3", "--micro_tokens=16"]  # a group that takes two rows


def run(name: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, f"benchmarks/{name}.py", *argv], cwd=ROOT, capture_output=True, text=True)


def test_a_rollout_is_one_json_line_with_what_is_promised():
    made = run(
        "rollout",
        f"--model={find_model('tiny')}",
        "--random",
        *SMALL,
        "--slots=2",
        "--lengths=lognormal",
        "--compare",
        "--new_tokens=12",
    )
    assert made.returncode == 0, made.stderr
    (line,) = made.stdout.splitlines()
    found = json.loads(line)
    for name in (
        "gen_tok_s",
        "generate_s",
        "decode_ms",
        "limit_fraction",
        "peak_rss_gib",
        "seconds",
        "limit_ms",
        "matmul_ms",
        "bytes_ms",
        "read_gb_s",
        "square_gflop_s",
        "draw_fraction",
        "static_tok_s",
        "speedup",
    ):
        assert isinstance(found[name], (int, float)), name
    assert found["parameters"] == 853_120 and found["rows"] == 2 and found["dtype"] == "float32"
    assert found["limit_ms"] == max(found["matmul_ms"], found["bytes_ms"])
    assert found["kv_bytes_per_slot"] == 4 * 2 * 2 * 32 * 4 * (
        32 + 12
    )  # layers, k and v, heads, width, float32, columns


def test_learning_is_one_json_line_and_counts_what_the_packed_work_needs():
    made = run("learn", f"--model={find_model('tiny')}", "--random", *SMALL, *CUT)
    assert made.returncode == 0, made.stderr
    (line,) = made.stdout.splitlines()
    found = json.loads(line)
    for name in (
        "score_s",
        "update_s",
        "learn_s",
        "tok_s",
        "completion_tok_s",
        "model_flops_utilisation",
        "limit_s",
        "limit_fraction",
        "square_gflop_s",
        "score_temp_gib",
        "update_temp_gib",
        "peak_rss_gib",
        "seconds",
    ):
        assert found[name] > 0, name
    assert found["parameters"] == 853_120 and found["kl_coef"] == 0.001 and "compile_s" in found
    # A prompt of 8 and three completions of 4 are too much for a row of 16: both prompts are computed twice.
    assert (found["tokens"], found["prompt_tokens_computed"]) == (4 * 8 + 6 * 4, 4 * 8)
    assert (found["rows"], found["width"], found["micro_batches"]) == (6, 16, 4)
    assert found["padding_fraction"] == 1 - 56 / 64
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384  # q and o; k and v; gate, up and down
    seen = 4 * (8 * 9 // 2) + 6 * (4 * 8 + 4 * 5 // 2)  # by the prompts' tokens; by the completions'
    forward = 2 * 4 * layer * 56 + 2 * 128 * 512 * 24 + 4 * (2 * 2 * 4 * 32 * seen)
    assert found["needed_tflop"] == pytest.approx(4 * forward / 1e12, rel=1e-3)  # of 4 digits


@pytest.mark.slow
def test_without_a_reference_learning_is_three_passes_and_no_score():
    made = run(
        "learn", "--model=tiny", *SMALL, "--kl_coef=0", "--dtype=bfloat16", "--lengths=lognormal", "--remat=none"
    )
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    assert found["score_s"] == found["score_temp_gib"] == 0 and found["learn_s"] == found["update_s"]
    lengths = np.clip(np.round(np.random.default_rng(0).lognormal(math.log(32), 1, 4)), 1, 4)
    assert found["tokens"] - found["prompt_tokens_computed"] == lengths.sum()


@pytest.mark.slow
def test_a_step_is_one_json_line_with_what_is_promised():
    made = run("step", f"--model={find_model('tiny')}", "--random", *SMALL, *CUT)
    assert made.returncode == 0, made.stderr
    (line,) = made.stdout.splitlines()
    found = json.loads(line)
    parts = [found[name] for name in ("generate_s", "score_s", "update_s", "pack_s", "other_s")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(found["step_s"], rel=0.01)  # one round: its own median
    for name in ("gen_tok_s", "step_tok_s", "peak_rss_gib", "seconds"):
        assert found[name] > 0, name
    assert found["parameters"] == 853_120 and found["tokens"] == 6 * 4 and "compile_s" in found


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model=nowhere/at/all"], "nowhere/at/all"),
        (["--model=tiny", "--prompts=0"], "--prompts of 1 or more"),
        (["--model=tiny", "--slots=99"], "at most prompts"),
        ([], "--model"),
        (["--model=tiny", "--dtype=int8"], "--dtype"),
    ],
)
def test_a_mistake_is_one_line(argv, message):
    made = run("rollout", *argv)
    assert made.returncode == 2 and not made.stdout
    (line,) = made.stderr.splitlines()
    assert line.startswith("error: expected") and message in line


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model=tiny", "--slots=0"], "--slots of 1 or more"),
        (["--model=tiny", "--devices=a"], "--devices"),
        (["--model=tiny", "--new_tokens=99999"], "at most 512 positions"),
        (["--model=nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_a_mistake_about_layouts_is_one_line(argv, message):
    made = run("layouts", *argv)
    assert made.returncode == 2 and not made.stdout
    (line,) = made.stderr.splitlines()
    assert line.startswith("error: expected") and message in line


@pytest.mark.parametrize(
    "name, argv, message",
    [
        ("learn", ["--model=tiny", "--kl_coef=-1"], "--kl_coef of 0 or more"),
        ("step", ["--model=tiny", "--samples=1"], "--samples of 2 or more"),
        ("step", ["--model=tiny", "--new_tokens=999"], "at most 512 positions"),
    ],
)
def test_a_mistake_about_learning_is_one_line(name, argv, message):
    made = run(name, *argv)
    assert made.returncode == 2 and not made.stdout
    (line,) = made.stderr.splitlines()
    assert line.startswith("error: expected") and message in line


@pytest.mark.parametrize(
    "benchmark, names",
    [
        ("rollout", "limit_fraction decode_ms peak_rss_gib draw_fraction"),
        (
            "learn",
            "score_s update_s learn_s tok_s completion_tok_s tokens prompt_tokens_computed padding_fraction rows "
            "width micro_batches needed_tflop model_flops_utilisation square_gflop_s limit_s limit_fraction "
            "score_temp_gib update_temp_gib peak_rss_gib compile_s seconds",
        ),
        (
            "step",
            "step_s generate_s score_s update_s pack_s other_s gen_tok_s step_tok_s tokens peak_rss_gib compile_s "
            "seconds",
        ),
    ],
)
def test_help_explains_every_number(benchmark, names):
    text = run(benchmark, "--help").stdout
    for name in [*names.split(), "example:"]:
        assert re.search(rf"\b{name}", text), name


COMMANDS = re.findall(r"```bash\npython (benchmarks/.*?)\n```", (ROOT / "docs" / "performance.md").read_text())
SHORT = {
    "benchmarks/rollout.py": [*SMALL, "--slots=4", f"--model={find_model('tiny')}"],
    "benchmarks/learn.py": [*SMALL, *CUT, f"--model={find_model('tiny')}"],
    "benchmarks/step.py": [*SMALL, *CUT, f"--model={find_model('tiny')}"],
    "benchmarks/layouts.py": ["--prompts=1", "--samples=2", "--new_tokens=2", "--model=tiny"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_on_performance_runs(command):
    script, *argv = shlex.split(command)
    made = subprocess.run([sys.executable, script, *argv, *SHORT[script]], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout).get("unexplained", 0) == 0


@pytest.mark.slow
def test_layouts_draw_the_same():
    made = run(
        "layouts", "--model=tiny", "--prompts=3", "--samples=4", "--new_tokens=6", "--slots=2,12", "--devices=1,2"
    )
    assert made.returncode == 0, made.stderr
    (line,) = made.stdout.splitlines()
    found = json.loads(line)
    assert found["sequences"] == 12 and found["layouts"] == 4 and found["unexplained"] == 0
