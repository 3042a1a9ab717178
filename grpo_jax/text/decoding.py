"""Decodes the token ids of completions into the text that the rewards read."""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders

MAX_PENDING = 8  # tokens that may share a character; a character has at most 4 bytes


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


def decode_pieces(tokenizer: Any, rows: Iterable[Sequence[int]]) -> list[list[str]]:
    """Returns the text of each token of each row. Joined, the texts of a row are what `decode_ids` returns for it.

    A character that is split over several tokens belongs to the last of them; those before it have empty texts.

    Args:
        tokenizer: A `transformers` tokenizer, or one of the `tokenizers` library.
        rows: Rows of token ids.
    """
    backend = tokenizer_backend(tokenizer)
    is_byte_level = backend is not None and isinstance(backend.decoder, decoders.ByteLevel)
    decode_one = cache(lambda token: decode_ids(tokenizer, [token]))

    def decode_row(ids: Sequence[int]) -> list[str]:
        pieces: list[str] = []
        pending = 0  # tokens that may hold the first bytes of a character
        for n, token in enumerate(ids):
            alone = decode_one(token)
            if is_byte_level and not pending and "\ufffd" not in alone:
                pieces.append(alone)
                continue
            start = max(0, n - pending - 1)  # a decoder may treat the first token differently, so one more is decoded
            text = decode_ids(tokenizer, ids[start : n + 1])
            if text.endswith("\ufffd") and pending < MAX_PENDING:
                pieces.append("")
                pending += 1
            else:
                pieces.append(text[len(decode_one(ids[start])) if start < n - pending else 0 :])
                pending = 0
        # If later tokens changed the text of earlier ones, all text from there belongs to the last token.
        text, done = decode_ids(tokenizer, ids), 0
        for n, piece in enumerate(pieces):
            pieces[n] = piece if text.startswith(piece, done) and n + 1 < len(pieces) else ""
            done += len(pieces[n])
        return [*pieces[:-1], text[done:]] if pieces else []

    return [decode_row(ids) for ids in rows]


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
