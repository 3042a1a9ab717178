"""The template, BOS and EOS at a prompt's ends, and the text that the rewards read."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo_jax.errors import UserError
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import (
    completion_eos_ids,
    decode_completion,
    decode_completions,
    encode_prompts,
    encode_text,
    format_prompt,
)
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tokenizer import load_tokenizer

BOS, EOS = "<s>", "</s>"


def byte_tokenizer(template: str = "$A", merges=()) -> PreTrainedTokenizerFast:
    """One token a byte, and one for each merge.

    Args:
      template: what the post-processor makes of a text $A.
    """
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    ends = [(name, tokenizer.token_to_id(name)) for name in (BOS, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def tiny():
    return load_tokenizer(find_model("tiny"))


def test_template_is_that_of_r1_zero():
    assert format_prompt("What is 347 + 589?") == (
        "A conversation between User and Assistant. The User asks a question and the Assistant solves it. "
        "The Assistant first thinks about the reasoning process in the mind and then provides the User with the "
        "answer. The reasoning process and answer are enclosed within <think>...</think> and <answer>...</answer> "
        "tags, respectively, that is, <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: What is 347 + 589?. Assistant:"
    )


@pytest.mark.parametrize("question", ["{}", "{0}", "{question}", r"\frac{3}{4}", "{{x}}", "}{", "%s %d", "\\1"])
def test_braces_in_a_question_are_text(question):
    assert format_prompt(question) == format_prompt("Q").replace("User: Q.", f"User: {question}.")


def test_bos_stands_in_front_exactly_once_where_the_tokenizer_puts_it():
    tokenizer = byte_tokenizer(f"{BOS} $A")
    for text in ("hello", BOS + "hello"):  # a text may bring its own
        ids = encode_text(tokenizer, text)
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids[1:]) == "hello"


def test_bos_is_not_added_for_a_tokenizer_that_has_one_and_does_not_put_it():
    tokenizer = byte_tokenizer()
    ids = encode_text(tokenizer, "hello")
    assert tokenizer.bos_token_id is not None and tokenizer.bos_token_id not in ids
    assert len(ids) == len("hello")


def test_tokenizer_without_bos_and_eos_encodes_the_text_alone():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    assert tokenizer.decode(encode_text(tokenizer, "hello")) == "hello"


def test_eos_that_the_tokenizer_closes_a_text_with_is_dropped():
    tokenizer = byte_tokenizer(f"{BOS} $A {EOS}")
    assert tokenizer("hello")["input_ids"][-1] == tokenizer.eos_token_id  # so there is something to drop
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
    for row, length, problem in zip(prompts.tokens.tolist(), prompts.lengths, problems):
        assert row[0] == tokenizer.bos_token_id and not any(row[length:])
        assert tokenizer.decode(row[1:length]) == format_prompt(problem.question)


def test_prompt_as_long_as_allowed_fits_and_one_token_more_is_a_user_error():
    problems = [Problem("abc", "", {})]
    width = len(format_prompt("abc"))
    assert encode_prompts(byte_tokenizer(), problems, [7], width).lengths.tolist() == [width]
    with pytest.raises(UserError, match=f"problem 7 .*'abc'.* has {width}. Raise rollout.max_prompt_tokens"):
        encode_prompts(byte_tokenizer(), problems, [7], width - 1)


# `>\n\n` as one token, as in many vocabularies: Ċ is how byte-level tokenizers write a newline.
MERGES = ((">", "Ċ"), (">Ċ", "Ċ"))


def test_stopping_id_is_left_out():
    tokenizer = byte_tokenizer()
    ids = encode_text(tokenizer, "<answer>5</answer>")
    stop = tokenizer.eos_token_id
    assert decode_completion(tokenizer, [*ids, stop], (stop,)) == "<answer>5</answer>"
    assert decode_completion(tokenizer, ids, (stop,)) == "<answer>5</answer>"  # cut at max_tokens
    assert decode_completion(tokenizer, [stop], (stop,)) == decode_completion(tokenizer, [], (stop,)) == ""


def test_stopping_id_is_left_out_whichever_it_is():
    tokenizer = byte_tokenizer()
    ids = encode_text(tokenizer, "12")
    assert decode_completion(tokenizer, ids, (ids[-1], tokenizer.eos_token_id)) == "1"


def test_special_tokens_inside_a_completion_are_kept():
    """The format reward has to see them: they stand outside the tags or spoil what is inside."""
    tokenizer = byte_tokenizer()
    ids = [tokenizer.bos_token_id, *encode_text(tokenizer, "ab"), tokenizer.eos_token_id]
    assert decode_completion(tokenizer, ids, (tokenizer.eos_token_id,)) == BOS + "ab"


@pytest.mark.parametrize("stopped", [True, False])
def test_bytes_that_come_with_the_token_that_completes_the_answer_are_left_out(stopped):
    tokenizer = byte_tokenizer(merges=MERGES)
    ids = encode_text(tokenizer, "<answer>5</answer>\n\n")
    assert tokenizer.decode(ids[-1:]) == ">\n\n"
    ids = [*ids, tokenizer.eos_token_id] if stopped else ids
    assert decode_completion(tokenizer, ids, (tokenizer.eos_token_id,)) == "<answer>5</answer>"


def test_text_that_the_model_goes_on_with_after_the_answer_is_kept():
    tokenizer = byte_tokenizer(merges=MERGES)
    ids = encode_text(tokenizer, "<answer>5</answer>\n\nBye")
    assert decode_completion(tokenizer, [*ids, tokenizer.eos_token_id], (tokenizer.eos_token_id,)) == (
        "<answer>5</answer>\n\nBye"
    )


def test_bytes_after_a_second_answer_are_kept():
    """Only the first `</answer>` could have been the stop."""
    tokenizer = byte_tokenizer(merges=MERGES)
    text = "<answer>5</answer> <answer>6</answer>\n\n"
    assert decode_completion(tokenizer, encode_text(tokenizer, text), (tokenizer.eos_token_id,)) == text


def test_the_cut_is_at_the_stop_string_that_is_complete_first():
    tokenizer = byte_tokenizer(merges=MERGES)
    ids = encode_text(tokenizer, "<a>5</a>\n\n")
    stops = (tokenizer.eos_token_id,)
    assert decode_completion(tokenizer, ids, stops, ("</a>\n", "</a>")) == "<a>5</a>"
    assert decode_completion(tokenizer, ids, stops, ("</a>\n",)) == "<a>5</a>\n"
    assert decode_completion(tokenizer, ids, stops, ("<a>", "</a>")) == "<a>5</a>\n\n"  # the first was no stop
    assert decode_completion(tokenizer, ids, stops, ()) == "<a>5</a>\n\n"


def test_rows_are_read_up_to_their_lengths():
    import numpy as np

    tokenizer = byte_tokenizer()
    row = encode_text(tokenizer, "abcd")
    texts = decode_completions(tokenizer, np.asarray([row, row]), np.asarray([2, 4]), (tokenizer.eos_token_id,))
    assert texts == ["ab", "abcd"]


def test_every_end_of_the_model_and_of_the_tokenizer_stops():
    tokenizer = byte_tokenizer()
    assert completion_eos_ids(tokenizer, (3, 1)) == (1, 3, tokenizer.eos_token_id)
    assert completion_eos_ids(tokenizer, (tokenizer.eos_token_id,)) == (tokenizer.eos_token_id,)
    tokenizer.eos_token = None
    assert completion_eos_ids(tokenizer, (3,)) == (3,)


@pytest.mark.parametrize(
    "text",
    [
        "What is 347 + 589?",
        "  two  spaces ",
        "line\nline\r\n\ttab",
        "Größe, 数学, שלום, 🙂👩‍👩‍👧",
        "<think> x </think>",
        r"\frac{3}{4} $x^2$",
        "don 't , you .",
        "\x00\x1f\N{REPLACEMENT CHARACTER}",
    ],
)
def test_packaged_tokenizer_gives_any_text_back(text):
    tokenizer = tiny()
    assert decode_completion(tokenizer, encode_text(tokenizer, text), (tokenizer.eos_token_id,)) == text


def test_folder_without_a_tokenizer_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"expected a tokenizer .*copy the tokenizer files"):
        load_tokenizer(tmp_path)


def test_folder_with_a_broken_tokenizer_is_a_user_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="expected a tokenizer"):
        load_tokenizer(tmp_path)
