"""Files that others wrote: each of tests/hostile.py is refused in one line that names the cause; none runs code.

Each case has room for 512 MiB of memory besides what the process has, and a limit of time that only an endless one
would reach.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax import load
from grpo_jax.config import check, flags
from grpo_jax.errors import UserError
from grpo_jax.reporting.page import make_page, report_data
from grpo_jax.reporting.runs import read_runs
from grpo_jax.tasks import read_problems
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tokenizer import load_tokenizer
from tests import hostile

ROOM, SECONDS = 1 << 29, 300


ALWAYS = ("NaN weight", "pickled weights", "shard above the folder", "10**12 questions")


def some_slow(*tables):
    """Returns the names of cases, of which all but every fourth and those in `ALWAYS` are slow."""
    names = [name for table in tables for name in table]
    fast = {*names[::4], *ALWAYS}
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@contextlib.contextmanager
def limits():
    """Limits the memory and the time of a block."""

    def stop(*_):
        raise TimeoutError

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def assert_refused(tmp_path, says, read):
    """Asserts that `read` raises a UserError in one line, or nothing if `says` is empty, and that no code ran."""
    with limits():
        if says:
            with pytest.raises(UserError, match=says) as raised:
                read()
            assert "Traceback" not in str(raised.value)
        else:
            read()
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module", autouse=True)
def started_libraries():
    """Lets JAX and `transformers` take what they need once, before memory is limited."""
    load("tiny")
    load_tokenizer(find_model("tiny"))


def make(tmp_path, cases, name):
    (tmp_path / "made").mkdir()
    return cases[name][0](tmp_path / "made")


@pytest.mark.parametrize("name", some_slow(hostile.MODELS))
def test_a_hostile_model_is_refused(tmp_path, name):
    path = make(tmp_path, hostile.MODELS, name)
    assert_refused(tmp_path, hostile.MODELS[name][1], lambda: (load(path), load_tokenizer(find_model(path))))


@pytest.mark.parametrize("name", some_slow(hostile.GGUFS))
def test_a_hostile_gguf_file_is_refused(tmp_path, name):
    path = make(tmp_path, hostile.GGUFS, name)
    assert_refused(tmp_path, hostile.GGUFS[name][1], lambda: load(path))


@pytest.mark.parametrize("name", some_slow(hostile.PROBLEMS))
def test_a_hostile_file_of_problems_is_refused(tmp_path, name):
    path = make(tmp_path, hostile.PROBLEMS, name)
    assert_refused(tmp_path, hostile.PROBLEMS[name][1], lambda: read_problems(path))


@pytest.mark.parametrize("name", some_slow(hostile.CONFIGS))
def test_a_config_that_no_run_can_have_is_refused(tmp_path, name):
    line, says = hostile.CONFIGS[name]
    (tmp_path / "c.py").write_text(hostile.config_file(line))
    assert_refused(tmp_path, says, lambda: check(flags.load_config(str(tmp_path / "c.py"))))


@pytest.mark.parametrize("name", some_slow(hostile.RUN_CONFIGS, hostile.LOGS))
def test_a_hostile_workdir_is_refused_or_what_can_be_read_is_shown(tmp_path, name):
    cases = hostile.RUN_CONFIGS | hostile.LOGS
    workdir = make(tmp_path, cases, name)

    def write_report():
        runs = read_runs([str(workdir)])
        return make_page(report_data(runs, runs[0].config, "none"))

    if name != "key is a section":
        assert_refused(tmp_path, cases[name][1], write_report)


@pytest.mark.slow
def test_every_entry_point_refuses_them_with_exit_code_2_and_one_line(tmp_path):
    command = [sys.executable, "-m", "tests.hostile_runs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    start, *runs = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0 and len(runs) > 150, done.stderr
    for run in runs:
        errors = [line for line in run["output"].splitlines() if line.startswith("error: ")]
        assert run["code"] == (2 if run["says"] else 0), run
        assert not run["says"] or (len(errors) == 1 and re.search(run["says"], errors[0])), run
        assert "Traceback" not in run["output"], run
        assert run["peak"] < start["peak"] + ROOM, run
    assert not list(tmp_path.rglob("ran"))


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(find_model("tiny"), blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    assert find_model(snapshot) == snapshot
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(find_model("tiny") / "config.json")
    with pytest.raises(UserError, match="must lie in the model folder"):
        find_model(snapshot)
