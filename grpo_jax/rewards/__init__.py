"""Rule-based rewards: verifiers that read the text of completions.

Modules, in reading order:

    verify       accuracy and format of completions
    parts        the parts of a reward, and their sum

No module of this package imports JAX.
"""

from grpo_jax.rewards.verify import accuracy, format

__all__ = ["accuracy", "format"]
