"""A task whose problems are given as a list, and the rule that holds some of them out."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from grpo_jax.errors import UserError
from grpo_jax.text.problem import Problem, read_messages

BLANKS = re.compile(r"\\[,;:! ]|\\q?quad\b|~")  # of LaTeX


class ProblemList:
    """A task with finitely many problems. Training asks all of them in each epoch, in a new order."""

    def __init__(
        self,
        train: Sequence[Problem],
        held_out: Sequence[Problem],
        notes: Sequence[str] = (),
        digests: dict[str, str] | None = None,
    ):
        """Makes a task.

        Args:
            train: Training problems, at least one.
            held_out: Held-out problems.
            notes: Lines to print before training, which say how the problems were read and split.
            digests: SHA-256 of each file that the problems come from, by absolute path.
        """
        self.train, self.held_out, self.notes, self.digests = train, held_out, notes, digests or {}

    def __call__(self, index: int, *, seed: int, split: str) -> Problem:
        """Returns a problem; see `grpo_jax.tasks.task.Task`."""
        import grain  # imports JAX, which grading and reading problems must not need

        problems = self.held_out if split == "eval" else self.train
        if split == "eval" and index >= len(problems):
            raise IndexError(index)
        return grain.MapDataset.source(problems).seed(seed).shuffle().repeat()[index]


def question_hash(problem: Problem) -> int:
    """Returns a hash of a question that ignores white space, case and compatibility variants of characters."""
    text = "\n".join(turn["content"] for turn in read_messages(problem.question))
    text = BLANKS.sub(" ", unicodedata.normalize("NFKC", text).casefold())
    normalized = " ".join(re.findall(r"\w+|[^\w\s]", text))  # `2+3` asks the same as `2 + 3`
    return int.from_bytes(hashlib.sha256(normalized.encode(errors="replace")).digest()[:8])


def leave_out_examples(task: ProblemList, examples: Sequence[str]) -> ProblemList:
    """Returns a task that does not train on the questions of the solved examples in its prompts.

    Args:
        task: The task.
        examples: Alternating questions and completions, as in `prompt.examples`.

    Raises:
        UserError: No problem is left for training.
    """
    shown = {question_hash(Problem(question, "")) for question in examples[::2]}
    train = [problem for problem in task.train if question_hash(problem) not in shown] if shown else task.train
    left_out = len(task.train) - len(train)
    if left_out and not train:
        raise UserError(
            f"At least one problem must be left for training; found {left_out:,}, all of them in prompt.examples. Add "
            "other problems."
        )
    if not left_out:
        return task
    note = f"{left_out:,} of these left out of training, because prompts show them as examples"
    return ProblemList(train, task.held_out, (*task.notes, note), task.digests)


def split_problems(
    problems: Sequence[Problem],
    held_out: Sequence[Problem] | None = None,
    *,
    hold_out: bool,
    notes: Sequence[str] = (),
    digests: dict[str, str] | None = None,
) -> ProblemList:
    """Splits problems into training and held-out problems, so that no question is in both.

    Args:
        problems: All problems.
        held_out: The held-out problems, or None to choose them. Problems with the same questions are not trained on.
        hold_out: Whether to hold out about a tenth of the questions if `held_out` is None. They are chosen by their
            hashes: at least one, but not all.
        notes: Lines that say how the problems were read. A line with the counts is appended.
        digests: See `ProblemList`.

    Raises:
        UserError: No problem is left for training.
    """
    hashes = [question_hash(problem) for problem in problems]
    distinct = set(hashes)
    if held_out is not None:
        chosen = set(map(question_hash, held_out))
    else:
        chosen = {value for value in distinct if value % 10 == 0 and hold_out}
        if hold_out and len(chosen) in (0, len(distinct)):
            chosen = {min(distinct)}
    train = [problem for problem, value in zip(problems, hashes, strict=True) if value not in chosen]
    if not train:
        advice = "set --config.eval.questions=0 to train without evaluation"
        raise UserError(
            f"At least one problem must be left for training; found {len(distinct):,} different "
            f"question{'s' * (len(distinct) != 1)}, all held out. Add other problems, or "
            f"{advice if held_out is None else 'name another task.eval_path'}."
        )
    removed = [problem for problem, value in zip(problems, hashes, strict=True) if value in chosen]
    note = f"{len(train):,} problem{'s' * (len(train) != 1)} for training"
    note += f", {len(removed if held_out is None else held_out):,} held out"
    note += f"; not trained on because held out: {len(removed):,}" if held_out is not None and removed else ""
    answers = {(value, problem.answer) for value, problem in zip(hashes, problems, strict=True)}
    note += f"; duplicate questions: {len(hashes) - len(distinct):,}" if len(distinct) < len(hashes) else ""
    note += f" ({len(answers) - len(distinct):,} with another answer)" if len(distinct) < len(answers) else ""
    return ProblemList(train, removed if held_out is None else held_out, (*notes, note), digests)
