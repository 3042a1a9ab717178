"""Shows what a run would do without writing anything: its plan, prompts, expected answers and one group.

The group is the first of the run's first rollout, drawn with the run's own sampler and keys.
"""

from collections.abc import Collection
from contextlib import closing
from pathlib import Path

import jax
import numpy as np

from grpo_jax.config.schema import Config
from grpo_jax.parallel.processes import from_first_process
from grpo_jax.rewards.parts import accuracy_part
from grpo_jax.rollout.memory import mebibytes
from grpo_jax.run.checkpoint import saved_steps
from grpo_jax.run.context import SAMPLING_KEY, RunContext, resident_bytes
from grpo_jax.run.policy import load_policy
from grpo_jax.run.preparation import PreparedRun, check_run, prepare_run
from grpo_jax.run.progress import announce, phase
from grpo_jax.run.stages import draw_completions, fold_in_all, grade_completions, sample_records
from grpo_jax.tasks.streams import draw_problems
from grpo_jax.text.answers import read_expected
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import encode_prompts
from grpo_jax.text.terminal import printable

SHOWN = 3  # prompts and expected answers
KINDS = {"n": "the number", "choice": "choice", "text": "words", "unit": "a quantity with a unit", "list": "a list"}
MAX_SHOWN = 600  # characters of a completion


def dry_run(raw, workdir: Path, *, given: Collection[str] = (), accept_changed_files: bool = False) -> None:
    """Prints the plan of a run, three of its prompts with the expected answers, and one group of completions.

    Args:
        raw: The config, not checked yet.
        workdir: The folder of the run, whose newest policy is sampled if it has one.
        given: The keys that the command line sets.
        accept_changed_files: Whether files that the run reads may have changed since it was started.

    Raises:
        UserError: The run could not start.
    """
    with phase("Preparing the run"):
        run = prepare_run(check_run(raw, workdir, given=given, accept_changed_files=accept_changed_files), workdir)
    for line in [*run.notes, *describe_plan(run)]:
        announce(line)
    is_graded = accuracy_part in run.context.grader.parts.values()
    problems = draw_problems(run.task, range(SHOWN), seed=run.cfg.seed, split="train")
    for index, problem in enumerate(problems):
        announce(f"\nPrompt {index + 1}, {printable(problem.id) or 'as the model sees it'}:")
        announce(indent(run.context.prompt_format.text(problem)))
        announce(f"Expected answer {index + 1}: {describe_expected(problem, is_graded=is_graded)}")
    with jax.set_mesh(run.context.mesh), closing(run.context.grader):
        from_first_process(run.context.grader.start, np.zeros(()))
        records = sample_group(run.fitted, run.context, problems[0], workdir)
    announce(f"\n{len(records)} completions of prompt 1:")
    for record in records:
        announce(describe_record(record))
    announce(f"\n{judge_group(run.fitted, records)}")
    announce(f"Nothing was written. Leave out --dry-run to train in {workdir}.")


def describe_plan(run: PreparedRun) -> list[str]:
    """Returns lines about the model, the devices, the memory and the rollouts of a run."""
    cfg, context, devices = run.fitted, run.context, jax.devices()
    model_cfg, axes = context.model_cfg, " x ".join(f"{axis} {size}" for axis, size in context.mesh.shape.items())
    held = mebibytes(resident_bytes(cfg, model_cfg, context.mesh, training=True))
    completions = f"{cfg.rollout.prompts} prompts x {cfg.rollout.samples} completions of up to {cfg.rollout.max_tokens}"
    updates = cfg.train.minibatches * cfg.train.epochs
    return [
        f"Model: {cfg.model.path}, {model_cfg.num_layers} layers of width {model_cfg.hidden_size}, "
        f"{model_cfg.max_positions:,} positions, computed in {cfg.model.compute_dtype}",
        f"Devices: {len(devices)} {devices[0].device_kind}, mesh {axes}; the training state takes {held} of each",
        f"Each rollout: {completions} tokens, {context.rollout_plan}",
        f"Training: {cfg.total_steps:,} updates, {updates} for each rollout, with {cfg.optim.name} at learning rate "
        f"{cfg.optim.lr:g}; rewards {', '.join(cfg.reward.parts)}",
    ]


def describe_expected(problem: Problem, *, is_graded: bool) -> str:
    """Returns the expected answer of a problem and, if the accuracy reward grades it, how that reads the answer."""
    answer = printable(problem.answer)
    if not is_graded:
        return answer
    try:
        kind, *values = read_expected(problem.answer)
    except ValueError as error:
        return f"{answer}, which no completion could match ({error})"
    return f"{answer}, read as {KINDS.get(kind, 'an expression')}{f' {values[0]}' if kind in ('n', 'choice') else ''}"


def sample_group(cfg: Config, context: RunContext, problem: Problem, workdir: Path) -> list[dict]:
    """Draws and grades the completions of one problem, and returns their records."""
    has_policy = bool(saved_steps(workdir))
    with phase("Loading the weights"):
        _, params = load_policy(cfg, context, workdir, base=not has_policy)
    prompts = encode_prompts(context.prompt_format, [problem], [0], cfg.rollout.max_prompt_tokens)
    key = fold_in_all(jax.random.key(cfg.seed), SAMPLING_KEY, 0)
    with phase("Sampling one group"):
        rollout = draw_completions(cfg, context, params, prompts, key)
    grades, rewards = grade_completions(cfg, context, [problem], rollout)
    return sample_records(context, [problem], rollout, grades, rewards, cfg.rollout.samples)


def indent(text: str) -> str:
    """Returns a text of the model or a file for the console, each line after a bar."""
    return "\n".join(f"  | {line}" for line in printable(text).splitlines() or [""])


def describe_record(record: dict) -> str:
    """Returns the text, the length and the rewards of a completion for the console."""
    rewards = " ".join(f"{name} {value:g}" for name, value in record["rewards"].items())
    cut = ", cut off" if record["truncated"] else ""
    why = f" ({printable(record['why'])})" if record["why"] else ""
    text = record["completion"]
    text = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]} ..."
    return f"{indent(text)}\n  = reward {record['reward']:g}: {rewards}{why}; {record['length']} tokens{cut}"


def judge_group(cfg: Config, records: list[dict]) -> str:
    """Returns a line about whether an update would learn from a group, and what to try if not."""
    count, cut = len(records), sum(record["truncated"] for record in records)
    rewards = [record["reward"] for record in records]
    lines = [f"Rewards {', '.join(f'{reward:g}' for reward in rewards)}."]
    if min(rewards) == max(rewards):
        lines.append(
            "They are all equal, so an update would learn nothing from this group. If most groups are like this one, "
            "a run learns nothing: try solved problems in prompt.examples, easier problems, more completions "
            "(rollout.samples), or a larger model."
        )
    else:
        lines.append("They differ, so an update learns from this group.")
    if 2 * cut > count:
        lines.append(f"{cut} of {count} completions were cut off: raise rollout.max_tokens={cfg.rollout.max_tokens}.")
    if "format" in records[0]["rewards"] and not any(record["rewards"]["format"] for record in records):
        lines.append("No completion has the format <think>...</think> <answer>...</answer>.")
    return " ".join(lines)
