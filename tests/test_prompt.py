"""The prompt template, BOS and EOS in encoded prompts, and the decoded text that the rewards read."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo_jax.errors import UserError
from grpo_jax.text.decoding import decode_completion, decode_completions
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import (
    completion_eos_ids,
    encode_prompts,
    encode_text,
    format_prompt,
)
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tokenizer import load_tokenizer

BOS, EOS = "<s>", "</s>"


def byte_tokenizer(template: str = "$A", merges=()) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per byte and one per merge.

    Args:
        template: What the post-processor turns a text $A into.
        merges: Pairs of pieces that form one token.
    """
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    ends = [(name, tokenizer.token_to_id(name)) for name in (BOS, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def test_the_template_is_that_of_r1_zero():
    assert format_prompt("What is 347 + 589?") == (
        "A conversation between User and Assistant. The User asks a question and the Assistant solves it. "
        "The Assistant first thinks about the reasoning process in the mind and then provides the User with the "
        "answer. The reasoning process and answer are enclosed within <think>...</think> and <answer>...</answer> "
        "tags, respectively, that is, <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: What is 347 + 589?. Assistant:"
    )


@pytest.mark.parametrize("question", ["{}", "{0}", "{question}", r"\frac{3}{4}", "{{x}}", "}{", "%s %d", "\\1"])
def test_braces_in_a_question_are_ordinary_text(question):
    assert format_prompt(question) == format_prompt("Q").replace("User: Q.", f"User: {question}.")


def test_bos_comes_exactly_once_if_the_tokenizer_adds_it():
    tokenizer = byte_tokenizer(f"{BOS} $A")
    for text in ("hello", BOS + "hello"):  # the second text starts with its own
        ids = encode_text(tokenizer, text)
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids[1:]) == "hello"


def test_bos_is_not_added_if_the_tokenizer_has_one_but_does_not_add_it():
    tokenizer = byte_tokenizer()
    ids = encode_text(tokenizer, "hello")
    assert tokenizer.bos_token_id is not None and tokenizer.bos_token_id not in ids
    assert len(ids) == len("hello")


def test_without_bos_and_eos_only_the_text_is_encoded():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    assert tokenizer.decode(encode_text(tokenizer, "hello")) == "hello"


def test_eos_that_the_tokenizer_appends_is_removed():
    tokenizer = byte_tokenizer(f"{BOS} $A {EOS}")
    assert tokenizer("hello")["input_ids"][-1] == tokenizer.eos_token_id  # there is something to remove
    ids = encode_text(tokenizer, "hello")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids[1:]) == "hello"


def test_prompts_are_padded_on_the_right():
    problems = [Problem("a", "", {}), Problem("abc", "", {})]
    tokenizer = byte_tokenizer(f"{BOS} $A {EOS}")
    width = len(format_prompt("abc")) + 1  # BOS; all bytes are ASCII
    prompts = encode_prompts(tokenizer, problems, [40, 41], width + 3)
    assert prompts.tokens.shape == (2, width + 3)
    assert prompts.lengths.tolist() == [width - 2, width]
    assert prompts.ids.tolist() == [40, 41]
    for row, length, problem in zip(prompts.tokens.tolist(), prompts.lengths, problems, strict=True):
        assert row[0] == tokenizer.bos_token_id and not any(row[length:])
        assert tokenizer.decode(row[1:length]) == format_prompt(problem.question)


def test_a_prompt_of_max_tokens_fits_and_a_longer_one_is_a_user_error():
    problems = [Problem("abc", "", {})]
    width = len(format_prompt("abc"))
    assert encode_prompts(byte_tokenizer(), problems, [7], width).lengths.tolist() == [width]
    with pytest.raises(UserError, match=f"problem 7 .*'abc'.* has {width}. Raise rollout.max_prompt_tokens"):
        encode_prompts(byte_tokenizer(), problems, [7], width - 1)


# These make `>\n\n` one token, as in many vocabularies. Byte-level tokenizers write a newline as Ċ.
MERGES = ((">", "Ċ"), (">Ċ", "Ċ"))


