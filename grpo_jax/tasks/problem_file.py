"""Reads problems from a file or a dataset, and limits how many rows may be unreadable."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from os.path import basename

from tqdm import tqdm

from grpo_jax.config.schema import TaskSection
from grpo_jax.config.workdir import digest_files
from grpo_jax.errors import UserError
from grpo_jax.tasks.problem_list import ProblemList, split_problems
from grpo_jax.tasks.rows import read_rows
from grpo_jax.tasks.shapes import read_problem
from grpo_jax.text.answers import read_expected
from grpo_jax.text.problem import Problem
from grpo_jax.text.terminal import printable

# Choices and short sums of numbers, fractions, square roots and letters (not e, as in 1e5) are readable without being
# parsed, which takes up to 0.2 ms for each row.
_TERM = (
    r"(?:\d{1,20}(?:\.\d{1,20})?|\d{0,9}(?:\\[dt]?frac\{\d{1,20}\}\{[1-9]\d{,20}\}|\\sqrt\{\d{1,9}\}|\\pi|[a-df-z]))"
)
READABLE = re.compile(rf"-?{_TERM}(?: ?[+-] ?{_TERM}){{0,4}}|\([A-J]\) .*", re.DOTALL)
MIN_DIVERSE = 10  # from this many problems on, it is unlikely that all have the same answer
SHOWN_REASONS, SHOWN_ROWS = 3, 4  # reasons that an error quotes, and rows that it names for each
MAX_REASONS = 1000  # that are told apart; each may quote its row


def read_problems(
    path: str, *, question: str | None = None, answer: str | None = None, choices: str | None = None
) -> list[Problem]:
    """Reads problems from JSON lines, a JSON array, CSV or parquet, each also gzipped, or a Hugging Face dataset.

    The fields of known data sets are recognized by their names. Fields that are not used become metadata. Unreadable
    rows are left out: those without a question, and those with an answer that no completion could match.

    Args:
        path: A file, the folder of a dataset, or a hub id `owner/name[:config[:split]]`.
        question: The field of the question, dotted if nested, such as `extra_info.question` or `prompt.0.content`.
        answer: The field of the expected answer, likewise.
        choices: The field of the choices of a multiple-choice question, likewise.

    Raises:
        UserError: The file cannot be read, a row is malformed, or more than 1% of the rows are unreadable.
    """
    task_cfg = TaskSection(question=question or "", answer=answer or "", choices=choices or "")
    return read_with_notes(str(path), task_cfg, graded=True)[0]


def read_with_notes(path: str, task_cfg: TaskSection, *, graded: bool) -> tuple[list[Problem], str]:
    """Reads problems as `read_problems` does.

    Args:
        path: The file or dataset.
        task_cfg: The config's `task` section, with the names of fields and the limit on unreadable rows.
        graded: Whether the accuracy reward compares completions with the answers.

    Returns:
        (problems, note): The problems, and a line that says which fields they were read from.
    """
    name = basename(path.rstrip("/"))
    said: Counter[str] = Counter()

    def read() -> Iterator[tuple[str, Problem | str]]:
        # `disable=None`: only on a terminal
        options = dict(unit=" rows", mininterval=2, delay=2, leave=False, disable=None)
        for place, row in tqdm(read_rows(path), f"Reading {printable(name)}", **options):
            try:
                problem, how = read_problem(row, task_cfg, graded=graded)
                said[how] += 1
                yield place, replace(problem, id=f"{name} {place}")
            except ValueError as error:
                yield place, str(error)

    problems, unreadable = keep_readable(path, read(), task_cfg.max_unreadable, graded=graded)
    counted = [
        f"{how} in {count:,} row{'s' * (count > 1)}" if len(said) > 1 else how for how, count in said.most_common()
    ]
    return problems, f"{name}: {'; '.join(counted)}; {len(problems):,} problems{unreadable}"


def keep_readable(
    source: str, rows: Iterable[tuple[str, Problem | str]], limit: float, *, graded: bool
) -> tuple[list[Problem], str]:
    """Separates readable from unreadable rows.

    Args:
        source: The name of the file in error messages; "problems" is a list, which has no fields.
        rows: The place of each row, with its problem or with the reason why it has none.
        limit: Largest fraction of rows that may be unreadable.
        graded: Whether the accuracy reward compares completions with the answers. If so, a row is unreadable if no
            completion could match its answer.

    Returns:
        (problems, phrase): The problems of the readable rows, and a phrase that lists the others, or "".

    Raises:
        UserError: There are no rows, or too many are unreadable.
    """
    problems: list[Problem] = []
    counts: Counter[str] = Counter()  # of rows by reason
    examples: dict[str, list[str]] = {}  # the first rows by reason
    for place, value in rows:
        if graded and isinstance(value, Problem):
            value = unreadable_answer(value) or value
        if isinstance(value, Problem):
            problems.append(value)
        else:
            reason = value if value in counts or len(counts) < MAX_REASONS else "other reasons"
            counts[reason] += 1
            examples.setdefault(reason, []).extend([place] * (counts[reason] <= SHOWN_ROWS))
    count = counts.total()
    total = count + len(problems)
    if not total:
        raise UserError(f"{source} must have at least one problem; found none. Add some.")
    listed = "; ".join(
        ", ".join([*examples[reason], *([f"and {rows - SHOWN_ROWS:,} more"] * (rows > SHOWN_ROWS))]) + f": {reason}"
        for reason, rows in list(counts.items())[:SHOWN_REASONS]
    )
    unlisted = sum(list(counts.values())[SHOWN_REASONS:])
    listed += f"; and {unlisted:,} more rows" if unlisted else ""
    if count > limit * total:
        flags = "--config.task.question=FIELD, --config.task.answer=FIELD and --config.task.choices=FIELD"
        advice = ["Correct them"] + [f"name the fields with {flags}"] * (
            source != "problems" and not all("needs the verifier" in reason for reason in counts)
        )
        advice += ["raise the limit"] * (count < total)
        raise UserError(
            f"Of the rows of {source}, at most a fraction of task.max_unreadable={limit} may be unreadable; found "
            f"{count:,} of {total:,} rows: {listed}. {', or '.join(advice)}."
        )
    return problems, f", {count:,} unreadable row{'s' * (count > 1)} ({listed})" if count else ""


def unreadable_answer(problem: Problem) -> str:
    """Returns why no completion could match the answer of a problem, or "" if one could."""
    try:
        if not READABLE.fullmatch(problem.answer):
            read_expected(problem.answer)
    except ValueError as error:
        return f"no completion could match the answer {problem.answer!a:.60} ({error})"
    return ""


def file_task(task_cfg: TaskSection, *, hold_out: bool = True, graded: bool = True) -> ProblemList:
    """Returns the task that asks the problems of `task.path`.

    Args:
        task_cfg: The config's `task` section.
        hold_out: Whether to hold out a tenth of the problems if there is no `task.eval_path`.
        graded: Whether the accuracy reward compares completions with the answers.

    Raises:
        UserError: A file cannot be used, or both files have the same content.
    """
    path, eval_path = task_cfg.path, task_cfg.eval_path
    are_equal = path == eval_path
    if not are_equal:  # the files are read first, because they are refused early if they are not what they should be
        problems, note = read_with_notes(path, task_cfg, graded=graded)
        held_out, eval_note = read_with_notes(eval_path, task_cfg, graded=graded) if eval_path else (None, "")
        digests, eval_digests = digest_files(path), digest_files(eval_path) if eval_path else {}
        are_equal = bool(digests) and sorted(digests.values()) == sorted(eval_digests.values())
    if are_equal:
        raise UserError(
            f"task.eval_path must not hold the same problems as task.path; found equal files {path} and {eval_path}. "
            "Name another file, or leave out task.eval_path to hold out a tenth of task.path."
        )
    notes = [note, eval_note] if eval_path else [note]
    if graded and len(problems) >= MIN_DIVERSE and len({problem.answer for problem in problems}) == 1:
        notes.append(
            f"All {len(problems):,} problems of {path} have the answer {problems[0].answer!a:.60}, which a policy can "
            "learn without reading the question. Check the field that holds the answer (task.answer)."
        )
    return split_problems(problems, held_out, hold_out=hold_out, notes=notes, digests=digests | eval_digests)
