"""Tasks: sources of problems, for training and for held-out evaluation.

Modules, in reading order:

    task           the interface: a function from an index, a seed and a split to a problem
    problem_list   a task whose problems are given as a list, and which of them are held out
    addition       the built-in task, sums of two numbers
    rows           reads the rows of files and datasets
    shapes         makes problems from rows, by the field names of known data sets
    problem_file   reads problems from a file or a dataset
    streams        the task that a config names, and the problems that a run takes from it

No module of this package imports JAX.
"""

from grpo_jax.tasks.problem_file import read_problems
from grpo_jax.text.problem import Problem

__all__ = ["Problem", "read_problems"]
