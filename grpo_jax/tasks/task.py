"""The interface of a task."""

from collections.abc import Callable

from grpo_jax.text.problem import Problem

# A task maps an index, which has no upper limit, to a problem. The same seed and index give the same problem on every
# host and after every resume.
Task = Callable[[int], Problem]
