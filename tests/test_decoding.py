"""Completions are decoded as `transformers` does, and cut after a stop string that the last token completes."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_jax.text.decoding import decode_completion, decode_ids, decode_pieces, tokenizer_backend
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tokenizer import load_tokenizer

PIECES = ["</answer>", "</ans", "wer>", ">\n\n", "é", "🙂", "數", "x", " ", "<", "\r\n"]
STOP_STRINGS = ("</answer>", "er>", "🙂x", "\n", "🙂", "> ")


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer of bytes like GPT-2's, in which `</answer>` and bytes of an emoji are merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("<", "/"), ("e", "r"), ("er", ">"), ("Ċ", "Ċ"), ("er>", "ĊĊ"), ("Ĥ", "x"), ("ð", "Ł")]
    vocabulary = {piece: n for n, piece in enumerate(["<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer like SentencePiece's, with a token for each byte that is not in the vocabulary."""
    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁x", "</answer>", "</ans", "wer>", "é"]
    backend = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def decode_twice(tokenizer, tokens, stop_ids, stop_strings) -> str:
    """Decodes with `transformers`, as defined: a stop string counts if the text without the last token lacks it."""

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    ids = [int(token) for token in tokens]
    ids = ids[:-1] if ids and ids[-1] in stop_ids else ids
    text, before = decode(ids), decode(ids[:-1])
    ends = [text.find(string) + len(string) for string in stop_strings if string in text]
    return text[: min(ends)] if ends and not any(string in before for string in stop_strings) else text


@pytest.mark.parametrize("kind", ["tiny", "byte level", "byte fallback"])
def test_completions_are_decoded_as_defined_by_the_trainers_tokenizer_and_from_its_json(kind):
    makers = {"byte level": byte_level_tokenizer, "byte fallback": byte_fallback_tokenizer}
    tokenizer = makers[kind]() if kind in makers else load_tokenizer(find_model("tiny"))
    from_json = Tokenizer.from_str(tokenizer_backend(tokenizer).to_str())
    rng, size, cut = np.random.default_rng(0), len(tokenizer), 0
    # Merges and whole words come last, then an id that stands for nothing, as in a padded vocabulary.
    likely = np.r_[np.arange(size), np.repeat(np.arange(size - 8, size + 1), 40)]
    for trial in range(400):
        text = "".join(rng.choice(PIECES, rng.integers(0, 6)))
        ids = np.array([*tokenizer.encode(text, add_special_tokens=False), *rng.choice(likely, trial % 4)], np.int32)
        ids = ids[: rng.integers(0, len(ids) + 1)] if trial % 2 else ids  # often inside a character or a stop string
        for strings in (STOP_STRINGS, STOP_STRINGS[:1], STOP_STRINGS[-2:-1], STOP_STRINGS[-1:], ()):
            expected = decode_twice(tokenizer, ids, (1,), strings)
            assert decode_completion(tokenizer, ids, (1,), strings) == expected
            assert decode_completion(from_json, ids, (1,), strings) == expected
            cut += expected != decode_twice(tokenizer, ids, (1,), ())
    assert cut > 9 or kind == "tiny"  # the tokens of tiny end where a stop string does


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
def test_a_character_belongs_to_the_last_of_its_tokens_and_no_text_is_lost(make):
    tokenizer = make()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokenizer.tokenize("x🙂é x")]
    (pieces,) = decode_pieces(tokenizer, [ids])
    assert [piece for piece in pieces if piece and piece not in " x"] == ["🙂", "é"]
    assert pieces.index("🙂") >= 2 and pieces[0] == "x" and "".join(pieces) == "x🙂é x"
    rng = np.random.default_rng(0)
    # Random ids are mostly incomplete characters, many of which no later token completes.
    rows = [rng.integers(0, len(tokenizer), length).tolist() for length in range(60)]
    rows += [tokenizer.encode("x🙂數 x", add_special_tokens=False)[:length] for length in range(12)]
    for row, texts in zip(rows, decode_pieces(tokenizer, rows), strict=True):
        assert len(texts) == len(row) and "".join(texts) == decode_ids(tokenizer, row)
