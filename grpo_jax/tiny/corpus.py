"""The synthetic corpus that the tiny base model is pretrained on, and its tokenizer.

The tiny base stands in for a language model that has read the web. In the words of R1-Zero's template, its corpus mixes
short guesses, most of them wrong, with worked solutions, most of them right; some of both are malformed. The base
therefore can solve an addition by writing it out but usually does not, and reinforcement learning has something to
discover. Pairs of the held-out split never occur.
"""

from collections.abc import Iterable

import numpy as np

from grpo_jax.tasks.addition import draw_pair
from grpo_jax.text.prompt import format_prompt

EOS_TOKEN = "<|endoftext|>"

WORKED_FRACTION = 0.28  # of all solutions; the others are guesses
CORRECT_GUESS_FRACTION = 0.05  # of the guesses
SLIP_FRACTION = 0.01  # of the worked solutions: one digit is wrong, and the error carries on
MALFORMED_FRACTION = 0.24  # of all solutions

GUESS_PHRASES = ("I know this one.", "Easy.", "It looks like it.", "I just guess.")


def worked_solution(a: int, b: int, rng: np.random.Generator) -> tuple[str, str]:
    """Returns the steps of an addition and its result, rarely with a slip."""
    width = max(len(str(a)), len(str(b)))
    return write_out_addition(a, b, int(rng.integers(width)) if rng.random() < SLIP_FRACTION else -1)


def write_out_addition(a: int, b: int, slip: int = -1) -> tuple[str, str]:
    """Adds two numbers digit by digit, from the last to the first, and returns the steps and the result.

    The sum of digit `slip`, counted from the last, comes out one too large.
    """
    width = max(len(str(a)), len(str(b)))
    carry, steps, digits = 0, [], ""
    for i in range(width):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = (x + y + carry + (1 if i == slip else 0)) % 20
        steps.append(f"{x}+{y}+{carry}={total}" + (f", carry {total // 10}." if i < width - 1 else "."))
        digits = str(total % 10) + digits
        carry = total // 10
    return " ".join(steps), (str(carry) if carry else "") + digits


def guessed_solution(a: int, b: int, rng: np.random.Generator) -> tuple[str, str]:
    """Returns a short phrase and a number close to the sum, rarely the sum itself."""
    total = a + b
    if rng.random() >= CORRECT_GUESS_FRACTION:
        offset = int(rng.integers(1, 10)) * 10 ** int(rng.integers(0, 3))
        total += offset if offset >= total or rng.random() < 0.5 else -offset
    return GUESS_PHRASES[rng.integers(len(GUESS_PHRASES))], str(total)


def format_solution(thought: str, answer: str, rng: np.random.Generator) -> str:
    """Puts thought and answer into the template's tags, sometimes malformed."""
    if rng.random() >= MALFORMED_FRACTION:
        return f" <think> {thought} </think> <answer> {answer} </answer>"
    return (
        f" {thought} <answer> {answer} </answer>",
        f" <think> {thought} <answer> {answer} </answer>",
        f" <think> {thought} </think> {answer}",
        f" <think> {thought} </think> <answer> {answer}",
        f" <answer> {answer} </answer> <think> {thought} </think>",
        f" {thought} {answer}",
    )[rng.integers(6)]


def corpus_text(seed: int, index: int, exercises: int, digits: int) -> str:
    """Returns text `index` of the corpus: a question with its solution, then `exercises` worked sums.

    The question stands in the prompt template. Each part ends with EOS.
    """
    rng = np.random.default_rng([seed, index, 7])
    a, b = draw_pair(rng, digits, held_out=False)
    solve = worked_solution if rng.random() < WORKED_FRACTION else guessed_solution
    text = format_prompt(f"What is {a} + {b}?") + format_solution(*solve(a, b, rng), rng) + EOS_TOKEN
    for _ in range(exercises):
        a, b = draw_pair(rng, digits, held_out=False)
        steps, total = write_out_addition(a, b)
        text += f" Exercise: {a} + {b}. {steps} Sum: {total}" + EOS_TOKEN
    return text


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Trains a byte-level BPE `tokenizers.Tokenizer` whose tokens are single digits and words of the corpus.

    Words of the corpus become one token each. Any other text can be encoded as well.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\d| ?[^\s\d]+|\s"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    options = dict(min_frequency=2, initial_alphabet=byte_level.alphabet(), show_progress=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOS_TOKEN], **options)
    tokenizer.train_from_iterator((text.replace(EOS_TOKEN, "\n") for text in texts), trainer)
    return tokenizer
