"""Files that others wrote: each of tests/hostile.py is refused in one line that names the cause; none runs code.

Each case has room for 512 MiB of memory besides what the process has, and a limit of time that only an endless one
would reach.
"""

import contextlib
import os
import resource
import signal
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


@pytest.mark.parametrize("name", hostile.MODELS)
def test_a_hostile_model_is_refused(tmp_path, name):
    path = make(tmp_path, hostile.MODELS, name)
    assert_refused(tmp_path, hostile.MODELS[name][1], lambda: (load(path), load_tokenizer(find_model(path))))


@pytest.mark.parametrize("name", hostile.GGUFS)
def test_a_hostile_gguf_file_is_refused(tmp_path, name):
    path = make(tmp_path, hostile.GGUFS, name)
    assert_refused(tmp_path, hostile.GGUFS[name][1], lambda: load(path))


@pytest.mark.parametrize("name", hostile.PROBLEMS)
def test_a_hostile_file_of_problems_is_refused(tmp_path, name):
    path = make(tmp_path, hostile.PROBLEMS, name)
    assert_refused(tmp_path, hostile.PROBLEMS[name][1], lambda: read_problems(path))


@pytest.mark.parametrize("name", hostile.CONFIGS)
def test_a_config_that_no_run_can_have_is_refused(tmp_path, name):
    line, says = hostile.CONFIGS[name]
    lines = ["from grpo_jax import config", "def get_config():", "    cfg = config.default()", f"    {line}"]
    (tmp_path / "c.py").write_text("\n".join([*lines, "    return cfg"]))
    assert_refused(tmp_path, says, lambda: check(flags.load_config(str(tmp_path / "c.py"))))


@pytest.mark.parametrize("name", [*hostile.RUN_CONFIGS, *hostile.LOGS])
def test_a_hostile_workdir_is_refused_or_what_can_be_read_is_shown(tmp_path, name):
    cases = hostile.RUN_CONFIGS | hostile.LOGS
    workdir = make(tmp_path, cases, name)

    def write_report():
        runs = read_runs([str(workdir)])
        return make_page(report_data(runs, runs[0].config, "none"))

    if name != "key is a section":
        assert_refused(tmp_path, cases[name][1], write_report)
