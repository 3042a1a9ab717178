"""The training loop: problems -> prompts -> rollout -> rewards -> advantages -> experience -> update -> log.

A step is one optimizer update. A rollout feeds `train.minibatches * train.epochs` steps. Every random key is folded
from (seed, purpose, counters), so a resumed run continues exactly as if it had not been interrupted.
"""

import dataclasses
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from grpo_jax import config as configs
from grpo_jax.config.keys import flatten
from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.learn.optimizer import make_optimizer
from grpo_jax.learn.update import make_experience, make_update, take_rows
from grpo_jax.parallel.mesh import shard_rows
from grpo_jax.parallel.processes import check_shared_workdir, from_first_process
from grpo_jax.rewards.parts import RewardPart
from grpo_jax.rollout.sampler import place_for_rollout
from grpo_jax.run.checkpoint import damage_of, newest_step, read_meta
from grpo_jax.run.console import RunLog, describe_run, num_records
from grpo_jax.run.context import EVALUATION_KEY, SAMPLING_KEY, RunContext
from grpo_jax.run.diagnosis import initial_facts, sample_surprise
from grpo_jax.run.disk import CheckpointSaver, disk_errors
from grpo_jax.run.evaluation import evaluate
from grpo_jax.run.lock import WorkdirLock
from grpo_jax.run.metrics import (
    before_and_after,
    describe_finished_run,
    evaluation_line,
    read_metrics,
    truncate_logs,
)
from grpo_jax.run.preparation import check_run, prepare_run
from grpo_jax.run.progress import announce, phase, set_detail
from grpo_jax.run.saving import CheckpointStore
from grpo_jax.run.stages import (
    add_advantages,
    draw_completions,
    fold_in_all,
    grade_completions,
    measure_rollout,
    pack_rows,
    plan_minibatches,
    sample_records,
    start_recording,
    start_scoring,
    timed,
)
from grpo_jax.run.state import (
    RunState,
    UpdateInFlight,
    checkpoint_bytes,
    describe_failure,
    replace_reference,
    save_run,
    start_or_resume,
    wait_for_update,
)
from grpo_jax.tasks.streams import draw_problems, held_out_problems
from grpo_jax.tasks.task import Task
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import encode_prompts

SAMPLER_DRIFT_METRICS = ("policy/kl_sampler", "policy/logp_gap/mean", "policy/logp_gap/max")
# 0 for updates that do not start a rollout
ROLLOUT_TIMES = ("time/placement_s", "time/rollout_s", "time/reward_s", "time/score_s", "time/record_s")
LOSS_NOTE = (
    "loss/total does not measure progress; by default it is about 0, because the advantages of a group sum to 0 and "
    "the ratio starts at 1. Watch reward/* and rollout/length_mean instead."
)


class RunSetup(NamedTuple):
    """What stays the same throughout a run, besides its config and context."""

    root_key: jax.Array  # every random key of the run is folded from it
    held_out: list[Problem]
    saver: CheckpointSaver
    lock: WorkdirLock
    log: RunLog
    started_with: dict  # the values of config.json by dotted name, for checkpoints


