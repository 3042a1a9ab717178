"""Finds the task of a run, which a config names or Python code passes, and takes problems from it."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from grpo_jax.config.functions import describe_error, resolve_function
from grpo_jax.config.rules import PYTHON_TASK
from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.tasks.addition import addition_task
from grpo_jax.tasks.problem_file import file_task, keep_readable
from grpo_jax.tasks.problem_list import ProblemList, leave_out_examples, split_problems
from grpo_jax.tasks.task import Task
from grpo_jax.text.problem import Problem, read_messages

CHECKED_PROBLEMS = 256  # training problems of an endless task whose prompts are measured before training

TASK_RESUME_HINT = "To resume a run of grpo_jax.train with problems=..., call it again with the same problems."


def resolve_task(cfg: Config, *, graded: bool = True) -> Task:
    """Returns the task that a config names: `addition`, `file`, or a function of the user's, which is itself a task.

    Raises:
        UserError: There is no such task, or its file of problems cannot be used.
    """
    task_cfg = cfg.task
    if task_cfg.name == "addition":
        return addition_task(task_cfg.digits, task_cfg.shots)
    if task_cfg.name == "file":
        return file_task(task_cfg, hold_out=cfg.eval.questions > 0, graded=graded)
    hint = TASK_RESUME_HINT if task_cfg.name == PYTHON_TASK else ""
    return resolve_function(task_cfg.name, "task.name", {"addition": addition_task, "file": file_task}, hint)


def make_task(problems: Any, cfg: Config, *, graded: bool = True) -> Task:
    """Returns the task of a run.

    Args:
        problems: None for the task that the config names, a list of problems, the path of a file of problems, or a
            task.
        cfg: The run's config.
        graded: Whether the accuracy reward compares completions with the answers. If so, rows of a file or a list whose
            answer no completion could match are left out.

    Raises:
        UserError: `problems` is none of these, or a problem cannot be used.
    """
    if isinstance(problems, str | Path):
        path = str(Path(problems).expanduser())
        cfg, problems = replace(cfg, task=replace(cfg.task, name="file", path=path)), None
    if problems is None:
        task = resolve_task(cfg, graded=graded)
    elif isinstance(problems, list | tuple):
        task = list_task(problems, cfg, graded=graded)
    else:
        task = problems
    if isinstance(task, ProblemList):
        return leave_out_examples(task, cfg.prompt.examples)
    if callable(task):
        return task
    raise UserError(
        f"problems must be a list of Problem, the path of a file, or a task; found {type(problems).__name__}. "
        "Pass one of these."
    )


def list_task(problems: list[Problem] | tuple[Problem, ...], cfg: Config, *, graded: bool) -> ProblemList:
    """Returns a task that asks the problems of a list and holds out about a tenth of them (see `split_problems`).

    Raises:
        UserError: The list is empty, an element is not a problem, or no completion could match the answers of too many
            problems.
    """
    named = [(f"problems[{i}]", check_problem(problem, f"problems[{i}]")) for i, problem in enumerate(problems)]
    kept, unreadable = keep_readable("problems", named, cfg.task.max_unreadable, graded=graded)
    notes = (f"{len(kept):,} problems{unreadable}",) if unreadable else ()
    return split_problems(kept, hold_out=cfg.eval.questions > 0, notes=notes)


def check_problem(value: Any, name: str) -> Problem:
    """Returns `value` if it is a `Problem` whose question is a string or messages, and whose answer is a string.

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
    try:
        read_messages(value.question)
        if not isinstance(value.answer, str):
            raise ValueError(f"the answer must be a string; found {value.answer!r:.60}")
    except ValueError as error:
        raise UserError(f"{name}: {error}. Write it as text.") from None
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
    """Returns up to `count` held-out problems, the same ones for every seed of a run; none for a count of 0.

    Raises:
        UserError: The task has none, or fails (see `draw_problems`).
    """
    problems = draw_problems(task, range(count), seed=0, split="eval")
    if count and not problems:
        raise UserError(
            "A task must have at least one held-out problem; found none for split 'eval'. Add problems with other "
            "questions, return one for index 0 of that split, or set --config.eval.questions=0 to train without "
            "evaluation."
        )
    return problems


def problems_to_check(task: Task, seed: int, questions: int) -> tuple[list[Problem], list[Problem]]:
    """Returns the (training, held-out) problems whose prompts are measured before training.

    These are all problems of a list. Any other task may be endless, so they are its first training problems, and the
    held-out problems of an evaluation.
    """
    if isinstance(task, ProblemList):
        return list(task.train), list(task.held_out)
    train = draw_problems(task, range(CHECKED_PROBLEMS), seed=seed, split="train")
    return train, held_out_problems(task, questions) if questions else []
