"""Finds the task of a run, which a config names or Python code passes, and takes problems from it."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grpo_jax.config.functions import describe_error, resolve_function
from grpo_jax.config.rules import PYTHON_TASK
from grpo_jax.config.schema import TaskSection
from grpo_jax.errors import UserError
from grpo_jax.tasks.addition import addition_task
from grpo_jax.tasks.problem_file import file_task
from grpo_jax.tasks.problem_list import ProblemList, hold_out_tenths
from grpo_jax.tasks.task import Task
from grpo_jax.text.problem import Problem

CHECKED_PROBLEMS = 256  # training problems of an endless task whose prompts are checked before training

TASK_RESUME_HINT = "To resume a run of grpo_jax.train with problems=..., call it again with the same problems."

log = logging.getLogger(__name__)


def resolve_task(task_cfg: TaskSection) -> Task:
    """Returns the task that a config names: `addition`, `jsonl`, or a function of the user's, which is itself a task.

    Raises:
        UserError: There is no such task, or its file of problems is malformed.
    """
    if task_cfg.name == "addition":
        return addition_task(task_cfg.digits, task_cfg.shots)
    if task_cfg.name == "file":
        return file_task(task_cfg.path, task_cfg.eval_path)
    hint = TASK_RESUME_HINT if task_cfg.name == PYTHON_TASK else ""
    return resolve_function(task_cfg.name, "task.name", {"addition": addition_task, "file": file_task}, hint)


def make_task(problems: Any, task_cfg: TaskSection) -> Task:
    """Returns the task of a run.

    Args:
        problems: None for the task that the config names, a list of problems, the path of a file with one JSON object
            per line, or a task.
        task_cfg: The config's `task` section.

    Raises:
        UserError: `problems` is none of these, or a problem is malformed.
    """
    if problems is None:
        return resolve_task(task_cfg)
    if isinstance(problems, str | Path):
        return file_task(str(Path(problems).expanduser()), task_cfg.eval_path)
    if isinstance(problems, list | tuple):
        return list_task(problems)
    if callable(problems):
        return problems
    raise UserError(
        f"problems must be a list of Problem, the path of a JSONL file, or a task; found {type(problems).__name__}. "
        "Pass one of these."
    )


def list_task(problems: list[Problem] | tuple[Problem, ...]) -> ProblemList:
    """Returns a task that asks the problems of a list and holds out every tenth.

    If there are fewer than ten, none is held out, and evaluation asks all of them.

    Raises:
        UserError: The list is empty, or an element is not a problem.
    """
    for i, problem in enumerate(problems):
        check_problem(problem, f"problems[{i}]")
    if not problems:
        raise UserError("problems must hold at least one Problem; found an empty list. Add some.")
    train, held_out = hold_out_tenths(problems)
    if not held_out:
        log.warning("Fewer than 10 problems: none is held out, so evaluation asks the training problems.")
    return ProblemList(train, held_out or train)


def check_problem(value: Any, name: str) -> Problem:
    """Returns `value` if it is a `Problem` whose question and answer are strings.

    Args:
        value: The value to check.
        name: What error messages call the value.

    Raises:
        UserError: The value is something else.
    """
    if not isinstance(value, Problem):
        raise UserError(
            f"{name} must be a grpo_jax.tasks.Problem; found {value!r:.60}. Write it like Problem('1 + 1?', '2')."
        )
    for field, text in (("question", value.question), ("answer", value.answer)):
        if not isinstance(text, str):
            raise UserError(f"{name} must have a string as {field}; found {text!r:.60}. Write it as text.")
    return value


def draw_problems(task: Task, indices: Iterable[int], *, seed: int, split: str) -> list[Problem]:
    """Returns the problems of a task with the given indices.

    If the split is "eval", there may be fewer: the held-out problems end where the task raises an IndexError.

    Raises:
        UserError: The task raises another exception, or returns something that `check_problem` refuses.
    """
    name = getattr(task, "__name__", type(task).__name__)
    problems = []
    for index in indices:
        try:
            value = task(index, seed=seed, split=split)
        except Exception as error:
            if split == "eval" and isinstance(error, IndexError):
                break
            raise UserError(
                f"The task {name!r} must return a Problem for index {index}, seed {seed} and split {split!r}, but it "
                f"raised {describe_error(error)}. Correct that function."
            ) from error
        problems.append(check_problem(value, f"The value of task {name!r} for index {index} of split {split!r}"))
    return problems


def held_out_problems(task: Task, count: int) -> list[Problem]:
    """Returns up to `count` held-out problems, the same ones for every seed of a run.

    Raises:
        UserError: The task has none, or fails (see `draw_problems`).
    """
    problems = draw_problems(task, range(count), seed=0, split="eval")
    if not problems:
        raise UserError(
            "A task must have at least one held-out problem; found none, because it raised an IndexError for index 0 "
            "of split 'eval'. Return a problem there."
        )
    return problems


def problems_to_check(task: Task, seed: int, questions: int) -> tuple[list[Problem], list[Problem]]:
    """Returns the (training, held-out) problems whose prompts are checked before training.

    They are all problems of a list. Another task may be endless: they are its first problems and the held-out problems
    that are evaluated.
    """
    if isinstance(task, ProblemList):
        return list(task.train), list(task.held_out)
    train = draw_problems(task, range(CHECKED_PROBLEMS), seed=seed, split="train")
    return train, held_out_problems(task, questions) if questions else []
