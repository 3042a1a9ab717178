"""The parts of a reward, and their sum."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from grpo_jax.rewards.verify import accuracy, format


def reward_parts(texts: Sequence[str], answers: Sequence[str]) -> dict[str, Float[np.ndarray, " N"]]:
    """Grades N completions: returns each part of the reward, and as `total` their sum, which is 0, 1 or 2."""
    parts = {"accuracy": accuracy(texts, answers), "format": format(texts)}
    return parts | {"total": parts["accuracy"] + parts["format"]}
