"""The loop: problems -> Prompts -> Rollout -> rewards -> advantages -> Experience -> (TrainState, metrics) -> checkpoint.

A step is one update. A rollout feeds `train.minibatches * train.epochs` of them. Everything random is decided by
(seed, what for, counter), so a resumed run goes on as if it had not been interrupted.
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
from grpo_jax.learn.packing import pack_completions, packed_shape, unpack_completions
from grpo_jax.learn.update import make_experience, make_update, score_reference, take_minibatch
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import gather_to_host, num_row_shards, shard_rows, tree_shardings
from grpo_jax.rewards.parts import reward_parts
from grpo_jax.rollout.sampler import generate_rollout, place_for_rollout
from grpo_jax.run import checkpoint
from grpo_jax.run.context import EVALUATION_KEY, SAMPLING_KEY, SHUFFLING_KEY, RunContext
from grpo_jax.run.evaluation import evaluate
from grpo_jax.run.metrics import MetricsLog, before_and_after, console_line, write_samples
from grpo_jax.tasks.streams import held_out_problems, make_task
from grpo_jax.tasks.task import Task
from grpo_jax.text.prompt import decode_completions, encode_prompts, format_prompt
from grpo_jax.types import Experience, PackedBatch
from grpo_jax.weights.model_io import load

SAMPLER_DRIFT_METRICS = ("policy/kl_sampler", "policy/logp_gap/mean", "policy/logp_gap/max")
LOSS_NOTE = (
    "loss/total is about 0 by design: a group's advantages sum to 0 and the ratio starts at 1. "
    "Watch reward, accuracy, format and length instead."
)


def fold_in_all(key, *counters):
    """The key of (key, counter, counter, ...)."""
    for counter in counters:
        key = jax.random.fold_in(key, counter)
    return key


def collect_experience(
    cfg: Config, context: RunContext, problem: Task, params, reference, position: int, key
) -> tuple[Experience, dict[str, float], list[dict]]:
    """Rollout `position` of a run: the experience, its metrics and records of its completions.

    Args:
      params: the policy, as training holds it.
      reference: the frozen reference, None if `loss.kl_coef` is 0.
    """
    start = time.monotonic()
    count, samples = cfg.rollout.prompts, cfg.rollout.samples
    ids = range(position * count, (position + 1) * count)
    problems = [problem(i) for i in ids]
    prompts = encode_prompts(context.tokenizer, problems, ids, cfg.rollout.max_prompt_tokens)

    rollout = generate_rollout(
        context.model_cfg,
        place_for_rollout(context.model_cfg, params, context.mesh),
        prompts,
        key,
        samples=samples,
        max_tokens=cfg.rollout.max_tokens,
        temperature=cfg.rollout.temperature,
        stop_table=context.stop_table,
        slots=context.rollout_plan.slots,
    )
    rollout = gather_to_host(rollout)
    rows = rollout.rows()
    sampled = time.monotonic()

    texts = decode_completions(
        context.tokenizer, rows["tokens"], rows["lengths"], context.stop_ids, cfg.rollout.stop_strings
    )
    parts = reward_parts(texts, [p.answer for p in problems for _ in range(samples)])
    group_advantages = np.asarray(advantages(jnp.asarray(parts["total"].reshape(count, samples))))
    rewarded = time.monotonic()

    experience = make_experience(prompts, rollout, group_advantages, None)
    if reference is not None:
        packed = pack_batch(cfg, context.mesh, experience)
        ref_logps = gather_to_host(
            score_reference(
                context.model_cfg,
                reference,
                shard_rows(context.mesh, packed),
                temperature=cfg.rollout.temperature,
                chunk_tokens=cfg.train.chunk_tokens,
            )
        )
        experience = experience.replace(
            ref_logps=unpack_completions(ref_logps, packed.flat_index, experience.mask.shape)
        )

    metrics = {
        "reward/mean": parts["total"].mean(),
        "reward/accuracy": parts["accuracy"].mean(),
        "reward/format": parts["format"].mean(),
        "rollout/length_mean": rows["lengths"].mean(),
        "rollout/truncated_frac": rows["truncated"].mean(),
        "rollout/tokens_per_s": rows["lengths"].sum() / (sampled - start),
        "groups/zero_variance_frac": (group_advantages == 0).all(axis=1).mean(),
        "time/rollout_s": sampled - start,
        "time/reward_s": rewarded - sampled,
        "time/score_s": time.monotonic() - rewarded,
    }
    records = [
        {
            "prompt_id": int(rows["prompt_ids"][n]),
            "sample_id": int(rows["sample_ids"][n]),
            "prompt": format_prompt(problems[n // samples].question),
            "completion": texts[n],
            "accuracy": float(parts["accuracy"][n]),
            "format": float(parts["format"][n]),
            "advantage": float(group_advantages.flat[n]),
        }
        for n in range(min(cfg.log.samples, len(texts)))
    ]
    return experience, {name: float(value) for name, value in metrics.items()}, records


def pack_batch(cfg: Config, mesh, experience: Experience) -> PackedBatch:
    """A batch in packed rows, on the host."""
    shards = num_row_shards(mesh)
    shape = packed_shape(
        len(experience.advantages),
        cfg.rollout.samples,
        cfg.rollout.max_prompt_tokens,
        cfg.rollout.max_tokens,
        cfg.train.micro_tokens,
        shards,
    )
    return pack_completions(experience, shape, shards)


def train(cfg: Config, context: RunContext, workdir: Path) -> None:
    """Trains to `total_steps`, from the newest checkpoint of the workdir if it has one."""
    with jax.set_mesh(context.mesh):
        _train(cfg, context, workdir)
    if jax.process_index() == 0:
        print(before_and_after(workdir))
        print(f"\nwrote {workdir}/metrics.jsonl, samples/, checkpoints/ and tensorboard/")


def describe_run(cfg: Config, context: RunContext, params) -> str:
    """What is trained, on what."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    device = jax.devices()[0]
    axes = " x ".join(f"{axis} {size}" for axis, size in context.mesh.shape.items())
    return (
        f"{cfg.model.path}: {count:,} parameters on {jax.device_count()} {device.device_kind} device(s) ({axes}); "
        f"{cfg.rollout.prompts} questions x {cfg.rollout.samples} answers a rollout, {context.rollout_plan}"
    )


