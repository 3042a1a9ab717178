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

import heapq
import statistics
import time
from collections.abc import Sequence

import common
import jax
import numpy as np
from limits import draw_ms, kv_bytes, measure

from grpo_jax.errors import UserError
from grpo_jax.config.flags import run_entry_point
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.rollout.sampler import generate_rollout, place_for_rollout
from grpo_jax.text.stops import build_stop_table

EXAMPLES = """  python benchmarks/rollout.py --model=smollm2 --prompts=4 --samples=8
  python benchmarks/rollout.py --model=smollm2 --prompts=16 --slots=32 --lengths=lognormal --compare"""


def read_flags(argv: Sequence[str]):
    """The command line.

    Raises:
      UserError: a value that no rollout can have.
    """
    numbers = common.NUMBERS | {"slots": (0, 0, "sequences at a time; 0: all")}
    parser = common.make_parser(__doc__, EXAMPLES, numbers, "of weights and products")
    parser.add_argument("--static", action="store_true", help="batches of slots sequences instead of refilled slots")
    parser.add_argument("--compare", action="store_true", help="time both; fields static_*, refill_* and speedup")
    flags = parser.parse_args(argv)
    common.check_numbers(flags, numbers)
    sequences = flags.prompts * flags.samples
    if flags.slots > sequences:
        raise UserError(f"expected --slots of at most prompts * samples, {sequences}; found {flags.slots}")
    if (flags.static or flags.compare) and (not flags.slots or flags.slots % flags.samples or sequences % flags.slots):
        raise UserError(
            f"expected --slots for batches of whole prompts: a multiple of {flags.samples} samples that "
            f"divides {sequences} sequences; found {flags.slots}"
        )
    return flags


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


def rollout(model_cfg: ModelConfig, params, parts: list[tuple], flags) -> float:
    """Seconds of a whole rollout: the copy of the weights, then the parts one after another."""
    table = build_stop_table(model_cfg.vocab_size, (), (), None)
    began = time.perf_counter()
    placed = place_for_rollout(model_cfg, params)
    drawn = [
        generate_rollout(
            model_cfg,
            placed,
            prompts,
            jax.random.key(flags.seed),
            samples=flags.samples,
            max_tokens=flags.new_tokens,
            temperature=1.0,
            stop_table=table,
            slots=flags.slots,
            limits=limits,
        )
        for prompts, limits in parts
    ]
    jax.block_until_ready(drawn)
    took = time.perf_counter() - began
    if any((np.asarray(part.lengths) != limits).any() for part, (_, limits) in zip(drawn, parts)):
        raise RuntimeError("the sampler drew sequences of other lengths than it was told to")
    return took


def main(argv: Sequence[str]) -> None:
    began = time.perf_counter()
    flags = read_flags(argv)
    model_cfg, params = common.load_model(flags, flags.dtype)
    prompts, limits = common.draw_prompts(flags, model_cfg), common.draw_lengths(flags)
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
            times[name].append(rollout(model_cfg, params, parts, flags))
            common.say(began, f"{name} rollout {turn}{'' if turn else ', which compiles'}: {times[name][-1]:.2f} s")
    median = {name: statistics.median(found[1:]) for name, found in times.items()}
    decode_ms = 1e3 * (median[chosen] - median["single"]) / (steps[chosen] - steps["single"])
    peak = common.peak_rss_gib()

    common.say(began, "the limits")
    columns = flags.prompt_tokens + (limits * (limits - 1)).sum() / limits.sum() / 2  # that the step of a token sees
    measured = measure(model_cfg, place_for_rollout(model_cfg, params), rows, columns)
    result = {
        **common.about(flags, params),
        "rows": rows,
        "generate_s": median[chosen],
        "gen_tok_s": limits.sum() / median[chosen],
        "compile_s": times[chosen][0] - median[chosen],
        "decode_ms": decode_ms,
        "decode_steps": steps[chosen],
        "limit_fraction": measured["limit_ms"] / decode_ms,
        **measured,
        "draw_fraction": draw_ms(rows, model_cfg.vocab_size) / decode_ms,
        "kv_bytes_per_slot": int(kv_bytes(model_cfg, prompts.tokens.shape[1] + flags.new_tokens)),
        "peak_rss_gib": peak,
    }
    if flags.compare:
        for name in ("static", "refill"):
            result |= {f"{name}_s": median[name], f"{name}_tok_s": limits.sum() / median[name]}
        result["speedup"] = median["static"] / median["refill"]
    common.report(began, result)


if __name__ == "__main__":
    run_entry_point(main)
