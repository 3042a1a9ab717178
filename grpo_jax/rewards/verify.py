"""Rule-based rewards: r = accuracy + format, each 0 or 1 (DeepSeek-R1, section 2.2.2). No model judges anything.

They read the text from the prompt's end (`Assistant:`) to the stop (`prompt.completion_text`); white space at either
end is allowed. Columns of N values in, float32[N] out.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from grpo_jax.text.answers import answers_match, extract_answer

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def accuracy(texts: Sequence[str], answers: Sequence[str]) -> Float[np.ndarray, " N"]:
    """1 where the last `<answer>...</answer>` of a text holds the expected answer, whatever stands around it."""
    found = [extract_answer(text) for text in texts]
    right = [have is not None and answers_match(have, want) for have, want in zip(found, answers, strict=True)]
    return np.asarray(right, np.float32)


def is_well_formed(text: str) -> bool:
    """`<think>...</think> <answer>...</answer>` and nothing else, each tag once; the content is free."""
    text = text.strip()
    if [text.count(tag) for tag in TAGS] != [1, 1, 1, 1]:
        return False
    _, think_end, answer, _ = (text.index(tag) for tag in TAGS)
    between = text[think_end + len("</think>") : answer]
    in_order = text.startswith("<think>") and think_end < answer and text.endswith("</answer>")
    return in_order and not between.strip()


def format(texts: Sequence[str]) -> Float[np.ndarray, " N"]:
    """1 where a text is well-formed."""
    return np.asarray([is_well_formed(text) for text in texts], np.float32)
