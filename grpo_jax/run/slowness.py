"""Notices when a phase takes far longer than usual, and describes where the program is.

What is usual is known from the last few times that the phase ran. A phase counts only while no phase inside it is
active, and without the time that is spent on compiling.
"""

import os
import socket
import sys
import traceback
from collections import defaultdict, deque
from functools import partial
from pathlib import Path

SLOW_FACTOR = 5.0  # a phase is slow if it takes this many times the longest of its earlier occurrences,
SLOW_SECONDS = 60.0  # and at least this,
SLOW_FIRST_SECONDS = 600.0  # or, in its first occurrence, if it shows no progress for this long
REMEMBERED = 8  # earlier occurrences of each phase
PACKAGE = str(Path(__file__).parent.parent)


class PhaseTimer:
    """Times the innermost phase and compares it with its earlier occurrences. All times are in seconds."""

    def __init__(self):
        """Starts without a phase."""
        self.earlier = defaultdict(partial(deque, maxlen=REMEMBERED))  # by the names of the active phases
        self.names: tuple[str, ...] = ()
        self.switch((), 0.0)

    def switch(self, names: tuple[str, ...], now: float) -> None:
        """Ends the time of the former innermost phase, and starts that of the last of `names`, outermost first."""
        if self.names:
            self.earlier[self.names].append(now - self.start)
        self.names = tuple(name.rstrip("0123456789") for name in names)  # some end with the number of an update
        self.name = names[-1] if names else ""
        self.start = self.last_progress = now
        self.reports = 0

    def note_progress(self, now: float) -> None:
        """Notes that the phase has shown progress."""
        self.last_progress = now

    def describe_slowness(self, now: float) -> str:
        """Returns how long the phase has taken, or "" if that is not unusual or has been returned already.

        It is returned again each time that the time has doubled.
        """
        if not self.names:
            return ""
        if earlier := self.earlier.get(self.names):
            longest, seconds = max(earlier), now - self.start
            limit = max(SLOW_SECONDS, SLOW_FACTOR * longest)
            words = f"{self.name} has taken {seconds:.0f} s, so far at most {longest:.0f} s"
        else:
            limit, seconds = SLOW_FIRST_SECONDS, now - self.last_progress
            words = f"{self.name} has shown no progress for {seconds:.0f} s"
        if seconds < limit * 2**self.reports:
            return ""
        self.reports += 1
        return words


def describe_position(thread: int) -> str:
    """Describes where a thread is, in a few lines: the last two functions of this package and what they have called."""
    frames = traceback.extract_stack(sys._current_frames()[thread])
    own = [n for n, frame in enumerate(frames) if frame.filename.startswith(PACKAGE)]
    shown = sorted({*own[-2:], *range(max(len(frames) - 3, own[-1] if own else 0), len(frames))})
    lines = [f"    {frames[n].filename}:{frames[n].lineno} in {frames[n].name}" for n in shown]
    return "\n".join([f"process {os.getpid()} on {socket.gethostname()} goes on and is here:", *lines])
