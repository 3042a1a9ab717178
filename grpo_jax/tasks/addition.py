"""The built-in task: sums of two numbers."""

import numpy as np

from grpo_jax.tasks.task import Task
from grpo_jax.text.problem import Problem

# Written like the prompt template, which puts ". Assistant:" after the question.
SOLVED_EXAMPLE = "What is {a} + {b}?. Assistant: <think> {a} + {b} = {c} </think> <answer> {c} </answer> User: "


def is_held_out(a: int, b: int) -> bool:
    """Returns whether a pair is held out: a * b leaves 1 when divided by 11, true of one pair in twelve."""
    return a * b % 11 == 1


def draw_pair(rng: np.random.Generator, digits: int, held_out: bool) -> tuple[int, int]:
    """Draws two numbers of exactly `digits` digits, uniformly from the pairs that are or are not held out."""
    while True:
        a, b = (int(x) for x in rng.integers(10 ** (digits - 1), 10**digits, size=2))
        if is_held_out(a, b) == held_out:
            return a, b


def addition_task(digits: int, shots: int = 0) -> Task:
    """Returns the task that asks `What is {a} + {b}?` for two numbers drawn from a split.

    Args:
        digits: Number of digits of both numbers.
        shots: Number of solved examples in front of each question; none of them is held out or has the same answer.
    """

    def problem(index: int, *, seed: int, split: str) -> Problem:
        rng = np.random.default_rng([seed, index, int(split == "eval")])
        a, b = draw_pair(rng, digits, held_out=split == "eval")
        solved: list[tuple[int, int]] = []
        while len(solved) < shots:
            x, y = draw_pair(rng, digits, held_out=False)
            if x + y != a + b:  # or the example would show the answer
                solved.append((x, y))
        examples = "".join(SOLVED_EXAMPLE.format(a=x, b=y, c=x + y) for x, y in solved)
        return Problem(f"{examples}What is {a} + {b}?", str(a + b), {"a": a, "b": b})

    return problem
