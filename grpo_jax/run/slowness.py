"""Detects that a phase takes far longer than usual, and describes where the program is.

A phase is compared with its last few occurrences. Only the time during which it is the innermost phase counts, without
the time spent compiling.
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
        """Stops timing the former innermost phase and starts timing the last of `names`, which go from outermost."""
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
        """Returns how long the phase has taken, or "" if that is not unusual or has already been returned.

        The result is returned again each time the duration doubles.
        """
        if not self.names:
            return ""
        if earlier := self.earlier.get(self.names):
            longest, seconds = max(earlier), now - self.start
            limit = max(SLOW_SECONDS, SLOW_FACTOR * longest)
            words = f"slow: {self.name} has taken {seconds:.0f} s; the longest time until now was {longest:.0f} s."
        else:
            limit, seconds = SLOW_FIRST_SECONDS, now - self.last_progress
            words = f"slow: {self.name} has shown no progress for {seconds:.0f} s."
        if seconds < limit * 2**self.reports:
            return ""
        self.reports += 1
        return words


def describe_position(thread: int) -> str:
    """Describes where a thread is, in a few lines: its innermost two functions of this package and what they called."""
    frames = traceback.extract_stack(sys._current_frames()[thread])
    own = [n for n, frame in enumerate(frames) if frame.filename.startswith(PACKAGE)]
    shown = sorted({*own[-2:], *range(max(len(frames) - 3, own[-1] if own else 0), len(frames))})
    lines = [f"    {frames[n].filename}:{frames[n].lineno} in {frames[n].name}" for n in shown]
    return "\n".join([f"Process {os.getpid()} on {socket.gethostname()} keeps running and is here:", *lines])
