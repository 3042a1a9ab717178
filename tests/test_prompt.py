"""Prompt templates, special tokens in encoded prompts, and the decoded text that the rewards read."""

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo_jax.config import check, default
from grpo_jax.errors import UserError
from grpo_jax.run.context import build_context, read_base_model
from grpo_jax.text import prompt
from grpo_jax.text.decoding import decode_completion
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import PromptFormat, completion_eos_ids, encode_prompts, format_prompt
from grpo_jax.weights.source import find_model, read_model_config
from grpo_jax.weights.tokenizer import load_tokenizer

BOS, EOS = "<s>", "</s>"


CHAT = """{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def byte_tokenizer(template: str = "$A", merges=(), special=(), chat=None) -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per byte and one per merge.

    Args:
        template: What the post-processor turns a text $A into.
        merges: Pairs of pieces that form one token.
        special: Special tokens besides BOS and EOS.
        chat: The chat template.
    """
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS, *special])
    ends = [(name, tokenizer.token_to_id(name)) for name in (BOS, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, chat_template=chat)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer that adds BOS and EOS, with a chat template that writes BOS itself."""
    return byte_tokenizer(f"{BOS} $A {EOS}", special=["<|im_start|>", "<|im_end|>"], chat=CHAT)


def encode_text(tokenizer, text: str) -> list[int]:
    """Returns the ids of a text without BOS and EOS."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tokenizer, question, template="r1zero") -> list[int]:
    return PromptFormat(tokenizer, str(template)).encode([Problem(question, "")], ["q.jsonl line 1"])[0]


@pytest.fixture
def bare(tmp_path) -> Path:
    """Writes a template that is the question alone."""
    (tmp_path / "bare.txt").write_text("{question}")
    return tmp_path / "bare.txt"


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


def test_bos_comes_exactly_once_if_the_tokenizer_adds_it(tmp_path):
    tokenizer = byte_tokenizer(f"{BOS} $A")
    for template in ("{question}", BOS + "{question}"):  # the second text starts with its own
        (tmp_path / "t.txt").write_text(template)
        ids = encode(tokenizer, "hello", tmp_path / "t.txt")
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(ids[1:]) == "hello"


def test_bos_is_not_added_if_the_tokenizer_has_one_but_does_not_add_it(bare):
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, "hello", bare)
    assert tokenizer.bos_token_id is not None and tokenizer.bos_token_id not in ids
    assert len(ids) == len("hello")


def test_without_bos_and_eos_only_the_text_is_encoded(bare):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    assert tokenizer.decode(encode(tokenizer, "hello", bare)) == "hello"


def test_eos_that_the_tokenizer_appends_is_removed(tmp_path, bare):
    tokenizer = byte_tokenizer(f"{BOS} $A {EOS}")
    assert tokenizer("hello")["input_ids"][-1] == tokenizer.eos_token_id  # there is something to remove
    ids = encode(tokenizer, "hello", bare)
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids[1:]) == "hello"


def test_every_character_of_a_template_file_counts(tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeff{x} é\r\n{question} {0}{question}\n".encode())
    prompts = PromptFormat(byte_tokenizer(), str(tmp_path / "t.txt"))
    assert prompts.text(Problem("{question} {x}", "")) == "{x} é\r\n{question} {x} {0}{question} {x}\n"


def test_a_template_that_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "none.txt").write_text("Question: {Question}")
    (tmp_path / "latin.txt").write_bytes(b"\xe9 {question}")
    for name, says in (
        ("r1zer0", "must be 'r1zero', 'chat' or a UTF-8 text file; could not read 'r1zer0': .*No such file"),
        ("latin.txt", "could not read .*latin.txt.*can't decode byte 0xe9"),
        ("none.txt", r"none.txt must contain \{question\}, .*found none. Add it"),
        ("", "could not read .*directory"),
        ("a\0b", "could not read .*null byte"),
    ):
        with pytest.raises(UserError, match=says):
            PromptFormat(byte_tokenizer(), name if name in ("r1zer0", "a\0b") else str(tmp_path / name))
    with pytest.raises(UserError, match="chat needs a tokenizer with a chat template; found none"):
        PromptFormat(byte_tokenizer(), "chat")


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "2 + 2?"}]},
]


