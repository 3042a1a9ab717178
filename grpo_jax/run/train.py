"""The training loop: problems -> prompts -> rollout -> rewards -> advantages -> experience -> update -> log.

A step is one optimizer update. A rollout feeds `train.minibatches * train.epochs` steps. Every random key is folded
from (seed, purpose, counters), so a resumed run continues exactly as if it had not been interrupted.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

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
from grpo_jax.run.checkpoint import read_meta
from grpo_jax.run.console import RunLog, describe_run, fetch_update, finish_update, num_records
from grpo_jax.run.context import EVALUATION_KEY, SAMPLING_KEY, RunContext
from grpo_jax.run.diagnosis import initial_facts, sample_surprise
from grpo_jax.run.disk import CheckpointSaver, disk_errors
from grpo_jax.run.drawn import DrawnCompletions, remove_drawn
from grpo_jax.run.evaluation import evaluate
from grpo_jax.run.lock import WorkdirLock
from grpo_jax.run.metrics import before_and_after, evaluation_line, is_logged
from grpo_jax.run.preemption import SafePoints, resume_command
from grpo_jax.run.preparation import check_run, describe_outcome, is_complete, prepare_run, take_workdir
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
    replace_reference,
    save_run,
    start_or_resume,
)
from grpo_jax.signals import defer_signals, receive_deferred_signals
from grpo_jax.tasks.streams import draw_problems, held_out_problems
from grpo_jax.tasks.task import Task
from grpo_jax.text.problem import Problem, Prompts
from grpo_jax.text.prompt import encode_prompts
from grpo_jax.types import Rollout

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
    safe_points: SafePoints
    started_with: dict  # the values of config.json by dotted name, for checkpoints


@receive_deferred_signals()
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
        RunStopped: The run was told to stop: by SIGTERM, Ctrl-C or `run.time_limit`.
    """
    workdir = Path(workdir).expanduser()
    checked = check_run(cfg, workdir, problems, rewards, given=given, accept_changed_files=accept_changed_files)
    safe_points = SafePoints(checked.cfg, workdir, resume_command(workdir, problems, rewards))
    if checked.done == checked.cfg.total_steps and is_complete(workdir, checked.done):
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
        with jax.set_mesh(context.mesh), closing(context.grader), defer_signals(safe_points.may_defer):
            from_first_process(context.grader.start, np.zeros(()))
            started_with = flatten(dataclasses.asdict(cfg))
            metrics = run_updates(run.fitted, context, run.task, lock, safe_points, started_with)
    if jax.process_index() == 0:
        folders = (
            "samples/, checkpoints/ and tensorboard/" if "tensorboard" in cfg.log.sinks else "samples/ and checkpoints/"
        )
        announce(f"{before_and_after(workdir)}\n\nWrote metrics.jsonl, {folders} to {workdir}")
    return metrics


@phase("Evaluating")
def evaluate_step(cfg: Config, context: RunContext, setup: RunSetup, run: RunState) -> dict[str, float]:
    """Evaluates the policy, writes its samples and prints its scores; returns the metrics, {} if none are held out."""
    if not setup.held_out:
        return {}
    start = time.monotonic()
    placed = place_for_rollout(context.model_cfg, run.train.params, context.rollout_mesh)
    key = fold_in_all(setup.root_key, EVALUATION_KEY, run.step)

    def stop_if_asked() -> None:
        if setup.safe_points.must_stop():
            stop_run(cfg, setup, run)

    metrics, records = evaluate(cfg, context, placed, setup.held_out, key, stop_if_asked)
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


def start_saving(cfg: Config, setup: RunSetup, run: RunState) -> None:
    """Starts to save a checkpoint, unless there is one of this step; all earlier steps must be logged."""
    if setup.saver.has(run.step):
        return
    from_first_process(setup.lock.check, np.zeros(()))
    setup.log.attempt()
    line = {} if run.unlogged else setup.log.last_line
    with setup.saver.saving(run.step, checkpoint_bytes(cfg, run, setup.saver.store)):
        save_run(cfg, setup.saver.store, run, setup.root_key, setup.started_with, line)
    remove_drawn(setup.lock.workdir)


def evaluate_and_save(cfg: Config, context: RunContext, setup: RunSetup, run: RunState) -> RunState:
    """Evaluates the policy and saves a checkpoint, each if it is due after `run.step`."""
    setup.saver.check()
    is_last = run.step == cfg.total_steps
    if is_last or (cfg.eval.every_steps and run.step % cfg.eval.every_steps == 0):
        run = fetch_update(cfg, setup.log, run)  # so that its time does not include the evaluation
        run = finish_update(cfg, setup.log, run, evaluate_step(cfg, context, setup, run))
    is_due = is_last or run.step % cfg.checkpoint.every_steps == 0 or bool(run.failure)
    if run.experience is None or jax.process_count() == 1:  # processes agree before a rollout only, as they wait there
        is_due |= setup.safe_points.must_save()
    if is_due or setup.saver.is_due():
        run = finish_update(cfg, setup.log, run)
        start = time.monotonic()
        start_saving(cfg, setup, run)
        setup.log.save_seconds = time.monotonic() - start
    if run.flight is None:
        setup.log.step_end = time.monotonic()  # so that the time of the next step does not include this
    return run


