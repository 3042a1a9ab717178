"""Full, read-only and failing disks: one line, nothing lost that was written before, and no process that hangs."""

import errno
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax.run.disk
import grpo_jax.run.saving
import grpo_jax.run.train
from grpo_jax import config
from grpo_jax.config.flags import run_entry_point
from grpo_jax.config.workdir import replace_file
from grpo_jax.errors import UserError
from grpo_jax.run.checkpoint import saved_steps
from grpo_jax.run.console import RunLog
from grpo_jax.run.disk import CheckpointSaver, DiskError, disk_errors
from grpo_jax.run.drawn import DrawnCompletions
from grpo_jax.run.metrics import LogFile
from grpo_jax.run.saving import CheckpointStore
from grpo_jax.run.train import stop_run
from grpo_jax.text.problem import Prompts
from grpo_jax.types import Rollout, TrainState
from tests.tiny import write_meta

REPO = Path(__file__).parent.parent
# As TensorStore reports it.
FULL = f"RESOURCE_EXHAUSTED: Failed to write 9 bytes to file 8: {os.strerror(errno.ENOSPC)} [os_error_code='28']"


class FullDisk:
    """Makes every write to a file descriptor write a few bytes and then fail, until `is_full` is False."""

    def __init__(self, monkeypatch):
        self.write, self.is_full = os.write, False
        monkeypatch.setattr(os, "write", self)
        monkeypatch.setattr(os, "fsync", self.sync)

    def __call__(self, descriptor, content):
        if not self.is_full:
            return self.write(descriptor, content)
        if len(content) <= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.write(descriptor, content[: min(5, len(content) - 5)])

    def sync(self, descriptor):
        if self.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch):
    return FullDisk(monkeypatch)


def test_a_log_that_cannot_be_written_gets_all_of_a_line_or_nothing(tmp_path, full_disk):
    log = LogFile(tmp_path / "log.jsonl")
    log.append_json({"step": 1})
    full_disk.is_full = True
    with pytest.raises(OSError, match="No space left"):
        log.append_json({"step": 2})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'
    full_disk.is_full = False
    log.append_json({"step": 2})
    log.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_file_that_cannot_be_replaced_keeps_its_content_and_leaves_nothing_behind(tmp_path, full_disk):
    replace_file(tmp_path / "a.json", b"old")
    full_disk.is_full = True
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


def open_log(workdir, retry_s):
    raw = config.default()
    raw.checkpoint.retry_s = retry_s
    return RunLog(config.check(raw), SimpleNamespace(model_cfg=SimpleNamespace(experts=None)), workdir, 0)


LINE = {"rollout/truncated_frac": 0.9, "optim/lr": 1.0, "time/rollout_s": 1.0}  # which the run warns of
LINE |= {"reward/mean": 0.5, "rollout/length_mean": 2.0, "rollout/tokens_per_s": 1.0, "time/step_s": 1.0}
LINE |= {"groups/zero_variance_frac": 0.0, "optim/no_signal": 0.0}


def test_metrics_that_cannot_be_written_end_the_run_in_one_line(tmp_path, full_disk):
    log = open_log(tmp_path, 0)
    log.write(1, LINE)
    full_disk.is_full = True
    says = r"but metrics and samples could not be written: No space left on device \(.* are free\)\. Free some space"
    with pytest.raises(DiskError, match=says + ", and start the run again: it starts over") as raised:
        log.write(2, LINE)
    assert raised.value.leaves_threads  # so the process ends without waiting for Orbax
    log.close()  # raises nothing more
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()] == [1]


def test_with_a_time_to_try_again_metrics_and_samples_are_kept_until_there_is_room(tmp_path, full_disk, capsys):
    """Everything is written in the end, in order, and one line says that something is wrong."""
    log, expected = open_log(tmp_path / "late", 60), open_log(tmp_path / "at once", 60)
    full_disk.is_full = True
    for step in (1, 2, 3):
        log.write_samples("train", step, [{"completion": "x", "rewards": {}}])
        log.write(step, LINE)
    full_disk.is_full = False
    log.attempt()
    shown = capsys.readouterr().out
    assert shown.count("could not be written") == 1 and "writes them as soon as it can" in shown
    for step in (1, 2, 3):
        expected.write_samples("train", step, [{"completion": "x", "rewards": {}}])
        expected.write(step, LINE)
    for name in ("metrics.jsonl", "warnings.jsonl", *(f"samples/train-00000{step}.jsonl" for step in (1, 2, 3))):
        assert (tmp_path / "late" / name).read_bytes() == (tmp_path / "at once" / name).read_bytes()
    events = [next((tmp_path / run / "tensorboard").iterdir()).stat().st_size for run in ("late", "at once")]
    assert events[0] == events[1]


