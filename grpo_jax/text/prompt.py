"""Prompt templates, and the encoding of prompts.

R1-Zero's template shapes only the format of a completion and says nothing about its content. A completion is the text
from the end of the prompt (`Assistant:`) to the stop.
"""

import math
import os
import re
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from grpo_jax.errors import UserError
from grpo_jax.text.problem import Message, Problem, Prompts, read_messages

# From DeepSeek-R1 (Nature, doi 10.1038/s41586-025-09422-z), Methods.
R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The User asks a question and the Assistant solves it. "
    "The Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
    "The reasoning process and answer are enclosed within <think>...</think> and <answer>...</answer> tags, "
    "respectively, that is, <think> reasoning process here </think> <answer> answer here </answer>. "
    "User: {question}. Assistant:"
)

# Separators of the turns of a conversation that continues the template's `User: {question}. Assistant:`.
BEFORE_TURN = {"user": " User: ", "assistant": ". Assistant: "}

CHAT_DATE = "26 Jul 2024"  # the default date of Llama's chat templates, fixed so that prompts do not change daily

HIDDEN = "c8d5a1c3f0b94c0e9c1f6d2b7e5a4938-"  # prefix of the placeholders of special tokens that a question spells out

CHUNK_PROMPTS = 1024  # prompts that are encoded at a time when lengths are measured
TOKENS_NEXT_TO_QUESTION = 16  # upper bound of the template's tokens that may depend on the question


def format_prompt(question: str, template: str = R1_ZERO_TEMPLATE) -> str:
    """Inserts a question into a template. Braces in the question are ordinary text."""
    return template.replace("{question}", question)


def completion_eos_ids(tokenizer: Any, model_eos: Sequence[int] = (), vocab_size: float = math.inf) -> tuple[int, ...]:
    """Returns every token id that ends a completion: those of the model's config, and the tokenizer's EOS.

    An id without a row in the embedding, which has `vocab_size` rows, can never be drawn and is left out.
    """
    tokenizer_eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(sorted(token for token in {*model_eos, *tokenizer_eos} if token < vocab_size))


def read_template(name: str, tokenizer: Any) -> str | None:
    """Returns the template that `prompt.template` names, as a text with `{question}`; None for the chat template.

    Raises:
        UserError: The tokenizer has no chat template, or the file cannot be read or has no `{question}`.
    """
    if name == "r1zero":
        return R1_ZERO_TEMPLATE
    if name == "chat":
        if not tokenizer.chat_template:
            raise UserError(
                "prompt.template=chat needs a tokenizer with a chat template; found none. Use another model."
            )
        return None
    try:
        text = Path(name).read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        expected = "prompt.template must be 'r1zero', 'chat' or a UTF-8 text file"
        raise UserError(f"{expected}; could not read {name!r}: {error}. Correct the path or the file.") from None
    if "{question}" not in text:
        raise UserError(f"{name} must contain {{question}}, which stands for the question; found none. Add it.")
    return text


def named_messages(problem: Problem, name: str) -> list[Message]:
    """Returns the question of a problem as messages. Error messages call the problem `name`.

    Raises:
        UserError: A message is malformed, the last one is not the user's, or a text cannot be encoded.
    """
    try:
        messages = read_messages(problem.question)
        "".join(message["content"] for message in messages).encode()
    except UnicodeEncodeError as error:
        surrogate = error.object[error.start]
        raise UserError(f"{name} must be valid Unicode; found the lone surrogate {surrogate!r}. Remove it.") from None
    except ValueError as error:
        raise UserError(f"{name}: {error}. Correct it.") from None
    return messages


