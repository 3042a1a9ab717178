"""Builds the table that tells a compiled decode loop where completions end, at the cost of one gather per token.

Stop strings are matched in the UTF-8 bytes of the text, so it does not matter how the tokenizer splits them: across
many tokens, inside a character, or in the middle of a token that goes on after the string.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int16

from grpo_jax.text.decoding import decode_ids

STOPPED = -1


def build_stop_table(
    vocab_size: int, stop_ids: Sequence[int], stop_strings: Sequence[str] = (), tokenizer: Any = None
) -> Int16[np.ndarray, "A V"]:
    """Builds the stop table: `table[state, token]` is the state after `token`, or STOPPED if the completion ends there.

    A completion starts in state 0. A state stands for the longest suffix of the text so far that could become a stop
    string; without stop strings there is only state 0.

    Args:
        vocab_size: Number of token ids V. Ids beyond the tokenizer's (padding of the embedding) add no text.
        stop_ids: Token ids that end a completion in any state.
        stop_strings: Strings that end a completion, with the token that completes the first of them.
        tokenizer: A `transformers` tokenizer, needed only with stop strings.

    Returns:
        The table of A states.

    Raises:
        ValueError: A stop id is outside the vocabulary, a stop string is empty, stop strings come without a tokenizer,
            or they need more states than int16 can number.
    """
    outside = [token for token in stop_ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"Stop ids must lie in 0..{vocab_size - 1}; found {outside[0]}. Leave it out.")
    if not all(stop_strings):
        raise ValueError("Stop strings must have at least one character; found an empty one. Leave it out.")
    if stop_strings and tokenizer is None:
        raise ValueError("Stop strings need a tokenizer, to look for them in its tokens; found None. Pass one.")
    byte_table = build_byte_table([string.encode() for string in stop_strings])
    states = np.arange(len(byte_table) - 1, dtype=np.int16)
    table = np.repeat(states[:, None], vocab_size, axis=1)  # a token without text leaves the state as it is
    if stop_strings:
        pieces = token_bytes(tokenizer, vocab_size)
        lengths = np.asarray([len(piece) for piece in pieces])
        order = np.argsort(-lengths, kind="stable")  # longest first: step i then touches a prefix of the columns
        joined = np.frombuffer(b"".join(pieces), np.uint8)
        starts = (np.cumsum(lengths) - lengths)[order]
        for position in range(int(lengths.max())):
            longer = np.count_nonzero(lengths > position)
            table[:, :longer] = byte_table[table[:, :longer], joined[starts[:longer] + position]]
        table[:, order] = table.copy()
    table[:, list(stop_ids)] = STOPPED
    return table


def build_byte_table(stop_strings: Sequence[bytes]) -> Int16[np.ndarray, "_ 256"]:
    """Builds the same table over bytes instead of tokens (Aho and Corasick, 1975).

    Row STOPPED, the last one, leads only to itself.
    """
    children: list[dict[int, int]] = [{}]  # a trie of the strings, by node
    ends = set()
    for string in stop_strings:
        node = 0
        for byte in string:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
            node = children[node][byte]
        ends.add(node)
    nodes = [0]  # trie node of each state, breadth first. Nodes whose text contains a whole string are not states
    fallbacks = [0]  # for each state, the state of the next shorter suffix
    rows: list[np.ndarray] = []
    while len(rows) < len(nodes):
        state = len(rows)
        row = rows[fallbacks[state]].copy() if state else np.zeros(256, np.int32)
        for byte, child in children[nodes[state]].items():
            if child in ends:
                row[byte] = STOPPED
            elif row[byte] != STOPPED:
                fallbacks.append(row[byte])
                row[byte] = len(nodes)
                nodes.append(child)
        rows.append(row)
        if len(nodes) > 2**15:
            raise ValueError(
                "The stop strings need more than 32768 states, the most that a stop table can hold (one per byte). "
                "Use shorter stop strings."
            )
    return np.stack([*rows, np.full(256, STOPPED)]).astype(np.int16)


# Decoders that turn every token into text on its own, except that some strip a space at the start of the whole text. A
# completion follows its prompt, so it keeps that space.
SPACE_STRIPPING_DECODERS = re.compile("((Replace|Metaspace) )*(ByteFallback )?(Fuse (Replace )*(Strip )?)?")
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


def token_bytes(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """Returns the bytes that each token id adds to the decoded text; b"" for ids that are not tokens.

    Special tokens count as text. The result is exact for tokenizers of the `tokenizers` library that decode like GPT-2
    (SmolLM2, Qwen, Llama 3) or SentencePiece (Llama 2, Mistral, Gemma). With any other tokenizer each id is decoded on
    its own, so a character that is split across tokens is lost.

    Args:
        tokenizer: A `transformers` tokenizer.
        vocab_size: Number of ids to return.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = decoder_steps(json.loads(backend.to_str())["decoder"]) if backend else []
    kinds = "".join(f"{step['type']} " for step in steps)
    replacements = []
    for step in steps:
        if step["type"] == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif step["type"] == "Replace":
            replacements.append((step["pattern"].get("String", ""), step["content"]))
    # A pattern longer than one character could match across tokens.
    sentencepiece = SPACE_STRIPPING_DECODERS.fullmatch(kinds) and all(len(old) == 1 for old, _ in replacements)
    if backend is None or not steps or not (sentencepiece or kinds == "ByteLevel "):
        return token_bytes_by_decoding(tokenizer, vocab_size)
    # id_to_token, like decode, also finds the tokens that were added to the vocabulary.
    pieces = [backend.id_to_token(token) or "" for token in range(vocab_size)]
    if not sentencepiece:
        return decode_byte_level(pieces)
    for old, new in replacements:
        pieces = [piece.replace(old, new) for piece in pieces]
    byte_fallback = "ByteFallback" in kinds  # <0x41> then stands for the byte 0x41
    return [
        bytes.fromhex(piece[3:5]) if byte_fallback and BYTE_TOKEN.fullmatch(piece) else piece.encode()
        for piece in pieces
    ]


def decoder_steps(decoder: dict | None) -> list[dict]:
    """Flattens the `decoder` entry of a tokenizer.json into the decoders that run one after another."""
    if decoder is None or decoder["type"] != "Sequence":
        return [decoder] if decoder else []
    return [step for part in decoder["decoders"] for step in decoder_steps(part)]


def decode_byte_level(pieces: Sequence[str]) -> list[bytes]:
    """Decodes pieces that are written in GPT-2's byte alphabet.

    Printable Latin-1 bytes stand for themselves; the others are numbered from U+0100 upwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = dict.fromkeys(others, 0xFFFF) | {0x100 + number: byte for number, byte in enumerate(others)}
    decoded = []
    for piece in pieces:
        try:
            decoded.append(piece.translate(alphabet).encode("latin-1"))
        except UnicodeEncodeError:  # a character outside the alphabet: an added token, which is written as itself
            decoded.append(piece.encode())
    return decoded


def token_bytes_by_decoding(tokenizer: Any, vocab_size: int) -> list[bytes]:
    """Decodes each id after the text `a`, because some tokenizers strip a space at the start of a text."""
    anchor = tokenizer.encode("a", add_special_tokens=False)
    prefix, known = decode_ids(tokenizer, anchor), set(tokenizer.get_vocab().values())
    return [
        decode_ids(tokenizer, [*anchor, token]).removeprefix(prefix).encode() if token in known else b""
        for token in range(vocab_size)
    ]