@phase("Starting")
def train(
    cfg,
    *,
    workdir: str | Path,
    problems: Sequence[Problem] | str | Path | Task | None = None,
    rewards: dict[str, RewardPart] | None = None,
    accept_changed_files: bool = False,
    given: Collection[str] = (),
) -> dict[str, float]:
    """Trains to `total_steps`, resuming from the newest checkpoint of the workdir if it has one.

    `python -m grpo_jax.main` calls this function. Problems and rewards that are passed as Python objects are not stored
    in the workdir: pass them again to resume the run.

    Args:
        cfg: A config as `grpo_jax.config.default()` returns it.
        workdir: The folder of the run, which must be new or that of an earlier run.
        problems: The problems to learn from instead of those that `cfg.task` names: a list, a path (see
            `grpo_jax.tasks.read_problems`), or a task, which is a function `f(index, *, seed, split) -> Problem`.
        rewards: The reward parts by label, instead of those that `cfg.reward.parts` names. Each is a function
            `f(problems, texts, lengths) -> float32[N]`. `cfg.reward.weights` holds their weights in this order; if it
            has its default value, every weight is 1.
        accept_changed_files: Whether to resume even if files that the run reads have changed since it was started.
        given: With `cfg.derive`, keys that keep their values besides those that differ from `config.default()`.

    Returns:
        The metrics of the last update, as on the last line of metrics.jsonl.

    Raises:
        UserError: The config, the model, a problem or a reward cannot be used, or updates were not finite
            `optim.max_skips` times in a row.
    """
    workdir = Path(workdir).expanduser()
    checked = check_run(cfg, workdir, problems, rewards, given=given, accept_changed_files=accept_changed_files)
    if checked.done == checked.cfg.total_steps and is_sound(workdir, checked.done):
        return describe_outcome(checked.cfg, workdir)
    with closing(WorkdirLock(workdir)) as lock:
        from_first_process(lambda: take_workdir(lock, checked.done), np.zeros(()))
        run = prepare_run(checked, workdir)
        cfg, context = run.cfg, run.context
        if jax.process_index() == 0:
            configs.write_config(workdir, cfg, checked.digests)
            announce("\n".join(run.notes))
        if jax.process_count() > 1:
            check_shared_workdir(workdir)
        with jax.set_mesh(context.mesh), closing(context.grader):
            from_first_process(context.grader.start, np.zeros(()))
            metrics = run_updates(run.fitted, context, run.task, lock, flatten(dataclasses.asdict(cfg)))
    if jax.process_index() == 0:
        folders = (
            "samples/, checkpoints/ and tensorboard/" if "tensorboard" in cfg.log.sinks else "samples/ and checkpoints/"
        )
        announce(f"{before_and_after(workdir)}\n\nWrote metrics.jsonl, {folders} to {workdir}")
    return metrics


@phase("Reading the last checkpoint")
def is_sound(workdir: Path, step: int) -> bool:
    """Returns whether the checkpoint of a step is sound."""
    return bool(from_first_process(lambda: np.bool_(not damage_of(workdir, step)), np.bool_(False)))


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
    if meta.get("line") not in (None, *read_metrics(workdir)):
        with closing(WorkdirLock(workdir)) as lock:
            lock.take()
            truncate_logs(workdir, done, meta["line"])
    announce(f"{before_and_after(workdir)}\n\n{describe_finished_run(workdir, done)}")
    return meta.get("line") or read_metrics(workdir)[-1]


@phase("Evaluating")
def evaluate_step(cfg: Config, context: RunContext, setup: RunSetup, run: RunState) -> dict[str, float]:
    """Evaluates the policy, writes its samples and prints its scores; returns the metrics, {} if none are held out."""
    if not setup.held_out:
        return {}
    start = time.monotonic()
    placed = place_for_rollout(context.model_cfg, run.train.params, context.rollout_mesh)
    key = fold_in_all(setup.root_key, EVALUATION_KEY, run.step)
    metrics, records = evaluate(cfg, context, placed, setup.held_out, key)
    setup.log.write_samples("eval", run.step, records)
    asked = f"{len(setup.held_out)} held-out question{'s' * (len(setup.held_out) > 1)}"
    setup.log.say(f"step {run.step}: {asked}: {evaluation_line(metrics)}")
    return metrics | {"time/eval_s": time.monotonic() - start}


def look_at_base_model(cfg: Config, context: RunContext, task: Task, setup: RunSetup, run: RunState) -> None:
    """Evaluates the policy of a new run, and looks for signs that the model or the problems are not sound."""
    if setup.held_out:
        setup.log.write(0, evaluate_step(cfg, context, setup, run))
    with phase("Looking at the first problems and answers"):
        setup.log.observe(0, initial_facts(cfg, context, task, run.train.params, run.reference, setup.root_key))
    setup.log.say(LOSS_NOTE)


