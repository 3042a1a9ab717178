"""Accuracy and format of completions, each 0 or 1. Their sum is the reward (DeepSeek-R1, section 2.2.2).

Verifiers read the text from the end of the prompt (`Assistant:`) to the stop, as decoded by
`grpo_jax.text.decoding.decode_completion`. Whitespace at either end makes no difference.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from grpo_jax.text.answers import judge

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
ECHOES = {"reasoning process here", "answer here", "...", "…"}  # placeholders in R1-Zero's template


def accuracy(texts: Sequence[str], answers: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Returns 1 for each text whose last `<answer>...</answer>` holds the expected answer, otherwise 0, as float32.

    The text around that answer is ignored. See `grpo_jax.text.answers.judge` for what counts as equal.

    Raises:
        ValueError: There are not as many texts as answers.
    """
    correct = [judge(text, answer).correct for text, answer in zip(texts, answers, strict=True)]
    return np.asarray(correct, np.float32)


def format(texts: Sequence[str], *, empty: bool = False) -> Float[np.ndarray, " N"]:
    """Returns 1 for each well-formed text, otherwise 0, as float32. See `is_well_formed`."""
    return np.asarray([is_well_formed(text, empty=empty) for text in texts], np.float32)


def is_well_formed(text: str, *, empty: bool = False) -> bool:
    """Returns whether a text is `<think>...</think> <answer>...</answer>` and nothing else, with each tag once.

    Args:
        text: A completion.
        empty: Whether the think and the answer may be empty, or just a placeholder of R1-Zero's template (`ECHOES`).
    """
    text = text.strip()
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    _, think_end, answer_start, _ = (text.index(tag) for tag in TAGS)
    between = text[think_end + len("</think>") : answer_start]
    if between.strip() or not (text.startswith("<think>") and think_end < answer_start and text.endswith("</answer>")):
        return False
    contents = text[len("<think>") : think_end], text[answer_start + len("<answer>") : -len("</answer>")]
    return empty or not any(content.strip() in {"", *ECHOES} for content in contents)
