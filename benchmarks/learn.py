"""Measures the speed of learning from a rollout and how close it comes to the machine's limit. Prints one JSON line.

Learning is what training does with the tokens of a rollout: scoring by the reference and one AdamW update. Prompts,
completions and advantages are random, and the sampler's log-probs are the policy's own. Times are medians over
--repeats rounds after one that is not counted.

score_s, update_s      seconds of scoring by the reference (0 without one) and of the update; learn_s is their sum
tokens                 tokens of the packed rows without padding: completions, and each prompt once per row that it is
                       in. The latter are prompt_tokens_computed
tok_s                  tokens / learn_s; completion_tok_s counts completion tokens only
rows, width            shape of the packed arrays; micro_batches of the rows hold a token, and the others are skipped
padding_fraction       fraction of padding in those micro-batches
needed_tflop           floating-point operations that this work needs, in 1e12. The forward pass takes 2 per matmul
                       weight of the layers and token, 2 per weight of the head and completion token, and in each layer
                       4 * heads * head width per query and key that it attends to. The backward pass takes twice that.
                       Rematerialization is not counted
square_gflop_s         rate of one large matmul
model_flops_utilisation  needed_tflop / learn_s as a fraction of that rate
limit_s                the matmuls of hidden states and weights on their own, one after another, with the width and the
                       chunks of this work: forward for the score and the update, and both of the backward pass.
                       Learning that consists of these matmuls cannot be faster
limit_fraction         limit_s / learn_s; 1 is ideal, and the rest is attention, rematerialization, norms,
                       probabilities, the optimizer and overhead
score_temp_gib, update_temp_gib  memory of the compiled programs besides their arguments and results
peak_rss_gib           peak main memory of the process by the end of the updates, without accelerator memory
compile_s              seconds to compile both; small if JAX_COMPILATION_CACHE_DIR has the programs
seconds                total time, without imports
"""

import time
from argparse import Namespace
from collections.abc import Sequence

import common
import jax
import jax.numpy as jnp
import numpy as np
from limits import forward_flops, learn_limit_s, square_gflop_s

from grpo_jax.config.flags import run_entry_point
from grpo_jax.learn.advantages import advantages
from grpo_jax.learn.update import make_experience, score_completions
from grpo_jax.parallel.mesh import gather_to_host, shard_rows
from grpo_jax.rollout.sampler import place_for_rollout
from grpo_jax.run.stages import pack_rows
from grpo_jax.types import PackedBatch, Rollout

EXAMPLES = """  python benchmarks/learn.py --model=smollm2 --prompts=4 --samples=8
  python benchmarks/learn.py --model=smollm2 --prompts=16 --new_tokens=512 --lengths=lognormal --remat=none"""


def make_random_batch(flags: Namespace, learner: common.Learner) -> PackedBatch:
    """Returns a packed batch of random completions, on the host."""
    rng = np.random.default_rng(flags.seed + 1)
    lengths = common.draw_lengths(flags)
    shape = (*lengths.shape, flags.new_tokens)
    tokens = rng.integers(learner.model_cfg.sampleable_vocab_size, size=shape, dtype=np.int32)
    rollout = Rollout(
        tokens=tokens,
        logps=np.zeros(tokens.shape, np.float32),
        lengths=lengths,
        truncated=np.zeros(lengths.shape, bool),
        prompt_ids=np.arange(flags.prompts),
    )
    rewards = jnp.asarray(rng.standard_normal(lengths.shape), jnp.float32)
    prompts = common.draw_prompts(flags, learner.model_cfg)
    experience = make_experience(prompts, rollout).replace(advantages=np.asarray(advantages(rewards)).reshape(-1))
    return pack_rows(learner.cfg, learner.mesh, experience, lengths.size)


def timed(call, *args):
    """Returns the result of `call(*args)` and its seconds."""
    start = time.perf_counter()
    result = jax.block_until_ready(call(*args))
    return result, time.perf_counter() - start


def temp_gib(program) -> float | None:
    """Returns the memory in GiB that a compiled program needs besides its arguments and results, or None if unknown."""
    analysis = program.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes / 2**30


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    start = time.perf_counter()
    flags = common.read_learning_flags(__doc__, EXAMPLES, argv)
    learner = common.make_learner(flags)
    cfg, model_cfg, mesh, state, reference, _ = learner
    jax.set_mesh(mesh)
    packed = make_random_batch(flags, learner)
    batch = shard_rows(mesh, packed)
    options = dict(temperature=cfg.rollout.temperature, chunk_tokens=cfg.train.chunk_tokens)
    compile_start = time.perf_counter()
    score = score_completions.lower(model_cfg, state.params, batch, **options).compile()
    update = learner.update.lower(state, batch).compile()
    compile_s = time.perf_counter() - compile_start
    common.print_progress(start, f"compiled in {compile_s:.1f} s")
    packed = packed.replace(sampler_logps=gather_to_host(score(state.params, batch)))

    rounds = []
    for turn in range(flags.repeats + 1):
        batch, score_s = shard_rows(mesh, packed), 0.0
        if reference is not None:
            ref_logps, score_s = timed(score, reference, batch)
            batch = shard_rows(mesh, packed.replace(ref_logps=gather_to_host(ref_logps)))
        (state, metrics), update_s = timed(update, state, batch)
        if metrics["optim/skipped"]:
            raise RuntimeError("the gradient was not finite, so the update was skipped")
        rounds.append({"score_s": score_s, "update_s": update_s})
        common.print_progress(start, f"round {turn}: score {score_s:.3f} s, update {update_s:.3f} s")
    times, peak = common.medians(rounds), common.peak_rss_gib()

    common.print_progress(start, "measuring the limits")
    weights = place_for_rollout(model_cfg, state.params, mesh)
    del learner, state, reference  # frees memory for the measurements
    is_token, sampled_per_row = packed.segments.prompt > 0, (packed.flat_index >= 0).sum(axis=1)
    rows, width = packed.tokens.shape
    tokens, sampled, learn_s = int(is_token.sum()), int(sampled_per_row.sum()), sum(times.values())
    micro_batches, chunk = int(packed.num_micro_batches), min(width, flags.chunk_tokens)
    limit_s = learn_limit_s(
        model_cfg,
        weights,
        width=width,
        micro_batches=micro_batches,
        chunk=chunk,
        chunks=int((-(-sampled_per_row // chunk)).sum()),
        scored=flags.kl_coef > 0,
        repeats=flags.repeats,
    )
    square = square_gflop_s(flags.dtype, flags.repeats)
    passes = 4 if flags.kl_coef else 3  # one for the score; one forward and twice that backward for the update
    needed = passes * forward_flops(model_cfg, weights, packed.segments.position[is_token], sampled) / 1e12
    common.print_result(
        start,
        {
            **common.describe_setup(flags, weights),
            **times,
            "learn_s": learn_s,
            "tok_s": tokens / learn_s,
            "completion_tok_s": sampled / learn_s,
            "tokens": tokens,
            "prompt_tokens_computed": tokens - sampled,
            "padding_fraction": 1 - tokens / (micro_batches * width),
            "rows": rows,
            "width": width,
            "micro_batches": micro_batches,
            "needed_tflop": needed,
            "square_gflop_s": square,
            "model_flops_utilisation": 1e3 * needed / learn_s / square,
            "limit_s": limit_s,
            "limit_fraction": limit_s / learn_s,
            "score_temp_gib": temp_gib(score) if flags.kl_coef else 0.0,
            "update_temp_gib": temp_gib(update),
            "peak_rss_gib": peak,
            "compile_s": compile_s,
        },
    )


if __name__ == "__main__":
    run_entry_point(main)
