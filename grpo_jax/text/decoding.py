"""Decodes the token ids of completions into the text that the rewards read."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders


def tokenizer_backend(tokenizer: Any) -> Tokenizer | None:
    """Returns the `tokenizers` object that decodes for a `transformers` tokenizer, or None if it has none."""
    return tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)


def decode_ids(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decodes token ids verbatim: special tokens are kept and no white space is cleaned up."""
    backend = tokenizer_backend(tokenizer)
    if backend is not None:  # the same text in half the time
        return backend.decode(ids, skip_special_tokens=False)
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def decode_without_last(tokenizer: Any, ids: Sequence[int], text: str) -> str:
    """Returns the text of all token ids but the last, given the text of all of them."""
    backend = tokenizer_backend(tokenizer)
    if backend is not None and isinstance(backend.decoder, decoders.ByteLevel):
        # The bytes of all tokens are joined and then decoded. Unless the token before the last ends inside a character,
        # the text ends with the text of the last token.
        if decode_ids(tokenizer, ids[-2:-1])[-1:] not in ("", "\ufffd"):
            return text.removesuffix(decode_ids(tokenizer, ids[-1:]))
    return decode_ids(tokenizer, ids[:-1])


def decode_completion(
    tokenizer: Any, tokens: Iterable[int], stop_ids: Sequence[int], stop_strings: Sequence[str] = ("</answer>",)
) -> str:
    r"""Decodes the tokens of a completion into the text that the rewards read.

    A final stop id is left out. If the last token completes a stop string, the text ends with that string: a token may
    bring further characters with it (`>\n\n` is one token in many vocabularies), and the model could not have stopped
    between them.

    Args:
        tokenizer: A `transformers` tokenizer, or one of the `tokenizers` library.
        tokens: The sampled token ids, the stopping one included.
        stop_ids: Token ids that end a completion.
        stop_strings: Strings that end a completion.
    """
    ids = np.asarray(tokens).tolist()
    if ids and ids[-1] in stop_ids:
        ids = ids[:-1]
    text = decode_ids(tokenizer, ids)
    ends = [text.find(string) + len(string) for string in stop_strings if string in text]
    if ends:
        before = decode_without_last(tokenizer, ids, text)
        if not any(string in before for string in stop_strings):
            text = text[: min(ends)]
    return text