class PromptFormat:
    """The tokenizer and the template of a run, which turn problems into prompts.

    A chat template receives the messages of a conversation. In any other template, the turns replace `{question}`, as
    in `What is 1 + 1?. Assistant: 2 User: What is 2 + 2?`, and system messages precede the template.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str = "r1zero",
        *,
        instruction: str = "",
        examples: Sequence[str] = (),
        vocab_size: float = math.inf,
    ):
        """Makes a format.

        Args:
            tokenizer: A `transformers` tokenizer.
            template: A value of `prompt.template` (see `read_template`).
            instruction: A text before the first question of a chat template, or before any other template.
            examples: Solved problems before each question: alternating questions and completions.
            vocab_size: The number of rows of the model's embedding. Tokens without a row may not occur in prompts.
        """
        self.tokenizer, self.template = tokenizer, read_template(template, tokenizer)
        self.instruction = instruction
        self.examples = [
            Message(role="assistant" if i % 2 else "user", content=text) for i, text in enumerate(examples)
        ]
        tokens = sorted(tokenizer.added_tokens_decoder.values(), key=lambda token: len(token.content), reverse=True)
        spaced = [(r"\s*" * token.lstrip, token.content, r"\s*" * token.rstrip) for token in tokens if token.special]
        patterns = [before + re.escape(content) + after for before, content, after in spaced]
        self.special = re.compile(f"({'|'.join(patterns) or '(?!)'})")  # the text of a special token
        self.backend = getattr(tokenizer, "backend_tokenizer", None)
        self.vocab_size = vocab_size
        rowless = [token.content for index, token in tokenizer.added_tokens_decoder.items() if index >= vocab_size]
        self.rowless = re.compile("|".join(map(re.escape, rowless))) if rowless else None  # tokens without a row

    def text(self, problem: Problem, name: str = "the problem") -> str:
        """Returns the prompt of a problem as a text. Error messages call the problem `name`."""
        return self.render(self.conversation(problem, name), name)

    def conversation(self, problem: Problem, name: str) -> list[Message]:
        """Returns the messages of a prompt: those of the problem, after the instruction and the solved examples."""
        messages = named_messages(problem, name)
        if not (self.instruction or self.examples):
            return messages
        system = [message for message in messages if message["role"] == "system"]
        turns = [*self.examples, *(message for message in messages if message["role"] != "system")]
        if self.instruction and self.template is None:
            turns[0] = Message(role=turns[0]["role"], content=f"{self.instruction}\n\n{turns[0]['content']}")
        elif self.instruction:
            system = [Message(role="system", content=self.instruction), *system]
        return [*system, *turns]

    def render(self, messages: list[Message], name: str) -> str:
        """Returns the prompt of a conversation as a text."""
        if self.template is not None:
            system = "".join(f"{message['content']}\n\n" for message in messages if message["role"] == "system")
            turns = [message for message in messages if message["role"] != "system"]
            text = "".join(BEFORE_TURN[turn["role"]] + turn["content"] for turn in turns)
            return system + format_prompt(text.removeprefix(BEFORE_TURN["user"]), self.template)
        options = dict(tokenize=False, add_generation_prompt=True, date_string=CHAT_DATE)
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # a template may raise anything
            found = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"The chat template must accept {name}; it raised {found}. Correct the messages.") from None

    def encode(self, problems: Sequence[Problem], names: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of each prompt.

        Special tokens that a question spells out are encoded as text. Those of the template are special tokens.

        Raises:
            UserError: A token has no row in the embedding; or see `named_messages` and `render`.
        """
        named = [(self.conversation(problem, name), name) for problem, name in zip(problems, names, strict=True)]
        texts = [self.render(messages, name) for messages, name in named]
        if not texts:
            return []
        adds_ends = self.template is not None  # a chat template includes BOS itself
        self.tokenizer("")  # resets the backend: no truncation, no padding, special tokens are recognized
        if self.backend:  # twice as fast as the call below
            batch = [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=adds_ends)]
        else:
            batch = self.tokenizer(texts, add_special_tokens=adds_ends, verbose=False)["input_ids"]
        if adds_ends:
            batch = [trim_ends(self.tokenizer, ids, text) for ids, text in zip(batch, texts, strict=True)]
        for row, (messages, name) in enumerate(named):
            if any(self.special.search(message["content"]) for message in messages):
                batch[row] = self.encode_spelled(messages, name)
            if self.rowless and (index := max(batch[row], default=0)) >= self.vocab_size:
                raise UserError(
                    f"Each token of a prompt must have a row in the model's embedding, which has {self.vocab_size} "
                    f"rows; found {self.tokenizer.convert_ids_to_tokens(index)!r:.80}, id {index}, in {name}. "
                    "Remove it from the prompt, or resize the embedding with `resize_token_embeddings` of transformers."
                )
        return batch

    def encode_spelled(self, messages: list[Message], name: str) -> list[int]:
        """Encodes a prompt whose question spells out special tokens, so that these remain text."""
        spelled: dict[str, str] = {}

        def hide(match: re.Match) -> str:
            name = f"{HIDDEN}{len(spelled)}."
            spelled[name] = match[0]
            return name

        hidden = [message | {"content": self.special.sub(hide, message["content"])} for message in messages]
        ids: list[int] = []
        for i, part in enumerate(
            self.special.split(self.render(hidden, name))
        ):  # parts with odd i are the template's special tokens
            part = re.sub(HIDDEN + r"\d+\.", lambda match: spelled.get(match[0], match[0]), part)
            adds_ends = i == 0 and self.template is not None
            options = dict(add_special_tokens=adds_ends, split_special_tokens=i % 2 == 0, verbose=False)
            piece = self.tokenizer(part, **options)["input_ids"]
            ids += trim_ends(self.tokenizer, piece) if adds_ends else piece
        return trim_ends(self.tokenizer, ids, self.tokenizer.eos_token or "")

    def lengths(
        self, problems: Sequence[Problem], names: Sequence[str], most: int | None = None
    ) -> Int[np.ndarray, " N"]:
        """Returns the number of tokens of each of N prompts, using all CPU cores.

        Args:
            problems: The problems.
            names: The name of each problem in error messages.
            most: If given, the length of a prompt may be 0 instead, if it cannot be longer than the longest prompt of
                at most this many tokens. Most prompts of a large file then need not be encoded.
        """
        bounds = [self.bound(self.text(*pair)) for pair in zip(problems, names, strict=True)]
        lengths, enough = np.zeros(len(problems), np.int32), 0.0
        before = os.environ.get("TOKENIZERS_PARALLELISM", "false")
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        order = sorted(range(len(problems)), key=bounds.__getitem__, reverse=True)
        # `disable=None`: only on a terminal
        options = dict(unit=" prompts", mininterval=2, delay=2, leave=False, disable=None)
        bar = tqdm(total=len(order), desc="Measuring prompts", **options)
        try:
            for start in range(0, len(order), CHUNK_PROMPTS):
                chunk = order[start : start + CHUNK_PROMPTS]
                if most is not None and bounds[chunk[0]] <= enough:
                    break
                lengths[chunk] = [
                    len(ids) for ids in self.encode([problems[i] for i in chunk], [names[i] for i in chunk])
                ]
                enough = max([enough, *(length for length in lengths[chunk] if most is not None and length <= most)])
                bar.update(len(chunk))
        finally:  # a process that is forked later must not wait for threads that do not exist in it
            os.environ["TOKENIZERS_PARALLELISM"] = before
            bar.close()
        return lengths

    def bound(self, text: str) -> float:
        """Returns an upper bound on the number of tokens of a prompt, given its text.

        It is infinite if the text may contain a token without a row in the embedding, so that the prompt is
        encoded, and refused if it does.
        """
        if self.rowless and self.rowless.search(text):
            return math.inf
        return max(len(form.encode()) for form in (text, unicodedata.normalize("NFC", text))) - self.spared

    @cached_property
    def spared(self) -> float:
        """By how much the tokens of any prompt are fewer than its bytes; minus infinity if no bound is known.

        A byte-level tokenizer makes at most one token of each byte. The template has the same tokens in every prompt,
        except for those next to the question.
        """
        forms = [repr(getattr(self.backend, part, "")) for part in ("normalizer", "pre_tokenizer")]
        if forms[0] not in ("None", "NFC()", "Sequence(normalizers=[])") or "ByteLevel(" not in forms[1]:
            return -math.inf
        if self.template is None:
            return 0
        bare = self.template.replace("{question}", "")
        return max(0, len(bare.encode()) - len(self.tokenizer(bare)["input_ids"]) - TOKENS_NEXT_TO_QUESTION)


