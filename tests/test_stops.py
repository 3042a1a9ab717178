"""Where completions end, against a search in their bytes; the bytes of tokens, against what decode makes of them."""

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_jax.text.stops import STOPPED, build_byte_table, build_stop_table, token_bytes
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tokenizer import load_tokenizer

# Texts that the vocabularies below hold as one token each, besides all single bytes.
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


def wrap(model, decoder, added=ADDED) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    if decoder:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(list(added[::2]))
    tokenizer.add_tokens(list(added[1::2]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's. Two tokens begin or end inside a character; two added ones hold letters of the alphabet."""
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [letters.pre_tokenize_str(word)[0][0] for word in (*WORDS, "é<", "a数")]
    words[-2:] = words[-2][1:], words[-1][:-1]
    pieces = dict.fromkeys([*sorted(letters.alphabet()), *words])
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, [])
    return wrap(model, decoders.ByteLevel(), (*ADDED, "<|é|>", "Ġa"))


def spaced(decoder) -> PreTrainedTokenizerFast:
    """As SentencePiece's, with byte tokens."""
    words = [word.replace(" ", "▁") for word in WORDS]
    pieces = dict.fromkeys(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "▁", "<0x4g>"])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return wrap(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True), decoder)


REPLACE, FALLBACK, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
TOKENIZERS = {
    "tiny": lambda: load_tokenizer(find_model("tiny")),
    "byte_level": byte_level,
    "llama": lambda: spaced(decoders.Sequence([REPLACE, FALLBACK, FUSE, decoders.Strip(" ", 1, 0)])),
    "gemma": lambda: spaced(decoders.Sequence([REPLACE, FALLBACK, FUSE])),
    "replaced_last": lambda: spaced(decoders.Sequence([FALLBACK, decoders.Sequence([FUSE, REPLACE])])),
    "metaspace": lambda: spaced(decoders.Metaspace()),
    "metaspace_bytes": lambda: spaced(decoders.Sequence([decoders.Metaspace(), FALLBACK, FUSE])),
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


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def random_ids(pieces, strings, count: int, length: int) -> list[list[int]]:
    """Beginnings of the strings, cut into tokens at random; the last may bring more; between them any token."""
    rng = np.random.default_rng(0)
    strings = [string.encode() for string in strings]
    ends = {string[start:] for string in strings for start in range(len(string))}
    near = [
        i
        for i, piece in enumerate(pieces)
        if piece and any(end.startswith(piece) or piece.startswith(end) for end in ends)
    ]
    rows = []
    for _ in range(count):
        row = []
        while len(row) < length:
            row += rng.choice(len(pieces), rng.integers(2)).tolist()
            string = strings[rng.integers(len(strings))]
            left = string[: rng.integers(1, len(string) + 1)]
            while fits := [i for i in near if left and (left.startswith(pieces[i]) or pieces[i].startswith(left))]:
                row.append(fits[rng.integers(len(fits))])
                left = left[len(pieces[row[-1]]) :]
        rows.append(row)
    return rows


def follow(table, ids) -> int | None:
    """The place of the token that stops, None without one."""
    state = 0
    for place, token in enumerate(ids):
        state = table[state, token]
        if state == STOPPED:
            return place
    return None


def searched(pieces, ids, stop_ids, strings) -> int | None:
    text = b""
    for place, token in enumerate(ids):
        text += pieces[token]
        if token in stop_ids or any(string.encode() in text for string in strings):
            return place
    return None


@pytest.mark.parametrize("strings", STRINGS, ids=str)
def test_completion_stops_where_its_bytes_first_hold_a_string(tokenizer, strings):
    pieces = token_bytes(tokenizer, len(tokenizer))
    table = build_stop_table(len(tokenizer), (1, 5), strings, tokenizer)
    found = set()
    for ids in random_ids(pieces, strings, 150, 20):
        place = follow(table, ids)
        assert place == searched(pieces, ids, (1, 5), strings), ids
        found.add(place)
    assert len(found) > 3


@pytest.mark.parametrize("strings", STRINGS, ids=str)
def test_string_cut_into_single_bytes_stops_at_its_last_byte(strings):
    tokenizer = byte_level()
    pieces = token_bytes(tokenizer, len(tokenizer))
    table = build_stop_table(len(tokenizer), (), strings, tokenizer)
    for string in strings:
        before = "<</answe" + string[:-1]
        ids = [pieces.index(bytes([byte])) for byte in (before + string).encode()]
        assert follow(table, ids) == searched(pieces, ids, (), strings)
        assert follow(build_stop_table(len(tokenizer), (), (string,), tokenizer), ids) is not None


def test_bytes_of_tokens_join_to_the_decoded_text(tokenizer):
    """Behind another token: what takes a space from a text's beginning takes none there."""
    pieces = token_bytes(tokenizer, len(tokenizer))
    anchor = pieces.index(b"a")
    rng = np.random.default_rng(1)
    checked = set()
    for _ in range(5000):
        ids = [anchor, *rng.integers(0, len(tokenizer), rng.integers(1, 5)).tolist()]
        try:
            text = b"".join(pieces[token] for token in ids).decode()
        except UnicodeDecodeError:
            continue
        assert text == tokenizer.decode(ids, skip_special_tokens=False), ids
        checked |= set(ids)
    assert len(checked) > len(tokenizer) * 0.4  # half of the single bytes are no text


def test_bytes_that_are_no_text_are_those_of_the_decoder():
    tokenizer = byte_level()
    pieces = token_bytes(tokenizer, len(tokenizer))
    for token, piece in enumerate(pieces):
        assert piece and piece.decode(errors="replace") == tokenizer.decode([token])
    assert {bytes([byte]) for byte in range(256)} <= set(pieces)


@pytest.mark.parametrize("name", ["byte_level", "llama", "gemma", "replaced_last", "metaspace_bytes"])
@pytest.mark.parametrize(
    "text", ["Größe, 数学, שלום, 🙂👩‍👩‍👧", "line\nline\r\n\ttab \x00\x1f\N{REPLACEMENT CHARACTER}"]
)
def test_characters_are_joined_from_tokens_of_one_byte(name, text):
    tokenizer = TOKENIZERS[name]()
    pieces = token_bytes(tokenizer, len(tokenizer))
    ids = [pieces.index(bytes([byte])) for byte in text.encode()]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["byte_level", "llama", "metaspace"])
