"""Prepares a run: checks its config and inputs, derives keys if `derive` is on, and builds its context."""

import os
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax import config as configs
from grpo_jax.config.rules import PYTHON_TASK
from grpo_jax.config.schema import Config
from grpo_jax.config.workdir import (
    check_trained_config,
    continue_derived,
    has_checkpoint,
    keys_that_are_set,
    run_digests,
)
from grpo_jax.errors import UserError
from grpo_jax.parallel.processes import from_first_process, join_processes
from grpo_jax.rewards.parts import RewardPart, accuracy_part, resolve_parts
from grpo_jax.run.checkpoint import damage_of, newest_meta, newest_step, read_meta
from grpo_jax.run.context import RunContext, build_context, make_prompt_format, read_base_model, refit_mesh
from grpo_jax.run.derivation import find_machine
from grpo_jax.run.derive import derive
from grpo_jax.run.lock import WorkdirLock
from grpo_jax.run.metrics import before_and_after, describe_finished_run, read_metrics, truncate_logs
from grpo_jax.run.progress import announce, mute, phase
from grpo_jax.run.prompt_limit import fit_prompts
from grpo_jax.run.sinks import check_sinks
from grpo_jax.run.state import describe_failure
from grpo_jax.tasks.problem_list import ProblemList, leave_out_examples
from grpo_jax.tasks.streams import make_task
from grpo_jax.tasks.task import Task
from grpo_jax.text.problem import Problem
from grpo_jax.text.terminal import printable


class CheckedRun(NamedTuple):
    """A run whose config, workdir and problems have been checked."""

    raw: Any  # the config that was checked, an ml_collections ConfigDict
    given: frozenset[str]  # the keys that keep their values if others are derived
    cfg: Config
    done: int  # updates that the run in the workdir has done, 0 for a new run
    reward_parts: dict[str, RewardPart] | None  # that Python code passed
    task: Task
    digests: dict[str, str]  # of the files that it reads


class PreparedRun(NamedTuple):
    """A run that can start."""

    cfg: Config  # as config.json stores it
    fitted: Config  # with the prompt limit that the problems need
    context: RunContext
    task: Task
    notes: list[str]  # lines for the console


def check_run(
    raw,
    workdir: Path,
    problems: Sequence[Problem] | str | Path | Task | None = None,
    rewards: dict[str, RewardPart] | None = None,
    *,
    given: Collection[str] = (),
    accept_changed_files: bool = False,
) -> CheckedRun:
    """Checks what needs neither the model nor the devices, and joins the other processes.

    The arguments are those of `grpo_jax.run.train.train`, with the config called `raw`.

    Raises:
        UserError: The config, the workdir, a problem or a reward cannot be used.
    """
    raw = name_python_inputs(raw, problems, rewards)
    if has_checkpoint(workdir):
        raw = continue_derived(raw, frozenset(given), workdir)
    cfg = configs.check(raw)
    configs.check_workdir(workdir, cfg)
    check_sinks(cfg.log.sinks)
    done, meta = newest_meta(workdir)
    check_trained_config(workdir, cfg, done, meta.get("config", {}))
    if done > cfg.total_steps:
        raise UserError(
            f"total_steps must be at least {done}, the number of updates that the run in {workdir} has done; found "
            f"{cfg.total_steps}. Raise --config.total_steps, or choose another --workdir."
        )
    reward_parts = dict(rewards) if rewards else None
    graded = accuracy_part in (reward_parts or resolve_parts(cfg)).values()
    with phase("Reading the problems"):
        task = make_task(problems, cfg, graded=graded)
    digests = run_digests(task, cfg.prompt.template)
    configs.check_files(workdir, digests, accept=accept_changed_files or not has_checkpoint(workdir))
    join_processes(os.environ, preemptible=True)
    mute(jax.process_index() != 0)
    return CheckedRun(raw, frozenset(given), cfg, done, reward_parts, task, digests)


