"""Accuracy and format of completions, each 0 or 1. Their sum is the reward (DeepSeek-R1, section 2.2.2).

Verifiers read the text from the end of the prompt (`Assistant:`) to the stop, as decoded by
`grpo_jax.text.decoding.decode_completion`. Whitespace at either end makes no difference.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from grpo_jax.text.answers import answers_match, extract_answer

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def accuracy(texts: Sequence[str], answers: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Returns 1 for each text whose last `<answer>...</answer>` holds the expected answer, otherwise 0, as float32.

    The text around that answer is ignored.

    Raises:
        ValueError: There are not as many texts as answers.
    """
    # The empty answer, which stands for none here, matches nothing.
    correct = [answers_match(extract_answer(text) or "", answer) for text, answer in zip(texts, answers, strict=True)]
    return np.asarray(correct, np.float32)


def format(texts: Sequence[str]) -> Float[np.ndarray, " N"]:
    """Returns 1 for each well-formed text, otherwise 0, as float32."""
    return np.asarray([is_well_formed(text) for text in texts], np.float32)


def is_well_formed(text: str) -> bool:
    """Returns whether a text is `<think>...</think> <answer>...</answer>` and nothing else, with each tag once."""
    text = text.strip()
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    _, think_end, answer_start, _ = (text.index(tag) for tag in TAGS)
    between = text[think_end + len("</think>") : answer_start]
    in_order = text.startswith("<think>") and think_end < answer_start and text.endswith("</answer>")
    return in_order and not between.strip()
