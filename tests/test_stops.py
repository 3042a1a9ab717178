"""Stop tables against a search in the bytes of completions, and the bytes of tokens against the decoded text."""

import functools

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_jax.text.stops import STOPPED, build_byte_table, build_stop_table, token_bytes
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tokenizer import load_tokenizer

# The vocabularies below hold each of these as one token, besides all single bytes.
WORDS = (
    "a",
    "b",
    "ab",
    "ba",
    "bab",
    "</",
    "</a",
    "answ",
    "er",
    "</answe",
    "</answer>",
    "><",
    ">\n\n",
    "x</answer>y",
    " a",
    "  ",
    "\n",
    "é",
    "数学",
    "a数",
    "ab" * 100,
)
ADDED = ("<s>", "</s>", "<| a\n |>", "[</answer>]", "数</answer>", "é |")


def build_tokenizer(model, decoder, added=ADDED) -> PreTrainedTokenizerFast:
    """Wraps a model and a decoder. The tokens in `added` become special and ordinary added tokens in turn."""
    tokenizer = Tokenizer(model)
    if decoder:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(list(added[::2]))
    tokenizer.add_tokens(list(added[1::2]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level() -> PreTrainedTokenizerFast:
    """Builds a GPT-2 style tokenizer.

    Two tokens begin or end inside a character; two added ones contain characters of the byte alphabet.
    """
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [alphabet.pre_tokenize_str(word)[0][0] for word in (*WORDS, "é<", "a数")]
    words[-2:] = words[-2][1:], words[-1][:-1]
    pieces = dict.fromkeys([*sorted(alphabet.alphabet()), *words])
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [])
    return build_tokenizer(model, decoders.ByteLevel(), (*ADDED, "<|é|>", "Ġa"))


def sentencepiece(decoder) -> PreTrainedTokenizerFast:
    """Builds a SentencePiece style tokenizer with byte tokens."""
    words = [word.replace(" ", "▁") for word in WORDS]
    pieces = dict.fromkeys(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "▁", "<0x4g>"])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return build_tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True), decoder)


REPLACE, FALLBACK, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
TOKENIZERS = {
    "tiny": functools.cache(lambda: load_tokenizer(find_model("tiny"))),
    "byte_level": byte_level,
    "llama": lambda: sentencepiece(decoders.Sequence([REPLACE, FALLBACK, FUSE, decoders.Strip(" ", 1, 0)])),
    "gemma": lambda: sentencepiece(decoders.Sequence([REPLACE, FALLBACK, FUSE])),
    "replaced_last": lambda: sentencepiece(decoders.Sequence([FALLBACK, decoders.Sequence([FUSE, REPLACE])])),
    "metaspace": lambda: sentencepiece(decoders.Metaspace()),
    "metaspace_bytes": lambda: sentencepiece(decoders.Sequence([decoders.Metaspace(), FALLBACK, FUSE])),
}
STRINGS = [
    ("</answer>",),
    ("ab", "bab", "</answer>", "</a"),
    ("aab", "abaabb", "ba\n"),
    ("bbab", "bab", "ababb"),
    ("数学", "aé", "é<"),
    (" a", ">\n\n", "  "),
    ("abababac", "ababac", "</answer></answer>"),
]


def random_completions(pieces, strings, count: int, length: int) -> list[list[int]]:
    """Draws completions that nearly hold a stop string.

    They are prefixes of the strings, split into tokens at random, with random tokens in between. The last token of a
    prefix may go on after it.
    """
    rng = np.random.default_rng(0)
    strings = [string.encode() for string in strings]
    suffixes = {string[start:] for string in strings for start in range(len(string))}
    related = [
        i
        for i, piece in enumerate(pieces)
        if piece and any(suffix.startswith(piece) or piece.startswith(suffix) for suffix in suffixes)
    ]
    rows = []
    for _ in range(count):
        row = []
        while len(row) < length:
            row += rng.choice(len(pieces), rng.integers(2)).tolist()
            string = strings[rng.integers(len(strings))]
            rest = string[: rng.integers(1, len(string) + 1)]
            while fits := [i for i in related if rest and (rest.startswith(pieces[i]) or pieces[i].startswith(rest))]:
                row.append(fits[rng.integers(len(fits))])
                rest = rest[len(pieces[row[-1]]) :]
        rows.append(row)
    return rows


def stop_index(table, ids) -> int | None:
    """Follows the table and returns the index of the token that ends the completion, or None."""
    state = 0
    for index, token in enumerate(ids):
        state = table[state, token]
        if state == STOPPED:
            return index
    return None


def searched_stop_index(pieces, ids, stop_ids, strings) -> int | None:
    """Returns the same index, found by searching the bytes of every prefix."""
    text = b""
    for index, token in enumerate(ids):
        text += pieces[token]
        if token in stop_ids or any(string.encode() in text for string in strings):
            return index
    return None


