"""Rule-based rewards: verifiers that read the text of completions, and the reward as a weighted sum of parts.

Modules, in reading order:

    verify       accuracy and format of completions
    script       identifies the language of completions by their script
    length       the penalty for overlong completions
    parts        reward parts and their weighted sum
    worker       a process that grades completions
    pool         grades a batch, in workers if it is large or if a function could hang

No module of this package imports JAX.
"""

from grpo_jax.rewards.parts import accuracy_part, format_part
from grpo_jax.rewards.script import language
from grpo_jax.rewards.verify import accuracy, format

__all__ = ["accuracy", "accuracy_part", "format", "format_part", "language"]
