"""The training and held-out problems that a config names."""

from grpo_jax.config.schema import TaskSection
from grpo_jax.tasks.addition import addition_task
from grpo_jax.tasks.problem_file import file_task, read_split
from grpo_jax.tasks.task import Task
from grpo_jax.text.problem import Problem


def make_task(task_cfg: TaskSection, seed: int, split: str) -> Task:
    """Returns the task that a config names.

    Args:
        task_cfg: The config's `task` section.
        seed: Seed of the problems, or of their order.
        split: "train", or "eval" for held-out problems.
    """
    if task_cfg.name == "addition":
        return addition_task(seed, split, task_cfg.digits, task_cfg.shots)
    return file_task(seed, split, task_cfg.path, task_cfg.eval_path)


def held_out_problems(task_cfg: TaskSection, count: int) -> list[Problem]:
    """Returns up to `count` held-out problems, the same ones for every seed of a run."""
    if task_cfg.name == "jsonl":
        count = min(count, len(read_split("eval", task_cfg.path, task_cfg.eval_path)))
    problem = make_task(task_cfg, 0, "eval")
    return [problem(i) for i in range(count)]
