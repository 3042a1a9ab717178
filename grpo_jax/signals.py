"""Receives the signals that ask a program to stop, on a thread of its own.

SIGTERM and SIGINT (Ctrl-C) end a program at once and without a traceback. While a run has something to lose it defers
them: the first one leaves a request, which the run follows at its next safe point, and a second one ends the program at
once. SIGUSR1 asks a run to save a checkpoint and to go on.

Python calls signal handlers on the main thread, which may be compiling or waiting for the devices for minutes. Its
wakeup descriptor passes a signal on immediately.
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
LEAVING = "{}: ended at once. A training run continues from its newest checkpoint, if any, when started again.\n"


class SignalReceiver:
    """The signals that this process has received. The functions below share one instance per process."""

    def __init__(self):
        """Starts without having received any."""
        self.thread: threading.Thread | None = None  # of an entry point
        self.may_defer: Callable[[signal.Signals], bool] | None = None  # while a run defers signals
        self.stop: signal.Signals | None = None  # the deferred signal that asks to stop
        self.must_save = False  # whether SIGUSR1 has asked for a checkpoint

    def defer(self, received: signal.Signals) -> bool:
        """Leaves a request, if the signal is one that can be deferred now; returns whether it is."""
        if received == signal.SIGUSR1:
            self.must_save = True
        elif self.stop or not self.may_defer or not self.may_defer(received):
            return False
        else:
            self.stop = received
        return True

    def listen(self, descriptor: int) -> None:
        """Receives signals, one byte each, until the other end of the descriptor is closed."""
        while number := os.read(descriptor, 1):
            received = signal.Signals(number[0])
            if received in RECEIVED and not self.defer(received):
                with contextlib.suppress(OSError):
                    os.write(2, LEAVING.format(received.name).encode())
                # An orderly exit would wait for the main thread, and for processes that may be waiting for this one.
                os._exit(EXIT_CODES[received])
        os.close(descriptor)


SIGNALS = SignalReceiver()


def install_handler(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Installs a handler for all signals that are not ignored, and returns the former ones.

    A shell script ignores SIGINT for the programs that it starts in the background.
    """
    numbers = [number for number in RECEIVED if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


@contextlib.contextmanager
def receive_signals() -> Iterator[None]:
    """Receives signals as this module describes, for an entry point."""
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
    """Receives signals for a run that is started from Python; those that are not deferred keep their former handlers.

    Does nothing in an entry point, which receives them already, and outside of the main thread.
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
    """Defers the first signal that asks to stop, if `may_defer` returns True for it when it is received."""
    SIGNALS.may_defer, SIGNALS.stop, SIGNALS.must_save = may_defer, None, False
    try:
        yield
    finally:
        SIGNALS.may_defer = None
