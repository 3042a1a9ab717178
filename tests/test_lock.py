"""The lock of a workdir: one job at a time, on one machine or several, and locks of jobs that have ended."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_jax.run.lock
from grpo_jax.errors import UserError
from grpo_jax.run.lock import WorkdirLock

REPO = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Makes all waits short; the tests renew the file themselves."""
    for name in ("BEAT_S", "PATIENCE_S", "SETTLE_S"):
        monkeypatch.setattr(grpo_jax.run.lock, name, 0.01)


def on_another_machine(path, **names):
    """Changes the names in run.lock as if a job on another machine had written them."""
    path.write_text(json.dumps(json.loads(path.read_text() or "{}") | {"host": "elsewhere", "machine": "x"} | names))


def test_a_second_job_is_refused_in_one_line_that_names_the_first(tmp_path):
    first, second = WorkdirLock(tmp_path / "run"), WorkdirLock(tmp_path / "run")
    first.take()
    owner = json.loads((tmp_path / "run" / "run.lock").read_text())
    with pytest.raises(UserError, match=rf"but process {owner['pid']} on {owner['host']} has used it since .* Wait"):
        second.take()
    first.check()
    first.close()
    assert not (tmp_path / "run").exists()
    second.take()
    second.path.unlink()
    second.check()  # nobody else has it
    second.close()


def test_the_lock_of_a_killed_process_is_taken_over_with_a_message(tmp_path, capsys):
    program = "import os, sys, pathlib; from grpo_jax.run.lock import WorkdirLock\n"
    program += "WorkdirLock(pathlib.Path(sys.argv[1])).take(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=REPO, check=False, capture_output=True)
    owner = json.loads((tmp_path / "run.lock").read_text())
    lock = WorkdirLock(tmp_path)
    lock.take()
    assert f"Process {owner['pid']} has ended without releasing {tmp_path}" in capsys.readouterr().out
    lock.close()


def leave(tmp_path):
    """Leaves run.lock as a job does on another machine, which `flock` does not exclude."""
    lock = WorkdirLock(tmp_path)
    lock.take()
    on_another_machine(lock.path, pid=7)
    lock.close()
    assert json.loads(lock.path.read_text())["pid"] == 7  # only its own name is removed


@pytest.mark.parametrize("sign", ["beat", "name"])
def test_a_job_on_another_machine_that_renews_the_file_keeps_the_workdir(tmp_path, monkeypatch, sign):
    leave(tmp_path)
    lock, path = WorkdirLock(tmp_path), tmp_path / "run.lock"

    def live(seconds):
        path.touch() if sign == "beat" else on_another_machine(path, pid=8)

    monkeypatch.setattr(grpo_jax.run.lock.time, "sleep", live)
    with pytest.raises(UserError, match=f"process {7 if sign == 'beat' else 8} on elsewhere has used it since"):
        lock.take()
    with open(path) as file:  # raises if the refused start holds the lock
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("text", [None, "{" * 999, "[1]", "\x00\ud800", "{}"])
def test_a_lock_of_another_machine_that_is_not_renewed_is_taken_over_with_a_message(tmp_path, capsys, text):
    leave(tmp_path)
    if text is not None:
        (tmp_path / "run.lock").write_text(text, errors="surrogatepass")
    lock = WorkdirLock(tmp_path)
    lock.take()
    assert "shows no sign of life; this run takes over" in capsys.readouterr().out
    lock.check()
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    lock.close()


def test_a_job_that_finds_the_name_of_another_job_stops_and_leaves_it_there(tmp_path, monkeypatch):
    """Two machines start at the same time, and the one that writes its name last has the workdir."""
    lock = WorkdirLock(tmp_path)
    lock.take()
    monkeypatch.setattr(grpo_jax.run.lock, "SETTLE_S", 60.0)
    monkeypatch.setattr(grpo_jax.run.lock.time, "sleep", lambda seconds: on_another_machine(lock.path))
    with pytest.raises(UserError, match="on elsewhere has used it since"):
        lock.check()
    lock.close()
    assert json.loads(lock.path.read_text())["host"] == "elsewhere"


def test_without_flock_the_modification_time_decides(tmp_path, monkeypatch, capsys):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(grpo_jax.run.lock.fcntl, "flock", unsupported)
    monkeypatch.setattr(grpo_jax.run.lock, "PATIENCE_S", 2.0)
    first, second = WorkdirLock(tmp_path), WorkdirLock(tmp_path)
    first.take()  # beats every 10 ms
    with pytest.raises(UserError, match="Only one job at a time"):
        second.take()
    first.check()
    first.close()
    second.take()
    second.close()


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--workdir must be a writable folder, but .*Not a directory"):
        WorkdirLock(tmp_path / "file" / "run").take()


def test_a_job_that_writes_nothing_leaves_nothing(tmp_path):
    """A folder that was there before stays."""
    for workdir in (tmp_path / "new" / "run", tmp_path / "old"):
        (tmp_path / "old").mkdir(exist_ok=True)
        lock = WorkdirLock(workdir)
        lock.take()
        lock.close()
    assert not (tmp_path / "new" / "run").exists() and list((tmp_path / "old").iterdir()) == []
    lock = WorkdirLock(tmp_path / "old")
    lock.take()
    (tmp_path / "old" / "config.json").touch()
    lock.close()
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == ["config.json"]


def test_a_lock_whose_file_is_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """Otherwise a third job could take the lock of the new file at the same time."""
    first, hold = WorkdirLock(tmp_path / "run"), WorkdirLock.hold

    def hold_after_removal(self, descriptor):
        if first.path.exists() and not removed:
            removed.append(first.path.unlink())
        hold(self, descriptor)

    removed = []
    monkeypatch.setattr(WorkdirLock, "hold", hold_after_removal)
    first.take()
    assert removed and first.path.is_file()
    with pytest.raises(UserError, match="Only one job"):
        WorkdirLock(tmp_path / "run").take()
    first.close()
