"""How fast a rollout is, and how close its decode steps come to what the machine allows. Prints one JSON line.

What is timed is all that training does for its completions: a copy of the weights for decoding, prefill, decoding. No
token stops a sequence, so each has the length that it is told to have; prompts are random tokens. Every time is a
median of --repeats rounds after one that compiles.

generate_s, gen_tok_s  seconds of a whole rollout, and its completion tokens a second
compile_s              what the first rollout took longer; little where JAX_COMPILATION_CACHE_DIR holds the programs
decode_ms              of one decode step: the rollout's time less that of the same rollout with one token a sequence
                       (the copy, prefill and a first step), divided by the number of steps that it has more
decode_steps           steps of the whole rollout: a token is one, and a slot draws sequences one after another
rows                   sequences of a step: the slots, or all sequences
matmul_ms              a step's matrix products alone, on the same weights; matmul_gflop_s is their rate, square_gflop_s
                       that of one large product
bytes_ms               reading a step's weights and cached keys and values at read_gb_s, the rate of a plain sum
limit_ms               the larger of the two: no step made of these products is faster
limit_fraction         limit_ms / decode_ms: 1 is perfect, the rest is attention, norms, drawing and overhead.
                       A rollout of milliseconds has a decode_ms of noise alone
draw_fraction          the time of drawing a token a row from given logits, keys included, alone, / decode_ms
kv_bytes_per_slot      the cache of a slot at its largest
peak_rss_gib           the most main memory the process held until the rollouts were over; no accelerator's memory
speedup                --compare: static_s / refill_s. Static: as many sequences as there are slots start together, and
                       the next when the longest of them has ended. Refill: a slot takes the next sequence at once
seconds                all of this, without imports
"""

import argparse
import heapq
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from limits import check_measurable, draw_ms, kv_bytes, measure

from grpo_jax.architecture import ModelConfig
from grpo_jax.flags import OneLineParser, run
from grpo_jax.model import init_params
from grpo_jax.sampler import generate, pad_prompts, place_for_rollout
from grpo_jax.source import find_model, read_model_config
from grpo_jax.stops import stop_table
from grpo_jax.types import UserError
from grpo_jax.weights import load

BEGAN = time.perf_counter()