def test_a_final_stop_id_is_left_out():
    tokenizer = byte_tokenizer()
    ids = encode_text(tokenizer, "<answer>5</answer>")
    stop = tokenizer.eos_token_id
    assert decode_completion(tokenizer, [*ids, stop], (stop,)) == "<answer>5</answer>"
    assert decode_completion(tokenizer, ids, (stop,)) == "<answer>5</answer>"  # truncated at max_tokens
    assert decode_completion(tokenizer, ids, (ids[-1], stop)) == "<answer>5</answer"  # any stop id, not only EOS
    assert decode_completion(tokenizer, [stop], (stop,)) == decode_completion(tokenizer, [], (stop,)) == ""


def test_special_tokens_inside_a_completion_are_kept():
    """The format reward must see them, because they make a completion malformed."""
    tokenizer = byte_tokenizer()
    ids = [tokenizer.bos_token_id, *encode_text(tokenizer, "ab"), tokenizer.eos_token_id]
    assert decode_completion(tokenizer, ids, (tokenizer.eos_token_id,)) == BOS + "ab"


@pytest.mark.parametrize("stopped", [True, False])
def test_characters_after_the_stop_string_in_the_last_token_are_left_out(stopped):
    tokenizer = byte_tokenizer(merges=MERGES)
    ids = encode_text(tokenizer, "<answer>5</answer>\n\n")
    assert tokenizer.decode(ids[-1:]) == ">\n\n"
    ids = [*ids, tokenizer.eos_token_id] if stopped else ids
    assert decode_completion(tokenizer, ids, (tokenizer.eos_token_id,)) == "<answer>5</answer>"


def test_tokens_after_the_answer_are_kept():
    tokenizer = byte_tokenizer(merges=MERGES)
    ids = encode_text(tokenizer, "<answer>5</answer>\n\nBye")
    assert decode_completion(tokenizer, [*ids, tokenizer.eos_token_id], (tokenizer.eos_token_id,)) == (
        "<answer>5</answer>\n\nBye"
    )


def test_characters_after_a_second_answer_are_kept():
    """Only the first `</answer>` could have ended the completion."""
    tokenizer = byte_tokenizer(merges=MERGES)
    text = "<answer>5</answer> <answer>6</answer>\n\n"
    assert decode_completion(tokenizer, encode_text(tokenizer, text), (tokenizer.eos_token_id,)) == text


def test_the_text_ends_with_the_stop_string_that_is_complete_first():
    tokenizer = byte_tokenizer(merges=MERGES)
    ids = encode_text(tokenizer, "<a>5</a>\n\n")
    stops = (tokenizer.eos_token_id,)
    assert decode_completion(tokenizer, ids, stops, ("</a>\n", "</a>")) == "<a>5</a>"
    assert decode_completion(tokenizer, ids, stops, ("</a>\n",)) == "<a>5</a>\n"
    assert decode_completion(tokenizer, ids, stops, ("<a>", "</a>")) == "<a>5</a>\n\n"  # `<a>` did not end it
    assert decode_completion(tokenizer, ids, stops, ()) == "<a>5</a>\n\n"


def test_completions_are_decoded_up_to_their_lengths():
    tokenizer = byte_tokenizer()
    row = encode_text(tokenizer, "abcd")
    texts = decode_completions(tokenizer, np.asarray([row, row]), np.asarray([2, 4]), (tokenizer.eos_token_id,), ())
    assert texts == ["ab", "abcd"]


def test_eos_ids_are_those_of_the_model_and_the_tokenizer():
    tokenizer = byte_tokenizer()
    assert completion_eos_ids(tokenizer, (3, 1)) == (1, 3, tokenizer.eos_token_id)
    assert completion_eos_ids(tokenizer, (tokenizer.eos_token_id,)) == (tokenizer.eos_token_id,)
    tokenizer.eos_token = None
    assert completion_eos_ids(tokenizer, (3,)) == (3,)


def test_the_tiny_tokenizer_round_trips_any_text():
    tokenizer = load_tokenizer(find_model("tiny"))
    for text in (
        "What is 347 + 589?",
        "  two  spaces ",
        "line\nline\r\n\ttab",
        "Größe, 数学, שלום, 🙂👩‍👩‍👧",
        "<think> x </think>",
        r"\frac{3}{4} $x^2$",
        "don 't , you .",
        "\x00\x1f\N{REPLACEMENT CHARACTER}",
    ):
        assert decode_completion(tokenizer, encode_text(tokenizer, text), (tokenizer.eos_token_id,)) == text


def test_a_folder_without_tokenizer_files_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_folder_with_a_malformed_tokenizer_is_a_user_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
