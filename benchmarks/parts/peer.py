"""Measures the work of the part `step` with plain `transformers` and torch on the same device, for comparison.

The model has the shape of Qwen2.5-1.5B and random weights. It samples completions with `generate`, computes their
log-probs without gradients, as a reference would, and takes one step of AdamW: the loss is -ratio * advantage, and the
gradient is clipped. Weights, gradients and moments are in bfloat16, which takes less memory and time than the float32
of grpo_jax. Attention is torch's own (sdpa), AdamW is fused, nothing is rematerialized, and a micro-batch holds as many
sequences as fit in memory, at most 8. There is no grading and no packing.

A whole step takes minutes, so parts of it are timed and extrapolated linearly:

generate_s   time to sample all completions, extrapolated from a few tokens after the prompt and a few tokens at the end
             of a completion, where the KV cache holds random values. The time per token grows linearly with the context
score_s      time to compute the log-probs of all completions, extrapolated from a few micro-batches
update_s     time of the update, extrapolated from a few micro-batches and one optimizer step each
step_s       the sum of these times; step_tok_s is completion tokens per second, gen_tok_s the same for generate_s
measured     what was timed
"""

import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from parts import NotHere
from parts.line import extrapolate

INSTALLED = importlib.util.find_spec("torch") is not None
if INSTALLED:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # otherwise, waiting threads keep cores busy that others need
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401  (imported here, because it takes seconds)
    from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config

LARGEST_MICRO_BATCH = 8  # sequences
MICRO_BATCHES = 1, 3  # how many are timed
FEW_TOKENS = 4, 12  # how many tokens `generate` is timed for
LEARNING_S = 5  # seconds that timing scoring and the update may take


class Shape(NamedTuple):
    """The size of the step and of the model."""

    sequences: int
    prompt_tokens: int
    new_tokens: int
    dtype: str
    model: dict[str, Any]  # arguments of Qwen2Config


# The same sizes as in `parts.shapes`, which cannot be imported without JAX.
QWEN_1_5B = Shape(
    sequences=512,
    prompt_tokens=128,
    new_tokens=1024,
    dtype="bfloat16",
    model=dict(
        vocab_size=151936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
    ),
)
SMALL = Shape(
    sequences=16,
    prompt_tokens=64,
    new_tokens=128,
    dtype="float32",
    model=dict(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
)


def device_name() -> str:
    """Returns the name of the device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def seconds_of(call: Callable, *arguments) -> float:
    """Returns the seconds until the device has finished a call."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    call(*arguments)
    wait()
    return time.perf_counter() - start


def make_model(shape: Shape):
    """Returns a model with random weights on the device."""
    config = Qwen2Config(
        **shape.model, max_position_embeddings=shape.prompt_tokens + shape.new_tokens, tie_word_embeddings=True
    )
    config.bos_token_id = config.eos_token_id = None  # so that no completion ends early
    config.pad_token_id = 0
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype), attn_implementation="sdpa")
    return model.eval()


def random_tokens(model, sequences: int, length: int):
    """Returns random token ids [sequences, length] on the model's device."""
    return torch.randint(model.config.vocab_size, (sequences, length), device=model.device)


def generate(model, prompts, new_tokens: int, cache=None) -> None:
    """Samples `new_tokens` tokens after each prompt. `cache` may hold the keys and values of all but its last token.

    Raises:
        RuntimeError: The completions have another length.
    """
    sequences = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        past_key_values=cache,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
    )
    if sequences.shape[1] != prompts.shape[1] + new_tokens:
        raise RuntimeError(f"generate must return {new_tokens} new tokens; found sequences {tuple(sequences.shape)}")


def random_cache(model, sequences: int, length: int):
    """Returns a KV cache of random values."""
    config, cache = model.config, DynamicCache(config=model.config)
    shape = sequences, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        keys, values = torch.randn((2, *shape), dtype=model.dtype, device=model.device)
        cache.update(keys, values, layer)
    return cache


def generation_s(new_tokens: int, first_s: Sequence[float], last_s: Sequence[float]) -> float:
    """Returns the seconds that `generate` takes for completions of `new_tokens` tokens.

    Args:
        new_tokens: Tokens of a completion.
        first_s: Seconds of `generate` for each of FEW_TOKENS, right after the prompt.
        last_s: Seconds of `generate` for each of FEW_TOKENS, when FEW_TOKENS[1] tokens of the completion are left.
    """
    few, more = FEW_TOKENS
    token_s = [(seconds[1] - seconds[0]) / (more - few) for seconds in (first_s, last_s)]
    # Mean indices, counted from 1, of the tokens whose mean time is token_s; first_s[0] covers the first few tokens.
    timed = (few + 1 + more) / 2, (new_tokens - more + few + 1 + new_tokens) / 2
    return first_s[0] + (new_tokens - few) * extrapolate(timed, token_s, (few + 1 + new_tokens) / 2)