def read_flags(argv: Sequence[str]):
    """The command line.

    Raises:
      UserError: a value that no rollout can have.
    """
    parser = OneLineParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python benchmarks/rollout.py --model=smollm2 --prompts=4 --samples=8\n"
               "  python benchmarks/rollout.py --model=smollm2 --prompts=16 --slots=32 --lengths=lognormal --compare")
    parser.add_argument("--model", metavar="FOLDER", required=True, help="what model.path may be")
    parser.add_argument("--random", action="store_true", help="random weights; of FOLDER only config.json is read")
    for name, value, what in (
        ("prompts", 4, "distinct prompts"), ("samples", 8, "completions of each"),
        ("prompt_tokens", 128, "tokens of every prompt"), ("new_tokens", 64, "tokens of the longest completion"),
        ("slots", 0, "sequences at a time; 0: all"), ("repeats", 3, "rounds after the one that compiles"),
        ("seed", 0, "of prompts, lengths, random weights and draws"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"{what}; default: {value}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and products")
    parser.add_argument("--lengths", choices=("fixed", "lognormal"), default="fixed",
                        help="all new_tokens long, or drawn: median 32, sigma 1, cut to 1..new_tokens")
    parser.add_argument("--static", action="store_true", help="batches of slots sequences instead of refilled slots")
    parser.add_argument("--compare", action="store_true", help="time both; fields static_*, refill_* and speedup")
    flags = parser.parse_args(argv)
    sequences = flags.prompts * flags.samples
    for name, least in (("prompts", 1), ("samples", 1), ("prompt_tokens", 1), ("new_tokens", 2), ("slots", 0),
                        ("repeats", 1), ("seed", 0)):
        if getattr(flags, name) < least:
            raise UserError(f"expected --{name} of {least} or more; found {getattr(flags, name)}")
    if flags.slots > sequences:
        raise UserError(f"expected --slots of at most prompts * samples, {sequences}; found {flags.slots}")
    if (flags.static or flags.compare) and (not flags.slots or flags.slots % flags.samples or sequences % flags.slots):
        raise UserError(f"expected --slots for batches of whole prompts: a multiple of {flags.samples} samples that "
                        f"divides {sequences} sequences; found {flags.slots}")
    return flags


def load_model(flags) -> tuple[ModelConfig, dict]:
    """The model in the dtype, and its parameters.

    Raises:
      UserError: there is none, or none that this benchmark can measure with these flags.
    """
    config = read_model_config(flags.model if flags.random else find_model(flags.model))
    config = replace(config, compute_dtype=flags.dtype)
    check_measurable(config)
    if flags.prompt_tokens + flags.new_tokens > config.max_positions:
        raise UserError(f"expected prompt_tokens + new_tokens of at most {config.max_positions} positions; "
                        f"found {flags.prompt_tokens} + {flags.new_tokens}")
    if not flags.random:
        return config, load(flags.model, param_dtype=flags.dtype)[1]
    cast = lambda key: jax.tree.map(lambda leaf: leaf.astype(flags.dtype), init_params(config, key))
    return config, jax.block_until_ready(jax.jit(cast)(jax.random.key(flags.seed)))


def draw_lengths(flags) -> np.ndarray:
    """The tokens of every sequence, [B, G]."""
    shape = flags.prompts, flags.samples
    if flags.lengths == "fixed":
        return np.full(shape, flags.new_tokens)
    drawn = np.random.default_rng(flags.seed).lognormal(math.log(32), 1, shape)
    return np.clip(np.round(drawn), 1, flags.new_tokens).astype(int)


def batches(prompts, limits: np.ndarray, slots: int) -> list[tuple]:
    """Prompts and limits cut into parts of `slots` sequences."""
    size = slots // limits.shape[1]
    cut = lambda first: jax.tree.map(lambda x: x[first : first + size], (prompts, limits))
    return [cut(first) for first in range(0, len(limits), size)]


def steps_of(parts: list[tuple], slots: int) -> int:
    """Decode steps of parts run one after another: a slot that is free takes its part's next sequence."""
    total = 0
    for _, limits in parts:
        busy = [0] * (slots or limits.size)
        for length in limits.reshape(-1).tolist():
            heapq.heapreplace(busy, busy[0] + length)
        total += max(busy)
    return total


def rollout(config: ModelConfig, params, parts: list[tuple], flags) -> float:
    """Seconds of a whole rollout: the copy of the weights, then the parts one after another."""
    table = stop_table(config.vocab_size, (), (), None)
    began = time.perf_counter()
    placed = place_for_rollout(config, params)
    drawn = [
        generate(config, placed, prompts, jax.random.key(flags.seed), samples=flags.samples,
                 max_tokens=flags.new_tokens, temperature=1.0, table=table, slots=flags.slots, limits=limits)
        for prompts, limits in parts]
    jax.block_until_ready(drawn)
    took = time.perf_counter() - began
    if any((np.asarray(part.lengths) != limits).any() for part, (_, limits) in zip(drawn, parts)):
        raise RuntimeError("the sampler drew sequences of other lengths than it was told to")
    return took


def say(what: str) -> None:
    print(f"{time.perf_counter() - BEGAN:7.1f} s  {what}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
    flags = read_flags(argv)
    config, params = load_model(flags)
    limits = draw_lengths(flags)
    tokens = np.random.default_rng(flags.seed).integers(config.drawable, size=(flags.prompts, flags.prompt_tokens))
    prompts = pad_prompts(tokens.tolist())
    rows = flags.slots or limits.size
    whole, cut = [(prompts, limits)], lambda limits: batches(prompts, limits, flags.slots)
    plans = {"static" if flags.static else "refill": cut(limits) if flags.static else whole}
    (chosen,) = plans
    if flags.compare:
        plans |= {"static": cut(limits), "refill": whole}
    single = np.ones_like(limits)
    plans["single"] = cut(single) if flags.static else [(prompts, single)]
    steps = {name: steps_of(parts, flags.slots) for name, parts in plans.items()}
    if steps[chosen] == steps["single"]:
        raise UserError("expected a completion of 2 tokens or more; found none; change --seed")

    times = {name: [] for name in plans}
    for turn in range(flags.repeats + 1):
        for name, parts in plans.items():  # in turn, so that a slow minute of the machine is everyone's
            times[name].append(rollout(config, params, parts, flags))
            say(f"{name} rollout {turn}{'' if turn else ', which compiles'}: {times[name][-1]:.2f} s")
    median = {name: statistics.median(found[1:]) for name, found in times.items()}
    decode_ms = 1e3 * (median[chosen] - median["single"]) / (steps[chosen] - steps["single"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)

    say("the limits")
    columns = flags.prompt_tokens + (limits * (limits - 1)).sum() / limits.sum() / 2  # that the step of a token sees
    measured = measure(config, place_for_rollout(config, params), rows, columns)
    result = {
        "model": Path(flags.model).resolve().name, "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        **{name: value for name, value in vars(flags).items() if name not in ("model", "compare")},
        "device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "rows": rows,
        "generate_s": median[chosen], "gen_tok_s": limits.sum() / median[chosen],
        "compile_s": times[chosen][0] - median[chosen],
        "decode_ms": decode_ms, "decode_steps": steps[chosen], "limit_fraction": measured["limit_ms"] / decode_ms,
        **measured, "draw_fraction": draw_ms(rows, config.vocab_size) / decode_ms,
        "kv_bytes_per_slot": int(kv_bytes(config, prompts.tokens.shape[1] + flags.new_tokens)), "peak_rss_gib": peak,
    }
    if flags.compare:
        for name in ("static", "refill"):
            result |= {f"{name}_s": median[name], f"{name}_tok_s": limits.sum() / median[name]}
        result["speedup"] = median["static"] / median["refill"]
    result["seconds"] = time.perf_counter() - BEGAN
    print(json.dumps({key: float(f"{x:.4g}") if isinstance(x, float) else x for key, x in result.items()}))


if __name__ == "__main__":
    run(main)
