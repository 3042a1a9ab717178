"""Problems, and batches of problems encoded as prompts.

Both hold NumPy arrays and plain Python values, so that a process that grades completions starts without JAX. The axis
letters are explained in `grpo_jax.types`.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

import numpy as np
from jaxtyping import Int


class Message(TypedDict):
    """A turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True)
class Problem:
    """A question with its expected answer: `Problem("What is 2 + 2?", "4")`.

    The question is a text, or the messages of a conversation whose last one is the user's.
    """

    question: str | list[Message]
    answer: str  # the accuracy reward compares completions with it
    metadata: dict[str, Any] = field(default_factory=dict)  # whatever else the task knows about the problem
    id: str = ""  # where the problem comes from, such as "questions.jsonl line 17"
    solution: str = field(default="", compare=False)  # how the answer is found, if a file gives it; it is not graded


def read_messages(question: Any) -> list[Message]:
    """Returns a question as messages with roles and contents only; a content that is a list of texts is joined.

    Raises:
        ValueError: It is neither a text nor messages, or the last message is not the user's.
    """
    if isinstance(question, str):
        return [Message(role="user", content=question)]
    try:
        contents = [turn["content"] for turn in question]
        texts = [text if isinstance(text, str) else "".join(part["text"] for part in text) for text in contents]
        messages = [Message(role=turn["role"], content=text) for turn, text in zip(question, texts, strict=True)]
        if {turn["role"] for turn in messages} <= {"system", "user", "assistant"} and messages[-1]["role"] == "user":
            return messages
    except (KeyError, TypeError, IndexError):
        pass
    raise ValueError(
        f"the question must be a text, or messages of which the last is the user's; found {question!a:.70}"
    )


class Prompts(NamedTuple):
    """B encoded prompts, padded on the right to T tokens."""

    tokens: Int[np.ndarray, "B T"]  # 0 on padding
    lengths: Int[np.ndarray, " B"]  # tokens per prompt, without padding
    ids: Int[np.ndarray, " B"]  # index of each problem in its task