def test_added_tokens_are_their_content(name):
    tokenizer = TOKENIZERS[name]()
    pieces = token_bytes(tokenizer, len(tokenizer))
    for content in ADDED:
        assert pieces[tokenizer.convert_tokens_to_ids(content)] == content.encode()


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["<", "</answer>"], 1),  # <</answer>: the first byte begins a string that the second begins anew
        (["</answe", "</answe", "r", ">"], 3),
        (["</answe", "</a", "n", "</answer>"], 3),
        (["</", "answ", "er", ">\n\n"], 3),
        (["x</answer>y", "a"], 0),
        (["a", "[</answer>]"], 1),
        (["</answe", "<s>", "r", ">"], None),  # a special token is text between
        (["</", "answ", "er", " ", ">"], None),
        (["é", "数</answer>"], 1),
    ],
)
@pytest.mark.parametrize("name", ["byte_level", "gemma"])
def test_answer_ends_however_it_is_cut(name, words, place):
    tokenizer = TOKENIZERS[name]()
    pieces = token_bytes(tokenizer, len(tokenizer))
    table = build_stop_table(len(tokenizer), (), ("</answer>",), tokenizer)
    assert follow(table, [pieces.index(word.encode()) for word in words]) == place


def test_character_of_a_string_may_be_spread_over_tokens_that_hold_more():
    tokenizer = byte_level()
    pieces = token_bytes(tokenizer, len(tokenizer))
    table = build_stop_table(len(tokenizer), (), ("é<", "a数"), tokenizer)
    first, rest = "é<".encode()[:1], "é<".encode()[1:]
    assert follow(table, [pieces.index(piece) for piece in (b"a", first, rest)]) == 2
    first, rest = "a数".encode()[:-1], "a数".encode()[-1:]
    assert follow(table, [pieces.index(piece) for piece in (b"a", first, rest)]) == 2


