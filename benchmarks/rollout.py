"""Measures the speed of a rollout and how close decoding comes to the machine's limit. Prints one JSON line.

A rollout is everything that training does to get completions: a copy of the weights for decoding, prefill and decoding.
Prompts are random tokens. No token stops a completion, so each has the length that it is given. Times are medians over
--repeats rounds after one that compiles.

generate_s, gen_tok_s  seconds of a rollout, and completion tokens per second
compile_s              extra seconds of the first rollout; small if JAX_COMPILATION_CACHE_DIR has the programs
decode_ms              milliseconds of a decode step: the time of the rollout less that of the same rollout with one
                       token per completion (copy, prefill and first step), divided by the number of additional steps
decode_steps           decode steps of the rollout, given that a slot decodes its sequences one after another
rows                   sequences in a step: the number of slots, or all sequences
matmul_ms              matmuls of a step on their own, with the same weights; matmul_gflop_s is their rate, and
                       square_gflop_s that of one large matmul
bytes_ms               time to read the weights and KV cache of a step at read_gb_s, the bandwidth of a plain sum
limit_ms               the larger of matmul_ms and bytes_ms, which no step can beat
limit_fraction         limit_ms / decode_ms; 1 is ideal, and the rest is attention, norms, sampling and overhead.
                       decode_ms is mostly noise if a rollout takes only milliseconds
draw_fraction          sampling a token per row from given logits, random keys included, as a fraction of decode_ms
kv_bytes_per_slot      size of the KV cache of a slot when it is largest
peak_rss_gib           peak main memory of the process by the end of the rollouts, without accelerator memory
speedup                with --compare: static_s / refill_s. Static batching starts as many sequences as there are slots
                       and waits for the longest of them. With refill a slot takes the next sequence at once
seconds                total time, without imports
"""

import heapq
import statistics
import time
from argparse import Namespace
from collections.abc import Sequence

import common
import jax
import numpy as np
from limits import draw_ms, kv_bytes, measure_decode_limits

from grpo_jax.config.flags import run_entry_point
from grpo_jax.errors import UserError
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.rollout.sampler import generate_rollout, place_for_rollout
from grpo_jax.text.problem import Prompts
from grpo_jax.text.stops import build_stop_table

EXAMPLES = """  python benchmarks/rollout.py --model=smollm2 --prompts=4 --samples=8
  python benchmarks/rollout.py --model=smollm2 --prompts=16 --slots=32 --lengths=lognormal --compare"""

Batch = tuple[Prompts, np.ndarray]  # prompts, and the lengths of their completions [B, G]


def read_flags(argv: Sequence[str]) -> Namespace:
    """Parses the command line.

    Raises:
        UserError: A flag is unknown or has a value that no rollout can have.
    """
    integers = common.ROLLOUT_FLAGS | {"slots": (0, 0, "number of decode slots; 0 for one per sequence")}
    parser = common.make_benchmark_parser(__doc__, EXAMPLES, integers, "dtype of weights and matmuls")
    parser.add_argument("--static", action="store_true", help="decode static batches instead of refilling slots")
    parser.add_argument("--compare", action="store_true", help="time both; adds static_*, refill_* and speedup")
    flags = parser.parse_args(argv)
    common.check_integers(flags, integers)
    sequences = flags.prompts * flags.samples
    if flags.slots > sequences:
        raise UserError(
            f"--slots may be at most --prompts times --samples, {sequences}; found {flags.slots}. Lower it."
        )
    if (flags.static or flags.compare) and (not flags.slots or flags.slots % flags.samples or sequences % flags.slots):
        raise UserError(
            f"Static batches hold whole groups, so --slots must be a multiple of --samples={flags.samples} that "
            f"divides {sequences} sequences; found {flags.slots}. Change --slots."
        )
    return flags


def split_batches(prompts: Prompts, lengths: np.ndarray, slots: int) -> list[Batch]:
    """Splits a rollout into batches of `slots` sequences."""
    size = slots // lengths.shape[1]
    starts = range(0, len(lengths), size)
    return [jax.tree.map(lambda x, i=start: x[i : i + size], (prompts, lengths)) for start in starts]