def finish_saving(cfg: Config, setup: RunSetup, run: RunState) -> None:
    """Waits until the last checkpoint is written, which is that of `run`."""
    with phase("Writing the last checkpoint"):
        while not setup.saver.finish() or (run.step and not setup.saver.has(run.step)):
            start_saving(cfg, setup, run)
        setup.log.attempt()


def at_safe_point(cfg: Config, setup: RunSetup, run: RunState) -> bool:
    """Saves a checkpoint if a signal asks for it, and returns whether the run must stop; no update may be in flight."""
    if setup.safe_points.must_save() and run.step:
        start_saving(cfg, setup, run)
    return setup.safe_points.must_stop()


def stop_run(cfg: Config, setup: RunSetup, run: RunState, keep: Callable[[], int] = int) -> NoReturn:
    """Saves a run that must stop.

    Args:
        cfg: The run's config.
        setup: What stays the same.
        run: The state, without an update in flight.
        keep: Keeps the completions of the next rollout that are finished, and returns their number.

    Raises:
        RunStopped: Always.
    """
    setup.saver.retry_s = 0  # it does not wait until a full disk has room
    if run.step:
        start_saving(cfg, setup, run)
    kept = keep()
    with phase("Writing the last checkpoint"):
        setup.saver.wait()
        setup.log.attempt()
    raise setup.safe_points.stopped(kept)


def sample_policy(
    cfg: Config,
    context: RunContext,
    setup: RunSetup,
    run: RunState,
    prompts: Prompts,
    problems: Sequence[Problem],
    times: dict[str, float],
) -> tuple[Rollout, Callable[[], None]]:
    """Draws the completions of the next rollout, or those that are missing if the run stopped in the middle of it.

    Returns:
        (rollout, stop_if_asked): The rollout, and a function that keeps it and stops the run if that must stop; to be
        called at the safe points before the update.

    Raises:
        RunStopped: The run must stop; the completions that are finished are kept.
    """
    key = fold_in_all(setup.root_key, SAMPLING_KEY, run.step // (cfg.train.minibatches * cfg.train.epochs))
    kept = DrawnCompletions(cfg, context, setup.lock.workdir, prompts, key, run.train.params)
    must_stop = partial(at_safe_point, cfg, setup, run)
    with timed(times, "time/rollout_s", "Reading the finished completions"):
        drawn = kept.load()
    rollout = draw_completions(cfg, context, run.train.params, prompts, key, problems, times, drawn, must_stop)

    def stop_if_asked() -> None:
        if must_stop():
            stop_run(cfg, setup, run, partial(kept.save, rollout))

    stop_if_asked()
    return rollout, stop_if_asked


@contextmanager
def open_run(
    cfg: Config, context: RunContext, task: Task, lock: WorkdirLock, safe_points: SafePoints, started_with: dict
) -> Iterator[tuple[RunSetup, RunState]]:
    """Restores or starts a run and opens its log, which is cut back to the restored step; closes both in the end."""
    workdir = lock.workdir
    from_first_process(lock.check, np.zeros(()))
    run, root_key = start_or_resume(cfg, context, workdir)
    with disk_errors(workdir, "the folder of checkpoints"):
        store = CheckpointStore(workdir, cfg.checkpoint.keep, cfg.checkpoint.best, run.step)
        saver = CheckpointSaver(store, workdir, cfg.checkpoint.retry_s)
    line = read_meta(workdir, run.step)["line"] if run.step else None
    held_out = held_out_problems(task, cfg.eval.questions)
    with closing(saver):
        with closing(RunLog(cfg, context, workdir, run.step, line)) as log:
            if run.unlogged and from_first_process(lambda: np.bool_(is_logged(workdir, run.step)), np.bool_(False)):
                run = run._replace(unlogged=None)  # since then, the run had been resumed and killed
            yield RunSetup(root_key, held_out, saver, lock, log, safe_points, started_with), run


@phase("Training")
def run_updates(
    cfg: Config, context: RunContext, task: Task, lock: WorkdirLock, safe_points: SafePoints, started_with: dict
) -> dict[str, float]:
    """Runs the updates of `train` and returns the metrics of the last one; the mesh must be set.

    Within a rollout, an update is dispatched before the metrics of the one before it are fetched, so that the devices
    do not wait for the host.

    Raises:
        UserError: Updates were not finite `optim.max_skips` times in a row.
    """
    mesh, updates_per_rollout = context.mesh, cfg.train.minibatches * cfg.train.epochs
    completions = cfg.rollout.prompts * cfg.rollout.samples
    with open_run(cfg, context, task, lock, safe_points, started_with) as (setup, run):
        log, root_key = setup.log, setup.root_key
        update = make_update(context.model_cfg, cfg, mesh, run.train.params, make_optimizer(cfg.optim))
        log.say(describe_run(cfg, context, run))
        if run.step == 0:
            look_at_base_model(cfg, context, task, setup, run)
        elif run.unlogged:
            run = evaluate_and_save(cfg, context, setup, run)
        safe_points.has_unsaved, plan, log.step_end = True, None, time.monotonic()
        while run.step < cfg.total_steps and not run.failure:
            if safe_points.must_stop():
                stop_run(cfg, setup, finish_update(cfg, log, run))
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
                rollout, stop_if_asked = sample_policy(cfg, context, setup, run, prompts, problems, times)
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
                stop_if_asked()
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
        finish_saving(cfg, setup, run)
    if run.failure:
        raise UserError(run.failure)
    return log.last_metrics
