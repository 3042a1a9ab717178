"""Problems, and batches of problems encoded as prompts.

Both hold NumPy arrays and plain Python values, so that a process that grades completions starts without JAX. The axis
letters are explained in `grpo_jax.types`.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Problem:
    """A question with its expected answer: `Problem("What is 2 + 2?", "4")`."""

    question: str
    answer: str  # the accuracy reward compares completions with it
    metadata: dict[str, Any] = field(default_factory=dict)  # whatever else the task knows about the problem


class Prompts(NamedTuple):
    """B encoded prompts, padded on the right to T tokens."""

    tokens: Int[np.ndarray, "B T"]  # 0 on padding
    lengths: Int[np.ndarray, " B"]  # tokens per prompt, without padding
    ids: Int[np.ndarray, " B"]  # index of each problem in its task