def count_decode_steps(batches: list[Batch], slots: int) -> int:
    """Returns the decode steps of batches run one after another, where a free slot takes the next sequence."""
    total = 0
    for _, lengths in batches:
        busy_until = [0] * (slots or lengths.size)
        for length in lengths.reshape(-1).tolist():
            heapq.heapreplace(busy_until, busy_until[0] + length)
        total += max(busy_until)
    return total


def time_rollout(model_cfg: ModelConfig, params, batches: list[Batch], flags: Namespace) -> float:
    """Returns the seconds of a rollout: the copy of the weights, then one batch after another."""
    stop_table = build_stop_table(model_cfg.vocab_size, (), (), None)
    start = time.perf_counter()
    placed = place_for_rollout(model_cfg, params)
    rollouts = [
        generate_rollout(
            model_cfg,
            placed,
            prompts,
            jax.random.key(flags.seed),
            samples=flags.samples,
            max_tokens=flags.new_tokens,
            temperature=1.0,
            stop_table=stop_table,
            slots=flags.slots,
            limits=lengths,
        )
        for prompts, lengths in batches
    ]
    jax.block_until_ready(rollouts)
    seconds = time.perf_counter() - start
    if any((np.asarray(rollout.lengths) != batch[1]).any() for rollout, batch in zip(rollouts, batches, strict=True)):
        raise RuntimeError("a completion does not have the length that it was given")
    return seconds


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    start = time.perf_counter()
    flags = read_flags(argv)
    model_cfg, params = common.load_model(flags, flags.dtype)
    prompts, lengths = common.draw_prompts(flags, model_cfg), common.draw_lengths(flags)
    rows, ones = flags.slots or lengths.size, np.ones_like(lengths)
    chosen = "static" if flags.static else "refill"
    variants = {}
    if flags.static or flags.compare:
        variants["static"] = split_batches(prompts, lengths, flags.slots)
    if not flags.static or flags.compare:
        variants["refill"] = [(prompts, lengths)]
    variants["single"] = split_batches(prompts, ones, flags.slots) if flags.static else [(prompts, ones)]
    steps = {name: count_decode_steps(batches, flags.slots) for name, batches in variants.items()}
    if steps[chosen] == steps["single"]:
        raise UserError("At least one completion must have 2 tokens or more; found none. Change --seed.")

    times = {name: [] for name in variants}
    for turn in range(flags.repeats + 1):
        for name, batches in variants.items():  # interleaved, so that a slow spell of the machine affects all alike
            times[name].append(time_rollout(model_cfg, params, batches, flags))
            note = "" if turn else " (with compilation)"
            common.print_progress(start, f"{name} rollout {turn}{note}: {times[name][-1]:.2f} s")
    median = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
    decode_ms = 1e3 * (median[chosen] - median["single"]) / (steps[chosen] - steps["single"])
    peak = common.peak_rss_gib()

    common.print_progress(start, "measuring the limits")
    # Mean number of cache columns that a decode step attends to.
    columns = flags.prompt_tokens + (lengths * (lengths - 1)).sum() / lengths.sum() / 2
    limits = measure_decode_limits(model_cfg, place_for_rollout(model_cfg, params), rows, columns)
    result = {
        **common.describe_setup(flags, params),
        "rows": rows,
        "generate_s": median[chosen],
        "gen_tok_s": lengths.sum() / median[chosen],
        "compile_s": times[chosen][0] - median[chosen],
        "decode_ms": decode_ms,
        "decode_steps": steps[chosen],
        "limit_fraction": limits["limit_ms"] / decode_ms,
        **limits,
        "draw_fraction": draw_ms(rows, model_cfg.vocab_size) / decode_ms,
        "kv_bytes_per_slot": int(kv_bytes(model_cfg, prompts.tokens.shape[1] + flags.new_tokens)),
        "peak_rss_gib": peak,
    }
    if flags.compare:
        for name in ("static", "refill"):
            result |= {f"{name}_s": median[name], f"{name}_tok_s": lengths.sum() / median[name]}
        result["speedup"] = median["static"] / median["refill"]
    common.print_result(start, result)


if __name__ == "__main__":
    run_entry_point(main)
