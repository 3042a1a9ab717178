"""What a policy is asked: a problem, and problems encoded as prompts. NumPy only, so graders start without JAX.

Axes are those of the legend in `grpo_jax.types`.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int


class Problem(NamedTuple):
    """One question of a task."""

    question: str
    answer: str  # what the accuracy reward compares with
    metadata: dict[str, Any]


class Prompts(NamedTuple):
    """B encoded prompts, padded on the right."""

    tokens: Int[np.ndarray, "B T"]  # 0 beyond the prompt's length
    lengths: Int[np.ndarray, " B"]
    ids: Int[np.ndarray, " B"]  # position in the problem stream
