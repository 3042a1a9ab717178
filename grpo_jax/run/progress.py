"""Shows what a process is doing: every phase of a command has a name, and no phase is silent or stuck unnoticed.

On a terminal, the phase is shown on a line that is rewritten, or after the bar that counts steps. Elsewhere, such as in
a log file or a notebook, a plain line is printed whenever nothing has been printed for a few seconds. These lines go to
stderr, so that the output of a command can be piped. A phase that takes far longer than usual says where the program
is. Importing this module does not import JAX.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from tqdm import tqdm

from grpo_jax.run.slowness import PhaseTimer, describe_position
from grpo_jax.text.terminal import printable

QUIET_SECONDS = 3.5  # after which a plain line is printed
FIRST_SECONDS = 1.0  # the same for the first line of a command
TICK_SECONDS = 0.25
STEP_BAR = "{n_fmt}/{total_fmt} {bar:10} {elapsed}<{remaining}  {desc}"
PROCESS_INDEX_VARIABLES = ("JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "TPU_WORKER_ID")
COMPILATION = "/jax/core/compile/backend_compile_duration"  # an event of JAX, as are the others below
# What the console calls the jitted functions that can take long to compile.
PROGRAMS = {
    "place": "the placement of the weights",
    "init_decode": "prefill",
    "decode_tokens": "decode",
    "score_completions": "scoring",
    "update": "the update",
}


def is_terminal() -> bool:
    """Returns whether stderr is a terminal of a known width, so that a line on it can be rewritten."""
    try:
        return sys.stderr is not None and sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:  # a stream of Python's own that calls itself a terminal
        return False


class Progress:
    """What a process is doing, and when it last showed it. The functions below share one instance per process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Starts without a phase. `clock` returns a time in seconds."""
        self.clock = clock
        self.lock = threading.RLock()
        self.is_muted = any(os.environ.get(name, "0") != "0" for name in PROCESS_INDEX_VARIABLES)
        self.phases: list[list] = []  # name, detail and start of each active phase, outermost first
        self.programs = dict(PROGRAMS)
        self.compiling: tuple[str, float] | None = None  # a program, and when JAX began to trace it
        self.cached = ""  # whether that program is in the cache on disk: yes, no, or not known yet
        self.compile_seconds = 0.0  # in total
        self.is_listening = False
        self.last_output = clock()
        self.bar: tqdm | None = None
        self.timer = PhaseTimer()
        self.thread = threading.get_ident()  # the thread that entered the outermost phase

    def describe(self) -> str:
        """Returns the innermost phase, its detail, the program that is being compiled, and the time taken so far.

        The detail of the enclosing phase, such as the step of a run, comes first, unless a bar shows it already.
        """
        name, detail, start = self.phases[-1]
        details = [detail] * bool(detail)
        if len(self.phases) > 1 and self.phases[-2][1] and self.bar is None:
            name = f"{self.phases[-2][1]}  {name}"
        compiling = self.compiling  # read once: the thread that compiles may change it meanwhile
        if compiling:
            program, start = compiling
            details.append(f"compiling {program}" + f" (cached: {self.cached})" * bool(self.cached))
        return ": ".join([name, ", ".join(details)][: 1 + len(details)]) + f", {self.clock() - start:.0f} s"

    def tick(self) -> None:
        """Rewrites the line on a terminal. Elsewhere, prints a line if nothing has been printed for a while."""
        with self.lock:
            if not self.phases or self.is_muted or sys.stderr is None:
                return
            if is_terminal():
                self.bar = self.bar if self.bar is not None else tqdm(bar_format="{desc}", leave=False)
                line = self.describe()
                if self.bar.desc != line:
                    self.bar.set_description_str(line)
            elif self.clock() - self.last_output >= QUIET_SECONDS:
                print(self.describe(), file=sys.stderr, flush=True)
                self.last_output = self.clock()

    def time_innermost(self) -> None:
        """Starts timing the innermost phase, because it has changed."""
        self.timer.switch(tuple(name for name, *_ in self.phases), self.clock() - self.compile_seconds)

    def report_slowness(self) -> None:
        """Prints where the program is if its phase takes far longer than usual.

        Every process prints this, because the one that is stuck may not be process 0.
        """
        with self.lock:
            words = "" if self.compiling else self.timer.describe_slowness(self.clock() - self.compile_seconds)
            if words and sys.stderr is not None:
                tqdm.write(printable(f"{words} {describe_position(self.thread)}"), file=sys.stderr)
                sys.stderr.flush()

    def keep_ticking(self, stop: threading.Event) -> None:
        """Calls `tick` and `report_slowness` until the event is set."""
        while not stop.wait(TICK_SECONDS):
            try:
                self.tick()
                self.report_slowness()
            except (OSError, ValueError):  # stderr has been closed
                return

    def listen(self) -> None:
        """Registers listeners for what JAX compiles, once JAX has been imported."""
        if self.is_listening or sys.modules.get("jax") is None:
            return
        from jax import monitoring

        self.is_listening = True
        monitoring.register_scalar_listener(self.on_start)
        monitoring.register_event_listener(self.on_event)
        monitoring.register_event_duration_secs_listener(self.on_end)

    def on_start(self, event: str, _: float, **labels) -> None:
        """Notes that JAX begins to trace, lower or compile a function."""
        name = str(labels.get("fun_name")).removeprefix("jit(").removesuffix(")")
        if event.startswith("/jax/core/compile/") and name in self.programs:
            if self.compiling is None or self.compiling[0] != self.programs[name]:
                self.compiling = self.programs[name], self.clock()
            self.cached = "no" if event == COMPILATION else ""

    def on_event(self, event: str, **_) -> None:
        """Notes that a program is read from the cache on disk."""
        if event == "/jax/compilation_cache/cache_hits":
            self.cached = "yes"

    def on_end(self, event: str, seconds: float, **_) -> None:
        """Notes that JAX has traced, lowered or compiled a function."""
        if event.startswith("/jax/core/compile/"):
            self.compile_seconds += seconds
        if event == COMPILATION:
            self.compiling = None

    def close_bar(self) -> None:
        """Removes the line from the terminal, or leaves the bar of the steps as it is."""
        with self.lock:
            if self.bar is not None:
                self.bar.set_description_str("", refresh=False)
                self.bar.close()
            self.bar = None


PROGRESS = Progress()


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Names what the process does inside the block, such as "Loading the weights"; phases may be nested.

    It also decorates functions. A thread shows the innermost phase for as long as the outermost one lasts.
    """
    thread, stop, own = None, threading.Event(), [name, "", PROGRESS.clock()]
    try:
        with PROGRESS.lock:
            is_outermost = not PROGRESS.phases
            PROGRESS.phases.append(own)
            PROGRESS.time_innermost()
        if is_outermost:
            PROGRESS.thread = threading.get_ident()
            PROGRESS.last_output = PROGRESS.clock() + FIRST_SECONDS - QUIET_SECONDS
            thread = threading.Thread(target=PROGRESS.keep_ticking, args=(stop,), name="progress", daemon=True)
            thread.start()
        PROGRESS.listen()
        yield
    finally:  # first what lets the next phase be an outermost one, even if Ctrl-C interrupts the rest
        with PROGRESS.lock:
            PROGRESS.phases[:] = [other for other in PROGRESS.phases if other is not own]
            PROGRESS.compiling = None
            PROGRESS.time_innermost()
        if thread:
            stop.set()
            thread.join()
            PROGRESS.close_bar()


def set_detail(text: str) -> None:
    """Sets the progress of the current phase that is shown, such as "24 of 128 sequences"."""
    if PROGRESS.phases and PROGRESS.phases[-1][1] != text:
        PROGRESS.phases[-1][1] = text
        PROGRESS.timer.note_progress(PROGRESS.clock() - PROGRESS.compile_seconds)


def set_bytes(done: int, total: int) -> None:
    """Shows the progress of the current phase in bytes, such as "1.2 of 3.1 GB"."""
    unit, size, digits = ("GB", 1e9, 1) if total >= 1e9 else ("MB", 1e6, 0)
    set_detail(f"{done / size:.{digits}f} of {total / size:.{digits}f} {unit}")


def current_phase() -> str:
    """Returns what the process is doing, such as "Grading, 3 s"; empty if it is between two phases."""
    with PROGRESS.lock:
        return PROGRESS.describe() if PROGRESS.phases else ""


def announce(line: str, file: TextIO | None = None) -> None:
    """Prints a line above a progress bar, to stdout if no file is given, with its control characters made visible.

    A file that cannot be written, such as a log on a full disk, ends nothing.
    """
    if PROGRESS.is_muted:
        return
    with PROGRESS.lock, suppress(OSError):
        tqdm.write(printable(line), file=file or sys.stdout)
        (file or sys.stdout).flush()  # a pipe would hold it back
        PROGRESS.last_output = PROGRESS.clock()


def mute(is_muted: bool) -> None:
    """Says whether this process shows nothing; by default, only the first of several processes shows anything."""
    PROGRESS.is_muted = is_muted


def name_program(function: str, words: str) -> None:
    """Sets what the console calls a jitted function when it is compiled."""
    PROGRESS.programs[function] = words


def compile_seconds() -> float:
    """Returns the seconds that this process has spent on compiling, up to now."""
    return PROGRESS.compile_seconds


def step_bar(total: int, done: int) -> tqdm:
    """Returns a bar that counts steps. From then on, a terminal shows it together with the phase."""
    close_bar()
    is_shown = not PROGRESS.is_muted and is_terminal()
    bar = tqdm(total=total, initial=done, unit="step", bar_format=STEP_BAR, disable=not is_shown)
    PROGRESS.bar = bar if is_shown else None
    return bar


def close_bar() -> None:
    """Leaves the bar on the terminal as it is; the next phase is shown below it."""
    PROGRESS.close_bar()