@pytest.mark.parametrize(
    ("name", "strings"),
    [
        *(("byte_level", strings) for strings in STRINGS),
        *((name, STRINGS[1]) for name in TOKENIZERS if name != "byte_level"),
    ],
    ids=str,
)
def test_completion_ends_with_the_token_that_completes_a_stop_string(name, strings):
    tokenizer = TOKENIZERS[name]()
    pieces = token_bytes(tokenizer, len(tokenizer))
    table = build_stop_table(len(tokenizer), (1, 5), strings, tokenizer)
    indices = set()
    for ids in random_completions(pieces, strings, 150, 20):
        index = stop_index(table, ids)
        assert index == searched_stop_index(pieces, ids, (1, 5), strings), ids
        indices.add(index)
    assert len(indices) > 3


@pytest.mark.parametrize("strings", STRINGS, ids=str)
def test_a_stop_string_in_single_bytes_ends_at_its_last_byte(strings):
    tokenizer = byte_level()
    pieces = token_bytes(tokenizer, len(tokenizer))
    table = build_stop_table(len(tokenizer), (), strings, tokenizer)
    for string in strings:
        misleading = "<</answe" + string[:-1]
        ids = [pieces.index(bytes([byte])) for byte in (misleading + string).encode()]
        assert stop_index(table, ids) == searched_stop_index(pieces, ids, (), strings)
        assert stop_index(build_stop_table(len(tokenizer), (), (string,), tokenizer), ids) is not None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_tokens_join_to_the_decoded_text(name):
    """The first token is always `a`, because some decoders strip a space at the start of a text."""
    tokenizer = TOKENIZERS[name]()
    pieces = token_bytes(tokenizer, len(tokenizer))
    anchor = pieces.index(b"a")
    rng = np.random.default_rng(1)
    checked = set()
    for _ in range(2000):
        ids = [anchor, *rng.integers(0, len(tokenizer), rng.integers(1, 5)).tolist()]
        try:
            text = b"".join(pieces[token] for token in ids).decode()
        except UnicodeDecodeError:
            continue
        assert text == tokenizer.decode(ids, skip_special_tokens=False), ids
        checked |= set(ids)
    assert len(checked) > len(tokenizer) * 0.4  # half of the single bytes are not valid text


def test_bytes_of_partial_characters_are_those_of_the_decoder():
    tokenizer = byte_level()
    pieces = token_bytes(tokenizer, len(tokenizer))
    for token, piece in enumerate(pieces):
        assert piece and piece.decode(errors="replace") == tokenizer.decode([token])
    assert {bytes([byte]) for byte in range(256)} <= set(pieces)


@pytest.mark.parametrize("name", ["byte_level", "llama", "gemma", "replaced_last", "metaspace_bytes"])
@pytest.mark.parametrize(
    "text", ["Größe, 数学, שלום, 🙂👩‍👩‍👧", "line\nline\r\n\ttab \x00\x1f\N{REPLACEMENT CHARACTER}"]
)
def test_tokens_of_one_byte_join_to_characters(name, text):
    tokenizer = TOKENIZERS[name]()
    pieces = token_bytes(tokenizer, len(tokenizer))
    ids = [pieces.index(bytes([byte])) for byte in text.encode()]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["byte_level", "llama", "metaspace"])
def test_added_tokens_add_their_content(name):
    tokenizer = TOKENIZERS[name]()
    pieces = token_bytes(tokenizer, len(tokenizer))
    for content in ADDED:
        assert pieces[tokenizer.convert_tokens_to_ids(content)] == content.encode()


@pytest.mark.parametrize(
    ("words", "index"),
    [
        (["<", "</answer>"], 1),  # the second < starts the string anew
        (["</answe", "</answe", "r", ">"], 3),
        (["</answe", "</a", "n", "</answer>"], 3),
        (["</", "answ", "er", ">\n\n"], 3),
        (["x</answer>y", "a"], 0),
        (["a", "[</answer>]"], 1),
        (["</answe", "<s>", "r", ">"], None),  # a special token is text too
        (["</", "answ", "er", " ", ">"], None),
        (["é", "数</answer>"], 1),
    ],
)
@pytest.mark.parametrize("name", ["byte_level", "gemma"])
def test_answer_ends_however_it_is_tokenized(name, words, index):
    tokenizer = TOKENIZERS[name]()
    pieces = token_bytes(tokenizer, len(tokenizer))
    table = build_stop_table(len(tokenizer), (), ("</answer>",), tokenizer)
    assert stop_index(table, [pieces.index(word.encode()) for word in words]) == index


def test_a_character_of_a_stop_string_may_be_split_across_tokens():
    tokenizer = byte_level()
    pieces = token_bytes(tokenizer, len(tokenizer))
    table = build_stop_table(len(tokenizer), (), ("é<", "a数"), tokenizer)
    first, rest = "é<".encode()[:1], "é<".encode()[1:]
    assert stop_index(table, [pieces.index(piece) for piece in (b"a", first, rest)]) == 2
    first, rest = "a数".encode()[:-1], "a数".encode()[-1:]
    assert stop_index(table, [pieces.index(piece) for piece in (b"a", first, rest)]) == 2


