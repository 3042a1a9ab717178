"""The loop: problems -> Prompts -> Rollout -> rewards -> advantages -> Experience -> (TrainState, metrics) -> checkpoint.

A step is one update. A rollout feeds `update.minibatches * update.epochs` of them. Everything random is decided by
(seed, what for, counter), so a resumed run goes on as if it had not been interrupted.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from grpo_jax import checkpoint
from grpo_jax.evaluate import evaluate
from grpo_jax.grpo import advantages
from grpo_jax.mesh import row_shards, shardings, split_rows, to_host
from grpo_jax.metrics import MetricsLog, before_and_after, console_line, write_samples
from grpo_jax.model import param_shapes
from grpo_jax.optimizer import init_state, make_optimizer, state_shapes, state_shardings
from grpo_jax.packing import pack, packed_shape, unpack
from grpo_jax.prompt import completion_texts, encode_prompts, format_prompt
from grpo_jax.reward import rewards
from grpo_jax.sampler import generate, place_for_rollout
from grpo_jax.setting import EVALUATION, SAMPLING, SHUFFLING, Setting
from grpo_jax.tasks import Task, held_out_problems, make_task
from grpo_jax.train_step import make_experience, make_update, minibatch, score_reference
from grpo_jax.types import Experience, Packed, UserError
from grpo_jax.weights import load

OF_THE_SAMPLER = ("policy/kl_sampler", "policy/logp_gap/mean", "policy/logp_gap/max")
ABOUT_THE_LOSS = (
    "loss/total is about 0 by design: a group's advantages sum to 0 and the ratio starts at 1. "
    "Watch reward, accuracy, format and length instead."
)


def fold(key, *counters):
    """The key of (key, counter, counter, ...)."""
    for counter in counters:
        key = jax.random.fold_in(key, counter)
    return key


def collect(
    config, setting: Setting, problem: Task, params, reference, position: int, key
) -> tuple[Experience, dict[str, float], list[dict]]:
    """Rollout `position` of a run: the experience, its metrics and records of its completions.

    Args:
      params: the policy, as training holds it.
      reference: the frozen reference, None if `loss.kl_coef` is 0.
    """
    start = time.monotonic()
    count, samples = config.rollout.prompts, config.rollout.samples
    ids = range(position * count, (position + 1) * count)
    problems = [problem(i) for i in ids]
    prompts = encode_prompts(setting.tokenizer, problems, ids, config.rollout.max_prompt_tokens)

    rollout = generate(
        setting.model, place_for_rollout(setting.model, params, setting.mesh), prompts, key, samples=samples,
        max_tokens=config.rollout.max_tokens, temperature=config.rollout.temperature, table=setting.stop_table,
        slots=setting.plan.slots)
    rollout = to_host(rollout)
    rows = rollout.rows()
    sampled = time.monotonic()

    texts = completion_texts(
        setting.tokenizer, rows["tokens"], rows["lengths"], setting.stop_ids, config.rollout.stop_strings)
    parts = rewards(texts, [p.answer for p in problems for _ in range(samples)])
    group_advantages = np.asarray(advantages(jnp.asarray(parts["total"].reshape(count, samples))))
    rewarded = time.monotonic()

    experience = make_experience(prompts, rollout, group_advantages, None)
    if reference is not None:
        packed = pack_batch(config, setting.mesh, experience)
        ref_logps = to_host(score_reference(
            setting.model, reference, split_rows(setting.mesh, packed), temperature=config.rollout.temperature,
            chunk_tokens=config.update.chunk_tokens))
        experience = experience.replace(ref_logps=unpack(ref_logps, packed.place, experience.mask.shape))

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
        {"prompt_id": int(rows["prompt_ids"][n]), "sample_id": int(rows["sample_ids"][n]),
         "prompt": format_prompt(problems[n // samples].question), "completion": texts[n],
         "accuracy": float(parts["accuracy"][n]), "format": float(parts["format"][n]),
         "advantage": float(group_advantages.flat[n])}
        for n in range(min(config.log.samples, len(texts)))
    ]
    return experience, {name: float(value) for name, value in metrics.items()}, records


def pack_batch(config, mesh, experience: Experience) -> Packed:
    """A batch in packed rows, on the host."""
    shards = row_shards(mesh)
    shape = packed_shape(
        len(experience.advantages), config.rollout.samples, config.rollout.max_prompt_tokens,
        config.rollout.max_tokens, config.update.micro_tokens, shards)
    return pack(experience, shape, shards)


def train(config, setting: Setting, workdir: Path) -> None:
    """Trains to `total_steps`, from the newest checkpoint of the workdir if it has one."""
    with jax.set_mesh(setting.mesh):
        _train(config, setting, workdir)
    if jax.process_index() == 0:
        print(before_and_after(workdir))
        print(f"\nwrote {workdir}/metrics.jsonl, samples/, checkpoints/ and tensorboard/")


def describe(config, setting: Setting, params) -> str:
    """What is trained, on what."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    device = jax.devices()[0]
    axes = " x ".join(f"{axis} {size}" for axis, size in setting.mesh.shape.items())
    return (f"{config.model.path}: {count:,} parameters on {jax.device_count()} {device.device_kind} device(s) ({axes}); "
            f"{config.rollout.prompts} questions x {config.rollout.samples} answers a rollout, {setting.plan}")


