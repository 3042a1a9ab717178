"""Signals: when they end a program at once, when a run defers them, and what it does at its safe points."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_jax import signals
from grpo_jax.errors import UserError
from grpo_jax.run import preemption, train
from grpo_jax.run.preemption import SafePoints, resume_command
from grpo_jax.signals import SignalReceiver, defer_signals, receive_deferred_signals
from tests.tiny import write_meta

REPO = Path(__file__).parent.parent


@pytest.fixture
def received(monkeypatch):
    """Returns what this process has received, for a run that has received nothing yet."""
    received = SignalReceiver()
    for module in (signals, preemption):
        monkeypatch.setattr(module, "SIGNALS", received)
    return received


def test_the_first_signal_that_asks_to_stop_is_deferred_while_there_is_something_to_lose(received):
    assert not received.defer(signal.SIGTERM)
    with defer_signals(lambda number: number != signal.SIGTERM):
        assert not received.defer(signal.SIGTERM) and received.stop is None
        assert received.defer(signal.SIGUSR1) and received.must_save and received.stop is None
        assert received.defer(signal.SIGINT) and received.stop == signal.SIGINT
        assert not received.defer(signal.SIGINT)  # which ends the program at once
    received.stop = None
    assert not received.defer(signal.SIGINT)
    received.stop, received.must_save = signal.SIGINT, True  # of an earlier run of this process
    with defer_signals(lambda number: True):
        assert not received.must_save and received.defer(signal.SIGINT)


def run_program(*lines):
    """Runs a program that receives signals as an entry point does."""
    program = "\n".join(["import os, signal, sys, time", "from grpo_jax.signals import receive_signals", *lines])
    return subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGINT", 130)])
def test_an_entry_point_ends_at_once_and_without_a_traceback(name, code):
    done = run_program("with receive_signals():", f"    os.kill(os.getpid(), signal.{name}); time.sleep(50)")
    assert done.returncode == code and done.stderr.startswith(f"{name}: stopped immediately.")
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


def test_signals_that_the_parent_ignores_stay_ignored_and_sigusr1_ends_nothing():
    done = run_program(
        "signal.signal(signal.SIGINT, signal.SIG_IGN)",
        "with receive_signals():",
        "    for number in (signal.SIGINT, signal.SIGUSR1): os.kill(os.getpid(), number)",
        "    time.sleep(0.1)",
        "print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True\n", "")


def test_a_run_from_python_leaves_signals_that_it_does_not_defer_to_their_own_handlers(received):
    seen = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        own = signal.getsignal(signal.SIGTERM)
        with receive_deferred_signals():
            signal.raise_signal(signal.SIGTERM)
            assert seen == [signal.SIGTERM]
            with defer_signals(lambda number: True):
                signal.raise_signal(signal.SIGTERM)
                assert len(seen) == 1 and received.stop == signal.SIGTERM
                signal.raise_signal(signal.SIGTERM)  # the second one
            assert len(seen) == 2
        assert signal.getsignal(signal.SIGTERM) == own
    finally:
        signal.signal(signal.SIGTERM, former)


def safe_points(workdir, time_limit=0.0):
    cfg = SimpleNamespace(run=SimpleNamespace(time_limit=time_limit))
    return SafePoints(cfg, workdir, "COMMAND")


def test_a_run_stops_at_its_time_limit_and_does_not_change_its_mind(received, tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now)
    points, unlimited = safe_points(tmp_path, 10.0), safe_points(tmp_path)
    now = 109.0
    assert not points.must_stop()
    now = 110.0
    assert points.must_stop() and not unlimited.must_stop()
    stopped = points.stopped(0)
    assert stopped.exit_code == 75 and str(stopped).startswith("Stopped by run.time_limit=10: there is no checkpoint")
    now = 100.0
    assert points.must_stop()


def test_a_request_for_a_checkpoint_is_followed_once(received, tmp_path):
    received.must_save = True
    points = safe_points(tmp_path)
    assert points.must_save() and not points.must_save() and not points.must_stop()


def test_a_stopped_run_says_what_there_is_and_how_to_go_on(received, tmp_path):
    received.stop, points = signal.SIGTERM, safe_points(tmp_path)
    assert not points.may_defer(signal.SIGTERM)  # a run without updates has nothing to lose
    stopped = points.stopped(0)
    assert stopped.exit_code == 75
    assert str(stopped) == "Stopped by SIGTERM: there is no checkpoint yet. To start again: COMMAND"
    write_meta(tmp_path, 3, {})
    (tmp_path / "checkpoints" / "5").mkdir()  # which has no metadata
    received.stop = signal.SIGINT
    stopped = points.stopped(1)
    saved = "the newest checkpoint is from step 3, and 1 completion of the next rollout is kept"
    assert stopped.exit_code == 130 and str(stopped) == f"Stopped by SIGINT: {saved}. To resume: COMMAND"
    assert resume_command(tmp_path / "a b", None, None).endswith(f" --workdir='{tmp_path}/a b'")
    assert resume_command(tmp_path, [], None) == "call grpo_jax.train with the same arguments"


def test_a_run_that_is_asked_for_a_checkpoint_saves_one_and_goes_on(received, tmp_path, monkeypatch):
    saved, run = [], SimpleNamespace(step=2, failure="", experience=None, flight=None)
    monkeypatch.setattr(train, "start_saving", lambda cfg, setup, run: saved.append(run.step))
    monkeypatch.setattr(train, "finish_update", lambda cfg, log, run: run)
    cfg = SimpleNamespace(total_steps=9, eval=SimpleNamespace(every_steps=0), checkpoint=SimpleNamespace(every_steps=5))
    saver = SimpleNamespace(check=lambda: None, is_due=lambda: False)
    setup = SimpleNamespace(safe_points=safe_points(tmp_path), saver=saver, log=SimpleNamespace())
    for _ in range(2):  # between two updates
        received.must_save = not saved
        train.evaluate_and_save(cfg, None, setup, run)
        assert saved == [2]
    received.must_save = True  # in a rollout
    assert not train.at_safe_point(cfg, setup, run) and saved == [2, 2]
    received.must_save, received.stop, run.step = True, signal.SIGTERM, 0
    assert train.at_safe_point(cfg, setup, run) and saved == [2, 2]  # there is nothing to save before the first update


def test_nothing_is_saved_once_another_job_has_the_workdir(tmp_path):
    def refuse():
        raise UserError("another job")

    setup = SimpleNamespace(saver=SimpleNamespace(has=lambda step: step == 1), lock=SimpleNamespace(check=refuse))
    train.start_saving(None, setup, SimpleNamespace(step=1))  # which has been saved
    with pytest.raises(UserError, match="another job"):
        train.start_saving(None, setup, SimpleNamespace(step=2))
