"""Shows what a process is doing: every phase of a command has a name, and none of them is silent for long."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Names what the process does inside the block, such as "Loading the weights"; phases may be nested."""
    yield


def set_detail(text: str) -> None:
    """Says how far the current phase is, such as "24 of 128 sequences"."""


def announce(line: str) -> None:
    """Prints a line on the console, above a progress bar."""
    print(line, flush=True)