def prepare_run(run: CheckedRun, workdir: Path) -> PreparedRun:
    """Derives keys if `derive` is on, and builds the context of a run. Nothing is written.

    Raises:
        UserError: The model, the prompts or the devices do not fit the config.
    """
    cfg, task, derived = refit_mesh(run.cfg, workdir), run.task, list[str]()
    base = read_base_model(cfg)
    if cfg.derive:
        with phase("Deriving the config"):
            values, derived = derive(cfg, keys_that_are_set(run.raw, run.given), base, task, find_machine())
        run.raw.update_from_flattened_dict(values)
        cfg = configs.check(run.raw)
        base = base._replace(prompt_format=make_prompt_format(cfg, base.prompt_format.tokenizer, base.model_cfg))
        task = leave_out_examples(task, cfg.prompt.examples) if isinstance(task, ProblemList) else task
    notes = getattr(task, "notes", ())
    fitted, task, prompt_lengths = fit_prompts(cfg, base, task)
    context = build_context(fitted, base, reward_parts=run.reward_parts or resolve_parts(cfg), training=True)
    return PreparedRun(cfg, fitted, context, task, [printable(line) for line in (*notes, *derived, prompt_lengths)])


def name_python_inputs(raw, problems, rewards: dict[str, RewardPart] | None):
    """Returns a copy of a config in which names stand for problems and rewards that are Python objects.

    Raises:
        UserError: `raw` is not a config, `rewards` is not a dict of functions or uses a reserved name, or they replace
            parts that `raw` names.
    """
    default = configs.default()
    if not isinstance(raw, type(default)):
        raise UserError(f"cfg must be a config like config.default(); found {raw!r:.60}. Pass one.")
    if rewards is not None and not (isinstance(rewards, dict) and rewards and all(map(callable, rewards.values()))):
        raise UserError(f"rewards must be a dict of functions by name; found {rewards!r:.60}. Pass one.")
    if rewards and raw.reward.parts not in (default.reward.parts, tuple(rewards)):
        raise UserError(
            f"reward.parts has no effect with rewards=...; found {raw.reward.parts}. Leave out one of them."
        )
    if rewards and rewards.keys() & {"language", "length"}:
        raise UserError(
            "rewards must not have the names 'language' and 'length', which are built-in parts with settings of their "
            f"own; found {', '.join(map(repr, rewards))}. Rename yours."
        )
    raw = raw.copy_and_resolve_references()
    if isinstance(problems, str | Path):
        raw.task.name, raw.task.path = "file", str(problems)
    elif problems is not None:
        raw.task.name = PYTHON_TASK
    if rewards:
        raw.reward.parts = tuple(rewards)
        if raw.reward.weights == default.reward.weights:
            raw.reward.weights = (1.0,) * len(rewards)
    return raw


@phase("Reading the last checkpoint")
def is_complete(workdir: Path, step: int) -> bool:
    """Returns whether the checkpoint of the last step is sound, and the step has been evaluated."""

    def read() -> np.bool_:
        return np.bool_(not damage_of(workdir, step) and not read_meta(workdir, step)["unlogged"])

    return bool(from_first_process(read, np.bool_(False)))


def take_workdir(lock: WorkdirLock, done: int) -> None:
    """Takes the lock of a run's workdir, and checks that the run still has done the same number of updates.

    Raises:
        UserError: Another job uses the workdir, or has just used it.
    """
    lock.take()
    newest = newest_step(lock.workdir)
    if newest != done:
        raise UserError(
            f"The run in {lock.workdir} must not change while it is started again, but its newest checkpoint is of "
            f"step {newest} now, after {done}. Start it again."
        )


def describe_outcome(cfg: Config, workdir: Path) -> dict[str, float]:
    """Prints the outcome of a run that has done all its updates, and returns the metrics of the last one.

    Raises:
        UserError: The run ended because of gradients that were not finite.
    """
    done = cfg.total_steps
    meta = read_meta(workdir, done)
    if failure := describe_failure(cfg, meta["skipped_in_a_row"], done):
        raise UserError(failure)
    if jax.process_index() == 0 and meta["line"] not in read_metrics(workdir):
        with closing(WorkdirLock(workdir)) as lock:
            lock.take()
            truncate_logs(workdir, done, meta["line"])
    announce(f"{before_and_after(workdir)}\n\n{describe_finished_run(workdir, done)}")
    return meta["line"]
