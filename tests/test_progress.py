"""Phases of a command: what is shown, where, and when."""

import io
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import monitoring

from grpo_jax.run import progress
from grpo_jax.run.progress import FIRST_SECONDS, QUIET_SECONDS, Progress
from grpo_jax.run.rollout_progress import RolloutProgress
from grpo_jax.run.slowness import REMEMBERED, SLOW_FACTOR, SLOW_FIRST_SECONDS, SLOW_SECONDS


class Clock:
    """A clock that stands still until a test moves it."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """Replaces the progress of this process by one that is driven by hand: no thread shows it."""
    clock = Clock()
    monkeypatch.setattr(progress, "PROGRESS", Progress(clock))
    monkeypatch.setattr(Progress, "keep_ticking", lambda self, stop: None)
    return clock


def test_a_line_that_cannot_be_printed_ends_nothing(monkeypatch):
    """Such as one in a log on a full disk; the thread that receives signals prints lines, too."""
    log = io.StringIO()
    monkeypatch.setattr(log, "flush", lambda: os.write(-1, b""))
    progress.announce("a line", log)
    assert log.getvalue() == "a line\n"


def test_a_line_is_printed_when_nothing_has_been_printed_for_a_while(clock, capsys):
    def lines():
        progress.PROGRESS.tick()
        return capsys.readouterr().err

    with progress.phase("Training"):
        progress.set_detail("step 3/20")
        with progress.phase("Sampling"):
            clock.now += FIRST_SECONDS / 2
            assert lines() == ""
            clock.now += FIRST_SECONDS / 2
            assert lines() == "step 3/20  Sampling, 1 s\n"
            clock.now += QUIET_SECONDS / 2
            assert lines() == ""
            progress.set_detail("24 of 128 sequences")
            clock.now += QUIET_SECONDS / 2
            assert lines() == "step 3/20  Sampling: 24 of 128 sequences, 4 s\n"
            progress.set_bytes(1_234_000_000, 3_100_000_000)
            assert progress.current_phase() == "step 3/20  Sampling: 1.2 of 3.1 GB, 4 s"
            progress.set_bytes(1_234_000, 310_000_000)
            assert progress.current_phase() == "step 3/20  Sampling: 1 of 310 MB, 4 s"
            clock.now += QUIET_SECONDS - 0.5
            progress.announce("a line")
            assert capsys.readouterr().out == "a line\n"
            clock.now += QUIET_SECONDS - 0.5
            assert lines() == ""
        clock.now += 1
        assert lines() == "Training: step 3/20, 12 s\n"
    clock.now += QUIET_SECONDS
    assert lines() == ""  # nothing is going on


def test_a_phase_that_takes_far_longer_than_usual_says_where_the_program_is(clock, capsys):
    """Each of several processes reports it. The time of an inner phase does not count towards the outer one."""

    def report_after(seconds):
        clock.now += seconds
        progress.PROGRESS.report_slowness()
        return capsys.readouterr().err

    usual = 2 * SLOW_SECONDS / SLOW_FACTOR
    progress.mute(True)
    with progress.phase("Training"):
        for update, seconds in enumerate([usual, *[usual / 4] * (REMEMBERED - 1)]):
            with progress.phase(f"Waiting for update {update}"):
                assert report_after(seconds) == ""
        with progress.phase(f"Waiting for update {REMEMBERED}"):
            progress.PROGRESS.compile_seconds += SLOW_FIRST_SECONDS  # compiling does not count
            assert report_after(SLOW_FIRST_SECONDS + SLOW_FACTOR * usual - 1) == ""
            first, *stack = report_after(1).splitlines()
            taken = f"slow: Waiting for update {REMEMBERED} has taken {2 * SLOW_SECONDS:.0f} s;"
            assert first.startswith(f"{taken} the longest time until now was 24 s. Process {os.getpid()} on ")
            assert 1 < len(stack) <= 5 and "/run/progress.py:" in stack[-2] and "in report_slowness" in stack[-2]
            assert report_after(2 * SLOW_SECONDS - 1) == ""
            assert "240 s" in report_after(1)  # reported again, because the time has doubled
        with progress.phase("Sampling"):  # runs for the first time, so only a lack of progress is unusual
            for _ in range(3):
                assert report_after(SLOW_FIRST_SECONDS - 1) == ""
                progress.set_detail(f"{clock.now} sequences")
            assert "Sampling has shown no progress for 600 s" in report_after(SLOW_FIRST_SECONDS)
        assert report_after(SLOW_SECONDS - 1) == ""
    with progress.phase("Sampling"):  # outside "Training", so there is nothing to compare it with
        assert report_after(SLOW_FIRST_SECONDS - 1) == ""


def test_a_thread_shows_a_phase_for_as_long_as_it_lasts(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.01)
    printed = ""

    @progress.phase("Waiting")
    def wait():
        nonlocal printed
        deadline = time.monotonic() + 30
        while "Waiting, " not in printed and time.monotonic() < deadline:
            time.sleep(0.01)
            printed += capsys.readouterr().err

    for _ in range(2):
        with pytest.raises(ValueError, match="stop"), progress.phase("Outer"):
            wait()
            raise ValueError("stop")
        assert "\nWaiting, " in f"\n{printed}" and "progress" not in [thread.name for thread in threading.enumerate()]
        printed = ""


def test_an_interrupted_end_of_a_phase_leaves_no_phase_behind(clock, monkeypatch):
    def interrupt(thread):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupt)
        with pytest.raises(KeyboardInterrupt), progress.phase("Training"):
            pass
    assert progress.PROGRESS.phases == []  # so the next phase has a thread again, as in a notebook that goes on


def test_a_terminal_shows_the_phase_on_one_line_and_behind_the_bar(clock, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "is_terminal", lambda: True)

    def written():
        progress.PROGRESS.tick()
        text = terminal.getvalue()
        terminal.seek(0)
        terminal.truncate()
        return text

    with progress.phase("Training"):
        assert written().strip() == "Training, 0 s"
        assert written() == ""  # it has not changed
        clock.now += 1
        assert written().startswith("\rTraining, 1 s")
        bar = progress.step_bar(20, 2)
        bar.update()
        progress.set_detail("step 4/20")
        with progress.phase("Sampling"):
            text = written()
        assert "3/20 " in text and text.rstrip().endswith("Sampling, 0 s") and "step 4/20" not in text
        progress.close_bar()
    assert written().endswith("\n")  # what is printed next does not overwrite the bar


def test_a_stream_that_only_calls_itself_a_terminal_gets_plain_lines(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    assert not progress.is_terminal()


def test_only_the_first_process_shows_anything(monkeypatch, capsys):
    for variable in progress.PROCESS_INDEX_VARIABLES:
        with monkeypatch.context() as patch:
            assert not Progress().is_muted
            patch.setenv(variable, "0")
            assert not Progress().is_muted
            patch.setenv(variable, "3")
            assert Progress().is_muted
    monkeypatch.setattr(progress, "PROGRESS", Progress())
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    progress.mute(True)
    with progress.phase("Training"):
        progress.announce("a line")
        progress.PROGRESS.tick()
    assert capsys.readouterr() == ("", "")
    progress.mute(False)
    progress.announce("a line")
    assert capsys.readouterr() == ("a line\n", "")


def test_a_phase_names_the_program_that_is_compiled_and_whether_it_was_cached(clock):
    """Relies on the events of JAX itself."""

    def update(x):
        return x * 2.0 + 17.0

    def see(*_, **__):
        seen.append(shown.describe())

    seen, shown = [], progress.PROGRESS
    saved = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        with progress.phase("Training"):
            monitoring.register_scalar_listener(see)
            monitoring.register_event_duration_secs_listener(see)
            jax.jit(update)(np.float32(1)).block_until_ready()
            assert seen[0] == "Training: compiling the update, 0 s"
            assert shown.compiling is None and 0 < shown.compile_seconds < 60
            jax.clear_caches()
            jax.jit(update)(np.float32(1)).block_until_ready()  # now it certainly is on disk
            assert {f"Training: compiling the update (cached: {cached}), 0 s" for cached in ("no", "yes")} <= set(seen)
            before = len(seen)
            jax.jit(lambda x: x - 3.0)(np.float32(1)).block_until_ready()  # has no name for users
            assert set(seen[before:]) == {"Training, 0 s"}
    finally:
        monitoring.unregister_scalar_listener(see)
        monitoring.unregister_event_duration_listener(see)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", saved)


def state_of(columns=136, **fields):
    kv = SimpleNamespace(k=np.zeros((1, 1, 1, 1, columns)))
    return SimpleNamespace(kv_cache=[kv], **{name: np.array(values, np.int32) for name, values in fields.items()})


def test_the_progress_of_a_rollout_is_counted_and_extrapolated(clock, monkeypatch):
    """10 sequences of at most 50 tokens, four slots, and two decode steps a second."""
    monkeypatch.setattr(RolloutProgress, "now", lambda self: clock.now)
    with progress.phase("Sampling"):
        reports = RolloutProgress(10, 50)
        assert reports.report(state_of()) == 8  # not known yet how long a step takes
        assert progress.PROGRESS.programs["decode_tokens"] == "decode with 136 cache columns"
        clock.now += 8.0
        # 16 steps: 64 tokens; three of the seven sequences that have been started are done
        state = state_of(
            num_started=[7], sequence=[3, 4, 5, 6], num_sampled=[16, 16, 2, 1], lengths=[14, 15, 0, 16, 16, 2, 1]
        )
        assert reports.report(state) == 4  # two seconds
        assert progress.PROGRESS.phases[-1][1] == "3 of 10 sequences finished, 8 tokens/s, about 19 s left"
        clock.now += 10.0
        state = state_of(num_started=[10], sequence=[-1, 8, -1, 9], num_sampled=[9, 12, 7, 2], lengths=[114, 0, 10])
        reports.report(state)
        # 20 steps for three slots on average, and the newest sequence may need 48 more
        assert progress.PROGRESS.phases[-1][1] == "8 of 10 sequences finished, 6 tokens/s, up to 24 s left"
        reports.start_batch(8)
        assert reports.earlier == 8 and reports.last_time is None


def test_a_run_says_where_it_writes_before_jax_is_imported(tmp_path):
    """JAX's import takes seconds on a slow machine."""
    code = "import sys; sys.modules['jax'] = None; from grpo_jax.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "--config=configs/r1zero.py", f"--workdir={tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"Training in {tmp_path}/run\n" and "import of jax halted" in done.stderr
