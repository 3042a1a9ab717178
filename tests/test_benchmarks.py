"""The benchmarks run, print the fields that they explain, and count correctly. Timings are not asserted."""

import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax.config.flags import run_entry_point
from grpo_jax.weights.source import find_model

ROOT = Path(__file__).parent.parent
TINY = str(find_model("tiny"))
SMALL = [f"--model={TINY}", "--prompts=2", "--samples=2", "--prompt_tokens=8", "--new_tokens=4", "--repeats=1"]
TWO_ROWS_PER_GROUP = ["--samples=3", "--micro_tokens=16"]
COMMANDS = {
    "rollout": [*SMALL, "--random", "--slots=2", "--lengths=lognormal", "--new_tokens=12"],
    "learn": [*SMALL, "--random", *TWO_ROWS_PER_GROUP],
    "step": [*SMALL, "--random", *TWO_ROWS_PER_GROUP],
}
FIELDS = {
    "rollout": "generate_s gen_tok_s compile_s decode_ms decode_steps rows matmul_ms matmul_gflop_s square_gflop_s "
    "bytes_ms read_gb_s limit_ms limit_fraction draw_fraction kv_bytes_per_slot peak_rss_gib seconds",
    "learn": "score_s update_s learn_s tok_s completion_tok_s tokens prompt_tokens_computed padding_fraction rows "
    "width micro_batches needed_tflop model_flops_utilisation square_gflop_s limit_s limit_fraction score_temp_gib "
    "update_temp_gib peak_rss_gib compile_s seconds",
    "step": "step_s generate_s score_s update_s pack_s other_s gen_tok_s step_tok_s tokens peak_rss_gib compile_s "
    "seconds",
    "layouts": "sequences layouts differing near_ties unexplained logp_gap",
    "grading": "workers start_s grade_s bound_s timeouts errors one_ms decode_ms",
}


