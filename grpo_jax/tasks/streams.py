"""The training and held-out problem streams that a config names."""

from grpo_jax.config.schema import TaskSection
from grpo_jax.tasks.addition import addition_task
from grpo_jax.tasks.problem_file import file_task, problems_of_split
from grpo_jax.tasks.task import Task
from grpo_jax.text.problem import Problem


def make_task(task: TaskSection, seed: int, split: str) -> Task:
    """The stream that a config's `task` section names.

    Args:
      task: the section: name, digits and shots (addition), path and eval_path (jsonl).
      split: `train`, or `eval` for held-out problems.
    """
    if task.name == "addition":
        return addition_task(seed, split, task.digits, task.shots)
    return file_task(seed, split, task.path, task.eval_path)


def held_out_problems(task: TaskSection, count: int) -> list[Problem]:
    """The first `count` problems of the held-out stream, or all there are; the same for every seed of a run."""
    if task.name == "jsonl":
        count = min(count, len(problems_of_split("eval", task.path, task.eval_path)))
    problem = make_task(task, 0, "eval")
    return [problem(i) for i in range(count)]
