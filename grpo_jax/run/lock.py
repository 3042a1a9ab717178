"""Locks a workdir, so that only one job at a time writes to it.

WORKDIR/run.lock holds the host and PID of the process that uses the workdir, and is removed when it ends. `flock`
excludes the other processes of a machine, and is released when the process that holds it ends. On a file system that
several machines share, it may not exclude the others. A job therefore also renews the modification time of the file
while it runs, and rereads the file before each save. A machine that finds the name of another one in the file watches
the time for a while before it takes over, and a job that finds another job's name in place of its own stops.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.run.progress import announce, phase

BEAT_S = 10.0  # between renewals of the file's modification time
PATIENCE_S = 45.0  # without a renewal, after which a job on another machine counts as ended
SETTLE_S = 1.0  # after which two machines that wrote their names at the same time read the same one


def machine_id() -> str:
    """Returns a name of this machine that differs between machines of the same host name, and between reboots."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"


class WorkdirLock:
    """The lock of a workdir."""

    def __init__(self, workdir: Path):
        """Creates a lock that is not held yet; `take` takes it."""
        self.workdir, self.path = workdir, workdir / "run.lock"
        self.descriptor: int | None = None  # of the open file, while the lock is held
        self.stop, self.taken, self.own = threading.Event(), 0.0, b""
        self.is_new = False  # whether `take` has created the folder

    @phase("Locking the workdir")
    def take(self) -> None:
        """Takes the lock, or raises a UserError if another job uses the workdir or it cannot be written."""
        self.is_new = not self.workdir.exists()
        try:
            while not self.is_held():
                self.workdir.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # a job that left nothing has just removed the folder
                    descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
                    try:
                        self.hold(descriptor)
                    except BaseException:
                        os.close(descriptor)
                        raise
                    self.descriptor = descriptor
        except OSError as error:
            raise UserError(f"--workdir must be a writable folder, but {error}. Choose another --workdir.") from None
        self.taken = time.monotonic()
        threading.Thread(target=self.beat, name="lock", daemon=True).start()

    def is_held(self) -> bool:
        """Returns whether the open file is still that of the workdir, from which another job may have removed it."""
        if self.descriptor is None:
            return False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self.descriptor), os.stat(self.path)):
                return True
        os.close(self.descriptor)
        self.descriptor = None
        return False

    def hold(self, descriptor: int) -> None:
        """Makes sure that no other job uses the workdir, and writes the name of this job."""
        is_exclusive = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self.in_use(self.read_owner()) from None
            is_exclusive = False  # the file system does not support locks
        owner = self.read_owner()
        if owner and is_exclusive and owner["machine"] == machine_id():
            announce(f"Process {owner['pid']} has ended without releasing {self.workdir}; this run takes it over")
        elif owner:
            self.watch(owner)
        names = {"host": socket.gethostname(), "pid": os.getpid(), "machine": machine_id(), "key": secrets.token_hex(8)}
        self.own = json.dumps(names | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, self.own, 0)

    def read_owner(self) -> dict[str, Any]:
        """Returns the content of the file; an empty dict if it is empty."""
        text = self.path.read_bytes()[:4096]
        unknown = {"host": "another machine", "pid": "unknown", "machine": "", "since": "an unknown time"}
        try:
            return unknown | json.loads(text) if text else {}
        except (ValueError, TypeError, RecursionError):
            return unknown

    def in_use(self, owner: dict[str, Any]) -> UserError:
        """Returns the error which says that another job uses the workdir."""
        names = "process {pid} on {host} has used it since {since}".format(**owner) if owner else "another job uses it"
        return UserError(
            f"Only one job at a time may use the workdir {self.workdir}, but {names}. Wait until it ends, stop it, or "
            "choose another --workdir."
        )

    def watch(self, owner: dict[str, Any]) -> None:
        """Watches whether a job on another machine still renews the file, and raises a UserError if it does."""
        announce(
            f"{self.workdir} was used by process {owner['pid']} on {owner['host']}, which did not release it; waiting "
            f"{PATIENCE_S:.0f} s to see whether it is still running"
        )
        before, end = self.last_beat(), time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            time.sleep(min(1.0, PATIENCE_S))
            try:
                if self.last_beat() != before:
                    raise self.in_use(self.read_owner())
            except FileNotFoundError:  # the other job has ended
                return
        announce(f"Process {owner['pid']} on {owner['host']} shows no sign of life; this run takes over the workdir")

    def last_beat(self) -> int:
        """Returns the file's modification time in ns. Opens the file, so that network file systems update it."""
        with open(self.path, "rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns

    def beat(self) -> None:
        """Renews the file's modification time until the lock is released."""
        while not self.stop.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the disk may fail for a while
                os.utime(self.path)

    def check(self) -> None:
        """Raises a UserError if another job has taken over the workdir; does nothing if the lock is not held."""
        if self.descriptor is None:
            return
        time.sleep(max(0.0, self.taken + SETTLE_S - time.monotonic()))
        try:
            owner = self.read_owner()
        except OSError:  # temporarily unreadable, or removed; neither is the work of another job
            return
        if owner and owner != json.loads(self.own):
            raise self.in_use(owner)

    def close(self) -> None:
        """Releases the lock, if it is held."""
        if self.descriptor is None:
            return
        self.stop.set()
        descriptor, self.descriptor = self.descriptor, None
        with contextlib.suppress(OSError):
            if os.pread(descriptor, 4096, 0) == self.own:
                self.path.unlink()
                if self.is_new:
                    self.workdir.rmdir()  # fails unless the run was refused and has written nothing
        os.close(descriptor)