@pytest.mark.parametrize("error", [ValueError(FULL), OSError(errno.EROFS, "Read-only"), OSError(errno.EIO, "I/O")])
def test_the_error_of_a_disk_says_what_to_do(tmp_path, error):
    is_full = isinstance(error, ValueError)
    room = r"No space left on device \(it needs 1,000,000.0 GB, and .* are free\)\. Free 1.* GB"
    fix = room if is_full else r"(Read-only file system|Input/output error)\. Make sure that it can be written"
    write_meta(tmp_path, 4, {})
    (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    size = 10**15 if is_full else 5
    with pytest.raises(
        DiskError, match=rf"the checkpoint could not be written: {fix}, and start the run again: it resu"
    ):
        with disk_errors(tmp_path, "the checkpoint", size):
            raise RuntimeError("at the end of a chain") from error
    assert os.listdir(tmp_path / "checkpoints") == ["4"]  # which leaves as much room as there can be


def test_other_errors_are_not_taken_for_a_failing_disk(tmp_path):
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path, "x"):
        print(1 / 0)
    with pytest.raises(ValueError, match="shapes"), disk_errors(tmp_path, "x"):
        raise ValueError("shapes (3, 1) and (4,) differ")


def save(saver, step):
    with saver.saving(step, 80):
        state = TrainState(
            jnp.int32(step), {"w": jnp.full(20, step)}, {"n": jnp.int32(1)}, jnp.int32(0), jnp.bool_(False)
        )
        saver.store.save(state, {"step": step, "line": {}}, None, None, is_replaced=False)


@pytest.fixture
def broken_writes(monkeypatch):
    """Returns a dict; while "is_broken" is True in it, the arrays of a checkpoint cannot be written."""
    from orbax.checkpoint._src.serialization import serialization

    write, broken = serialization.async_serialize_from_host, {"is_broken": True}

    async def fail(*args, **kwargs):
        if broken["is_broken"]:
            raise ValueError(FULL)
        await write(*args, **kwargs)

    monkeypatch.setattr(serialization, "async_serialize_from_host", fail)
    return broken


def wait_for_background(saver):
    while saver.store.manager.is_saving_in_progress():
        time.sleep(0.01)


def test_a_save_that_fails_in_the_background_is_noticed_at_the_next_step(tmp_path, broken_writes, capfd):
    broken_writes["is_broken"] = False
    saver = CheckpointSaver(CheckpointStore(tmp_path, 2, "", 0), tmp_path, 0)
    save(saver, 1)
    saver.check()
    assert saver.finish()
    broken_writes["is_broken"] = True
    save(saver, 2)
    wait_for_background(saver)
    with pytest.raises(DiskError, match=r"checkpoint of step 2 could not .*it resumes from step 1, its newest check"):
        saver.check()
    saver.close()
    assert saved_steps(tmp_path) == [1] and os.listdir(tmp_path / "checkpoints") == ["1"]
    assert capfd.readouterr() == ("", "")  # no tracebacks of Orbax


def test_a_save_that_failed_is_tried_again_and_old_checkpoints_are_forgotten_only_then(tmp_path, broken_writes, capsys):
    broken_writes["is_broken"] = False
    saver = CheckpointSaver(CheckpointStore(tmp_path, 1, "", 0), tmp_path, 1)
    save(saver, 1)
    assert saver.finish() and not saver.is_due()
    broken_writes["is_broken"] = True
    save(saver, 2)
    wait_for_background(saver)
    saver.check()
    assert "The run continues, and tries again in 1 s." in capsys.readouterr().out
    assert not saver.finish() and saver.is_due() and saved_steps(tmp_path) == [1]
    broken_writes["is_broken"] = False
    save(saver, 3)
    assert saver.finish() and not saver.is_due() and saved_steps(tmp_path) == [3]
    saver.close()


@pytest.mark.parametrize("often", [1, 2])
def test_a_checkpoint_that_is_not_what_was_saved_can_be_saved_again_at_the_same_step(
    tmp_path, monkeypatch, capsys, often
):
    damage = iter(["its policy is damaged"] * often)
    monkeypatch.setattr(grpo_jax.run.saving, "read_back", lambda *args: iter([next(damage, "")]))
    saver = CheckpointSaver(CheckpointStore(tmp_path, 1, "", 0), tmp_path, 0)
    save(saver, 1)
    assert saver.finish() and not saver.has(1)  # the end of a run then saves again
    assert "warning: The checkpoint of step 1 differs from what was saved: its policy" in capsys.readouterr().out
    save(saver, 1)
    if often == 1:
        assert saver.finish() and saver.has(1) and set(os.listdir(tmp_path / "checkpoints")) == {"1", "damaged-1"}
    else:
        with pytest.raises(UserError, match=r"step 1 was damaged twice: its .*damaged-1-2\. Replace the disk"):
            saver.finish()
    saver.close()


