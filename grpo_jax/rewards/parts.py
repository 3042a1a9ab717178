"""Reward parts and their weighted sum."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from grpo_jax.config.functions import describe_error, function_label, resolve_function
from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.rewards.length import overlong_penalty
from grpo_jax.rewards.script import language
from grpo_jax.rewards.verify import accuracy, format
from grpo_jax.text.answers import Verdict, judge
from grpo_jax.text.problem import Problem

Lengths = Int[np.ndarray, " N"]

# A reward part grades N completions. It is called with the problem, the text and the length in tokens of each
# completion, and returns one finite number for each.
RewardPart = Callable[[list[Problem], list[str], Lengths], Float[np.ndarray, " N"]]


class Rewards(NamedTuple):
    """The rewards of N completions."""

    parts: dict[str, Float[np.ndarray, " N"]]  # float32, by the label of the part, before weighting
    total: Float[np.ndarray, " N"]  # float32, the weighted sum of the parts


def accuracy_part(problems: list[Problem], texts: list[str], lengths: Lengths) -> np.ndarray:
    """Grades the accuracy of N completions, float32[N]; see `grpo_jax.rewards.accuracy`."""
    return accuracy(texts, [problem.answer for problem in problems])


def format_part(problems: list[Problem], texts: list[str], lengths: Lengths, *, empty: bool = False) -> np.ndarray:
    """Grades the format of N completions, float32[N]; see `grpo_jax.rewards.format`."""
    return format(texts, empty=empty)


def language_part(problems: list[Problem], texts: list[str], lengths: Lengths, *, target: str) -> np.ndarray:
    """Returns the fraction of words in the target language, float32[N]; see `grpo_jax.rewards.language`."""
    return language(texts, target)


def length_part(problems: list[Problem], texts: list[str], lengths: Lengths, *, limit: int, cache: int) -> np.ndarray:
    """Returns the penalty for long completions, float32[N]; see `overlong_penalty`."""
    return overlong_penalty(lengths, limit, cache)


PARTS_RESUME_HINT = "To resume a run of grpo_jax.train with rewards=..., call it again with the same rewards."


def resolve_parts(cfg: Config) -> dict[str, RewardPart]:
    """Returns the parts that `reward.parts` names, by label and in the same order.

    Raises:
        UserError: A name is neither that of a built-in part nor that of a function that can be imported.
    """
    names, limit, cache = cfg.reward.parts, cfg.rollout.max_tokens, cfg.rollout.overlong_cache
    parts: dict[str, RewardPart] = {
        "accuracy": accuracy_part,
        "format": partial(format_part, empty=cfg.reward.format_empty),
        "language": partial(language_part, target=cfg.reward.language),
        "length": partial(length_part, limit=limit, cache=cache),
    }
    return {function_label(name): resolve_function(name, "reward.parts", parts, PARTS_RESUME_HINT) for name in names}


def is_built_in(part: RewardPart) -> bool:
    """Returns whether a part is a built-in one, with or without settings. Built-in parts take bounded time."""
    return getattr(part, "func", part) in (accuracy_part, format_part, language_part, length_part)


def grade_built_in(
    parts: Mapping[str, RewardPart], problem: Problem, text: str, length: int
) -> tuple[dict[str, float], Verdict | None]:
    """Grades one completion with built-in parts.

    Returns:
        (scores, verdict): The score of each part, and the verdict of the part `accuracy`, or None without that part.
    """
    verdict = judge(text, problem.answer) if accuracy_part in parts.values() else None
    arguments = [problem], [text], np.array([length])
    scores = {
        label: float(verdict.correct if verdict and part is accuracy_part else part(*arguments)[0])
        for label, part in parts.items()
    }
    return scores, verdict


def weigh_parts(parts: Mapping[str, Float[np.ndarray, " N"]], weights: Sequence[float]) -> Rewards:
    """Returns the rewards of N completions, given the scores of each part and one weight for each part."""
    total = sum(np.float32(weight) * scores for weight, scores in zip(weights, parts.values(), strict=True))
    return Rewards(dict(parts), np.asarray(total, np.float32))


def grade_texts(
    label: str, part: RewardPart, problems: Sequence[Problem], texts: Sequence[str], lengths: Int[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """Grades N completions with one part, and returns float32[N].

    Raises:
        UserError: The part raises, or does not return N finite numbers.
    """
    numbers = f"{len(texts)} finite number{'s' * (len(texts) != 1)}"
    expected = f"The reward part {label!r} must return {numbers}, one for each text"
    try:
        # Each part gets copies, so that none can change what the next one sees.
        returned = part(list(problems), list(texts), np.array(lengths))
        values = np.array(returned, np.float32)
    except Exception as error:
        raise UserError(f"{expected}, but it raised {describe_error(error)}. Correct that function.") from error
    if values.shape != (len(texts),):
        kind = "None" if returned is None else type(returned).__name__
        found = f"an array of shape {values.shape}" if values.ndim else kind
        raise UserError(f"{expected}; found {found}. Return an array of shape ({len(texts)},).")
    for index in np.flatnonzero(~np.isfinite(values)):
        found = list(returned)[index]  # as returned: in float32, None would be NaN and 1e39 infinity
        raise UserError(f"{expected}; found {found} at index {index}. Return a finite number there.")
    return values


def shape_overlong(
    rewards: Rewards, overlong: str, truncated: np.ndarray, lengths: np.ndarray, limit: int, cache: int
) -> Rewards:
    """Adjusts the rewards of overlong completions according to `rollout.overlong`.

    Args:
        rewards: The rewards of N completions.
        overlong: "zero" sets the total of truncated completions to 0. "soft" adds `overlong_penalty` to all totals and
            records it as the part "overlong". "keep" and "mask" change nothing.
        truncated: Whether each completion reached the limit without a stop, bool [N].
        lengths: The length of each completion in tokens, int [N].
        limit: The maximum length in tokens (`rollout.max_tokens`).
        cache: The number of tokens over which the penalty falls (`rollout.overlong_cache`).
    """
    if overlong == "zero":
        return rewards._replace(total=np.where(truncated, np.float32(0), rewards.total))
    if overlong == "soft":
        penalty = overlong_penalty(lengths, limit, cache)
        return Rewards(rewards.parts | {"overlong": penalty}, rewards.total + penalty)
    return rewards
