"""Rule-based rewards: verifiers that read the text of completions, and the parts that a reward sums.

Modules, in reading order:

    verify       accuracy and format of completions
    parts        the parts of a reward, and their weighted sum

No module of this package imports JAX.
"""

from grpo_jax.rewards.parts import accuracy_part, format_part
from grpo_jax.rewards.verify import accuracy, format

__all__ = ["accuracy", "accuracy_part", "format", "format_part"]
