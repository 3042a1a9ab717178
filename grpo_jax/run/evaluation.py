"""Evaluation: accuracy, format and length on held-out problems, with the sampler and the rewards of training."""

from collections.abc import Sequence

import numpy as np

from grpo_jax.config.schema import Config
from grpo_jax.parallel.mesh import gather_to_host, num_row_shards
from grpo_jax.rewards.parts import reward_parts
from grpo_jax.rollout.draws import TokenFilter
from grpo_jax.rollout.sampler import generate_rollout
from grpo_jax.run.context import RunContext
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import decode_completions, encode_prompts, format_prompt


def evaluate(
    cfg: Config, context: RunContext, params, problems: Sequence[Problem], key
) -> tuple[dict[str, float], list[dict]]:
    """One completion a problem: the metrics `eval/*`, and a record of each completion.

    Args:
      params: placed for rollout.
    """
    shards = num_row_shards(context.mesh)
    rows = min(context.rollout_plan.slots, -(-len(problems) // shards) * shards)
    records = []
    for first in range(0, len(problems), rows):
        part = list(problems[first : first + rows])
        padded = part + part[-1:] * (rows - len(part))  # one compiled shape; the copies are dropped below
        prompts = encode_prompts(context.tokenizer, padded, range(first, first + rows), cfg.rollout.max_prompt_tokens)
        rollout = gather_to_host(
            generate_rollout(
                context.model_cfg,
                params,
                prompts,
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
        parts = reward_parts(texts, [problem.answer for problem in padded])
        records += [
            {
                "prompt_id": first + i,
                "sample_id": 0,
                "prompt": format_prompt(problem.question),
                "question": problem.question,
                "answer": problem.answer,
                "completion": texts[i],
                "accuracy": float(parts["accuracy"][i]),
                "format": float(parts["format"][i]),
                "length": int(rollout.lengths[i, 0]),
            }
            for i, problem in enumerate(part)
        ]
    mean = lambda field: float(np.mean([record[field] for record in records]))
    metrics = {"eval/accuracy": mean("accuracy"), "eval/format": mean("format"), "eval/length_mean": mean("length")}
    return metrics, records
