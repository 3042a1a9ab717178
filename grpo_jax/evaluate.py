"""Evaluation: accuracy, format and length on held-out problems, with the sampler and the rewards of training."""

import json
import os
from collections.abc import Sequence

import jax
import numpy as np

from grpo_jax.draws import Filter
from grpo_jax.mesh import row_shards, to_host
from grpo_jax.processes import join_processes
from grpo_jax.prompt import completion_texts, encode_prompts, format_prompt
from grpo_jax.reward import rewards
from grpo_jax.sampler import generate, place_for_rollout
from grpo_jax.setting import EVALUATION, Setting, load_policy, prepare
from grpo_jax.tasks import held_out_problems, read_questions
from grpo_jax.types import Problem


def evaluate(config, setting: Setting, params, problems: Sequence[Problem], key) -> tuple[dict[str, float], list[dict]]:
    """One completion a problem: the metrics `eval/*`, and a record of each completion.

    Args:
      params: placed for rollout.
    """
    shards = row_shards(setting.mesh)
    rows = min(setting.plan.slots, -(-len(problems) // shards) * shards)
    records = []
    for first in range(0, len(problems), rows):
        part = list(problems[first : first + rows])
        padded = part + part[-1:] * (rows - len(part))  # one compiled shape; the copies are dropped below
        prompts = encode_prompts(
            setting.tokenizer, padded, range(first, first + rows), config.rollout.max_prompt_tokens)
        rollout = to_host(generate(
            setting.model, params, prompts, key, samples=1, max_tokens=config.rollout.max_tokens,
            temperature=config.eval.temperature, table=setting.stop_table,
            filter=Filter(config.eval.top_k, config.eval.top_p, config.eval.min_p)))
        texts = completion_texts(setting.tokenizer, rollout.tokens[:, 0], rollout.lengths[:, 0], setting.stop_ids,
                                 config.rollout.stop_strings)
        parts = rewards(texts, [problem.answer for problem in padded])
        records += [
            {"prompt_id": first + i, "sample_id": 0, "prompt": format_prompt(problem.question),
             "question": problem.question, "answer": problem.answer, "completion": texts[i],
             "accuracy": float(parts["accuracy"][i]), "format": float(parts["format"][i]),
             "length": int(rollout.lengths[i, 0])}
            for i, problem in enumerate(part)
        ]
    mean = lambda field: float(np.mean([record[field] for record in records]))
    metrics = {"eval/accuracy": mean("accuracy"), "eval/format": mean("format"), "eval/length_mean": mean("length")}
    return metrics, records


def main(argv: Sequence[str]) -> None:
    from grpo_jax import config as configs
    from grpo_jax import flags

    parser = flags.make_parser(
        "Evaluates a run's policy on held-out problems: accuracy, format, mean length in tokens.",
        "python -m grpo_jax.evaluate --workdir=runs/r1zero --questions=mine.jsonl --json", of_a_run=True)
    parser.add_argument("--questions", metavar="FILE.jsonl", help="own problems: `question` and `answer` a line")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, raw, workdir = flags.parse(parser, argv)
    config = configs.check(raw)
    join_processes(os.environ)
    setting = prepare(config)
    configs.check_model(config, setting.model)
    if options.questions:
        problems = read_questions(options.questions)
    else:
        problems = held_out_problems(config.task, config.eval.questions)
    encode_prompts(setting.tokenizer, problems, range(len(problems)), config.rollout.max_prompt_tokens)
    with jax.set_mesh(setting.mesh):
        step, params = load_policy(config, setting, workdir, options.base)
        placed = place_for_rollout(setting.model, params, setting.mesh)
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), EVALUATION), step)
        metrics, _ = evaluate(config, setting, placed, problems, key)
    if jax.process_index() == 0:
        if options.json:
            print(json.dumps({"step": step, "questions": len(problems)} | metrics))
        else:
            print(f"{len(problems)} questions, {'base model' if options.base else f'policy of step {step}'}, "
                  f"temperature {config.eval.temperature}: accuracy {metrics['eval/accuracy']:.3f}  "
                  f"format {metrics['eval/format']:.3f}  length {metrics['eval/length_mean']:.1f}")


if __name__ == "__main__":
    from grpo_jax.flags import run

    run(main)
