"""Reports the progress of a rollout: sequences finished, tokens per second, and the time left."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from grpo_jax.rollout.slots import DecodeState
from grpo_jax.run.progress import compile_seconds, name_program, set_detail

REPORT_SECONDS = 2.0  # between two reports, if there is one process
FIRST_REPORT = 8  # decode steps before the first report, while it is not known how long they take
MAX_STEPS = 256  # most decode steps between two reports


@jax.jit
def count_sequences(num_started, sequence, num_sampled, lengths) -> Int[Array, "4"]:
    """Counts finished sequences, sequences in slots, the fewest tokens of one of these, and all tokens.

    The arguments are fields of a `DecodeState`.

    On several hosts, every process must call this function.
    """
    is_active = sequence >= 0
    least = jnp.min(jnp.where(is_active, num_sampled, np.iinfo(np.int32).max))
    return jnp.stack([num_started.sum() - is_active.sum(), is_active.sum(), least, lengths.sum()])


def format_seconds(seconds: float) -> str:
    """Formats a duration for the console."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


class RolloutProgress:
    """Reports on a rollout while it is sampled, and decides when to report next."""

    def __init__(self, total: int, max_tokens: int, noun: str = "sequences"):
        """Prepares the reports on `total` sequences, in one batch or more, of at most `max_tokens` tokens each."""
        self.total, self.max_tokens, self.noun = total, max_tokens, noun
        self.start = self.now()
        self.start_batch(0)

    def now(self) -> float:
        """Returns a time in seconds that does not advance while programs are compiled."""
        return time.monotonic() - compile_seconds()

    def start_batch(self, finished: int) -> None:
        """Begins the next batch, after `finished` sequences of earlier ones."""
        self.earlier = finished
        self.finished = self.last_tokens = self.last_active = 0  # of this batch
        self.last_time: float | None = None  # of the last call of `report`
        self.steps = min(FIRST_REPORT, MAX_STEPS) if jax.process_count() == 1 else MAX_STEPS

    def report(self, state: DecodeState) -> int:
        """Reports the progress of the batch, except before its first step; returns the steps to the next report."""
        columns = state.kv_cache[0].k.shape[-1]
        name_program("decode_tokens", f"decode with {columns:,} cache columns")
        if self.last_time is None:
            self.last_time = self.now()
            return self.steps
        counts = count_sequences(state.num_started, state.sequence, state.num_sampled, state.lengths)
        self.finished, active, least, tokens = jax.device_get(counts).tolist()
        now, new_tokens = self.now(), tokens - self.last_tokens
        seconds = max(now - self.last_time, 1e-6)
        # A step samples one token for each active slot. Their number is taken to be the mean of the last two reports.
        step_seconds = seconds * (active + (self.last_active or active)) / 2 / max(new_tokens, 1)
        finished = self.earlier + self.finished
        waiting = self.total - finished - active
        left = ""
        if not waiting:
            left = f", up to {format_seconds((self.max_tokens - least) * step_seconds)} left"
        elif finished:
            left = f", about {format_seconds((now - self.start) * (self.total - finished) / finished)} left"
        set_detail(f"{finished:,} of {self.total:,} {self.noun} finished, {new_tokens / seconds:,.0f} tokens/s{left}")
        self.last_tokens, self.last_active, self.last_time = tokens, active, now
        if jax.process_count() == 1:  # several processes must agree on the number, and their clocks differ
            self.steps = int(np.clip(REPORT_SECONDS / max(step_seconds, 1e-6), 1, MAX_STEPS))
        return self.steps
