"""A task whose problems are given as a list."""

from collections.abc import Sequence

from grpo_jax.text.problem import Problem


class ProblemList:
    """A task with finitely many problems. Training asks all of them in each epoch, in a new order."""

    def __init__(self, train: Sequence[Problem], held_out: Sequence[Problem]):
        """Makes a task of training problems and held-out problems. Neither sequence may be empty."""
        self.train, self.held_out = train, held_out

    def __call__(self, index: int, *, seed: int, split: str) -> Problem:
        """Returns a problem; see `grpo_jax.tasks.task.Task`."""
        import grain  # imports JAX, which grading and reading problems must not need

        problems = self.held_out if split == "eval" else self.train
        if split == "eval" and index >= len(problems):
            raise IndexError(index)
        return grain.MapDataset.source(problems).seed(seed).shuffle().repeat()[index]


def hold_out_tenths(problems: Sequence[Problem]) -> tuple[list[Problem], list[Problem]]:
    """Divides problems into (train, held_out), where every tenth problem is held out."""
    train = [problem for i, problem in enumerate(problems) if i % 10 != 9]
    return train, list(problems[9::10])
