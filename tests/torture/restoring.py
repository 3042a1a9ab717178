"""Restores runs as training does, in this process, and compares what it gets with what was saved."""

from pathlib import Path

import jax
import numpy as np

from grpo_jax.config.workdir import read_config
from grpo_jax.run.preparation import check_run, prepare_run
from grpo_jax.run.progress import mute
from grpo_jax.run.state import RunState, start_or_resume
from tests.torture.runs import NEWEST, half_run


class Restorer:
    """Restores a run whose newest checkpoint may be damaged."""

    def __init__(self, undisturbed: Path, workdir: Path):
        """Restores each checkpoint that `half_run` copies, while it is sound."""
        self.workdir = half_run(undisturbed, workdir, max(NEWEST))
        prepared = prepare_run(check_run(read_config(workdir), workdir), workdir)
        mute(True)
        self.cfg, self.context = prepared.fitted, prepared.context
        self.saved = {}
        for step in range(1, max(NEWEST) + 1):
            half_run(undisturbed, workdir, step)
            self.saved[step] = self.restore()

    def restore(self) -> tuple[RunState, jax.Array]:
        """Returns what a run would continue with."""
        with jax.set_mesh(self.context.mesh):
            return start_or_resume(self.cfg, self.context, self.workdir)

    def complaint(self) -> str:
        """Restores the run, and returns what is wrong with the result: it must be equal to a checkpoint as saved."""
        run, key = self.restore()
        if run.step not in self.saved:
            return f"restored step {run.step}"
        found, expected = jax.tree.leaves((run, key)), jax.tree.leaves(self.saved[run.step])
        as_bytes = [[to_numpy(leaf).tobytes() for leaf in leaves] for leaves in (found, expected)]
        return "" if as_bytes[0] == as_bytes[1] else f"step {run.step} was restored, and other values than were saved"


def to_numpy(leaf) -> np.ndarray:
    """Returns a leaf of a run's state as an array; random keys as the numbers they consist of."""
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)