def run_script(name: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, f"benchmarks/{name}.py", *argv], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def results():
    """The JSON lines of small commands, by benchmark. One process runs them all, so that JAX starts once."""
    runs = [f"sys.argv = {[name, *argv]}; run('benchmarks/{name}.py')" for name, argv in COMMANDS.items()]
    run = "run = functools.partial(runpy.run_path, run_name='__main__')"
    code = "; ".join(["import functools, runpy, sys; sys.path.insert(0, 'benchmarks')", run, *runs])
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return dict(zip(COMMANDS, map(json.loads, made.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_prints_one_json_line_with_its_fields(results, name):
    fields = set(FIELDS[name].split())
    assert fields <= set(results[name])
    assert all(isinstance(results[name][field], int | float) for field in fields)
    assert results[name]["parameters"] == 853_120 and results[name]["dtype"] == "float32"


def test_the_rollout_benchmark_counts_rows_steps_and_cache_bytes(results):
    result = results["rollout"]
    assert result["rows"] == 2 and result["slots"] == 2
    assert result["limit_ms"] == max(result["matmul_ms"], result["bytes_ms"])
    # Layers, keys and values, heads, head width, float32, columns.
    assert result["kv_bytes_per_slot"] == 4 * 2 * 2 * 32 * 4 * (32 + 12)


def test_the_learning_benchmark_counts_what_the_packed_rows_need(results):
    result = results["learn"]
    # A prompt of 8 and three completions of 4 do not fit into a row of 16, so both prompts are computed twice.
    assert (result["tokens"], result["prompt_tokens_computed"]) == (4 * 8 + 6 * 4, 4 * 8)
    assert (result["rows"], result["width"], result["micro_batches"]) == (6, 16, 4)
    assert result["padding_fraction"] == 1 - 56 / 64
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384  # q and o; k and v; gate, up and down
    keys = 4 * (8 * 9 // 2) + 6 * (4 * 8 + 4 * 5 // 2)  # attended to by tokens of prompts and of completions
    forward = 2 * 4 * layer * 56 + 2 * 128 * 512 * 24 + 4 * (2 * 2 * 4 * 32 * keys)
    assert result["needed_tflop"] == pytest.approx(4 * forward / 1e12, rel=1e-3)  # printed with 4 digits


def test_the_parts_of_a_step_add_up(results):
    result = results["step"]
    parts = [result[name] for name in ("generate_s", "score_s", "update_s", "pack_s", "other_s")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(result["step_s"], rel=0.01)  # one round is its own median
    assert result["tokens"] == 6 * 4


@pytest.mark.parametrize(
    "name, argv, message",
    [
        ("rollout", ["--model=nowhere/at/all"], "nowhere/at/all"),
        ("rollout", ["--model=tiny", "--prompts=0"], "--prompts must be at least 1; found 0"),
        ("rollout", ["--model=tiny", "--slots=99"], "--slots may be at most"),
        ("rollout", ["--model=tiny", "--static"], "multiple of --samples=8"),
        ("rollout", [], "--model"),
        ("rollout", ["--model=tiny", "--dtype=int8"], "--dtype"),
        ("layouts", ["--model=tiny", "--slots=0"], "--slots must be at least 1"),
        ("layouts", ["--model=tiny", "--devices=a"], "--devices"),
        ("layouts", ["--model=tiny", "--new_tokens=99999"], "at most 512"),
        ("layouts", ["--model=nowhere/at/all"], "nowhere/at/all"),
        ("grading", ["--model=tiny", "--completions=9", "--hang=5"], "--hang must be at most half"),
        ("grading", ["--model=tiny", "--tokens=0"], "--tokens must be at least 1; found 0"),
        ("learn", ["--model=tiny", "--kl_coef=-1"], "--kl_coef must be a finite number of 0 or more; found -1.0"),
        ("step", ["--model=tiny", "--samples=1"], "--samples must be at least 2"),
        ("step", ["--model=tiny", "--new_tokens=999"], "at most 512"),
    ],
)
def test_a_wrong_flag_is_a_one_line_error(name, argv, message, monkeypatch, capsys):
    assert jax.device_count() == 8  # starts the backend: layouts.py changes XLA_FLAGS
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", [name, *argv])
    with pytest.raises(SystemExit) as exit:
        run_entry_point(importlib.import_module(name).main)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and not out
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and message in err


@pytest.mark.parametrize("name", FIELDS)
def test_help_explains_every_field(name, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(name).main(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    for field in [*FIELDS[name].split(), "example:"]:
        assert re.search(rf"\b{field}", text), field


@pytest.mark.slow
def test_comparing_static_batches_with_refill_adds_fields():
    made = run_script("rollout", *COMMANDS["rollout"], "--compare")
    assert made.returncode == 0, made.stderr
    result = json.loads(made.stdout)
    assert all(result[field] > 0 for field in ("static_s", "static_tok_s", "refill_s", "refill_tok_s", "speedup"))


@pytest.mark.slow
def test_learning_without_a_reference_needs_no_score():
    argv = ["--model=tiny", "--kl_coef=0", "--dtype=bfloat16", "--lengths=lognormal", "--remat=none"]
    made = run_script("learn", *SMALL, *argv)
    assert made.returncode == 0, made.stderr
    result = json.loads(made.stdout)
    assert result["score_s"] == result["score_temp_gib"] == 0 and result["learn_s"] == result["update_s"]
    lengths = np.clip(np.round(np.random.default_rng(0).lognormal(math.log(32), 1, 4)), 1, 4)
    assert result["tokens"] - result["prompt_tokens_computed"] == lengths.sum()


@pytest.mark.slow
def test_completions_do_not_depend_on_slots_and_devices():
    sizes = ["--prompts=3", "--samples=4", "--new_tokens=6", "--slots=2,12", "--devices=1,2"]
    made = run_script("layouts", "--model=tiny", *sizes)
    assert made.returncode == 0, made.stderr
    result = json.loads(made.stdout)
    assert set(FIELDS["layouts"].split()) <= set(result)
    assert result["sequences"] == 12 and result["layouts"] == 4 and result["unexplained"] == 0


@pytest.mark.slow
def test_grading_counts_the_completions_that_hang():
    sizes = ["--completions=8", "--tokens=40", "--hang=2", "--deadline=0.5"]
    made = run_script("grading", "--model=tiny", *sizes)
    assert made.returncode == 0, made.stderr
    result = json.loads(made.stdout)
    assert set(FIELDS["grading"].split()) <= set(result)
    assert (result["timeouts"], result["errors"]) == (2, 0)


# All but that of on_device.py, which tests/test_on_device.py runs.
DOCUMENTED = re.findall(
    r"```bash\npython (benchmarks/(?!on_device).*?)\n```", (ROOT / "docs/performance.md").read_text()
)
SHORTER = {
    "benchmarks/rollout.py": [*SMALL, "--slots=4"],
    "benchmarks/learn.py": [*SMALL, *TWO_ROWS_PER_GROUP],
    "benchmarks/step.py": [*SMALL, *TWO_ROWS_PER_GROUP],
    "benchmarks/grading.py": ["--completions=8", "--hang=2", "--deadline=0.5", "--model=tiny"],
    "benchmarks/layouts.py": ["--prompts=1", "--samples=2", "--new_tokens=2", "--model=tiny"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", DOCUMENTED)
def test_a_documented_command_runs(command):
    script, *argv = shlex.split(command)
    made = run_script(Path(script).stem, *argv, *SHORTER[script])
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout).get("unexplained", 0) == 0
