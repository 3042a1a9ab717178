"""R1-Zero's template, the tokenizer, and the way between text and token ids.

The template only shapes the format; nothing else is imposed on the content. A completion is what follows
`Assistant:`, up to the stop.
"""

from collections.abc import Sequence

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.text.problem import Problem, Prompts

# DeepSeek-R1 (Nature, doi 10.1038/s41586-025-09422-z), Methods.
R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The User asks a question and the Assistant solves it. "
    "The Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
    "The reasoning process and answer are enclosed within <think>...</think> and <answer>...</answer> tags, "
    "respectively, that is, <think> reasoning process here </think> <answer> answer here </answer>. "
    "User: {question}. Assistant:"
)


def format_prompt(question: str) -> str:
    """The question in the template. Braces in it are text."""
    return R1_ZERO_TEMPLATE.replace("{question}", question)


def completion_eos_ids(tokenizer, model_eos: Sequence[int] = ()) -> tuple[int, ...]:
    """All ids that end a completion: the model's own list and the tokenizer's EOS."""
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(sorted({*model_eos, *own}))


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids with BOS in front exactly once, if the model has one that its tokenizer puts there."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:  # the text itself began with the BOS string
        ids = ids[1:]
    # Some tokenizers close every text with EOS; a prompt that ends so would ask for nothing.
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token or "\0"):
        ids = ids[:-1]
    return ids


def encode_prompts(tokenizer, problems: Sequence[Problem], ids: Sequence[int], max_tokens: int) -> Prompts:
    """Problems in the template, encoded and padded on the right to `max_tokens`.

    Raises:
      UserError: a prompt is longer than `max_tokens` (it is never cut).
    """
    tokens = np.zeros((len(problems), max_tokens), np.int32)
    lengths = np.zeros(len(problems), np.int32)
    for row, (problem, problem_id) in enumerate(zip(problems, ids)):
        encoded = encode_text(tokenizer, format_prompt(problem.question))
        if len(encoded) > max_tokens:
            raise UserError(
                f"expected prompts of at most rollout.max_prompt_tokens={max_tokens} tokens; problem {problem_id} "
                f"({problem.question[:60]!r}) has {len(encoded)}; raise rollout.max_prompt_tokens"
            )
        tokens[row, : len(encoded)] = encoded
        lengths[row] = len(encoded)
    return Prompts(tokens=tokens, lengths=lengths, ids=np.asarray(ids, np.int32))


DEFAULT_STOP_STRINGS = ("</answer>",)


def decode_completion(
    tokenizer, tokens: Sequence[int], stop_ids: Sequence[int], stop_strings: Sequence[str] = DEFAULT_STOP_STRINGS
) -> str:
    """What the reward reads: the text from the prompt's end to the stop.

    A stopping id at the end is left out. If the last token completes a stop string and brings further bytes with it
    (`>\\n\\n` is one token in many vocabularies), those bytes are left out too: the model could not have chosen to stop
    between them.
    """
    tokens = [int(token) for token in tokens]
    if tokens and tokens[-1] in stop_ids:
        tokens = tokens[:-1]
    decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = decode(tokens)
    ends = [text.find(string) + len(string) for string in stop_strings if string in text]
    if ends and not any(string in decode(tokens[:-1]) for string in stop_strings):
        text = text[: min(ends)]
    return text


def decode_completions(
    tokenizer, tokens, lengths, stop_ids: Sequence[int], stop_strings: Sequence[str] = DEFAULT_STOP_STRINGS
) -> list[str]:
    """`completion_text` of N rows: tokens[N,S], lengths[N]."""
    return [decode_completion(tokenizer, row[:length], stop_ids, stop_strings) for row, length in zip(tokens, lengths)]
