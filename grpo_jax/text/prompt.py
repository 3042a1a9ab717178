"""R1-Zero's prompt template, and the encoding of prompts.

The template shapes only the format of a completion and says nothing about its content. A completion is the text from
the end of the prompt (`Assistant:`) to the stop.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.text.problem import Problem, Prompts

# From DeepSeek-R1 (Nature, doi 10.1038/s41586-025-09422-z), Methods.
R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The User asks a question and the Assistant solves it. "
    "The Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
    "The reasoning process and answer are enclosed within <think>...</think> and <answer>...</answer> tags, "
    "respectively, that is, <think> reasoning process here </think> <answer> answer here </answer>. "
    "User: {question}. Assistant:"
)


def format_prompt(question: str) -> str:
    """Inserts a question into the template. Braces in the question are ordinary text."""
    return R1_ZERO_TEMPLATE.replace("{question}", question)


def completion_eos_ids(tokenizer: Any, model_eos: Sequence[int] = ()) -> tuple[int, ...]:
    """Returns every token id that ends a completion: those of the model's config, and the tokenizer's EOS."""
    tokenizer_eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(sorted({*model_eos, *tokenizer_eos}))


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Encodes a text with exactly one BOS in front if the tokenizer adds BOS, and without a trailing EOS."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:  # the text itself starts with the BOS string
        ids = ids[1:]
    # Some tokenizers append EOS to every text. The model would take a prompt that ends with EOS as finished.
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token or "\0"):
        ids = ids[:-1]
    return ids


def encode_prompts(tokenizer: Any, problems: Sequence[Problem], ids: Sequence[int], max_tokens: int) -> Prompts:
    """Encodes problems as prompts, padded on the right to `max_tokens`.

    Args:
        tokenizer: A `transformers` tokenizer.
        problems: The B problems.
        ids: Index of each problem in its task.
        max_tokens: Width T of the result.

    Returns:
        The prompts: int32 tokens [B, T], with their lengths [B] and ids [B].

    Raises:
        UserError: A prompt is longer than `max_tokens`. Prompts are never truncated.
    """
    tokens = np.zeros((len(problems), max_tokens), np.int32)
    lengths = np.zeros(len(problems), np.int32)
    for row, (problem, problem_id) in enumerate(zip(problems, ids, strict=True)):
        encoded = encode_text(tokenizer, format_prompt(problem.question))
        if len(encoded) > max_tokens:
            raise UserError(
                f"A prompt may have at most rollout.max_prompt_tokens={max_tokens} tokens; the prompt of problem "
                f"{problem_id} ({problem.question[:60]!r}) has {len(encoded)}. Raise rollout.max_prompt_tokens."
            )
        tokens[row, : len(encoded)] = encoded
        lengths[row] = len(encoded)
    return Prompts(tokens=tokens, lengths=lengths, ids=np.asarray(ids, np.int32))