def start_or_resume(cfg: Config, context: RunContext, manager, workdir: Path, optimizer):
    """(state, reference, meta, experience): of the newest checkpoint, or of a new run."""
    shapes, mesh = param_shapes(context.model_cfg, cfg.model.param_dtype), context.mesh
    resumed = checkpoint.restore_checkpoint(
        manager, train_state_shapes(shapes, optimizer), train_state_shardings(mesh, shapes, optimizer)
    )
    if resumed:
        reference = None
        if cfg.loss.kl_coef:
            shapes = param_shapes(context.model_cfg, cfg.model.reference_dtype)
            reference = checkpoint.restore_reference(workdir, shapes, tree_shardings(mesh, shapes))
        return resumed.state, reference, resumed.meta, resumed.experience
    _, params = load(context.source, mesh=mesh, param_dtype=cfg.model.param_dtype)
    reference = None
    if cfg.loss.kl_coef:
        reference = jax.tree.map(lambda x: jnp.array(x, cfg.model.reference_dtype), params)
        checkpoint.save_reference(workdir, reference)
    key = jax.random.key_data(jax.random.key(cfg.seed)).tolist()
    meta = {"step": 0, "key": key, "rollout": {}, "skipped_in_a_row": 0}
    return init_train_state(mesh, params, optimizer), reference, meta, None


