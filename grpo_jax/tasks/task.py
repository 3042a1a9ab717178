"""The task interface."""

from collections.abc import Callable

from grpo_jax.text.problem import Problem

# A task maps an index to a problem. Problem i of a seed is the same on every host and after every resume, and the stream
# never ends.
Task = Callable[[int], Problem]
