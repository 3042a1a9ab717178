"""The stages of a rollout. Each function is one arrow of the training loop in `grpo_jax.run.train`."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from grpo_jax.config.schema import Config
from grpo_jax.learn.advantages import advantages
from grpo_jax.learn.grpo import estimate_kl
from grpo_jax.learn.packing import PackedShape, packed_shape, unpack_completions
from grpo_jax.learn.update import minibatch_rows, pack_minibatch, score_completions, take_rows
from grpo_jax.parallel.mesh import gather_to_host, num_data_shards, shard_rows
from grpo_jax.parallel.processes import from_first_process
from grpo_jax.rewards.parts import Rewards, shape_overlong, weigh_parts
from grpo_jax.rewards.pool import FAILURES, Grades
from grpo_jax.rollout.sampler import finished_lengths, generate_rollout, place_for_rollout
from grpo_jax.rollout.slots import DecodeState
from grpo_jax.run.context import SHUFFLING_KEY, RunContext
from grpo_jax.run.drawn import merge_completions, remaining_limits
from grpo_jax.run.progress import announce, phase
from grpo_jax.run.rollout_progress import RolloutProgress
from grpo_jax.text.decoding import decode_pieces
from grpo_jax.text.problem import Problem, Prompts
from grpo_jax.types import Experience, PackedBatch, Rollout

SUBMITTED_TOKENS = 2**22  # most tokens that are fetched at once while sampling


@contextmanager
def timed(times: dict[str, float], name: str, words: str) -> Iterator[None]:
    """Adds the seconds that a block takes to `times[name]`, and shows `words` as its phase."""
    start = time.monotonic()
    with phase(words):
        yield
    times[name] = times.get(name, 0.0) + time.monotonic() - start


def fold_in_all(key, *counters: int):
    """Returns the key with each of the counters folded in, one after another."""
    for counter in counters:
        key = jax.random.fold_in(key, counter)
    return key


def rehome_key(key):
    """Returns the key as an array of the current mesh, whose programs accept no arrays of another mesh."""
    return jax.random.wrap_key_data(jax.device_get(jax.random.key_data(key)))


def submit_finished(context: RunContext, problems: Sequence[Problem], samples: int, state: DecodeState) -> None:
    """Queues completions that have ended for the workers, which grade them while others are being sampled."""
    lengths, (count, width) = jax.device_get(finished_lengths(state)), state.tokens.shape
    ended = [n for n in np.flatnonzero(lengths[: len(problems) * samples]) if n not in context.grader.payloads]
    # The number of rows is always the same, so that taking them compiles once. The rest is taken later.
    rows = np.resize(ended or [0], min(count, max(1, SUBMITTED_TOKENS // width)))
    for n, tokens in zip(rows[: len(ended)].tolist(), jax.device_get(state.tokens[rows]), strict=False):
        context.grader.submit(n, problems[n // samples], tokens[: lengths[n]])
    context.grader.turn(0)


def draw_completions(
    cfg: Config,
    context: RunContext,
    params,
    prompts: Prompts,
    key,
    problems: Sequence[Problem] = (),
    times: dict[str, float] | None = None,
    drawn: Rollout | None = None,
    must_stop: Callable[[], bool] = lambda: False,
) -> Rollout:
    """Draws `rollout.samples` completions for each prompt and gathers them to the host.

    If the problems are given and workers are running, they grade completions that end early while others are sampled.

    Args:
        cfg: The run's config.
        context: The run's context.
        params: The policy.
        prompts: B prompts.
        key: The random key of the rollout.
        problems: Their problems.
        times: Receives the seconds of the placement and of the sampling.
        drawn: Completions that have been drawn already, on the host; the length of the others is 0.
        must_stop: Called at the safe points. Once it returns True, the completions that are not finished get the length
            0.
    """
    times, samples, limit = {} if times is None else times, cfg.rollout.samples, cfg.rollout.max_tokens
    if drawn is not None and drawn.lengths.all():
        return drawn
    overlaps = problems and context.grader.workers and jax.process_count() == 1 and drawn is None
    progress = RolloutProgress(len(prompts.ids) * samples, limit)

    def report(state: DecodeState) -> int:
        if must_stop():
            return 0
        steps = progress.report(state)
        if overlaps and progress.finished:
            submit_finished(context, problems, samples, state)
        return steps

    with timed(times, "time/placement_s", "Placing the weights"):
        placed = jax.block_until_ready(place_for_rollout(context.model_cfg, params, context.rollout_mesh))
    with timed(times, "time/rollout_s", "Sampling"), jax.set_mesh(context.rollout_mesh):
        rollout = generate_rollout(
            context.model_cfg,
            placed,
            prompts,
            rehome_key(key),
            samples=samples,
            max_tokens=limit,
            temperature=cfg.rollout.temperature,
            stop_table=context.stop_table,
            slots=context.rollout_plan.slots,
            room=context.room,
            limits=None if drawn is None else remaining_limits(context, prompts, drawn),
            on_progress=report,
        )
        return merge_completions(gather_to_host(rollout), drawn)


def batch_shape(cfg: Config, shards: int, completions: int) -> PackedShape:
    """Returns the shape of the packed rows that have room for `completions` completions, on this many data shards."""
    # If completions are left out, a minibatch may hold parts of more groups than if all groups were complete.
    are_complete = cfg.train.minibatches == 1 or (cfg.groups.equal == "keep" and cfg.rollout.overlong != "mask")
    return packed_shape(
        completions,
        cfg.rollout.samples if are_complete else 1,
        cfg.rollout.max_prompt_tokens,
        cfg.rollout.max_tokens,
        cfg.train.micro_tokens,
        shards,
    )


def pack_rows(cfg: Config, mesh, experience: Experience, completions: int) -> PackedBatch:
    """Packs completions on the host, into rows whose shape has room for `completions` of them."""
    shards = num_data_shards(mesh)
    # num_sequences is static, so packing fewer completions must not change it: that would compile again.
    packed = pack_minibatch(experience, cfg.loss, batch_shape(cfg, shards, completions), shards)
    return packed.replace(num_sequences=completions)


def start_scoring(
    cfg: Config, context: RunContext, params, experience: Experience
) -> Callable[[], Float[np.ndarray, "N S"]]:
    """Starts computing the log-probs of completions under the given parameters.

    Args:
        cfg: The run's config.
        context: The run's context.
        params: Parameters of the policy or of the reference; None if no reference is kept.
        experience: All completions of a rollout or some of them. Only their tokens matter.

    Returns:
        A function that waits for the log-probs and returns them. If `params` is None, it returns zeros.
    """
    if params is None:
        return lambda: np.zeros_like(experience.sampler_logps)
    batch = pack_rows(cfg, context.mesh, experience, cfg.rollout.prompts * cfg.rollout.samples)
    logps = score_completions(
        context.model_cfg,
        params,
        shard_rows(context.mesh, batch),
        temperature=cfg.rollout.temperature,
        chunk_tokens=cfg.train.chunk_tokens,
    )
    return lambda: unpack_completions(gather_to_host(logps), batch.flat_index, experience.mask.shape)


def grade_completions(
    cfg: Config, context: RunContext, problems: Sequence[Problem], rollout: Rollout
) -> tuple[Grades, Rewards]:
    """Decodes and grades the completions of a rollout on process 0.

    Args:
        cfg: The run's config.
        context: The run's context.
        problems: The B problems of the rollout.
        rollout: Their N = B * G completions, as host arrays.

    Returns:
        (grades, rewards): The grades of the completions, which have texts only on process 0, and their rewards.

    Raises:
        UserError: A reward part fails; see `Grader.grade`. Every process raises.
    """
    samples, lengths = rollout.lengths.shape[1], rollout.lengths.ravel()
    rows, parts = rollout.tokens.reshape(len(lengths), -1), context.grader.parts
    grades = Grades([""] * len(rows), {}, [None] * len(rows), [[]] * len(rows))

    def grade() -> np.ndarray:
        nonlocal grades
        grades = context.grader.grade([problem for problem in problems for _ in range(samples)], rows, lengths)
        failures = [failure for failures in grades.failures for failure in failures]
        if failures:
            line = f"{len(failures)} grade{'s' * (len(failures) > 1)} of {len(rows)} completions set to 0, because a "
            line += f"reward part failed. The first failure: {failures[0]}"
            announce(line, sys.stderr)
        return np.stack(list(grades.scores.values()))

    # Process 0 grades for all, because processes might disagree on which completions took too long.
    labels = *parts, *FAILURES
    scores = dict(zip(labels, from_first_process(grade, np.zeros((len(labels), len(rows)), np.float32)), strict=True))
    rewards = weigh_parts({label: scores[label] for label in parts}, cfg.reward.weights)
    limit, cache = cfg.rollout.max_tokens, cfg.rollout.overlong_cache
    rewards = shape_overlong(rewards, cfg.rollout.overlong, rollout.truncated.ravel(), lengths, limit, cache)
    return grades._replace(scores=scores), rewards


def are_equal(rewards: Float[np.ndarray, "B G"]) -> Bool[np.ndarray, " B"]:
    """Returns a mask of the groups whose completions all have the same reward."""
    return (rewards == rewards[:, :1]).all(axis=1)


def completion_kl(cfg: Config, experience: Experience) -> Float[np.ndarray, " N"]:
    """Estimates the KL divergence of the sampling policy from the reference, summed over each completion, in nats."""
    kl = np.asarray(estimate_kl(jnp.asarray(experience.sampler_logps), jnp.asarray(experience.ref_logps), cfg.loss.kl))
    return np.sum(kl * experience.mask, axis=1)


def add_advantages(cfg: Config, experience: Experience, rollout: Rollout, rewards: Rewards) -> Experience:
    """Computes the advantages of a rollout's completions and the mask of those that the updates learn from.

    With `loss.kl_in=reward`, the KL penalty is subtracted from the rewards first.
    """
    shape = rollout.lengths.shape
    kept = np.ones(shape, bool)
    if cfg.groups.equal == "drop":
        kept &= ~are_equal(rewards.total.reshape(shape))[:, None]
    if cfg.rollout.overlong == "mask":
        kept &= ~rollout.truncated
    scores = jnp.asarray(rewards.total)
    if cfg.loss.kl_in == "reward":
        scores = scores - cfg.loss.kl_coef * completion_kl(cfg, experience)
    statistics = dict(mean=cfg.advantage.mean, std=cfg.advantage.std, ddof=cfg.advantage.ddof, eps=cfg.advantage.eps)
    values = advantages(scores.reshape(shape), **statistics)
    return experience.replace(advantages=np.asarray(values).ravel(), kept=kept.ravel())


def plan_minibatches(cfg: Config, experience: Experience, root_key, rollout_index: int) -> list[Int[np.ndarray, " _"]]:
    """Returns the indices of the completions that each update learns from. Each epoch shuffles the groups anew.

    With a single minibatch there is no shuffle: every update learns from the whole rollout, in its original order.
    """
    count, epochs, kept = cfg.train.minibatches, cfg.train.epochs, np.flatnonzero(experience.kept)
    if count == 1:
        return [kept] * epochs
    keys = [fold_in_all(root_key, SHUFFLING_KEY, rollout_index, epoch) for epoch in range(epochs)]
    return [kept[rows] for key in keys for rows in minibatch_rows(experience.prompt_ids[kept], key, count)]


def measure_rollout(
    cfg: Config, experience: Experience, rollout: Rollout, grades: Grades, rewards: Rewards, seconds: float
) -> dict[str, float]:
    """Returns the reward/, rollout/ and groups/ metrics of a rollout that took `seconds` to sample."""
    metrics = {
        "reward/mean": rewards.total.mean(),
        **{f"reward/{name}": values.mean() for name, values in rewards.parts.items()},
        **{f"reward/{kind}": grades.scores[kind].sum() for kind in FAILURES},
        "rollout/length_mean": rollout.lengths.mean(),
        "rollout/truncated_frac": rollout.truncated.mean(),
        "rollout/tokens_per_s": rollout.lengths.sum() / seconds,
        "groups/zero_variance_frac": are_equal(rewards.total.reshape(rollout.lengths.shape)).mean(),
    }
    if cfg.loss.kl_in == "reward":
        metrics["reward/kl"] = completion_kl(cfg, experience).mean()
    return {name: float(value) for name, value in metrics.items()}


def sample_records(
    context: RunContext, problems: Sequence[Problem], rollout: Rollout, grades: Grades, rewards: Rewards, count: int
) -> list[dict]:
    """Returns the records of the first `count` completions of a rollout, as plain Python values.

    Args:
        context: The run's context.
        problems: The B problems of the rollout.
        rollout: Their N = B * G completions, as host arrays.
        grades: The grades of the completions.
        rewards: The rewards of the completions.
        count: Number of records.
    """
    samples = rollout.lengths.shape[1]
    rows = {name: np.asarray(x) for name, x in rollout.rows().items()}
    tokens = [rows["tokens"][n, : rows["lengths"][n]].tolist() for n in range(count)]
    records = []
    for n, pieces in enumerate(decode_pieces(context.tokenizer, tokens)):
        problem, length, verdict = problems[n // samples], int(rows["lengths"][n]), grades.verdicts[n]
        records.append(
            {
                "prompt_id": int(rows["prompt_ids"][n]),
                "sample_id": int(rows["sample_ids"][n]),
                "question": problem.question,
                "prompt": context.prompt_format.text(problem),
                "completion": grades.texts[n],
                "tokens": tokens[n],
                "pieces": pieces,
                "logps": rows["logps"][n, :length].tolist(),
                "length": length,
                "truncated": bool(rows["truncated"][n]),
                "expected": problem.answer,
                "parsed": verdict and verdict.parsed,
                "why": "; ".join([*([verdict.why] if verdict else []), *grades.failures[n]]),
                "rewards": {name: float(values[n]) for name, values in rewards.parts.items()},
                "reward": float(rewards.total[n]),
                "metadata": problem.metadata,
            }
        )
    return records


def start_recording(
    cfg: Config,
    context: RunContext,
    params,
    experience: Experience,
    records: list[dict],
    plan: Sequence[Int[np.ndarray, " _"]],
    first_step: int,
) -> Callable[[], list[dict]]:
    """Starts scoring the recorded completions with the policy that sampled them.

    Args:
        cfg: The run's config.
        context: The run's context.
        params: The policy, not yet updated.
        experience: The whole rollout.
        records: The records of its first completions, from `sample_records`.
        plan: The completions of each update, from `plan_minibatches`.
        first_step: The step of the first of these updates.

    Returns:
        A function that waits for the scores and returns the records with additional fields: `policy_logps`,
        `ref_logps` if there is a reference, `advantage`, and `update_steps`, the steps that learn from the completion.
    """
    wait_for_logps = start_scoring(cfg, context, params, take_rows(experience, np.arange(len(records))))

    def complete(n: int, record: dict, logps: Float[np.ndarray, " S"]) -> dict:
        scores = {"policy_logps": logps, "ref_logps": experience.ref_logps[n]}
        if not cfg.loss.kl_coef:
            del scores["ref_logps"]
        scores = {name: values[: record["length"]].tolist() for name, values in scores.items()}
        steps = [first_step + update for update, rows in enumerate(plan) if n in rows]
        return record | scores | {"advantage": float(experience.advantages[n]), "update_steps": steps}

    return lambda: [complete(n, *pair) for n, pair in enumerate(zip(records, wait_for_logps(), strict=True))]
