"""The built-in task: sums of two numbers."""

import numpy as np

from grpo_jax.tasks.task import Task
from grpo_jax.text.problem import Problem


def is_held_out(a: int, b: int) -> bool:
    """The held-out rule of `addition`: a * b leaves 1 when divided by 11 (one pair in twelve, in either order)."""
    return a * b % 11 == 1


# As the template has it, which puts ". Assistant:" behind a question.
SOLVED_EXAMPLE = "What is {a} + {b}?. Assistant: <think> {a} + {b} = {c} </think> <answer> {c} </answer> User: "


def addition_task(seed: int, split: str, digits: int, shots: int = 0) -> Task:
    """`What is {a} + {b}?` for two numbers of exactly `digits` digits, drawn uniformly from the split's pairs.

    Args:
      shots: questions that stand answered before it; none of them is held out.
    """
    low, high = 10 ** (digits - 1), 10**digits

    def pair(draw, from_held_out: bool) -> tuple[int, int]:
        while True:
            a, b = (int(x) for x in draw.integers(low, high, size=2))
            if is_held_out(a, b) == from_held_out:
                return a, b

    def problem(index: int) -> Problem:
        draw = np.random.default_rng([seed, index, int(split == "eval")])
        a, b = pair(draw, split == "eval")
        examples = [SOLVED_EXAMPLE.format(a=x, b=y, c=x + y) for x, y in (pair(draw, False) for _ in range(shots))]
        return Problem(f"{''.join(examples)}What is {a} + {b}?", str(a + b), {"a": a, "b": b})

    return problem
