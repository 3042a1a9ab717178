"""When a completion ends, as a transition table over tokens: a compiled decode loop follows it with one gather a token.

A stop string is looked for in the UTF-8 bytes of the text, so it does not matter how the tokenizer cuts it: over many
tokens, inside a character, or in the middle of a token that brings further bytes.
"""

import json
import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int16

STOPPED = -1


def build_stop_table(
    vocab_size: int, stop_ids: Sequence[int], strings: Sequence[str] = (), tokenizer=None
) -> Int16[np.ndarray, "A V"]:
    """`table[state, token]` is the state after that token, STOPPED if the completion ends with it; it begins in 0.

    A state is the longest end of the text so far that a stop string begins with; without strings there is one state.

    Args:
      stop_ids: tokens that end a completion in any state.
      strings: texts that end it with the token that completes the first of them.
      tokenizer: needed with strings only.
    Raises:
      ValueError: a stop id is not in the vocabulary, a string is empty, there is no tokenizer to read strings with, or
        there are more states than int16 holds.
    """
    outside = [token for token in stop_ids if not 0 <= token < vocab_size]
    if outside:
        raise ValueError(f"expected stop ids in 0..{vocab_size - 1}; found {outside[0]}")
    if not all(strings):
        raise ValueError("expected stop strings of at least one character; found an empty one")
    if strings and tokenizer is None:
        raise ValueError("expected a tokenizer, to find stop strings in its tokens; found None")
    after_byte = build_byte_table([string.encode() for string in strings])
    states = np.arange(len(after_byte) - 1, dtype=np.int16)
    table = np.repeat(states[:, None], vocab_size, axis=1)  # as padding of the vocabulary leaves it: nothing is added
    if strings:
        pieces = token_bytes(tokenizer, vocab_size)
        sizes = np.asarray([len(piece) for piece in pieces])
        order = np.argsort(-sizes, kind="stable")  # so a few long tokens do not pad the rest
        joined = np.frombuffer(b"".join(pieces), np.uint8)
        starts = (np.cumsum(sizes) - sizes)[order]
        for position in range(sizes.max()):
            longer = np.count_nonzero(sizes > position)
            table[:, :longer] = after_byte[table[:, :longer], joined[starts[:longer] + position]]
        table[:, order] = table.copy()
    table[:, list(stop_ids)] = STOPPED
    return table


def build_byte_table(strings: Sequence[bytes]) -> np.ndarray:
    """The same over bytes, int16[A + 1, 256] (Aho-Corasick). The last row, that of index STOPPED, leads to itself."""
    children, ends = [{}], set()  # of the strings' trie; a node is a beginning of a string
    for string in strings:
        node = 0
        for byte in string:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
            node = children[node][byte]
        ends.add(node)
    nodes = [0]  # of each state, the shorter before the longer. What holds a string is no state
    fallback = [0]  # the next shorter state that the text ends with
    rows = []
    for state, node in enumerate(nodes):  # the loop appends to it
        row = rows[fallback[state]].copy() if state else np.zeros(256, np.int32)
        for byte, child in children[node].items():
            if child in ends:
                row[byte] = STOPPED
            elif row[byte] != STOPPED:
                fallback.append(row[byte])
                row[byte] = len(nodes)
                nodes.append(child)
        rows.append(row)
        if len(nodes) > 2**15:
            raise ValueError("expected stop strings of at most 32768 states, one a byte; found more")
    return np.stack([*rows, np.full(256, STOPPED)]).astype(np.int16)


# Decoders that make each token's text for itself, but for a space that they take from the beginning of a text. A
# completion stands behind a prompt, so there the space is one.
SPACE_STRIPPING_DECODERS = re.compile("((Replace|Metaspace) )*(ByteFallback )?(Fuse (Replace )*(Strip )?)?")
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer, vocab_size: int) -> list[bytes]:
    """What each of `vocab_size` ids adds to the decoded text, special tokens as well; b"" for ids that are no token.

    Exact for the tokenizers of `tokenizers` that decode as GPT-2 (SmolLM2, Qwen, Llama 3) or SentencePiece (Llama 2,
    Mistral, Gemma) does. Of others each id is decoded, and characters that are cut over several tokens are lost.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = decoder_steps(json.loads(backend.to_str())["decoder"]) if backend else []
    kinds = "".join(f"{step['type']} " for step in steps)
    replaced = [
        (step["replacement"], " ")
        if step["type"] == "Metaspace"
        else (step["pattern"].get("String", ""), step["content"])
        for step in steps
        if step["type"] in ("Metaspace", "Replace")
    ]
    spaced = SPACE_STRIPPING_DECODERS.fullmatch(kinds) and all(
        len(old) == 1 for old, _ in replaced
    )  # longer ones may span tokens
    if not steps or not (spaced or kinds == "ByteLevel "):
        return bytes_by_decoding(tokenizer, vocab_size)
    pieces = [backend.id_to_token(token) or "" for token in range(vocab_size)]  # as decode looks added tokens up too
    if not spaced:
        return decode_byte_level(pieces)
    for old, new in replaced:
        pieces = [piece.replace(old, new) for piece in pieces]
    numbers = [BYTE_TOKEN.fullmatch(piece) if "ByteFallback" in kinds else None for piece in pieces]
    return [bytes([int(number[1], 16)]) if number else piece.encode() for number, piece in zip(numbers, pieces)]


def decoder_steps(decoder: dict | None) -> list[dict]:
    """The decoders that `tokenizers` runs one after another, as in tokenizer.json."""
    if decoder is None or decoder["type"] != "Sequence":
        return [decoder] if decoder else []
    return [step for part in decoder["decoders"] for step in decoder_steps(part)]


def decode_byte_level(pieces: Sequence[str]) -> list[bytes]:
    """The bytes behind GPT-2's alphabet: printable Latin-1 is itself, the others are U+0100 and on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = dict.fromkeys(others, 0xFFFF) | {0x100 + number: byte for number, byte in enumerate(others)}
    found = []
    for piece in pieces:
        try:
            found.append(piece.translate(letters).encode("latin-1"))
        except UnicodeEncodeError:  # a letter that is not in the alphabet: an added token, which decodes to itself
            found.append(piece.encode())
    return found


def bytes_by_decoding(tokenizer, vocab_size: int) -> list[bytes]:
    """What `decode` adds to the text `a` for each id: behind another token, as the first one may lose a space."""

    def text(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    anchor = tokenizer.encode("a", add_special_tokens=False)
    before, known = text(anchor), set(tokenizer.get_vocab().values())
    return [
        text([*anchor, token]).removeprefix(before).encode() if token in known else b"" for token in range(vocab_size)
    ]