def _train(cfg: Config, context: RunContext, workdir: Path) -> None:
    optimizer = make_optimizer(cfg.optim)
    manager = checkpoint.open_checkpoint_manager(workdir, cfg.checkpoint.keep)
    state, reference, meta, experience = start_or_resume(cfg, context, manager, workdir, optimizer)
    root = jax.random.wrap_key_data(jnp.asarray(meta["key"], jnp.uint32))
    first, about_rollout = meta["step"], meta["rollout"]
    update = make_update(context.model_cfg, cfg, context.mesh, state.params, optimizer)
    problem = make_task(cfg.task, cfg.seed, "train")
    held_out = held_out_problems(cfg.task, cfg.eval.questions)
    updates = cfg.train.minibatches * cfg.train.epochs
    log = MetricsLog(workdir, first if first else -1)
    speaks = jax.process_index() == 0
    bar = tqdm(total=cfg.total_steps, initial=first, unit="step", disable=not speaks)
    say = bar.write if speaks else lambda line: None
    due = lambda step: step % cfg.log.every_steps == 0 or step in (1, cfg.total_steps)

    def evaluated(step: int) -> dict[str, float]:
        begun = time.monotonic()
        placed = place_for_rollout(context.model_cfg, state.params, context.mesh)
        metrics, records = evaluate(cfg, context, placed, held_out, fold_in_all(root, EVALUATION_KEY, step))
        write_samples(workdir, "eval", step, [{"step": step} | record for record in records])
        say(
            f"step {step}: {len(held_out)} held-out questions: accuracy {metrics['eval/accuracy']:.3f}  "
            f"format {metrics['eval/format']:.3f}  length {metrics['eval/length_mean']:.1f}"
        )
        return metrics | {"time/eval_s": time.monotonic() - begun}

    say(describe_run(cfg, context, state.params))
    if first == 0:
        log.write(0, evaluated(0))
        say(LOSS_NOTE)
    elif first < cfg.total_steps:
        say(f"resumed after step {first}")
    for step in range(first + 1, cfg.total_steps + 1):
        begun = time.monotonic()
        position, inner = divmod(step - 1, updates)
        if inner == 0:
            experience, about_rollout, records = collect_experience(
                cfg, context, problem, state.params, reference, position, fold_in_all(root, SAMPLING_KEY, position)
            )
            if any(due(later) for later in range(step, step + updates)):
                write_samples(workdir, "train", step, [{"step": step} | record for record in records])
        batch = experience
        if cfg.train.minibatches > 1:
            epoch, index = divmod(inner, cfg.train.minibatches)
            key = fold_in_all(root, SHUFFLING_KEY, position, epoch)
            batch = take_minibatch(experience, key, index, count=cfg.train.minibatches)

        updating = time.monotonic()
        state, about_update = update(state, shard_rows(context.mesh, pack_batch(cfg, context.mesh, batch)))
        metrics = {name: float(value) for name, value in gather_to_host(about_update).items()}
        meta["skipped_in_a_row"] = meta["skipped_in_a_row"] + 1 if metrics["optim/skipped"] else 0
        if inner == 0:  # only now is the policy still the one that the sampler used
            about_rollout |= {name: metrics[name] for name in SAMPLER_DRIFT_METRICS}
        now = time.monotonic()
        metrics |= about_rollout | {"time/update_s": now - updating, "time/step_s": now - begun}
        if inner:
            metrics |= {name: 0.0 for name in ("time/rollout_s", "time/reward_s", "time/score_s")}

        last = step == cfg.total_steps
        if last or cfg.eval.every_steps and step % cfg.eval.every_steps == 0:
            metrics |= evaluated(step)
        log.write(step, metrics)
        bar.update()
        if due(step):
            say(console_line(step, cfg.total_steps, metrics))
        broken = meta["skipped_in_a_row"] >= cfg.optim.max_skips
        if last or broken or step % cfg.checkpoint.every_steps == 0:
            unfinished = experience if step % updates else None
            checkpoint.save_checkpoint(manager, state, meta | {"step": step, "rollout": about_rollout}, unfinished)
        if broken:
            break
    bar.close()
    log.close()
    manager.close()
    if meta["skipped_in_a_row"] >= cfg.optim.max_skips:
        raise UserError(
            f"expected finite gradients; found none in {meta['skipped_in_a_row']} updates in a row, the last one step "
            f"{step}; the policy has not changed since step {step - meta['skipped_in_a_row']}; look at metrics.jsonl and "
            "samples/, and begin again with a lower optim.lr in another --workdir"
        )