def test_tokens_without_the_stop_string_never_stop():
    tokenizer = byte_level()
    pieces = token_bytes(tokenizer, len(tokenizer))
    table = build_stop_table(len(tokenizer), (), ("\x01\x02",), tokenizer)
    free = [i for i, piece in enumerate(pieces) if b"\x02" not in piece]
    assert len(table) == 2 and (table[:, free] >= 0).all()
    assert (table == STOPPED).sum() == 1


@pytest.mark.parametrize(
    ("strings", "states"),
    [
        (("</answer>",), 9),
        (("ab", "ab"), 2),
        (("ab", "abc"), 2),
        (("ab", "xaby"), 4),
        (("abc", "abd"), 3),
        (("a", "é"), 2),
    ],
)
def test_states_are_the_proper_prefixes_that_contain_no_stop_string(strings, states):
    tokenizer = byte_level()
    table = build_stop_table(len(tokenizer), (), strings, tokenizer)
    assert table.dtype == np.int16 and table.shape == (states, len(tokenizer))
    assert sorted(set(table.ravel().tolist())) == [STOPPED, *range(states)]


def test_padding_ids_add_no_text_and_may_be_stop_ids():
    tokenizer = byte_level()
    used = len(tokenizer)
    table = build_stop_table(used + 3, (used + 1,), ("</answer>",), tokenizer)
    assert token_bytes(tokenizer, used + 3)[used:] == [b""] * 3
    assert table[:, used].tolist() == table[:, used + 2].tolist() == list(range(9))
    assert (table[:, used + 1] == STOPPED).all()
    assert (table[:, :used] == build_stop_table(used, (), ("</answer>",), tokenizer)).all()
    # The embedding may also have fewer rows than the tokenizer has tokens.
    assert (table[:, :20] == build_stop_table(20, (), ("</answer>",), tokenizer)).all()


def test_without_stop_strings_there_is_one_state_and_no_tokenizer_is_needed():
    table = build_stop_table(6, (2, 5))
    assert table.dtype == np.int16 and table.tolist() == [[0, 0, STOPPED, 0, 0, STOPPED]]
    assert build_stop_table(3, ()).tolist() == [[0, 0, 0]]


class SlowTokenizer:
    """A tokenizer without a backend. Like SentencePiece it strips a space at the start of a text."""

    words = ("a", " a", "</", "answer", ">\n", " </answer>", "数")

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [self.words.index(text)]

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert not skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(self.words[token] for token in ids).removeprefix(" ")


def test_tokens_of_a_slow_tokenizer_are_decoded_one_by_one():
    assert token_bytes(SlowTokenizer(), 9) == [*(word.encode() for word in SlowTokenizer.words), b"", b""]
    table = build_stop_table(9, (), ("</answer>",), SlowTokenizer())
    assert stop_index(table, [0, 2, 7, 3, 4]) == 4
    assert stop_index(table, [0, 5]) == 1
    assert stop_index(table, [2, 3, 6, 4]) is None


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        (None, [b" a", b" ##b", b" c"]),
        (decoders.WordPiece(), [b" a", b"b", b" c"]),
        (decoders.Sequence([FUSE, decoders.Replace("a##", "a+")]), [b"a", b"+b", b"c"]),  # could match across tokens
        (decoders.Replace(Regex("#+"), "+"), [b"a", b"+b", b"c"]),
        # Without Fuse, Strip applies to each token.
        (decoders.Sequence([decoders.Replace("#", "+"), decoders.Strip("c", 1, 0)]), [b"a", b"++b", b""]),
    ],
)
def test_tokens_of_other_decoders_are_decoded_one_by_one(decoder, expected):
    tokenizer = build_tokenizer(models.WordPiece({"a": 0, "##b": 1, "c": 2, "[UNK]": 3}), decoder, ())
    assert token_bytes(tokenizer, 3) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, (5,)), r"Stop ids must lie in 0\.\.4; found 5"),
        ((5, (0, -1)), r"Stop ids must lie in 0\.\.4; found -1"),
        ((5, (), ("a", ""), SlowTokenizer()), "at least one character; found an empty one"),
        ((5, (), ("a",)), "need a tokenizer"),
        ((5, (), ("ab" * 2**14 + "c",), SlowTokenizer()), "more than 32768 states"),
    ],
)
def test_unusable_arguments_raise_a_one_line_error(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        build_stop_table(*arguments)
    assert "\n" not in str(error.value)


def test_a_table_may_have_as_many_states_as_int16_can_number():
    table = build_byte_table([b"ab" * 2**14])
    assert table.shape == (2**15 + 1, 256) and table.dtype == np.int16 and table.max() == 2**15 - 1