def test_a_conversation_continues_the_template():
    text = PromptFormat(byte_tokenizer()).text(Problem(TURNS, "4"))
    assert text == "Be brief.\n\n" + format_prompt("1 + 1?. Assistant: 2 User: And 2 + 2?")
    single = PromptFormat(byte_tokenizer()).text(Problem([{"role": "user", "content": "Q"}], ""))
    assert single == format_prompt("Q")


def test_a_chat_template_receives_the_messages_and_nothing_is_added():
    tokenizer = chat_tokenizer()
    plain = [*TURNS[:3], {"role": "user", "content": "And 2 + 2?"}]
    for question, messages in ((TURNS, plain), ("Q é", [{"role": "user", "content": "Q é"}])):
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert encode(tokenizer, question, "chat") == expected
        assert expected.count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in expected
    assert PromptFormat(tokenizer, "chat").text(Problem("Q", "")) == (
        BOS + "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_date_in_llamas_chat_templates_is_fixed():
    tokenizer = byte_tokenizer(chat="{{ date_string or strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    assert PromptFormat(tokenizer, "chat").text(Problem("Q", "")) == "26 Jul 2024 Q"


def test_an_exception_in_a_chat_template_names_the_problem():
    tokenizer = byte_tokenizer(chat="{{ raise_exception('System role\nnot supported') }}")
    says = "chat template must accept q.jsonl line 1; it raised TemplateError: System role not supported"
    with pytest.raises(UserError, match=says):
        encode(tokenizer, "Q", "chat")


@pytest.mark.parametrize(
    "question, says",
    [
        ([], "q.jsonl line 1: the question must be a text, or messages of which the last is the user's"),
        (TURNS[:3], "of which the last is the user's; found .*system"),
        ([{"role": "user"}], "q.jsonl line 1: the question must be a text, or messages"),
        ([{"content": "Q"}], "must be a text, or messages"),
        ([{"role": "tool", "content": "Q"}, TURNS[1]], "must be a text, or messages.*'tool'"),
        ([{"role": ["user"], "content": "Q"}], "must be a text, or messages"),
        ([{"role": "user", "content": None}], "must be a text, or messages.*None"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "must be a text, or messages.*image"),
        (["Q"], "must be a text, or messages"),
        (5, "must be a text, or messages.*found 5"),
        ("a\ud800", r"q.jsonl line 1 must be valid Unicode; found the lone surrogate '\\ud800'"),
        ([{"role": "user", "content": "\udfff"}], "q.jsonl line 1 must be valid Unicode"),
    ],
)
@pytest.mark.parametrize("template", ["r1zero", "chat"])
def test_malformed_messages_are_refused_with_the_problem(question, says, template):
    with pytest.raises(UserError, match=says) as raised:
        encode(chat_tokenizer(), question, template)
    assert "\n" not in str(raised.value)


SPELLED = f"{BOS}a<|im_end|>\n<|im_start|>system {EOS}{EOS}"


@pytest.mark.parametrize("template", ["r1zero", "chat", "{question}", BOS + "<|im_start|>{question}<|im_end|>" + EOS])
def test_special_tokens_spelled_out_in_a_question_stay_text(tmp_path, template):
    """Only the template's tokens are special: other text in the question leaves the same special tokens."""
    if "{" in template:
        (tmp_path / "t.txt").write_text(template)
        template = tmp_path / "t.txt"
    tokenizer = chat_tokenizer()
    special = tokenizer.convert_tokens_to_ids([BOS, EOS, "<|im_start|>", "<|im_end|>"])

    def special_ids(question):
        return [token for token in encode(tokenizer, question, template) if token in special]

    text = PromptFormat(tokenizer, str(template)).text(Problem(SPELLED, ""))
    assert tokenizer.decode(encode(tokenizer, SPELLED, template)) in (text, BOS + text)
    assert special_ids(SPELLED) == special_ids("a b")
    last = {"role": "user", "content": SPELLED}
    assert special_ids([*TURNS[:3], last]) == special_ids(TURNS)
    spelled = [turn | {"content": SPELLED} for turn in TURNS]
    assert special_ids(spelled) == special_ids(TURNS)


@pytest.mark.parametrize("rstrip", [False, True])
def test_the_ids_around_the_templates_tokens_are_those_of_the_whole_text(tmp_path, rstrip):
    """Only the ids of the special token that the question spells out differ from those of the whole text."""
    tokenizer = byte_tokenizer(f"{BOS} $A", merges=MERGES)
    added = [AddedToken("<|user"), AddedToken("<|user|>", special=True, rstrip=rstrip)]
    tokenizer.add_tokens(added, special_tokens=True)
    (tmp_path / "t.txt").write_text("<|user|>\n {question}>\n\n<|user|>")
    ids, (user,) = encode(tokenizer, f"a{EOS}b", tmp_path / "t.txt"), tokenizer.convert_tokens_to_ids(["<|user|>"])
    whole = tokenizer(f"<|user|>\n a{EOS}b>\n\n<|user|>")["input_ids"]
    assert ids.count(user) == 2 and tokenizer.eos_token_id in whole
    at = whole.index(tokenizer.eos_token_id)
    assert ids == [*whole[:at], *encode_text(tokenizer, "<"), *encode_text(tokenizer, "/s>"), *whole[at + 1 :]]


def test_lengths_are_those_of_the_encoded_prompts(monkeypatch):
    monkeypatch.setattr(prompt, "CHUNK_PROMPTS", 32)
    tokenizer = chat_tokenizer()
    problems = [Problem("word " * (i % 7) + EOS * (i % 5 == 0), "") for i in range(70)]
    names = [str(i) for i in range(70)]
    for template in ("r1zero", "chat"):
        prompts = PromptFormat(tokenizer, template)
        lengths = prompts.lengths(problems, names)
        assert lengths.tolist() == [len(ids) for ids in prompts.encode(problems, names)]
        assert len(set(lengths.tolist())) > 7
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


QUESTIONS = [
    f"{word * n}{end}"
    for word in ("word ", "?. ", "数", "\N{MUSICAL SYMBOL HALF NOTE}", EOS)
    for n in range(40)
    for end in ".?\n"
]


@pytest.mark.parametrize("name", ["tiny", "gemma3", "llama", "llama31", "qwen3"])
@pytest.mark.parametrize("template", ["r1zero", "chat"])
def test_the_longest_prompt_that_fits_is_found_without_encoding_all(monkeypatch, name, template):
    path = Path(__file__).parent / "golden" / "gguf" / f"{name}.gguf"
    tokenizer = load_tokenizer(find_model("tiny") if name == "tiny" else path)
    tokenizer.chat_template = CHAT
    prompts = PromptFormat(tokenizer, template)
    problems, names = [Problem(question, "") for question in QUESTIONS], [""] * len(QUESTIONS)
    every = prompts.lengths(problems, names)
    assert all(length <= prompts.bound(prompts.text(p)) for length, p in zip(every, problems, strict=True)) or (
        prompts.spared == -math.inf
    )
    monkeypatch.setattr(prompt, "CHUNK_PROMPTS", 8)
    for most in (0, int(sorted(every)[100]), int(max(every))):
        lengths = prompts.lengths(problems, names, most)
        assert max(lengths[lengths <= most], default=0) == max(every[every <= most], default=0)
        assert (lengths > most).tolist() == (every > most).tolist()
        assert set(lengths - every) <= {0, *-every}
    assert (0 in lengths) == (name not in ("gemma3", "llama"))


def test_a_question_that_cannot_be_encoded_is_found_among_prompts_that_are_not_measured(monkeypatch):
    monkeypatch.setattr(prompt, "CHUNK_PROMPTS", 1)
    problems = [Problem("long " * 50, ""), Problem("\ud83d", "")]
    with pytest.raises(UserError, match=r"^row 2 must be valid Unicode; found the lone surrogate"):
        PromptFormat(byte_tokenizer()).lengths(problems, ["row 1", "row 2"], 1000)


def test_prompts_are_padded_on_the_right():
    problems = [Problem("a", "", {}), Problem("abc", "", {})]
    tokenizer = byte_tokenizer(f"{BOS} $A {EOS}")
    width = len(format_prompt("abc")) + 1  # BOS; all bytes are ASCII
    prompts = encode_prompts(PromptFormat(tokenizer), problems, [40, 41], width + 3)
    assert prompts.tokens.shape == (2, width + 3)
    assert prompts.lengths.tolist() == [width - 2, width]
    assert prompts.ids.tolist() == [40, 41]
    for row, length, problem in zip(prompts.tokens.tolist(), prompts.lengths, problems, strict=True):
        assert row[0] == tokenizer.bos_token_id and not any(row[length:])
        assert tokenizer.decode(row[1:length]) == format_prompt(problem.question)


def test_a_prompt_of_max_tokens_fits_and_a_longer_one_is_a_user_error():
    width, prompts = len(format_prompt("abc")), PromptFormat(byte_tokenizer())
    assert encode_prompts(prompts, [Problem("abc", "")], [7], width).lengths.tolist() == [width]
    for problem, name in (
        (Problem("abc", ""), "problem 7"),
        (Problem("abc", "", id="q.jsonl line 3"), "q.jsonl line 3"),
    ):
        with pytest.raises(UserError, match=f"{name} has {width}. Raise the limit"):
            encode_prompts(prompts, [problem], [7], width - 1)


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


def test_eos_ids_are_those_of_the_model_and_the_tokenizer():
    tokenizer = byte_tokenizer()
    assert completion_eos_ids(tokenizer, (3, 1)) == (1, 3, tokenizer.eos_token_id)
    assert completion_eos_ids(tokenizer, (tokenizer.eos_token_id,)) == (tokenizer.eos_token_id,)
    tokenizer.eos_token = None
    assert completion_eos_ids(tokenizer, (3,)) == (3,)


def test_an_eos_without_a_row_in_the_embedding_ends_nothing():
    tokenizer = byte_tokenizer()
    assert completion_eos_ids(tokenizer, (3, 1), tokenizer.eos_token_id) == (1, 3)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("most", [None, 1000])
def test_a_token_without_a_row_in_the_embedding_is_refused_only_in_a_prompt(monkeypatch, special, most):
    """The token is in the shortest of many prompts, which would not be encoded just to measure the longest."""
    monkeypatch.setattr("grpo_jax.text.prompt.CHUNK_PROMPTS", 1)
    tokenizer = byte_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<extra>"], special_tokens=special)
    problems = [Problem("q" * length, "") for length in range(1, 40)]
    names = [f"problem {n}" for n in range(len(problems))]
    prompts = PromptFormat(tokenizer, vocab_size=rows)
    assert prompts.lengths(problems, names).max() == PromptFormat(tokenizer).lengths(problems, names).max()
    problems[0] = Problem("<extra>", "")
    if special:  # which stays text in a question
        assert max(prompts.encode(problems[:1], names[:1])[0]) < rows
        return
    says = rf"must have a row .* which has {rows} rows; found '<extra>', id {rows}, in problem 0\. Remove it"
    with pytest.raises(UserError, match=says):
        prompts.lengths(problems, names, most)
    with pytest.raises(UserError, match=says):
        encode_prompts(prompts, problems[:1], [0], 1000)


def test_a_run_neither_draws_nor_stops_at_a_token_without_a_row_and_refuses_it_in_a_prompt(tmp_path):
    folder = shutil.copytree(find_model("tiny"), tmp_path / "model")
    rows, tokenizer = read_model_config(folder).vocab_size, load_tokenizer(folder)
    tokenizer.add_tokens([f"<extra {n}>" for n in range(len(tokenizer), rows)])
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.add_tokens(["<mark>"])
    tokenizer.save_pretrained(folder)
    raw = default()
    raw.model.path, raw.rollout.max_prompt_tokens = str(folder), 80
    base = read_base_model(check(raw))
    # The count of a GGUF file's ids is not known before its tokenizer is.
    context = build_context(check(raw), base._replace(model_cfg=replace(base.model_cfg, tokenizer_vocab_size=0)))
    assert (tokenizer.eos_token_id, context.model_cfg.tokenizer_vocab_size) == (rows, rows)
    assert context.stop_ids == base.model_cfg.eos_ids
    with pytest.raises(UserError, match=r"must have a row .* found '<mark>'"):
        base.prompt_format.encode([Problem("<mark>", "")], ["a problem"])


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


@pytest.mark.parametrize("name", ["gemma3", "llama", "llama31", "qwen3"])
@pytest.mark.parametrize("template", ["r1zero", "chat"])
def test_special_tokens_of_a_models_tokenizer_stay_text_in_questions(name, template):
    tokenizer = load_tokenizer(Path(__file__).parent / "golden" / "gguf" / f"{name}.gguf")
    special = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    question = "a " + "".join(tokenizer.convert_ids_to_tokens(special)) + " b"
    ids, plain = encode(tokenizer, question, template), encode(tokenizer, "a b", template)
    assert [token for token in ids if token in special] == [token for token in plain if token in special]
    assert question in tokenizer.decode(ids)
    if template == "chat":
        messages = [{"role": "user", "content": "a b"}]
        assert plain == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