def time_generation(model, shape: Shape) -> float:
    """Returns the seconds that the model takes to generate all completions."""
    prompts = random_tokens(model, shape.sequences, shape.prompt_tokens)
    generate(model, prompts, FEW_TOKENS[0])  # the first call is slower
    first_s = [seconds_of(generate, model, prompts, count) for count in FEW_TOKENS]
    cached = shape.prompt_tokens + shape.new_tokens - FEW_TOKENS[1] - 1
    sequences, last_s = random_tokens(model, shape.sequences, cached + 1), []
    for count in FEW_TOKENS:
        cache = random_cache(model, shape.sequences, cached)
        last_s.append(seconds_of(generate, model, sequences, count, cache))
        del cache
    return generation_s(shape.new_tokens, first_s, last_s)


def completion_logps(model, sequences, new_tokens: int):
    """Returns the log-probs of the last `new_tokens` tokens of each sequence, [sequences, new_tokens]."""
    logits = model(input_ids=sequences, logits_to_keep=new_tokens + 1, use_cache=False).logits[:, :-1].float()
    return logits.log_softmax(-1).gather(2, sequences[:, -new_tokens:, None])[..., 0]


def score(model, shape: Shape, batches: list) -> None:
    """Computes the log-probs of micro-batches, without gradients."""
    with torch.no_grad():
        for sequences in batches:
            completion_logps(model, sequences, shape.new_tokens)


def update(model, shape: Shape, batches: list, optimizer) -> None:
    """Accumulates the gradients of micro-batches and takes one optimizer step."""
    for sequences in batches:
        logps = completion_logps(model, sequences, shape.new_tokens)
        advantages = torch.randn(len(sequences), 1, device=model.device)
        loss = -(torch.exp(logps - logps.detach()) * advantages).mean()
        (loss * len(sequences) / shape.sequences).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def fit_micro_batch(model, shape: Shape, optimizer) -> list:
    """Returns MICRO_BATCHES[1] equal micro-batches of random tokens, as large as an update has the memory for."""
    size = LARGEST_MICRO_BATCH
    while True:
        batch = random_tokens(model, size, shape.prompt_tokens + shape.new_tokens)
        try:
            for _ in range(2):  # the second update has AdamW's moments in memory, its second micro-batch a gradient too
                update(model, shape, [batch] * 2, optimizer)
            return [batch] * MICRO_BATCHES[1]
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2
        optimizer.zero_grad()
        torch.cuda.empty_cache()


def measure(small: bool, seconds_left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yields the speed of generation, and then that of a whole step.

    Raises:
        NotHere: Torch is not installed, or finds no GPU and `small` is not set.
    """
    if not INSTALLED:
        raise NotHere("torch is not installed")
    if not small and not torch.cuda.is_available():
        raise NotHere("torch finds no GPU")
    shape = SMALL if small else QWEN_1_5B
    model, tokens = make_model(shape), shape.sequences * shape.new_tokens
    few = " and ".join(map(str, FEW_TOKENS))
    measured = [f"{few} of {shape.new_tokens} tokens of {shape.sequences} sequences, at the start and at the end"]
    times = {"generate_s": time_generation(model, shape)}
    yield {"gen_tok_s": tokens / times["generate_s"], **times, "measured": measured}
    if seconds_left() < LEARNING_S:
        yield {"left_out": "score_s and update_s", "reason": "no time"}
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    batches = fit_micro_batch(model, shape, optimizer)
    count, size = shape.sequences / len(batches[0]), len(batches[0])
    for name, call in (("score_s", score), ("update_s", partial(update, optimizer=optimizer))):
        call(model, shape, batches[:1])
        seconds = [seconds_of(call, model, shape, batches[:few]) for few in MICRO_BATCHES]
        times[name] = extrapolate(MICRO_BATCHES, seconds, count)
    few = " and ".join(map(str, MICRO_BATCHES))
    measured.append(f"{few} of {count:g} micro-batches of {size} sequences")
    step_s = sum(times.values())
    yield {"step_tok_s": tokens / step_s, "step_s": step_s, **times, "measured": measured}
