"""The interface of a task."""

from typing import Protocol

from grpo_jax.text.problem import Problem


class Task(Protocol):
    """A function from an index, a seed and a split to a problem."""

    def __call__(self, index: int, *, seed: int, split: str) -> Problem:
        """Returns a problem, the same one on every host and after every resume for the same arguments.

        Args:
            index: The number of the problem, counted from 0. It has no upper limit in training.
            seed: Seed of the problems, or of their order.
            split: "train", or "eval" for held-out problems.

        Raises:
            IndexError: The split is "eval", and there are no more than `index` held-out problems.
        """
        ...
