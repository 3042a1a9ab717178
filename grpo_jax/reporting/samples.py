"""Chooses the recorded completions that a page embeds within a budget of bytes, and compares evaluations."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_jax.reporting.runs import RunFiles
from grpo_jax.run.metrics import describe_unlike, is_record, read_json_lines

MAX_BYTES = 24_000_000  # of the sample files that a page embeds, for all runs together; the page is smaller
MIN_STEPS = 20  # steps of a run between which its share is divided; a larger file is embedded in part
MAX_TEXT = 4000  # characters of a completion in the comparison of evaluations
MAX_ANSWERS = 1 << 26  # characters of all answers of an evaluation, each counted with 1,000 more
MAX_COMPARISON = 1_000_000  # characters of all completions in the comparison
COMPARED = ("completion", "length", "truncated", "parsed", "why", "reward")  # of a completion
MAX_BINS = 16
MAX_BIN_WIDTHS = (1, 2, 5)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Returns `count` evenly spaced items, including the first and the last one."""
    if count >= len(items):
        return list(items)
    return [items[round(n * (len(items) - 1) / max(1, count - 1))] for n in range(count)]


def choose_files(files: dict[int, Path], max_bytes: float) -> tuple[dict[int, Path], float]:
    """Returns the files to embed, and how many bytes to read of each.

    Args:
        files: The files with the completions of each step.
        max_bytes: The budget for all of them.
    """
    limit = max_bytes / MIN_STEPS
    sizes = [min(path.stat().st_size, limit) for path in files.values()]
    count = int(max_bytes // max(1, sum(sizes) / len(sizes))) if sizes else 0
    return dict(spread(list(files.items()), max(count, MIN_STEPS))), limit


def graded_part(record: dict[str, Any]) -> str:
    """Returns the reward part that decides whether a completion is right: `accuracy`, or otherwise the first part."""
    parts = list(record.get("rewards") or {"": 0})
    return "accuracy" if "accuracy" in parts else parts[0]


def is_right(record: dict[str, Any]) -> bool:
    """Returns whether a completion is right: whether its graded part is more than 0."""
    return ((record.get("rewards") or {}).get(graded_part(record)) or 0) > 0


def question_text(question: Any) -> str:
    """Returns a question as text, with the role before each message of a conversation."""
    if isinstance(question, list):
        return "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in question if isinstance(turn, dict))
    return str(question)


def rounded_list(values: Sequence[float | None] | None) -> list[float | None] | None:
    """Returns the values with four significant digits."""
    return values and [None if value is None else float(f"{value:.4g}") for value in values]


def token_values(record: dict[str, Any]) -> dict[str, list | None]:
    """Returns three values of each token: log-prob, log of the ratio of trainer to sampler, and KL to the reference.

    The KL is the k3 estimate exp(d) - d - 1, where d is the reference's log-prob minus the policy's, in nats.
    """
    logps, policy, reference = (record.get(name) for name in ("logps", "policy_logps", "ref_logps"))

    def differences(of: list, minus: list) -> list[float | None]:
        return [None if None in pair else pair[0] - pair[1] for pair in zip(of, minus, strict=False)]

    kl = reference and policy and differences(reference, policy)
    return {
        "logps": rounded_list(logps),
        "log_ratios": rounded_list(policy and logps and differences(policy, logps)),
        "kl": rounded_list(kl and [d and math.exp(min(d, 20.0)) - d - 1 for d in kl]),
    }


def embed_answer(record: dict[str, Any]) -> dict[str, Any]:
    """Returns what the page shows of a completion."""
    names = "sample_id", "length", "truncated", "parsed", "why", "rewards", "reward", "advantage", "update_steps"
    answer = {name: record.get(name) for name in names} | {"right": is_right(record)} | token_values(record)
    if record.get("pieces"):
        return answer | {"pieces": record["pieces"], "tokens": record.get("tokens")}
    return answer | {"completion": record.get("completion")}


def embed_step(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the groups of a step's records, each with the question and the completions."""
    groups: dict[Any, dict[str, Any]] = {}
    for record in records:
        question = {name: record.get(name) for name in ("prompt_id", "prompt", "expected")}
        question |= {"question": question_text(record.get("question")), "answers": []}
        groups.setdefault(record.get("prompt_id"), question)["answers"].append(embed_answer(record))
    return list(groups.values())


def bin_lengths(records_by_step: dict[int, list[dict[str, Any]]]) -> dict[str, Any] | None:
    """Counts right and wrong completions by length, in the first and in the second half of the given steps.

    Returns:
        `width`, the tokens of a bin; `part`, which decides what is right; and for each of the `halves` its first and
        last step and the numbers of `right` and `wrong` completions in each bin. None if there are no completions.
    """
    records = [record for of_step in records_by_step.values() for record in of_step]
    if not records:
        return None
    longest = max(record.get("length") or 0 for record in records)
    width = next(w * 10**k for k in range(9) for w in MAX_BIN_WIDTHS if longest < w * 10**k * MAX_BINS)
    steps = list(records_by_step)
    middle = -(-len(steps) // 2)
    halves = []
    for of_half in filter(None, (steps[:middle], steps[middle:])):
        counts = {True: [0] * (longest // width + 1), False: [0] * (longest // width + 1)}
        for record in (record for step in of_half for record in records_by_step[step]):
            counts[is_right(record)][(record.get("length") or 0) // width] += 1
        halves.append({"first": of_half[0], "last": of_half[-1], "right": counts[True], "wrong": counts[False]})
    return {"width": width, "part": graded_part(records[0]), "halves": halves}


def embed_samples(run: RunFiles, max_bytes: float) -> tuple[dict[int, list], dict[str, Any] | None]:
    """Returns the groups of each embedded step, and their lengths in bins (see `bin_lengths`).

    `is_cut` of a step's last group says whether the file holds more answers than the page.
    """
    files, limit = choose_files(run.train_samples, max_bytes)
    read = {step: list(filter(is_record, read_json_lines(path, limit))) for step, path in files.items()}
    records = {step: of_step for step, of_step in read.items() if of_step}
    steps = {step: embed_step(of_step) for step, of_step in records.items()}
    for step, groups in steps.items():
        groups[-1]["is_cut"] = files[step].stat().st_size > limit
    return steps, bin_lengths(records)


def read_answers(path: Path) -> dict[tuple, dict[str, Any]]:
    """Returns the fields of an evaluation's completions that are compared, by prompt id and question.

    If the answers have more than `MAX_ANSWERS` characters, only the first ones are returned.
    """
    answers, characters = {}, 0
    for record in filter(is_record, read_json_lines(path)):  # one at a time: all may not fit in memory
        answer = {name: record.get(name) for name in (*COMPARED, "prompt_id", "expected", "rewards")}
        answer |= {"question": question_text(record.get("question"))}
        answer |= {"completion": str(record.get("completion"))[:MAX_TEXT]}
        answers[answer["prompt_id"], answer["question"], record.get("prompt"), answer["expected"]] = answer
        characters += 1000 + len(answer["question"]) + len(str(record.get("prompt"))) + len(answer["completion"])
        if characters > MAX_ANSWERS:
            break
    return answers


def compare_evaluations(run: RunFiles) -> dict[str, Any] | None:
    """Compares the completions of a run's first and last evaluation for the same questions.

    Returns:
        `steps`, the two steps; `unlike`, what they differ in apart from the policy, or ""; `part`, which decides what
        is right; `counts`, the number of questions by whether the completions were right before and after, such as
        `wrong right`; and `questions`, as many of each of the four kinds as fit. None unless there are two evaluations
        with records.
    """
    if len(run.eval_samples) < 2:
        return None
    steps = [min(run.eval_samples), max(run.eval_samples)]
    before, after = (read_answers(run.eval_samples[step]) for step in steps)
    metrics = {line["step"]: line for line in run.evaluations}
    unlike = describe_unlike(*(metrics.get(step, {}) for step in steps), before, after)
    kinds: dict[str, list] = {"wrong right": [], "right wrong": [], "right right": [], "wrong wrong": []}
    for question, answer in before.items():
        if question in after:
            pair = answer, after[question]
            kinds[" ".join("right" if is_right(record) else "wrong" for record in pair)].append(pair)
    chosen = []
    for kind, pairs in kinds.items():
        of_kind = 0
        for pair in pairs:
            answers = [{name: record[name] for name in COMPARED} for record in pair]
            length = sum(len(answer["completion"]) for answer in answers)
            if of_kind + length > MAX_COMPARISON / len(kinds):
                break
            of_kind += length
            question = {name: pair[0][name] for name in ("prompt_id", "question", "expected")}
            chosen.append(question | {"kind": kind, "answers": answers})
    part = graded_part(next(iter(before.values()), {}))
    counts = {kind: len(pairs) for kind, pairs in kinds.items()}
    return {"steps": steps, "unlike": unlike, "part": part, "counts": counts, "questions": chosen}
