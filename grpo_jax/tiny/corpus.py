"""The synthetic web text that the tiny base model is pretrained on, and its tokenizer.

The base plays the part of a language model that has read the web: its text holds short guesses that are mostly wrong
and worked solutions that are mostly right, well-formed and malformed, in the words of R1-Zero's template. So the base
can solve an addition by writing it out, and usually does not bother: what reinforcement then has to discover.
Pairs of the held-out split never occur.
"""

import numpy as np

from grpo_jax.tasks.addition import is_held_out
from grpo_jax.text.prompt import format_prompt

EOS_TOKEN = "<|endoftext|>"

# How an answer of the corpus comes about, and how it is dressed. A worked solution has one step a digit.
WORKED_FRACTION = 0.28  # of the answers; the others are guesses
CORRECT_GUESS_FRACTION = 0.05  # of the guesses
SLIP_FRACTION = 0.01  # of the worked solutions: one wrong digit, carried along
MALFORMED_FRACTION = 0.24

GUESS_PHRASES = ("I know this one.", "Easy.", "It looks like it.", "I just guess.")


def worked_solution(a: int, b: int, draw: np.random.Generator) -> tuple[str, str]:
    """An addition written out, now and then with a slip, and the result it arrives at."""
    width = max(len(str(a)), len(str(b)))
    return write_out_addition(a, b, int(draw.integers(width)) if draw.random() < SLIP_FRACTION else -1)


def write_out_addition(a: int, b: int, slip: int = -1) -> tuple[str, str]:
    """An addition from the last digit to the first, one too many at the place `slip`, and the result."""
    width = max(len(str(a)), len(str(b)))
    carry, steps, digits = 0, [], ""
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = (x + y + carry + (1 if place == slip else 0)) % 20
        steps.append(f"{x}+{y}+{carry}={total}" + (f", carry {total // 10}." if place < width - 1 else "."))
        digits = str(total % 10) + digits
        carry = total // 10
    return " ".join(steps), (str(carry) if carry else "") + digits


def guessed_solution(a: int, b: int, draw: np.random.Generator) -> tuple[str, str]:
    """A few words and a number that is near the sum and seldom the sum."""
    total = a + b
    if draw.random() >= CORRECT_GUESS_FRACTION:
        off = int(draw.integers(1, 10)) * 10 ** int(draw.integers(0, 3))
        total += off if off >= total or draw.random() < 0.5 else -off
    return GUESS_PHRASES[draw.integers(len(GUESS_PHRASES))], str(total)


def format_solution(thought: str, answer: str, draw: np.random.Generator) -> str:
    """Thought and answer in the template's tags, or in one of the ways in which people get them wrong."""
    if draw.random() >= MALFORMED_FRACTION:
        return f" <think> {thought} </think> <answer> {answer} </answer>"
    return (
        f" {thought} <answer> {answer} </answer>",
        f" <think> {thought} <answer> {answer} </answer>",
        f" <think> {thought} </think> {answer}",
        f" <think> {thought} </think> <answer> {answer}",
        f" <answer> {answer} </answer> <think> {thought} </think>",
        f" {thought} {answer}",
    )[draw.integers(6)]


def draw_training_pair(draw: np.random.Generator, digits: int) -> tuple[int, int]:
    """Two numbers whose sum is not held out."""
    while True:
        a, b = (int(x) for x in draw.integers(10 ** (digits - 1), 10**digits, size=2))
        if not is_held_out(a, b):
            return a, b


def corpus_text(seed: int, index: int, exercises: int, digits: int) -> str:
    """Text i of the corpus: a conversation in the template's words, then a few exercises, each closed by EOS."""
    draw = np.random.default_rng([seed, index, 7])
    a, b = draw_training_pair(draw, digits)
    solve = worked_solution if draw.random() < WORKED_FRACTION else guessed_solution
    text = format_prompt(f"What is {a} + {b}?") + format_solution(*solve(a, b, draw), draw) + EOS_TOKEN
    for _ in range(exercises):
        a, b = draw_training_pair(draw, digits)
        steps, total = write_out_addition(a, b)
        text += f" Exercise: {a} + {b}. {steps} Sum: {total}" + EOS_TOKEN
    return text


def train_tokenizer(texts, vocab_size: int):
    """A byte-level BPE over words and single digits: any text can be encoded, words of the corpus are one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?[^\s\d]+|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = (text.replace(EOS_TOKEN, "\n") for text in texts)
    tokenizer.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[EOS_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer
