"""Decides at the safe points of a run whether it stops or saves a checkpoint, because of a signal or the time limit.

A safe point is a moment at which a checkpoint can hold everything that has been done: between two updates, and in a
rollout or an evaluation whenever the compiled loop returns, every few seconds. A cloud's preemption notice arrives as
SIGTERM. All processes of a run stop at the same safe point, on which they agree through JAX's preemption service; with
several processes, that service receives SIGTERM instead of `grpo_jax.signals`.
"""

import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax.config.schema import Config
from grpo_jax.errors import RunStopped
from grpo_jax.parallel.processes import from_first_process
from grpo_jax.run.checkpoint import newest_step
from grpo_jax.run.progress import announce, current_phase
from grpo_jax.signals import EXIT_CODES, SIGNALS


class SafePoints:
    """Knows what a run must do at its safe points. Every process must call the methods at the same points."""

    def __init__(self, cfg: Config, workdir: Path, command: str):
        """Starts the clock of a run.

        Args:
            cfg: The run's config.
            workdir: The run.
            command: How to resume the run, for a message.
        """
        self.workdir, self.command, self.time_limit = workdir, command, cfg.run.time_limit
        self.start, self.count, self.is_stopping, self.has_told = time.monotonic(), 0, False, False
        self.has_unsaved = False  # whether a process that ends at once would lose something

    def may_defer(self, received: signal.Signals) -> bool:
        """Returns whether the run defers a signal to its next safe point; if so, prints what it is doing now."""
        if self.has_unsaved:
            now = current_phase()
            line = f"{received.name}: the run stops at its next safe point" + (f" (now: {now})" if now else "")
            announce(f"{line}. A second signal ends it immediately.", sys.stderr)
        return self.has_unsaved

    def reason(self) -> str:
        """Returns why this process must stop; empty if it need not."""
        if SIGNALS.stop:
            return SIGNALS.stop.name
        if self.time_limit and time.monotonic() - self.start >= self.time_limit:
            return f"run.time_limit={self.time_limit:g}"
        return ""

    def must_stop(self) -> bool:
        """Returns whether the run must stop here."""
        if self.is_stopping or jax.process_count() == 1:
            self.is_stopping = self.is_stopping or bool(self.reason())
            return self.is_stopping
        from jax.experimental import multihost_utils

        if self.reason() and not self.has_told:
            self.has_told = True
            signal.raise_signal(signal.SIGTERM)  # tells all processes
        self.count += 1
        self.is_stopping = multihost_utils.reached_preemption_sync_point(self.count)
        return self.is_stopping

    def must_save(self) -> bool:
        """Returns whether SIGUSR1 has asked process 0 for a checkpoint since the last call."""
        asked, SIGNALS.must_save = SIGNALS.must_save, False
        return bool(from_first_process(lambda: np.bool_(asked), np.bool_(False)))

    def stopped(self, kept: int) -> RunStopped:
        """Returns the exception that ends a run; its message says what the workdir holds.

        Args:
            kept: Number of completions of the next rollout that have been kept.
        """
        newest = newest_step(self.workdir)
        saved = f"the newest checkpoint is from step {newest}" if newest else "there is no checkpoint yet"
        if kept:
            saved += f", and {kept} completion{'s' * (kept > 1)} of the next rollout {'are' if kept > 1 else 'is'} kept"
        code = EXIT_CODES[SIGNALS.stop or signal.SIGTERM]
        reason = self.reason() or "a preemption notice"
        message = f"Stopped by {reason}: {saved}. To {'resume' if newest else 'start again'}: {self.command}"
        return RunStopped(message if jax.process_index() == 0 else "", code)


def resume_command(workdir: Path, problems: Any, rewards: Any) -> str:
    """Returns how to resume a run, for a message, given the arguments of `train`."""
    if problems is not None or rewards is not None:
        return "call grpo_jax.train with the same arguments"
    return f"python -m grpo_jax.main --workdir={shlex.quote(str(workdir))}"
