"""Evaluates a policy on held-out problems with the sampler and the reward parts of training."""

from collections.abc import Sequence

import numpy as np

from grpo_jax.config.schema import Config
from grpo_jax.parallel.mesh import gather_to_host, num_data_shards
from grpo_jax.rewards.parts import reward_parts
from grpo_jax.rollout.draws import TokenFilter
from grpo_jax.rollout.sampler import generate_rollout
from grpo_jax.run.context import RunContext
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import decode_completions, encode_prompts, format_prompt


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
        (metrics, records): The means `eval/accuracy`, `eval/format` and `eval/length_mean`, and one record per problem.
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
        texts = decode_completions(
            context.tokenizer, rollout.tokens[:, 0], rollout.lengths[:, 0], context.stop_ids, cfg.rollout.stop_strings
        )
        rewards = reward_parts(texts, [problem.answer for problem in padded])
        records += [
            {
                "prompt_id": start + i,
                "sample_id": 0,
                "prompt": format_prompt(problem.question),
                "question": problem.question,
                "answer": problem.answer,
                "completion": texts[i],
                "accuracy": float(rewards["accuracy"][i]),
                "format": float(rewards["format"][i]),
                "length": int(rollout.lengths[i, 0]),
            }
            for i, problem in enumerate(batch)
        ]
    averaged = {"eval/accuracy": "accuracy", "eval/format": "format", "eval/length_mean": "length"}
    metrics = {name: float(np.mean([record[field] for record in records])) for name, field in averaged.items()}
    return metrics, records
