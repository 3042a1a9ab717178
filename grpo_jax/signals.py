"""Handles the signals that ask a program to stop, on a separate thread.

SIGTERM and SIGINT (Ctrl-C) end a program immediately and without a traceback. A run that has something to lose defers
them: the first one is a request to stop at the next safe point, and a second one ends the program immediately. SIGUSR1
asks a run to save a checkpoint and continue.

Python calls signal handlers on the main thread, which may be compiling or waiting for the devices for minutes. The
wakeup file descriptor reports a signal without delay.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
RECEIVED = (*EXIT_CODES, signal.SIGUSR1)
LEAVING = "{}: stopped immediately. A training run that is started again resumes from its newest checkpoint, if any.\n"


class SignalReceiver:
    """Keeps the signals that this process has received. The functions below share one instance per process."""

    def __init__(self):
        """Starts without any signal."""
        self.thread: threading.Thread | None = None  # that receives signals, in an entry point
        self.may_defer: Callable[[signal.Signals], bool] | None = None  # while a run defers signals
        self.stop: signal.Signals | None = None  # the deferred signal that asks to stop
        self.must_save = False  # whether SIGUSR1 has asked for a checkpoint

    def defer(self, received: signal.Signals) -> bool:
        """Turns a signal into a request if it can be deferred now; returns whether it can."""
        if received == signal.SIGUSR1:
            self.must_save = True
        elif self.stop or not self.may_defer or not self.may_defer(received):
            return False
        else:
            self.stop = received
        return True

    def listen(self, descriptor: int) -> None:
        """Reads signals, one byte each, until the other end of the pipe is closed."""
        while number := os.read(descriptor, 1):
            received = signal.Signals(number[0])
            if received in RECEIVED and not self.defer(received):
                with contextlib.suppress(OSError):
                    os.write(2, LEAVING.format(received.name).encode())
                # A normal exit would wait for the main thread, and for processes that may be waiting for this one.
                os._exit(EXIT_CODES[received])
        os.close(descriptor)


SIGNALS = SignalReceiver()


def install_handler(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Installs a handler for each signal that is not ignored, and returns the former handlers.

    A shell script makes the programs that it starts in the background ignore SIGINT.
    """
    numbers = [number for number in RECEIVED if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


@contextlib.contextmanager
def receive_signals() -> Iterator[None]:
    """Handles signals as this module describes, for an entry point."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    SIGNALS.thread = threading.Thread(target=SIGNALS.listen, args=(readable,), name="signals", daemon=True)
    SIGNALS.thread.start()
    handlers = install_handler(lambda *_: None)
    descriptor = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writable)
        SIGNALS.thread.join()
        SIGNALS.thread = None


@contextlib.contextmanager
def receive_deferred_signals() -> Iterator[None]:
    """Handles signals in a run that is started from Python; those that are not deferred go to their former handlers.

    Does nothing in an entry point, which handles them already, or outside the main thread.
    """
    if SIGNALS.thread or threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if SIGNALS.defer(signal.Signals(number)):
            return
        if callable(handlers[number]):
            handlers[number](number, frame)
        else:
            signal.signal(number, handlers[number])
            signal.raise_signal(number)

    handlers = install_handler(handle)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def defer_signals(may_defer: Callable[[signal.Signals], bool]) -> Iterator[None]:
    """Defers the first signal that asks to stop if `may_defer` returns True when it is received."""
    SIGNALS.may_defer, SIGNALS.stop, SIGNALS.must_save = may_defer, None, False
    try:
        yield
    finally:
        SIGNALS.may_defer = None
