"""Grades completions, and evaluates a policy on held-out problems with the sampler and the rewards of training."""

from collections.abc import Sequence

import numpy as np

from grpo_jax.config.schema import Config
from grpo_jax.parallel.mesh import gather_to_host, num_data_shards
from grpo_jax.rewards.parts import Rewards, compute_rewards, resolve_parts
from grpo_jax.rollout.draws import TokenFilter
from grpo_jax.rollout.sampler import generate_rollout
from grpo_jax.run.context import RunContext
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import decode_completions, encode_prompts, format_prompt
from grpo_jax.types import Rollout


def grade_completions(
    cfg: Config, context: RunContext, problems: Sequence[Problem], rollout: Rollout
) -> tuple[list[str], Rewards]:
    """Decodes and grades the completions of a rollout.

    Args:
        cfg: The run's config.
        context: The run's context.
        problems: The B problems of the rollout.
        rollout: Their N = B * G completions, as host arrays.

    Returns:
        (texts, rewards): N strings, and their rewards.
    """
    tokens, samples = rollout.tokens, rollout.lengths.shape[1]
    rows, lengths = tokens.reshape(-1, tokens.shape[-1]), rollout.lengths.ravel()
    texts = decode_completions(context.tokenizer, rows, lengths, context.stop_ids, cfg.rollout.stop_strings)
    repeated = [problem for problem in problems for _ in range(samples)]
    parts = resolve_parts(cfg.reward.parts)
    return texts, compute_rewards(parts, cfg.reward.weights, repeated, texts, lengths)


def sample_records(problems: Sequence[Problem], rollout: Rollout, texts: list[str], rewards: Rewards) -> list[dict]:
    """Returns a record for samples/ of each completion in `texts`, the first ones of the rollout."""
    samples = rollout.lengths.shape[1]
    return [
        {
            "prompt_id": int(rollout.prompt_ids[n // samples]),
            "sample_id": n % samples,
            "prompt": format_prompt(problems[n // samples].question),
            "completion": text,
            **{label: float(part[n]) for label, part in rewards.parts.items()},
        }
        for n, text in enumerate(texts)
    ]


def evaluate(
    cfg: Config, context: RunContext, params, problems: Sequence[Problem], key
) -> tuple[dict[str, float], list[dict]]:
    """Draws one completion per problem and grades it.

    Args:
        cfg: The run's config; sampling follows its `eval` section.
        context: The run's context.
        params: The policy, placed by `place_for_rollout`.
        problems: The held-out problems.
        key: The random key. A completion depends on it and on the index of its problem only.

    Returns:
        (metrics, records): The means `eval/PART` of the parts and `eval/length_mean`, and one record per problem.
    """
    shards = num_data_shards(context.mesh)
    batch_size = min(context.rollout_plan.slots, -(-len(problems) // shards) * shards)
    records = []
    for start in range(0, len(problems), batch_size):
        batch = list(problems[start : start + batch_size])
        # A short last batch is filled up so that it has the compiled shape; the copies give no records.
        padded = batch + batch[-1:] * (batch_size - len(batch))
        prompt_ids = range(start, start + batch_size)
        rollout = gather_to_host(
            generate_rollout(
                context.model_cfg,
                params,
                encode_prompts(context.tokenizer, padded, prompt_ids, cfg.rollout.max_prompt_tokens),
                key,
                samples=1,
                max_tokens=cfg.rollout.max_tokens,
                temperature=cfg.eval.temperature,
                stop_table=context.stop_table,
                filter=TokenFilter(cfg.eval.top_k, cfg.eval.top_p, cfg.eval.min_p),
            )
        )
        texts, rewards = grade_completions(cfg, context, padded, rollout)
        batch_records = sample_records(batch, rollout, texts[: len(batch)], rewards)
        records += [
            record | {"question": problem.question, "answer": problem.answer, "length": int(rollout.lengths[i, 0])}
            for i, (problem, record) in enumerate(zip(batch, batch_records, strict=True))
        ]
    averaged = {f"eval/{label}": label for label in rewards.parts} | {"eval/length_mean": "length"}
    metrics = {name: float(np.mean([record[field] for record in records])) for name, field in averaged.items()}
    return metrics, records
