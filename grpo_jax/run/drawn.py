"""Keeps the finished completions of a rollout in which a run stops, in WORKDIR/checkpoints/rollout.

A completion depends only on the policy, its prompt, the key of the rollout and its ids, so a resumed run needs to draw
only the others. The file begins with a SHA-256 of its contents and of everything that they depend on, so a file that is
damaged or belongs to another policy is not used.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from grpo_jax.config.schema import Config
from grpo_jax.config.workdir import replace_file
from grpo_jax.foreign import read_bytes
from grpo_jax.parallel.mesh import mesh_platform
from grpo_jax.parallel.processes import from_first_process
from grpo_jax.rollout.sampler import cache_sizes
from grpo_jax.run.checkpoint import checkpoints_folder
from grpo_jax.run.context import RunContext
from grpo_jax.run.digests import digest_arrays
from grpo_jax.run.progress import announce
from grpo_jax.text.problem import Prompts
from grpo_jax.types import Rollout

DIGEST_BYTES = hashlib.sha256().digest_size


def drawn_path(workdir: Path) -> Path:
    """Returns the path of the file."""
    return checkpoints_folder(workdir) / "rollout"


def remove_drawn(workdir: Path) -> None:
    """Removes the file if it exists, on process 0."""
    if jax.process_index() == 0:
        with suppress(OSError):
            drawn_path(workdir).unlink()


class DrawnCompletions:
    """The file with the finished completions of one rollout, one row of int32 each.

    A row holds the completion's index in the rollout, its length, whether it is truncated, its tokens, and the bits of
    its log-probs.
    """

    def __init__(self, cfg: Config, context: RunContext, workdir: Path, prompts: Prompts, key: jax.Array, params: Any):
        """Takes everything that the completions depend on; `params` is the policy."""
        self.workdir, self.path, self.prompts, self.params = workdir, drawn_path(workdir), prompts, params
        self.shape = len(prompts.ids), cfg.rollout.samples, cfg.rollout.max_tokens
        named = jax.random.key_data(key).tolist(), cfg.rollout.temperature, self.shape
        arrays = prompts.tokens, prompts.lengths, prompts.ids, context.stop_table
        self.inputs = json.dumps(named).encode(), *(np.ascontiguousarray(x).tobytes() for x in arrays)

    def hash_inputs(self) -> bytes:
        """Returns hashes of everything that the completions depend on; every process must call it."""
        parts = json.dumps(digest_arrays(self.params)).encode(), *self.inputs
        return b"".join(hashlib.sha256(part).digest() for part in parts)

    def save(self, rollout: Rollout) -> int:
        """Writes the finished completions, on process 0, and returns their number; 0 if the disk fails."""
        tokens, logps, lengths, truncated = (
            np.asarray(x).reshape(self.shape[0] * self.shape[1], -1)
            for x in (rollout.tokens, rollout.logps, rollout.lengths, rollout.truncated)
        )
        finished = np.flatnonzero(lengths)
        columns = np.arange(len(lengths))[:, None], lengths, truncated, tokens, logps.view(np.int32)
        rows, inputs = np.concatenate(columns, axis=1, dtype=np.int32)[finished].tobytes(), self.hash_inputs()
        if jax.process_index() == 0:
            try:
                replace_file(self.path, hashlib.sha256(inputs + rows).digest() + rows)
            except OSError as error:  # they can be drawn again, so the checkpoint matters more
                announce(f"warning: The completions of the next rollout could not be written: {error}")
                return 0
        return len(finished)

    def load(self) -> Rollout | None:
        """Returns the completions, missing ones with length 0; None if there are none.

        Removes a file that cannot be used.
        """
        count, samples, limit = self.shape
        width = 3 + 2 * limit
        if not from_first_process(lambda: np.bool_(self.path.is_file()), np.bool_(False)):
            return None
        inputs = self.hash_inputs()

        def read() -> np.ndarray | None:
            try:
                content = read_bytes(self.path, DIGEST_BYTES + 4 * count * samples * width)
            except (OSError, ValueError):
                content = b""
            if content[:DIGEST_BYTES] != hashlib.sha256(inputs + content[DIGEST_BYTES:]).digest():
                remove_drawn(self.workdir)
                return None
            rows = np.frombuffer(content, np.int32, offset=DIGEST_BYTES).reshape(-1, width)
            found = np.zeros((count * samples, width), np.int32)
            found[rows[:, 0]] = rows
            return found

        found = from_first_process(read, np.zeros((count * samples, width), np.int32)).reshape(count, samples, width)
        if not found[..., 1].any():
            return None
        announce(f"{np.count_nonzero(found[..., 1])} of {count * samples} completions had been sampled before")
        tokens, logps = found[..., 3 : 3 + limit], np.ascontiguousarray(found[..., 3 + limit :]).view(np.float32)
        return Rollout(tokens, logps, found[..., 1], found[..., 2] > 0, np.asarray(self.prompts.ids))


def remaining_limits(context: RunContext, prompts: Prompts, drawn: Rollout) -> Int[np.ndarray, "B G"]:
    """Returns the token limits for drawing the rest of a rollout, which are 1 for completions that are finished.

    All completions are drawn again in full if that takes no longer because each has a slot of its own; and on a CPU if
    the number of cache columns changes during a rollout, because the last bits of a log-prob may depend on it.
    """
    (count, samples, limit), width = drawn.tokens.shape, prompts.tokens.shape[1]
    changes = mesh_platform() == "cpu" and len(cache_sizes(width, width + limit)) > 1
    again = changes or context.rollout_plan.slots >= count * samples
    return np.where((drawn.lengths > 0) & ~again, 1, limit)


def merge_completions(rollout: Rollout, drawn: Rollout | None) -> Rollout:
    """Returns a rollout in which the completions drawn earlier replace those drawn now."""
    if drawn is None:
        return rollout
    old = drawn.lengths > 0

    def choose(before, now):
        return np.where(old[:, :, None] if before.ndim == 3 else old, before, now)

    names = "tokens", "logps", "lengths", "truncated"
    return rollout.replace(**{name: choose(getattr(drawn, name), getattr(rollout, name)) for name in names})
