"""Measures how long decoding and grading of a rollout's completions take. Prints one JSON line.

Grades mathematics completions with the built-in parts and with a function that never returns for some of them.

workers      number of workers that grade at the same time
start_s      time to start one worker
grade_s      time to decode and grade all completions
bound_s      upper bound for grade_s: deadline * hang / workers + 15
timeouts     completions that exceeded the deadline; should equal --hang
errors       completions with another failure; should be 0
one_ms       time to decode one completion and grade it with the built-in parts in the trainer
decode_ms    the part of one_ms that decoding takes
"""

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import closing

WORK = "Let's see: 3 + 4 = 7, so x^2 - 7x + 12 = (x - 3)(x - 4), and \\frac{7}{12} of it is left. "


def hangs_sometimes(problems, texts, lengths):
    """Returns 1 for a completion, or never returns if its problem says so."""
    while problems[0].metadata["hangs"]:
        time.sleep(1)
    return [1.0]


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    from grpo_jax.config.flags import OneLineParser
    from grpo_jax.errors import UserError

    parser = OneLineParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python benchmarks/grading.py --model=smollm2 --completions=8192 --tokens=1000 --hang=16",
    )
    parser.add_argument(
        "--model", metavar="FOLDER", required=True, help="the model whose tokenizer is used, as in model.path"
    )
    for name, value in (("completions", 8192), ("tokens", 1000), ("hang", 16), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"default: {value}")
    parser.add_argument("--deadline", type=float, default=10, metavar="SECONDS", help="reward.deadline; default: 10")
    flags = parser.parse_args(argv)
    for name in ("completions", "tokens"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} must be at least 1; found {getattr(flags, name)}. Raise it.")
    if not 0 <= 2 * flags.hang <= flags.completions:
        raise UserError(
            f"--hang must be at most half of --completions={flags.completions}; found {flags.hang}. Lower it."
        )
    print(json.dumps({"model": flags.model} | measure(flags)))


def measure(flags: argparse.Namespace) -> dict[str, float]:
    """Returns the numbers that the module's docstring explains."""
    import numpy as np

    from grpo_jax.config import check, default
    from grpo_jax.rewards.parts import resolve_parts
    from grpo_jax.rewards.pool import Grader, most_at_work
    from grpo_jax.text.problem import Problem
    from grpo_jax.weights.source import find_model
    from grpo_jax.weights.tokenizer import load_tokenizer

    rng, tokenizer = np.random.default_rng(flags.seed), load_tokenizer(find_model(flags.model))
    answer = tokenizer("</think> <answer>\\frac{14}{24}</answer>")["input_ids"]
    work = tokenizer(WORK * (flags.tokens // 10 + 1))["input_ids"][: max(flags.tokens - len(answer), 0)]
    row = np.array([*work, *answer], np.int32)
    hanging = rng.permutation(flags.completions) < flags.hang
    problems = [  # distinct, so that a worker never sees the same completion twice
        Problem("How much is left?", "\\frac{7}{12}", {"hangs": bool(hangs)}, id=f"problem {n}")
        for n, hangs in enumerate(hanging)
    ]

    def make_grader(*parts: str, deadline: float = 10.0) -> Grader:
        raw = default()
        raw.reward.parts, raw.reward.weights, raw.reward.deadline = parts, (1.0,) * len(parts), deadline
        cfg = check(raw)
        return Grader(cfg, resolve_parts(cfg), tokenizer, ())

    def seconds(function, *args) -> float:
        start = time.perf_counter()
        function(*args)
        return time.perf_counter() - start

    one = make_grader("accuracy", "format")
    grader = make_grader("accuracy", "format", f"{__file__}:hangs_sometimes", deadline=flags.deadline)
    tokens, lengths = np.tile(row, (flags.completions, 1)), np.full(flags.completions, len(row))
    with closing(grader):
        start_s, start = seconds(grader.start), time.perf_counter()
        grades = grader.grade(problems, tokens, lengths)
        grade_s = time.perf_counter() - start
    workers = most_at_work()
    result = dict(
        workers=workers,
        start_s=start_s,
        grade_s=grade_s,
        bound_s=flags.deadline * flags.hang / workers + 15,
        timeouts=grades.scores["timeout"].sum(),
        errors=grades.scores["error"].sum(),
        one_ms=1000 * min(seconds(one.grade, problems[:1], tokens[:1], lengths[:1]) for _ in range(20)),
        decode_ms=1000 * min(seconds(one.decode, row) for _ in range(20)),
    )
    return {name: round(float(value), 4) for name, value in result.items()}


if __name__ == "__main__":
    from grpo_jax.config.flags import run_entry_point

    run_entry_point(main)