def test_a_run_that_must_stop_does_not_wait_until_there_is_room(tmp_path, broken_writes, monkeypatch):
    saver = CheckpointSaver(CheckpointStore(tmp_path, 1, "", 0), tmp_path, 600)
    monkeypatch.setattr(grpo_jax.run.disk, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pytest.fail))
    monkeypatch.setattr(grpo_jax.run.train, "start_saving", lambda cfg, setup, run: save(setup.saver, run.step))
    with pytest.raises(DiskError, match="checkpoint of step 1 could not be written"):
        stop_run(None, SimpleNamespace(saver=saver), SimpleNamespace(step=1))
    saver.close()


def test_completions_that_cannot_be_kept_leave_the_save_under_way_alone(tmp_path, full_disk, capsys):
    prompts = Prompts(np.zeros((1, 3), np.int32), np.full(1, 3, np.int32), np.zeros(1, np.int32))
    cfg, shape = config.check(config.default()), (1, 8, 64)
    context = SimpleNamespace(stop_table=np.zeros((1, 4), np.int8))
    kept = DrawnCompletions(cfg, context, tmp_path, prompts, jax.random.key(0), {"weight": np.ones(3)})
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    full_disk.is_full = True
    lengths, tokens = np.ones(shape[:2], np.int32), np.ones(shape, np.int32)
    assert kept.save(Rollout(tokens, tokens.astype(np.float32), lengths, lengths == 1, prompts.ids)) == 0
    assert os.listdir(tmp_path / "checkpoints") == ["5.orbax-checkpoint-tmp"]
    assert "warning: The completions of the next rollout could not be written: " in capsys.readouterr().out


@pytest.fixture
def idle_saver(tmp_path, monkeypatch):
    """Returns the saver of a run whose checkpoint of step 2 is sound, which has not saved any."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which the saver replaces
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    manager = SimpleNamespace(is_saving_in_progress=lambda: False, wait_until_finished=lambda: None)
    return CheckpointSaver(SimpleNamespace(step=0, sound={2}, manager=manager), tmp_path, 60)


def test_what_a_killed_save_has_left_is_removed(idle_saver, tmp_path):
    assert os.listdir(tmp_path / "checkpoints") == []


def test_a_step_has_a_checkpoint_unless_its_save_failed(idle_saver):
    assert idle_saver.has(2) and not idle_saver.has(3)
    with idle_saver.saving(3, 80):
        idle_saver.store.step = 3
    assert idle_saver.has(3)
    with idle_saver.saving(3, 80):
        raise ValueError(FULL)
    assert not idle_saver.has(3) and idle_saver.has(2)


def test_a_save_that_fails_while_the_run_ends_hides_no_other_error(idle_saver, capsys):
    def fail():
        raise ValueError(FULL)

    closed = []
    idle_saver.store.manager.wait_until_finished, idle_saver.store.close = fail, lambda: closed.append(True)
    idle_saver.close()
    assert closed and "warning: The workdir " in capsys.readouterr().out
    assert sys.unraisablehook == idle_saver.ignore_closed_loop  # other arrays may still be written


def test_a_process_whose_output_goes_to_the_full_disk_ends_without_waiting_for_threads(monkeypatch):
    def main(argv):
        raise DiskError("The disk is full.", "Free some room.")

    full, codes = io.StringIO(), []
    monkeypatch.setattr(full, "write", lambda text: os.write(-1, b""))
    monkeypatch.setattr(sys, "stderr", full)
    monkeypatch.setattr(os, "_exit", codes.append)
    with pytest.raises(SystemExit):
        run_entry_point(main)
    assert codes == [2]


FAILING_SAVE = """
import resource, sys, time
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from grpo_jax.config.flags import run_entry_point
from grpo_jax.run.disk import CheckpointSaver
from grpo_jax.run.saving import CheckpointStore
from grpo_jax.types import TrainState

def main(argv):
    workdir = Path(argv[0])
    saver = CheckpointSaver(CheckpointStore(workdir, 2, "", 0), workdir, 0)
    arrays = {f"w{n}": jnp.asarray(np.random.default_rng(n).normal(size=(64, 1024))) for n in range(40)}
    zero = jnp.int32(0)
    state = TrainState(step=zero, params=arrays, opt_state=arrays, skipped=zero, is_reference=jnp.bool_(False))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    with saver.saving(1, 10**7):
        saver.store.save(state, {"step": 1}, None, None, False)
    saver.finish()

run_entry_point(main)
"""


@pytest.mark.slow
def test_a_failed_save_prints_one_line_and_the_process_ends(tmp_path):
    """Orbax stops waiting when the first array cannot be written, while TensorStore still writes the others."""
    program = [sys.executable, "-c", FAILING_SAVE, str(tmp_path)]
    done = subprocess.run(program, cwd=REPO, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: The workdir ") and ": File too large." in line