def trim_ends(tokenizer: Any, ids: list[int], text: str = "") -> list[int]:
    """Returns the ids of a text with at most one BOS in front, and without an EOS that the text does not end with."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:  # the text itself starts with the BOS string
        ids = ids[1:]
    # Some tokenizers append EOS to every text. The model would take a prompt that ends with EOS as finished.
    if eos is not None and (ids[-2:] == [eos, eos] or (ids[-1:] == [eos] and not text.endswith(tokenizer.eos_token))):
        ids = ids[:-1]
    return ids


def encode_prompts(
    prompt_format: PromptFormat, problems: Sequence[Problem], ids: Sequence[int], max_tokens: int
) -> Prompts:
    """Encodes problems as prompts, padded on the right to `max_tokens`.

    Args:
        prompt_format: The tokenizer and the template.
        problems: The B problems.
        ids: Index of each problem in its task.
        max_tokens: Width T of the result.

    Returns:
        The prompts: int32 tokens [B, T], with their lengths [B] and ids [B].

    Raises:
        UserError: A prompt is longer than `max_tokens`, or a question cannot be encoded. Prompts are never truncated.
    """
    tokens = np.zeros((len(problems), max_tokens), np.int32)
    names = [problem.id or f"problem {index}" for problem, index in zip(problems, ids, strict=True)]
    encoded = prompt_format.encode(problems, names)
    for row, name, prompt in zip(tokens, names, encoded, strict=True):
        if len(prompt) > max_tokens:
            limit = f"rollout.max_prompt_tokens={max_tokens}"
            raise UserError(f"A prompt may have at most {limit} tokens; {name} has {len(prompt)}. Raise the limit.")
        row[: len(prompt)] = prompt
    lengths = np.asarray([len(prompt) for prompt in encoded], np.int32)
    return Prompts(tokens=tokens, lengths=lengths, ids=np.asarray(ids, np.int32))