def finish_update(cfg: Config, log: RunLog, run: RunState, eval_metrics: dict[str, float] | None = None) -> RunState:
    """Fetches and logs the metrics of the update in flight, if there is one.

    Args:
        cfg: The run's config.
        log: Where the metrics go.
        run: The state of the run.
        eval_metrics: Metrics of an evaluation after this update.

    Returns:
        The state without an update in flight.
    """
    if run.flight is None:
        return run
    flight = wait_for_update(run).flight
    # Every process has them all, so they need no collective, which the devices would run after the next update.
    metrics = {name: float(value) for name, value in jax.device_get(flight.metrics).items()}
    rollout_metrics = run.rollout_metrics
    if flight.rollout_metrics is not None:  # in later updates the policy is no longer the one that sampled the rollout
        rollout_metrics = flight.rollout_metrics | {name: metrics[name] for name in SAMPLER_DRIFT_METRICS}
    metrics |= rollout_metrics | flight.times | (eval_metrics or {})
    # What the host did while the previous update was still running took no time of this step.
    start, packed = max(flight.start, log.step_end), max(flight.packed, log.step_end)
    metrics["time/pack_s"] = packed - start
    metrics["time/update_s"] = flight.end - packed - flight.times.get("time/record_s", 0.0)
    metrics["time/save_s"], log.save_seconds = log.save_seconds, 0.0
    metrics["time/step_s"] = flight.end - log.step_end
    log.write(run.step, metrics)
    log.step_end = flight.end
    skipped = run.skipped_in_a_row + 1 if metrics["optim/skipped"] else 0
    failure = run.failure or describe_failure(cfg, skipped, run.step)
    return run._replace(flight=None, rollout_metrics=rollout_metrics, skipped_in_a_row=skipped, failure=failure)


def start_saving(cfg: Config, setup: RunSetup, run: RunState) -> None:
    """Starts to save a checkpoint, whose step must be the last one in metrics.jsonl."""
    setup.lock.check()
    setup.log.attempt()
    with setup.saver.saving(run.step, checkpoint_bytes(cfg, run, setup.saver.store)):
        save_run(cfg, setup.saver.store, run, setup.root_key, setup.started_with, setup.log.last_line)


def evaluate_and_save(cfg: Config, context: RunContext, setup: RunSetup, run: RunState) -> RunState:
    """Evaluates the policy and saves a checkpoint, each if it is due after `run.step`."""
    setup.saver.check()
    is_last = run.step == cfg.total_steps
    if is_last or (cfg.eval.every_steps and run.step % cfg.eval.every_steps == 0):
        run = wait_for_update(run)  # so that its time does not include the evaluation
        run = finish_update(cfg, setup.log, run, evaluate_step(cfg, context, setup, run))
    if is_last or run.step % cfg.checkpoint.every_steps == 0 or run.failure or setup.saver.is_due():
        run = finish_update(cfg, setup.log, run)
        start = time.monotonic()
        start_saving(cfg, setup, run)
        setup.log.save_seconds = time.monotonic() - start
    if run.flight is None:
        setup.log.step_end = time.monotonic()  # so that the time of the next step does not include this
    return run


@contextmanager
def open_run(
    cfg: Config, context: RunContext, task: Task, lock: WorkdirLock, started_with: dict
) -> Iterator[tuple[RunSetup, RunState]]:
    """Restores or starts a run and opens its log, which is cut back to the restored step; closes both in the end."""
    workdir = lock.workdir
    lock.check()
    run, root_key = start_or_resume(cfg, context, workdir)
    with disk_errors(workdir, "the folder of checkpoints"):
        store = CheckpointStore(workdir, cfg.checkpoint.keep, cfg.checkpoint.best, run.step)
        saver = CheckpointSaver(store, workdir, cfg.checkpoint.retry_s)
    line = read_meta(workdir, run.step)["line"] if run.step else None
    with closing(saver):
        with closing(RunLog(cfg, context, workdir, run.step, line)) as log:
            yield RunSetup(root_key, held_out_problems(task, cfg.eval.questions), saver, lock, log, started_with), run