def test_text_without_the_string_never_stops():
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
def test_states_are_the_beginnings_of_strings_that_hold_none(strings, states):
    tokenizer = byte_level()
    table = build_stop_table(len(tokenizer), (), strings, tokenizer)
    assert table.dtype == np.int16 and table.shape == (states, len(tokenizer))
    assert sorted(set(table.ravel().tolist())) == [STOPPED, *range(states)]


def test_padding_of_the_vocabulary_adds_nothing_and_may_be_a_stop_id():
    tokenizer = byte_level()
    used = len(tokenizer)
    table = build_stop_table(used + 3, (used + 1,), ("</answer>",), tokenizer)
    assert token_bytes(tokenizer, used + 3)[used:] == [b""] * 3
    assert table[:, used].tolist() == table[:, used + 2].tolist() == list(range(9))
    assert (table[:, used + 1] == STOPPED).all()
    assert (table[:, :used] == build_stop_table(used, (), ("</answer>",), tokenizer)).all()
    # An embedding with fewer rows than the tokenizer has tokens
    assert (table[:, :20] == build_stop_table(20, (), ("</answer>",), tokenizer)).all()


def test_without_strings_there_is_one_state_and_no_tokenizer_is_needed():
    table = build_stop_table(6, (2, 5))
    assert table.dtype == np.int16 and table.tolist() == [[0, 0, STOPPED, 0, 0, STOPPED]]
    assert build_stop_table(3, ()).tolist() == [[0, 0, 0]]


class Slow:
    """A tokenizer of which only the text is to be had; it takes a space from the beginning, as SentencePiece does."""

    words = ("a", " a", "</", "answer", ">\n", " </answer>", "数")

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [self.words.index(text)]

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert not skip_special_tokens and not clean_up_tokenization_spaces
        return "".join(self.words[token] for token in ids).removeprefix(" ")


def test_tokenizer_that_is_not_fast_is_decoded():
    assert token_bytes(Slow(), 9) == [*(word.encode() for word in Slow.words), b"", b""]
    table = build_stop_table(9, (), ("</answer>",), Slow())
    assert follow(table, [0, 2, 7, 3, 4]) == 4
    assert follow(table, [0, 5]) == 1
    assert follow(table, [2, 3, 6, 4]) is None


@pytest.mark.parametrize(
    ("decoder", "expected"),
    [
        (None, [b" a", b" ##b", b" c"]),
        (decoders.WordPiece(), [b" a", b"b", b" c"]),
        (decoders.Sequence([FUSE, decoders.Replace("a##", "a+")]), [b"a", b"+b", b"c"]),  # between tokens, too
        (decoders.Replace(Regex("#+"), "+"), [b"a", b"+b", b"c"]),
        (
            decoders.Sequence([decoders.Replace("#", "+"), decoders.Strip("c", 1, 0)]),
            [b"a", b"++b", b""],
        ),  # of each token
    ],
)
def test_other_decoders_are_asked(decoder, expected):
    tokenizer = wrap(models.WordPiece({"a": 0, "##b": 1, "c": 2, "[UNK]": 3}), decoder, ())
    assert token_bytes(tokenizer, 3) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, (5,)), r"stop ids in 0\.\.4; found 5"),
        ((5, (0, -1)), r"stop ids in 0\.\.4; found -1"),
        ((5, (), ("a", ""), Slow()), "at least one character; found an empty one"),
        ((5, (), ("a",)), "expected a tokenizer"),
        ((5, (), ("ab" * 2**14 + "c",), Slow()), "at most 32768 states"),
    ],
)
def test_what_no_table_can_be_made_of_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        build_stop_table(*arguments)
    assert "\n" not in str(error.value)


def test_as_many_states_as_int16_holds():
    table = build_byte_table([b"ab" * 2**14])
    assert table.shape == (2**15 + 1, 256) and table.dtype == np.int16 and table.max() == 2**15 - 1
