"""Problems read from a file."""

import json
from decimal import Decimal
from pathlib import Path

from grpo_jax.errors import UserError
from grpo_jax.tasks.task import Task
from grpo_jax.text.answers import MAX_ANSWER_CHARS
from grpo_jax.text.problem import Problem


def answer_text(answer: str | int | float) -> str:
    """An answer as text, without an exponent: 0.00001 and not 1e-05, which the rewards read as a word."""
    return format(Decimal(repr(answer)), "f") if isinstance(answer, float) else str(answer)


def read_problems(path: str) -> list[Problem]:
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
        if not row["question"].strip() or not 0 < len(answer_text(row["answer"]).strip()) <= MAX_ANSWER_CHARS:
            raise UserError(
                f"expected a question and an answer of 1 to {MAX_ANSWER_CHARS} characters in {path} line {number}; "
                f"found {row['question'][:40]!r} and {str(row['answer'])[:40]!r}; mend that line"
            )
        rest = {key: value for key, value in row.items() if key not in ("question", "answer")}
        problems.append(Problem(row["question"], answer_text(row["answer"]), rest))
    if not problems:
        raise UserError(f"expected at least one question in {path}; found an empty file")
    return problems


def problems_of_split(split: str, path: str, eval_path: str) -> list[Problem]:
    """The lines of `jsonl` in a split: those of the split's file, or of `path` every tenth for `eval` and the others."""
    if eval_path:
        return read_problems(eval_path if split == "eval" else path)
    problems = [p for i, p in enumerate(read_problems(path)) if (i % 10 == 9) == (split == "eval")]
    if not problems:
        raise UserError(
            f"expected at least 10 questions in task.path={path}, every tenth of which is held out; "
            "found fewer; add some or set task.eval_path"
        )
    return problems


def file_task(seed: int, split: str, path: str, eval_path: str) -> Task:
    """Questions of a file, in an order shuffled anew each epoch.

    The held-out questions are those of `eval_path`; without one, every tenth line of `path`, which training then
    leaves out.
    """
    import grain

    stream = grain.MapDataset.source(problems_of_split(split, path, eval_path)).seed(seed).shuffle().repeat()
    return lambda index: stream[index]
