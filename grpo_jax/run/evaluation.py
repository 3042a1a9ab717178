"""Evaluates a policy on held-out problems with the sampler and the rewards of training."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from grpo_jax.config.schema import Config
from grpo_jax.parallel.mesh import gather_to_host, num_data_shards
from grpo_jax.rewards.pool import FAILURES
from grpo_jax.rollout.draws import TokenFilter
from grpo_jax.rollout.sampler import generate_rollout, needed_room
from grpo_jax.rollout.slots import DecodeState
from grpo_jax.run.context import RunContext
from grpo_jax.run.progress import phase
from grpo_jax.run.rollout_progress import RolloutProgress
from grpo_jax.run.stages import grade_completions, rehome_key, sample_records
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import encode_prompts


@phase("Evaluating")
def evaluate(
    cfg: Config,
    context: RunContext,
    params,
    problems: Sequence[Problem],
    key,
    at_safe_point: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], list[dict]]:
    """Draws one completion per problem and grades it.

    Args:
        cfg: The run's config; sampling follows its `eval` section.
        context: The run's context.
        params: The policy, placed by `place_for_rollout`.
        problems: The held-out problems.
        key: The random key. A completion depends on it and on the index of its problem only.
        at_safe_point: Called at the safe points; it may raise an exception to end the evaluation.

    Returns:
        (metrics, records): The mean of each reward part (`eval/accuracy`, ...) and of the length (`eval/length_mean`),
        how the completions were sampled (`eval/sampling/temperature`, ...), and one record per problem.
    """
    shards = num_data_shards(context.rollout_mesh)
    batch_size = min(context.rollout_plan.slots, -(-len(problems) // shards) * shards)
    sampling = dict(max_tokens=cfg.rollout.max_tokens, temperature=cfg.eval.temperature, stop_table=context.stop_table)
    sampling |= dict(slots=context.rollout_plan.slots, room=context.room or needed_room(batch_size, 1, shards))
    filter = TokenFilter(cfg.eval.top_k, cfg.eval.top_p, cfg.eval.min_p)
    records, failures = [], np.zeros(len(FAILURES))
    progress = RolloutProgress(len(problems), cfg.rollout.max_tokens, "questions")

    def report(state: DecodeState) -> int:
        at_safe_point()
        return progress.report(state)

    sampling["on_progress"] = report
    for start in range(0, len(problems), batch_size):
        progress.start_batch(start)
        batch = list(problems[start : start + batch_size])
        prompt_ids = range(start, start + len(batch))
        prompts = encode_prompts(context.prompt_format, batch, prompt_ids, cfg.rollout.max_prompt_tokens)
        with jax.set_mesh(context.rollout_mesh):
            inputs = params, prompts, rehome_key(key)
            rollout = generate_rollout(context.model_cfg, *inputs, samples=1, filter=filter, **sampling)
        rollout = gather_to_host(rollout)
        grades, rewards = grade_completions(cfg, context, batch, rollout)
        failures += [grades.scores[kind].sum() for kind in FAILURES]
        records += sample_records(context, batch, rollout, grades, rewards, count=len(batch))
    names = records[0]["rewards"]
    means = {f"eval/{name}": np.mean([record["rewards"][name] for record in records]) for name in names}
    means |= {f"eval/{kind}": count for kind, count in zip(FAILURES, failures, strict=True)}
    means |= {f"eval/sampling/{name}": getattr(cfg.eval, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    means["eval/length_mean"] = np.mean([record["length"] for record in records])
    return {name: float(value) for name, value in means.items()}, records
