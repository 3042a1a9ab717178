"""Handles full, read-only and failing disks: a run says in one line what was saved and what was not."""

import errno
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from grpo_jax.errors import UserError
from grpo_jax.run.checkpoint import checkpoints_folder, newest_step
from grpo_jax.run.progress import announce
from grpo_jax.run.saving import CheckpointStore

FULL = (errno.ENOSPC, errno.EDQUOT)
# Other disk errors, whose texts TensorStore's messages contain.
FAILING = (errno.EROFS, errno.EIO, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENODEV, errno.ENOENT)


class DiskError(UserError):
    """Raised if something could not be written to the workdir."""

    leaves_threads = True  # Orbax may still be writing other arrays of the checkpoint

    def __init__(self, found: str, advice: str):
        """Creates the error; a run that continues prints `found`, the first half of the message."""
        super().__init__(f"{found} {advice}")
        self.found = found


def disk_errno(error: BaseException | None) -> int:
    """Returns the errno of the disk error that caused an exception; 0 if it has another cause."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        for number in (*FULL, *FAILING):
            if os.strerror(number) in str(error):
                return number
        error = error.__cause__ or error.__context__
    return 0


def format_bytes(count: float) -> str:
    """Formats a number of bytes."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


@contextmanager
def disk_errors(workdir: Path, what: str, size: int = 0) -> Iterator[None]:
    """Turns an exception of the block into a DiskError if it says that the disk cannot be written.

    Args:
        workdir: The run.
        what: What the block writes, such as "the checkpoint of step 20".
        size: Its size in bytes if it is part of a checkpoint, whose remains are removed; 0 for small files.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = disk_errno(error)
        if not number:
            raise
        if size:
            remove_unfinished(workdir)
        reason, fix = os.strerror(number), "Make sure that it can be written"
        if number in FULL:
            free = shutil.disk_usage(workdir).free
            needs = f"it needs {format_bytes(size)}, and " if size else ""
            reason += f" ({needs}{format_bytes(free)} are free)"
            fix = f"Free {format_bytes(max(size - free, 0) * 1.1)}" if size > free else "Free some space"
        newest = newest_step(workdir)
        then = f"resumes from step {newest}, its newest checkpoint" if newest else "starts over"
        found = (
            f"The workdir {workdir} must be writable and have enough room, but {what} could not be written: {reason}."
        )
        raise DiskError(found, f"{fix}, and start the run again: it {then}.") from None


class CheckpointSaver:
    """Notices failed saves, after which the run ends or tries again, depending on `checkpoint.retry_s`."""

    def __init__(self, store: CheckpointStore, workdir: Path, retry_s: int):
        """Wraps the checkpoints of a run, and removes the remains of saves that were killed."""
        # If one of several processes cannot save, the others are waiting for it, so they cannot try again together.
        self.store, self.workdir, self.retry_s = store, workdir, retry_s * (jax.process_count() == 1)
        self.step, self.size = 0, 0  # of the last save
        self.retry_at: float | None = None  # when to try again, by `time.monotonic`; None if no save has failed
        self.has_failed, self.unraisablehook = False, sys.unraisablehook
        sys.unraisablehook = self.ignore_closed_loop
        remove_unfinished(workdir)

    def ignore_closed_loop(self, unraisable: Any) -> None:
        """Reports an exception of a thread, unless it comes from an array that was being written when a save failed."""
        if str(unraisable.exc_value) != "Event loop is closed":
            self.unraisablehook(unraisable)

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Raises a DiskError if the block reveals that the last save failed, or prints it and schedules another try."""
        try:
            with disk_errors(self.workdir, f"the checkpoint of step {self.step}", self.size):
                try:
                    yield
                except Exception:
                    self.has_failed = True
                    raise
        except DiskError as error:
            if not self.retry_s:
                raise
            self.retry_at = time.monotonic() + self.retry_s
            announce(f"warning: {error.found} The run continues, and tries again in {self.retry_s} s.")

    @contextmanager
    def saving(self, step: int, size: int) -> Iterator[None]:
        """Wraps the start of a save of `size` bytes."""
        self.check()
        self.step, self.size, self.retry_at = step, size, None
        with self.noticing():
            yield

    def check(self) -> None:
        """Notices if a save in the background has failed; does not wait for one in progress."""
        if not self.store.manager.is_saving_in_progress():
            with self.noticing():
                self.store.manager.wait_until_finished()

    def has(self, step: int) -> bool:
        """Returns whether there is a sound checkpoint of a step, or one is being saved."""
        return step in self.store.sound or (step == self.store.step and self.retry_at is None)

    def is_due(self) -> bool:
        """Returns whether it is time to try again to save."""
        return self.retry_at is not None and time.monotonic() >= self.retry_at

    def finish(self) -> bool:
        """Waits for the last save. If it failed and must be tried again, waits until that is due and returns False."""
        with self.noticing():
            self.store.finish()
        if self.retry_at is not None:
            time.sleep(max(0.0, self.retry_at - time.monotonic()))
        return self.retry_at is None

    def wait(self) -> None:
        """Waits until the last save is complete. A run that stops leaves reading it back to its next start."""
        with self.noticing():
            self.store.manager.wait_until_finished()

    def close(self) -> None:
        """Waits for a save in progress, prints one line if it fails, and closes the checkpoints."""
        try:
            with disk_errors(self.workdir, f"the checkpoint of step {self.step}", self.size):
                self.store.manager.wait_until_finished()
        except DiskError as error:
            self.has_failed = True
            announce(f"warning: {error.found}")
        self.store.close()
        if self.has_failed:
            remove_unfinished(self.workdir)  # some arrays may still have been written when the failure was noticed
        else:
            sys.unraisablehook = self.unraisablehook


def remove_unfinished(workdir: Path) -> None:
    """Removes the folders of unfinished checkpoints, which would otherwise take up space forever."""
    if jax.process_index() == 0:
        for folder in checkpoints_folder(workdir).glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(folder, ignore_errors=True)