@phase("Training")
def run_updates(
    cfg: Config, context: RunContext, task: Task, lock: WorkdirLock, started_with: dict
) -> dict[str, float]:
    """Runs the updates of `train` and returns the metrics of the last one; the mesh must be set.

    Within a rollout, an update is dispatched before the metrics of the one before it are fetched, so that the devices
    do not wait for the host.

    Raises:
        UserError: Updates were not finite `optim.max_skips` times in a row.
    """
    mesh, updates_per_rollout = context.mesh, cfg.train.minibatches * cfg.train.epochs
    completions = cfg.rollout.prompts * cfg.rollout.samples
    with open_run(cfg, context, task, lock, started_with) as (setup, run):
        log, root_key = setup.log, setup.root_key
        update = make_update(context.model_cfg, cfg, mesh, run.train.params, make_optimizer(cfg.optim))
        log.say(describe_run(cfg, context, run))
        if run.step == 0:
            look_at_base_model(cfg, context, task, setup, run)
        plan, log.step_end = None, time.monotonic()
        while run.step < cfg.total_steps and not run.failure:
            step, (rollout_index, update_index) = run.step + 1, divmod(run.step, updates_per_rollout)
            set_detail(f"step {step}/{cfg.total_steps}")
            times, rollout_metrics, recording = dict.fromkeys(ROLLOUT_TIMES, 0.0), None, None
            if run.experience is None:
                prompt_ids = range(rollout_index * cfg.rollout.prompts, (rollout_index + 1) * cfg.rollout.prompts)
                problems = draw_problems(task, prompt_ids, seed=cfg.seed, split="train")
                prompts = encode_prompts(context.prompt_format, problems, prompt_ids, cfg.rollout.max_prompt_tokens)
                run = finish_update(cfg, log, run)  # sampling needs its policy, and its line should not wait for it
                if run.failure:
                    run = evaluate_and_save(cfg, context, setup, run)
                    break
                key = fold_in_all(root_key, SAMPLING_KEY, rollout_index)
                rollout = draw_completions(cfg, context, run.train.params, prompts, key, problems, times)
                with timed(times, "time/score_s", "Scoring with the reference"):
                    experience = make_experience(prompts, rollout)
                    wait_for_ref_logps = start_scoring(cfg, context, run.reference, experience)
                with timed(times, "time/reward_s", "Grading"):  # the host grades while the devices score
                    grades, rewards = grade_completions(cfg, context, problems, rollout)
                with timed(times, "time/score_s", "Scoring with the reference"):
                    ref_logps = wait_for_ref_logps()
                with phase("Computing the advantages"):
                    if cfg.loss.kl_in == "reward" and run.train.is_reference:
                        ref_logps = experience.sampler_logps  # exactly 0 KL; dividing by the std would amplify rounding
                    experience = experience.replace(ref_logps=ref_logps)
                    experience = add_advantages(cfg, experience, rollout, rewards)
                rollout_metrics = measure_rollout(cfg, experience, rollout, grades, rewards, times["time/rollout_s"])
                run = run._replace(experience=experience)
            start = time.monotonic()
            with phase("Packing"):
                if plan is None or update_index == 0:  # drawn on the devices, so not while an update is in flight
                    plan = plan_minibatches(cfg, run.experience, root_key, rollout_index)
                minibatch = take_rows(run.experience, plan[update_index])
                batch = shard_rows(mesh, pack_rows(cfg, mesh, minibatch, completions // cfg.train.minibatches))
            packed = time.monotonic()
            if rollout_metrics and num_records(cfg, step):
                records = sample_records(context, problems, rollout, grades, rewards, num_records(cfg, step))
                recording = start_recording(cfg, context, run.train.params, run.experience, records, plan, step)
            with phase("Updating"):
                train_state, update_metrics = update(run.train, batch)
            if recording:
                with timed(times, "time/record_s", "Scoring the recorded samples"):
                    records = recording()
                log.write_samples("train", step, records)
                log.observe(step, sample_surprise(records) if step == 1 else {})
            run = finish_update(cfg, log, run)  # the previous update, while the devices compute this one
            experience = run.experience if step % updates_per_rollout else None
            flight = UpdateInFlight(update_metrics, rollout_metrics, times, start, packed)
            run = run._replace(step=step, train=train_state, experience=experience, flight=flight)
            run = replace_reference(cfg, run)
            run = evaluate_and_save(cfg, context, setup, run)
        with phase("Writing the last checkpoint"):
            while not setup.saver.finish():
                start_saving(cfg, setup, run)
            log.attempt()
    if run.failure:
        raise UserError(run.failure)
    return log.last_metrics
