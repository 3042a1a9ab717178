"""The prompt limit of a run: `rollout.max_prompt_tokens`, or the length that the problems need if that is 0."""

import copy
from dataclasses import replace
from itertools import compress

import numpy as np
from jaxtyping import Int

from grpo_jax.config.rules import check_model
from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.run.context import BaseModel
from grpo_jax.run.progress import phase
from grpo_jax.tasks.problem_list import ProblemList
from grpo_jax.tasks.streams import CHECKED_PROBLEMS, problems_to_check
from grpo_jax.tasks.task import Task

LIMIT_MULTIPLE = 16  # a limit that is derived from the problems is a multiple of this
NAMED_PROMPTS = 5  # prompts that an error names at most


@phase("Measuring the prompts")
def fit_prompts(cfg: Config, base: BaseModel, task: Task) -> tuple[Config, Task, str]:
    """Chooses the prompt limit of a run, and leaves out problems that exceed it if `task.too_long` is `drop`.

    All problems of a list are measured. Any other task may be endless, so only its first problems are measured, and
    half the difference between their longest and shortest prompts is added for later ones.

    Args:
        cfg: A checked config.
        base: The base model.
        task: The task of the run.

    Returns:
        (cfg, task, line): The config with the limit as `rollout.max_prompt_tokens`, the task, and a line that says how
        long the prompts are, after one about those that are left out.

    Raises:
        UserError: A prompt is too long, and `task.too_long` does not leave it out; or the task fails or holds out no
            problems; or the model has too few positions.
    """
    check_model(cfg, base.model_cfg)
    is_list, positions = isinstance(task, ProblemList), base.model_cfg.max_positions
    leaves_out = is_list and cfg.task.too_long == "drop"
    splits = problems_to_check(task, cfg.seed, cfg.eval.questions)
    names = [[problem.id or f"problem {i}" for i, problem in enumerate(split)] for split in splits]
    most, limit = positions - cfg.rollout.max_tokens, cfg.rollout.max_prompt_tokens
    # The lengths of a list are 0 for prompts that cannot be the longest one that fits, and are not measured.
    options = dict(most=limit or most) if is_list else {}
    lengths = [base.prompt_format.lengths(*pair, **options) for pair in zip(splits, names, strict=True)]
    if not limit:
        # A resumed run may evaluate more questions, and must have the same limit.
        counted = np.concatenate(lengths if is_list else [split[:CHECKED_PROBLEMS] for split in lengths])
        counted = counted[counted <= most] if leaves_out else counted
        longest = int(counted.max(initial=0)) or most
        room = 0 if is_list else (longest - int(counted.min())) // 2
        limit = min(most, -(-(longest + room) // LIMIT_MULTIPLE) * LIMIT_MULTIPLE)
    line, are_short = "", [split <= limit for split in lengths]
    measured = np.concatenate(lengths)
    kept = measured[measured <= limit]
    if len(kept) < len(measured):
        if not leaves_out or any(short.size and not short.any() for short in are_short):
            raise UserError(describe_too_long(cfg, positions, limit, [*names[0], *names[1]], measured, is_list))
        task = copy.copy(task)
        task.train, task.held_out = (list(compress(*pair)) for pair in zip(splits, are_short, strict=True))
        left = f"{len(task.train):,} problems for training and {len(task.held_out):,} held out are left"
        long = f"{len(measured) - len(kept):,} of {len(measured):,} prompts have more than {limit} tokens"
        line = f"{long} and are left out: {name_long([*names[0], *names[1]], measured, limit)}; {left}\n"
    line += f"Prompts of up to {kept.max()} tokens; rollout.max_prompt_tokens {limit}"
    return replace(cfg, rollout=replace(cfg.rollout, max_prompt_tokens=limit)), task, line


def name_long(names: list[str], lengths: Int[np.ndarray, " N"], limit: int) -> str:
    """Lists the first of the prompts that are longer than the limit, with their lengths."""
    rows = np.flatnonzero(lengths > limit)
    named = [f"{names[row]} has {lengths[row]}" for row in rows[:NAMED_PROMPTS]]
    return ", ".join(named + [f"and {len(rows) - NAMED_PROMPTS:,} more"] * (len(rows) > NAMED_PROMPTS))


def describe_too_long(
    cfg: Config, positions: int, limit: int, names: list[str], lengths: Int[np.ndarray, " N"], is_list: bool
) -> str:
    """Returns the error for prompts that are too long: which of N they are, and which settings would fit all."""
    count, longest = np.count_nonzero(lengths > limit), int(lengths.max())
    most = positions - cfg.rollout.max_tokens
    expected, changes = f"rollout.max_prompt_tokens={limit} tokens", [f"rollout.max_prompt_tokens={longest}"]
    if limit == most and not cfg.rollout.max_prompt_tokens:
        expected = (
            f"{limit} tokens, the model's {positions} positions minus rollout.max_tokens={cfg.rollout.max_tokens}"
        )
        changes = []
    changes += [f"rollout.max_tokens={positions - longest}"] * (longest > most)
    advice = f"Set {' and '.join(changes)}" if longest < positions else "Shorten them"
    if is_list and cfg.task.too_long == "refuse" and count < len(lengths):
        advice += ", or leave them out with task.too_long=drop"
    found = f"{count:,} of {len(lengths):,} have more: {name_long(names, lengths, limit)}"
    return f"A prompt may have at most {expected}; {found}. {advice}."
