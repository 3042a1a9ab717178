"""Rule-based rewards: verifiers that read the text of completions. No module here imports JAX.

verify       accuracy and format of completions
parts        the parts of a reward, and their sum
"""

from grpo_jax.rewards.verify import accuracy, format

__all__ = ["accuracy", "format"]
