"""Tasks: sources of problems, for training and for held-out evaluation.

Modules, in reading order:

    task           the interface: a function from an index to a problem
    addition       the built-in task, sums of two numbers
    problem_file   problems from a file, one JSON object per line
    streams        the training and held-out problems that a config names

No module of this package imports JAX.
"""

from grpo_jax.tasks.problem_file import read_problems

__all__ = ["read_problems"]
