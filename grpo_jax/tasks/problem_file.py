"""Problems from a file, one JSON object per line."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.tasks.problem_list import ProblemList, hold_out_tenths
from grpo_jax.text.answers import MAX_ANSWER_CHARS
from grpo_jax.text.problem import Problem


def answer_text(answer: str | int | float) -> str:
    """Writes an answer as text, numbers without an exponent: the rewards would read 1e-05 as a word."""
    return format(Decimal(repr(answer)), "f") if isinstance(answer, float) else str(answer)


def parse_problem(line: str, location: str) -> Problem:
    """Parses a line of a file of problems; `location` names the line in errors.

    Raises:
        UserError: The line is not a JSON object with a usable `question` and `answer`.
    """
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{location} must be a JSON object; found invalid JSON: {error}. Correct that line.") from None
    if not isinstance(row, dict):
        raise UserError(f"{location} must be a JSON object; found {line[:40]!r}. Correct that line.")
    for field, types, kind in (("question", (str,), "a string"), ("answer", (str, int, float), "a string or a number")):
        if field not in row:
            raise UserError(f"{location} must have the field {field!r}; found the fields {sorted(row)}. Add it.")
        if not isinstance(row[field], types) or isinstance(row[field], bool):
            raise UserError(
                f"{location} must have {kind} in the field {field!r}; found {repr(row[field])[:40]}. Correct that line."
            )
    question, answer = row.pop("question"), answer_text(row.pop("answer"))
    if not question.strip() or not 0 < len(answer.strip()) <= MAX_ANSWER_CHARS:
        raise UserError(
            f"{location} must have a question, and an answer of 1 to {MAX_ANSWER_CHARS} characters; found "
            f"{question[:40]!r} and {answer[:40]!r}. Correct that line."
        )
    return Problem(question, answer, metadata=row)


def read_problems(path: str) -> list[Problem]:
    """Reads a file of problems: one JSON object per line with `question` and `answer`.

    Empty lines are skipped. All other fields of an object become the problem's metadata.

    Raises:
        UserError: The file cannot be read, it has no problems, or a line is malformed; the message names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Problems must come in a UTF-8 file with one JSON object per line; could not read {path}: {error}. "
            "Correct the path or the file."
        ) from None
    problems = [parse_problem(line, f"{path} line {i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not problems:
        raise UserError(f"{path} must have at least one problem; found none. Add one JSON object per line.")
    return problems


def file_task(path: str, eval_path: str) -> ProblemList:
    """Returns the task that asks the problems of a file.

    Args:
        path: File of problems.
        eval_path: File of held-out problems; if empty, every tenth problem of `path` is held out.

    Raises:
        UserError: A file is malformed, or `path` has too few problems to hold any out.
    """
    problems = read_problems(path)
    if eval_path:
        return ProblemList(problems, read_problems(eval_path))
    train, held_out = hold_out_tenths(problems)
    if not held_out:
        raise UserError(
            f"Every tenth problem of task.path is held out, so {path} must have at least 10; found {len(problems)}. "
            "Add some, or set task.eval_path."
        )
    return ProblemList(train, held_out)
