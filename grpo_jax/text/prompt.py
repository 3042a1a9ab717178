"""R1-Zero's prompt template, and the conversion between text and token ids.

The template shapes only the format of a completion and says nothing about its content. A completion is the text from
the end of the prompt (`Assistant:`) to the stop.
"""

from collections.abc import Iterable, Sequence
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


def decode_ids(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decodes token ids verbatim: special tokens are kept and no white space is cleaned up."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def decode_completion(
    tokenizer: Any, tokens: Iterable[int], stop_ids: Sequence[int], stop_strings: Sequence[str] = ("</answer>",)
) -> str:
    r"""Decodes the tokens of a completion into the text that the rewards read.

    A final stop id is left out. If the last token completes a stop string, the text ends with that string: a token may
    bring further characters with it (`>\n\n` is one token in many vocabularies), and the model could not have stopped
    between them.

    Args:
        tokenizer: A `transformers` tokenizer.
        tokens: The sampled token ids, the stopping one included.
        stop_ids: Token ids that end a completion.
        stop_strings: Strings that end a completion.
    """
    ids = [int(token) for token in tokens]
    if ids and ids[-1] in stop_ids:
        ids = ids[:-1]
    text = decode_ids(tokenizer, ids)
    ends = [text.find(string) + len(string) for string in stop_strings if string in text]
    if ends and not any(string in decode_ids(tokenizer, ids[:-1]) for string in stop_strings):
        text = text[: min(ends)]
    return text


def decode_completions(
    tokenizer: Any, tokens: np.ndarray, lengths: np.ndarray, stop_ids: Sequence[int], stop_strings: Sequence[str]
) -> list[str]:
    """Decodes N completions, given as tokens [N, S] and lengths [N], with `decode_completion`."""
    completions = zip(tokens, lengths, strict=True)
    return [decode_completion(tokenizer, row[:length], stop_ids, stop_strings) for row, length in completions]
