"""The training loop: problems -> prompts -> rollout -> rewards -> advantages -> experience -> updates -> checkpoint.

A step is one optimizer update. A rollout feeds `train.minibatches * train.epochs` steps. Every random key is folded
from (seed, purpose, counters), so a resumed run continues exactly as if it had not been interrupted.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.learn.grpo import advantages
from grpo_jax.learn.optimizer import init_train_state, make_optimizer, train_state_shapes, train_state_shardings
from grpo_jax.learn.packing import packed_shape, unpack_completions
from grpo_jax.learn.update import (
    make_experience,
    make_update,
    minibatch_rows,
    pack_minibatch,
    score_completions,
    take_rows,
)
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import gather_to_host, num_data_shards, shard_rows, tree_shardings
from grpo_jax.rewards.parts import Rewards
from grpo_jax.rollout.sampler import generate_rollout, place_for_rollout
from grpo_jax.run import checkpoint
from grpo_jax.run.context import EVALUATION_KEY, SAMPLING_KEY, SHUFFLING_KEY, RunContext
from grpo_jax.run.evaluation import evaluate, grade_completions, sample_records
from grpo_jax.run.metrics import MetricsLog, before_and_after, console_line, evaluation_line, write_samples
from grpo_jax.tasks.streams import draw_problems, held_out_problems, resolve_task
from grpo_jax.tasks.task import Task
from grpo_jax.text.problem import Problem, Prompts
from grpo_jax.text.prompt import encode_prompts
from grpo_jax.types import Experience, PackedBatch, Rollout
from grpo_jax.weights.model_io import load

SAMPLER_DRIFT_METRICS = ("policy/kl_sampler", "policy/logp_gap/mean", "policy/logp_gap/max")
LOSS_NOTE = (
    "loss/total is about 0 by design, because the advantages of a group sum to 0 and the ratio starts at 1. "
    "Watch reward, accuracy, format and length instead."
)


def fold_in_all(key, *counters: int):
    """Returns the key with each of the counters folded in, one after another."""
    for counter in counters:
        key = jax.random.fold_in(key, counter)
    return key


def collect_experience(
    cfg: Config, context: RunContext, task: Task, params, reference, index: int, key
) -> tuple[Experience, dict[str, float], list[dict]]:
    """Runs rollout `index` of a run: problems -> prompts -> rollout -> rewards -> advantages -> experience.

    Args:
        cfg: The run's config.
        context: The run's context.
        task: The stream of training problems.
        params: The policy, sharded for training.
        reference: The frozen reference, or None if `loss.kl_coef` is 0.
        index: The number of the rollout, which decides its problems.
        key: The random key of the rollout.

    Returns:
        (experience, metrics, records): The records describe the first `log.samples` completions.
    """
    start = time.monotonic()
    prompt_ids = range(index * cfg.rollout.prompts, (index + 1) * cfg.rollout.prompts)
    problems = draw_problems(task, prompt_ids, seed=cfg.seed, split="train")
    prompts = encode_prompts(context.tokenizer, problems, prompt_ids, cfg.rollout.max_prompt_tokens)
    rollout = draw_completions(cfg, context, params, prompts, key)
    sampled = time.monotonic()
    texts, rewards = grade_completions(cfg, context, problems, rollout)
    group_advantages = np.asarray(advantages(jnp.asarray(rewards.total.reshape(rollout.lengths.shape))))
    graded = time.monotonic()
    experience = make_experience(prompts, rollout).replace(advantages=group_advantages.reshape(-1))
    if reference is not None:
        experience = add_reference_logps(cfg, context, reference, experience)
    times = {
        "rollout/tokens_per_s": rollout.lengths.sum() / (sampled - start),
        "time/rollout_s": sampled - start,
        "time/reward_s": graded - sampled,
        "time/score_s": time.monotonic() - graded,
    }
    metrics = measure_rollout(rollout, rewards, group_advantages) | times
    records = sample_records(problems, rollout, texts[: cfg.log.samples], rewards)
    records = [record | {"advantage": float(group_advantages.flat[n])} for n, record in enumerate(records)]
    return experience, {name: float(value) for name, value in metrics.items()}, records


def draw_completions(cfg: Config, context: RunContext, params, prompts: Prompts, key) -> Rollout:
    """Draws `rollout.samples` completions for each prompt and gathers them to the host."""
    rollout = generate_rollout(
        context.model_cfg,
        place_for_rollout(context.model_cfg, params, context.mesh),
        prompts,
        key,
        samples=cfg.rollout.samples,
        max_tokens=cfg.rollout.max_tokens,
        temperature=cfg.rollout.temperature,
        stop_table=context.stop_table,
        slots=context.rollout_plan.slots,
    )
    return gather_to_host(rollout)


def add_reference_logps(cfg: Config, context: RunContext, reference, experience: Experience) -> Experience:
    """Returns the experience with the log-probs of its completions under the reference."""
    packed = pack_batch(cfg, context.mesh, experience)
    ref_logps = gather_to_host(
        score_completions(
            context.model_cfg,
            reference,
            shard_rows(context.mesh, packed),
            temperature=cfg.rollout.temperature,
            chunk_tokens=cfg.train.chunk_tokens,
        )
    )
    return experience.replace(ref_logps=unpack_completions(ref_logps, packed.flat_index, experience.mask.shape))


def measure_rollout(rollout: Rollout, rewards: Rewards, group_advantages: np.ndarray) -> dict:
    """Returns the reward/, rollout/ and groups/ metrics of a rollout, except times."""
    return {
        "reward/mean": rewards.total.mean(),
        **{f"reward/{label}": part.mean() for label, part in rewards.parts.items()},
        "rollout/length_mean": rollout.lengths.mean(),
        "rollout/truncated_frac": rollout.truncated.mean(),
        "groups/zero_variance_frac": (group_advantages == 0).all(axis=1).mean(),
    }


def pack_batch(cfg: Config, mesh, experience: Experience) -> PackedBatch:
    """Packs completions into rows of one fixed shape, on the host."""
    shards = num_data_shards(mesh)
    shape = packed_shape(
        len(experience.advantages),
        cfg.rollout.samples,
        cfg.rollout.max_prompt_tokens,
        cfg.rollout.max_tokens,
        cfg.train.micro_tokens,
        shards,
    )
    return pack_minibatch(experience, shape, shards)


def select_minibatch(cfg: Config, experience: Experience, key, rollout_index: int, update_index: int) -> Experience:
    """Returns the minibatch for update `update_index` of a rollout. Each epoch shuffles the groups anew."""
    count = cfg.train.minibatches
    if count == 1:
        return experience
    epoch, index = divmod(update_index, count)
    key = fold_in_all(key, SHUFFLING_KEY, rollout_index, epoch)
    return take_rows(experience, minibatch_rows(experience.prompt_ids, key, count)[index])


def train(cfg: Config, context: RunContext, workdir: Path) -> None:
    """Trains to `total_steps`, resuming from the newest checkpoint of the workdir if it has one.

    Raises:
        UserError: Gradients were not finite for `optim.max_skips` updates in a row.
    """
    with jax.set_mesh(context.mesh):
        train_on_mesh(cfg, context, workdir)
    if jax.process_index() == 0:
        print(before_and_after(workdir))
        print(f"\nWrote metrics.jsonl, samples/, checkpoints/ and tensorboard/ to {workdir}")


def describe_run(cfg: Config, context: RunContext, params) -> str:
    """Describes the model, the devices and the rollouts of a run for the console."""
    param_count = sum(leaf.size for leaf in jax.tree.leaves(params))
    devices = jax.devices()
    axes = " x ".join(f"{axis} {size}" for axis, size in context.mesh.shape.items())
    return (
        f"{cfg.model.path}: {param_count:,} parameters on {len(devices)} {devices[0].device_kind} "
        f"device{'s' if len(devices) > 1 else ''} ({axes})\n"
        f"Each rollout: {cfg.rollout.prompts} prompts x {cfg.rollout.samples} completions, {context.rollout_plan}"
    )


def start_or_resume(cfg: Config, context: RunContext, manager, workdir: Path, optimizer):
    """Restores the newest checkpoint of a run, or starts a new run from the base model.

    Returns:
        (state, reference, meta, experience): The reference is None without a KL term; the experience is that of the
        current rollout, or None if the next step starts a new one.
    """
    mesh, shapes = context.mesh, param_shapes(context.model_cfg, cfg.model.param_dtype)
    restored = checkpoint.restore_checkpoint(
        manager, train_state_shapes(shapes, optimizer), train_state_shardings(mesh, shapes, optimizer)
    )
    reference = None
    if restored:
        if cfg.loss.kl_coef:
            shapes = param_shapes(context.model_cfg, cfg.model.reference_dtype)
            reference = checkpoint.restore_reference(workdir, shapes, tree_shardings(mesh, shapes))
        return restored.state, reference, restored.meta, restored.experience
    _, params = load(context.source, mesh=mesh, param_dtype=cfg.model.param_dtype)
    if cfg.loss.kl_coef:
        reference = jax.tree.map(lambda x: jnp.array(x, cfg.model.reference_dtype), params)
        checkpoint.save_reference(workdir, reference)
    key_data = jax.random.key_data(jax.random.key(cfg.seed)).tolist()
    meta = {"step": 0, "key": key_data, "rollout": {}, "skipped_in_a_row": 0}
    return init_train_state(mesh, params, optimizer), reference, meta, None


def evaluate_step(
    cfg: Config, context: RunContext, workdir: Path, params, problems: list[Problem], root_key, step: int, say
) -> dict[str, float]:
    """Evaluates the policy after `step`, writes its samples and prints its scores; returns the eval metrics."""
    start = time.monotonic()
    placed = place_for_rollout(context.model_cfg, params, context.mesh)
    metrics, records = evaluate(cfg, context, placed, problems, fold_in_all(root_key, EVALUATION_KEY, step))
    write_samples(workdir, "eval", step, [{"step": step} | record for record in records])
    say(f"step {step}: {len(problems)} held-out questions: {evaluation_line(metrics)}")
    return metrics | {"time/eval_s": time.monotonic() - start}


def train_on_mesh(cfg: Config, context: RunContext, workdir: Path) -> None:
    """Runs the updates of `train`. The mesh must be set."""
    optimizer = make_optimizer(cfg.optim)
    manager = checkpoint.open_checkpoint_manager(workdir, cfg.checkpoint.keep)
    state, reference, meta, experience = start_or_resume(cfg, context, manager, workdir, optimizer)
    root_key = jax.random.wrap_key_data(jnp.asarray(meta["key"], jnp.uint32))
    resumed_step = step = meta["step"]
    rollout_metrics, skipped_in_a_row = meta["rollout"], meta["skipped_in_a_row"]
    update = make_update(context.model_cfg, cfg, context.mesh, state.params, optimizer)
    task = resolve_task(cfg.task)
    held_out = held_out_problems(task, cfg.eval.questions)
    updates_per_rollout = cfg.train.minibatches * cfg.train.epochs
    log = MetricsLog(workdir, resumed_step if resumed_step else -1)
    is_main_process = jax.process_index() == 0
    bar = tqdm(total=cfg.total_steps, initial=resumed_step, unit="step", disable=not is_main_process)

    def say(line: str) -> None:
        if is_main_process:
            bar.write(line)

    def is_reported(step: int) -> bool:
        return step % cfg.log.every_steps == 0 or step in (1, cfg.total_steps)

    say(describe_run(cfg, context, state.params))
    if resumed_step == 0:
        log.write(0, evaluate_step(cfg, context, workdir, state.params, held_out, root_key, 0, say))
        say(LOSS_NOTE)
    elif resumed_step < cfg.total_steps:
        say(f"Resuming after step {resumed_step}")
    for step in range(resumed_step + 1, cfg.total_steps + 1):
        step_start = time.monotonic()
        rollout_index, update_index = divmod(step - 1, updates_per_rollout)
        if update_index == 0:
            key = fold_in_all(root_key, SAMPLING_KEY, rollout_index)
            experience, rollout_metrics, records = collect_experience(
                cfg, context, task, state.params, reference, rollout_index, key
            )
            if any(is_reported(later) for later in range(step, step + updates_per_rollout)):
                write_samples(workdir, "train", step, [{"step": step} | record for record in records])
        minibatch = select_minibatch(cfg, experience, root_key, rollout_index, update_index)

        update_start = time.monotonic()
        state, update_metrics = update(state, shard_rows(context.mesh, pack_batch(cfg, context.mesh, minibatch)))
        metrics = {name: float(value) for name, value in gather_to_host(update_metrics).items()}
        skipped_in_a_row = skipped_in_a_row + 1 if metrics["optim/skipped"] else 0
        if update_index == 0:  # in later updates of the rollout the policy is no longer the one that sampled it
            rollout_metrics |= {name: metrics[name] for name in SAMPLER_DRIFT_METRICS}
        end = time.monotonic()
        metrics |= rollout_metrics | {"time/update_s": end - update_start, "time/step_s": end - step_start}
        if update_index:
            metrics |= {name: 0.0 for name in ("time/rollout_s", "time/reward_s", "time/score_s")}

        is_last, is_broken = step == cfg.total_steps, skipped_in_a_row >= cfg.optim.max_skips
        if is_last or (cfg.eval.every_steps and step % cfg.eval.every_steps == 0):
            metrics |= evaluate_step(cfg, context, workdir, state.params, held_out, root_key, step, say)
        log.write(step, metrics)
        bar.update()
        if is_reported(step):
            say(console_line(step, cfg.total_steps, metrics))
        if is_last or is_broken or step % cfg.checkpoint.every_steps == 0:
            progress = {"step": step, "rollout": rollout_metrics, "skipped_in_a_row": skipped_in_a_row}
            checkpoint.save_checkpoint(
                manager, state, meta | progress, experience if step % updates_per_rollout else None
            )
        if is_broken:
            break
    bar.close()
    log.close()
    manager.close()
    if skipped_in_a_row >= cfg.optim.max_skips:
        last_change = step - skipped_in_a_row
        raise UserError(
            f"Gradients were not finite for {skipped_in_a_row} updates in a row (steps {last_change + 1} to {step}), "
            f"so the policy has not changed since step {last_change}. Look at metrics.jsonl and samples/, then start "
            "again in a new --workdir with a lower optim.lr."
        )