def start_or_resume(config, setting: Setting, manager, workdir: Path, optimizer):
    """(state, reference, meta, experience): of the newest checkpoint, or of a new run."""
    shapes, mesh = param_shapes(setting.model, config.model.param_dtype), setting.mesh
    resumed = checkpoint.restore(
        manager, state_shapes(shapes, optimizer), state_shardings(mesh, shapes, optimizer))
    if resumed:
        reference = None
        if config.loss.kl_coef:
            shapes = param_shapes(setting.model, config.model.reference_dtype)
            reference = checkpoint.restore_reference(workdir, shapes, shardings(mesh, shapes))
        return resumed.state, reference, resumed.meta, resumed.experience
    _, params = load(setting.source, mesh=mesh, param_dtype=config.model.param_dtype)
    reference = None
    if config.loss.kl_coef:
        reference = jax.tree.map(lambda x: jnp.array(x, config.model.reference_dtype), params)
        checkpoint.save_reference(workdir, reference)
    key = jax.random.key_data(jax.random.key(config.seed)).tolist()
    meta = {"step": 0, "key": key, "rollout": {}, "skipped_in_a_row": 0}
    return init_state(mesh, params, optimizer), reference, meta, None


def _train(config, setting: Setting, workdir: Path) -> None:
    optimizer = make_optimizer(config.optim)
    manager = checkpoint.open_manager(workdir, config.checkpoint.keep)
    state, reference, meta, experience = start_or_resume(config, setting, manager, workdir, optimizer)
    root = jax.random.wrap_key_data(jnp.asarray(meta["key"], jnp.uint32))
    first, about_rollout = meta["step"], meta["rollout"]
    update = make_update(setting.model, config, setting.mesh, state.params, optimizer)
    problem = make_task(config.task, config.seed, "train")
    held_out = held_out_problems(config.task, config.eval.questions)
    updates = config.update.minibatches * config.update.epochs
    log = MetricsLog(workdir, first if first else -1)
    speaks = jax.process_index() == 0
    bar = tqdm(total=config.total_steps, initial=first, unit="step", disable=not speaks)
    say = bar.write if speaks else lambda line: None
    due = lambda step: step % config.log.every_steps == 0 or step in (1, config.total_steps)

    def evaluated(step: int) -> dict[str, float]:
        begun = time.monotonic()
        placed = place_for_rollout(setting.model, state.params, setting.mesh)
        metrics, records = evaluate(config, setting, placed, held_out, fold(root, EVALUATION, step))
        write_samples(workdir, "eval", step, [{"step": step} | record for record in records])
        say(f"step {step}: {len(held_out)} held-out questions: accuracy {metrics['eval/accuracy']:.3f}  "
            f"format {metrics['eval/format']:.3f}  length {metrics['eval/length_mean']:.1f}")
        return metrics | {"time/eval_s": time.monotonic() - begun}

    say(describe(config, setting, state.params))
    if first == 0:
        log.write(0, evaluated(0))
        say(ABOUT_THE_LOSS)
    elif first < config.total_steps:
        say(f"resumed after step {first}")
    for step in range(first + 1, config.total_steps + 1):
        begun = time.monotonic()
        position, inner = divmod(step - 1, updates)
        if inner == 0:
            experience, about_rollout, records = collect(
                config, setting, problem, state.params, reference, position, fold(root, SAMPLING, position))
            if any(due(later) for later in range(step, step + updates)):
                write_samples(workdir, "train", step, [{"step": step} | record for record in records])
        batch = experience
        if config.update.minibatches > 1:
            epoch, index = divmod(inner, config.update.minibatches)
            key = fold(root, SHUFFLING, position, epoch)
            batch = minibatch(experience, key, index, count=config.update.minibatches)

        updating = time.monotonic()
        state, about_update = update(state, split_rows(setting.mesh, pack_batch(config, setting.mesh, batch)))
        metrics = {name: float(value) for name, value in to_host(about_update).items()}
        meta["skipped_in_a_row"] = meta["skipped_in_a_row"] + 1 if metrics["optim/skipped"] else 0
        if inner == 0:  # only now is the policy still the one that the sampler used
            about_rollout |= {name: metrics[name] for name in OF_THE_SAMPLER}
        now = time.monotonic()
        metrics |= about_rollout | {"time/update_s": now - updating, "time/step_s": now - begun}
        if inner:
            metrics |= {name: 0.0 for name in ("time/rollout_s", "time/reward_s", "time/score_s")}

        last = step == config.total_steps
        if last or config.eval.every_steps and step % config.eval.every_steps == 0:
            metrics |= evaluated(step)
        log.write(step, metrics)
        bar.update()
        if due(step):
            say(console_line(step, config.total_steps, metrics))
        broken = meta["skipped_in_a_row"] >= config.optim.max_skips
        if last or broken or step % config.checkpoint.every_steps == 0:
            unfinished = experience if step % updates else None
            checkpoint.save(manager, state, meta | {"step": step, "rollout": about_rollout}, unfinished)
        if broken:
            break
    bar.close()
    log.close()
    manager.close()
    if meta["skipped_in_a_row"] >= config.optim.max_skips:
        raise UserError(
            f"expected finite gradients; found none in {meta['skipped_in_a_row']} updates in a row, the last one step "
            f"{step}; the policy has not changed since step {step - meta['skipped_in_a_row']}; look at metrics.jsonl and "
            "samples/, and begin again with a lower optim.lr in another --workdir")
