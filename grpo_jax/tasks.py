"""Tasks: where questions come from.

A task is a function from an index to a `Problem`. Problem i of a seed is the same on any host and after any resume,
and the stream has no end. Each task has two streams: `train`, and `eval` for what is held out.
"""

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np

from grpo_jax.types import LONGEST_ANSWER, Problem, UserError

Task = Callable[[int], Problem]


def held_out(a: int, b: int) -> bool:
    """The held-out rule of `addition`: a * b leaves 1 when divided by 11 (one pair in twelve, in either order)."""
    return a * b % 11 == 1


# As the template has it, which puts ". Assistant:" behind a question.
EXAMPLE = "What is {a} + {b}?. Assistant: <think> {a} + {b} = {c} </think> <answer> {c} </answer> User: "


def addition(seed: int, split: str, digits: int, shots: int = 0) -> Task:
    """`What is {a} + {b}?` for two numbers of exactly `digits` digits, drawn uniformly from the split's pairs.

    Args:
      shots: questions that stand answered before it; none of them is held out.
    """
    low, high = 10 ** (digits - 1), 10**digits

    def pair(draw, from_held_out: bool) -> tuple[int, int]:
        while True:
            a, b = (int(x) for x in draw.integers(low, high, size=2))
            if held_out(a, b) == from_held_out:
                return a, b

    def problem(index: int) -> Problem:
        draw = np.random.default_rng([seed, index, int(split == "eval")])
        a, b = pair(draw, split == "eval")
        examples = [EXAMPLE.format(a=x, b=y, c=x + y) for x, y in (pair(draw, False) for _ in range(shots))]
        return Problem(f"{''.join(examples)}What is {a} + {b}?", str(a + b), {"a": a, "b": b})

    return problem


def written(answer: str | int | float) -> str:
    """An answer as text, without an exponent: 0.00001 and not 1e-05, which the rewards read as a word."""
    return format(Decimal(repr(answer)), "f") if isinstance(answer, float) else str(answer)


def read_questions(path: str) -> list[Problem]:
    """The problems of a JSONL file: one object a line with `question` and `answer`; other fields become metadata.

    Raises:
      UserError: no such file, no line in it, or a line that is not such an object; it names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a JSONL file of questions at {path}; found: {error}") from None
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"expected a JSON object in {path} line {number}; found: {error}; mend that line") from None
        if not isinstance(row, dict):
            raise UserError(f"expected a JSON object in {path} line {number}; found {line[:40]!r}; mend that line")
        for field, kinds, kind in (("question", (str,), "a str"), ("answer", (str, int, float), "a text or number")):
            if not isinstance(row.get(field), kinds) or isinstance(row[field], bool):
                found = repr(row[field])[:40] if field in row else f"the fields {sorted(row)}"
                raise UserError(f"expected the field {field!r} ({kind}) in {path} line {number}; found {found}; add it")
        if not row["question"].strip() or not 0 < len(written(row["answer"]).strip()) <= LONGEST_ANSWER:
            raise UserError(f"expected a question and an answer of 1 to {LONGEST_ANSWER} characters in {path} line {number}; "
                            f"found {row['question'][:40]!r} and {str(row['answer'])[:40]!r}; mend that line")
        rest = {key: value for key, value in row.items() if key not in ("question", "answer")}
        problems.append(Problem(row["question"], written(row["answer"]), rest))
    if not problems:
        raise UserError(f"expected at least one question in {path}; found an empty file")
    return problems


def split_lines(split: str, path: str, eval_path: str) -> list[Problem]:
    """The lines of `jsonl` in a split: those of the split's file, or of `path` every tenth for `eval` and the others."""
    if eval_path:
        return read_questions(eval_path if split == "eval" else path)
    problems = [p for i, p in enumerate(read_questions(path)) if (i % 10 == 9) == (split == "eval")]
    if not problems:
        raise UserError(f"expected at least 10 questions in task.path={path}, every tenth of which is held out; "
                        "found fewer; add some or set task.eval_path")
    return problems


def jsonl(seed: int, split: str, path: str, eval_path: str) -> Task:
    """Questions of a file, in an order shuffled anew each epoch.

    The held-out questions are those of `eval_path`; without one, every tenth line of `path`, which training then
    leaves out.
    """
    import grain

    stream = grain.MapDataset.source(split_lines(split, path, eval_path)).seed(seed).shuffle().repeat()
    return lambda index: stream[index]


def make_task(task, seed: int, split: str) -> Task:
    """The stream that a config's `task` section names.

    Args:
      task: the section: name, digits and shots (addition), path and eval_path (jsonl).
      split: `train`, or `eval` for held-out problems.
    """
    if task.name == "addition":
        return addition(seed, split, task.digits, task.shots)
    return jsonl(seed, split, task.path, task.eval_path)


def held_out_problems(task, count: int) -> list[Problem]:
    """The first `count` problems of the held-out stream, or all there are; the same for every seed of a run."""
    if task.name == "jsonl":
        count = min(count, len(split_lines("eval", task.path, task.eval_path)))
    problem = make_task(task, 0, "eval")
    return [problem(i) for i in range(count)]
