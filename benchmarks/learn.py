"""How fast a policy learns from a rollout, and how close that comes to what the machine allows. Prints one JSON line.

What is timed is what training does with a rollout's tokens: scoring by the reference, and one update, AdamW's. Prompts
and completions are random tokens, advantages are random, the sampler's log-probabilities are the policy's own. Every
time is a median of --repeats rounds after one that is not counted.

score_s, update_s      seconds of scoring by the reference (0 without one), and of the update; learn_s is their sum
tokens                 of the packed work, without padding: completions, and prompts once in each row that they are
                       in, which are prompt_tokens_computed
tok_s                  tokens / learn_s; completion_tok_s counts completions alone
rows, width            of the packed arrays; micro_batches of these rows hold a token, and the others are not run
padding_fraction       of the tokens in those
needed_tflop           multiplications and additions, in 1e12, that this work needs. Forwards: 2 for each matrix weight
                       of the layers and token, 2 for each weight of the head and token of a completion, and in each
                       layer 4 * heads * their width for each query and key that it sees. Backwards: twice that.
                       Nothing that is computed again is counted
square_gflop_s         the rate of one large matrix product
model_flops_utilisation  needed_tflop / learn_s, as a part of that rate
limit_s                the products of hidden states and weights of this work alone, one after another, at the width
                       and the chunks in use: forwards for the score and for the update, and the two of each
                       backwards. No learning that is made of these products is faster
limit_fraction         limit_s / learn_s: 1 is perfect, the rest is attention, what is computed again, norms, the
                       probabilities, the optimizer and overhead
score_temp_gib, update_temp_gib  memory that the compiled programs take besides their arguments and results
peak_rss_gib           the most main memory the process held until the updates were over; no accelerator's memory
compile_s              compiling both; little where JAX_COMPILATION_CACHE_DIR holds the programs
seconds                all of this, without imports
"""

import time
from collections.abc import Sequence

import common
import jax
import jax.numpy as jnp
import numpy as np
from limits import forward_flops, learn_limit_s, square_gflop_s

from grpo_jax.config.flags import run_entry_point
from grpo_jax.learn.grpo import advantages
from grpo_jax.learn.update import make_experience, score_reference
from grpo_jax.parallel.mesh import gather_to_host, shard_rows
from grpo_jax.rollout.sampler import place_for_rollout
from grpo_jax.run.train import pack_batch
from grpo_jax.types import PackedBatch, Rollout

EXAMPLES = """  python benchmarks/learn.py --model=smollm2 --prompts=4 --samples=8
  python benchmarks/learn.py --model=smollm2 --prompts=16 --new_tokens=512 --lengths=lognormal --remat=none"""


def random_work(flags, learner) -> PackedBatch:
    """A packed batch of random completions, on the host."""
    draws = np.random.default_rng(flags.seed + 1)
    lengths = common.draw_lengths(flags)
    tokens = draws.integers(
        learner.model.sampleable_vocab_size, size=(*lengths.shape, flags.new_tokens), dtype=np.int32
    )
    rollout = Rollout(
        tokens=tokens,
        logps=np.zeros(tokens.shape, np.float32),
        lengths=lengths,
        truncated=np.zeros(lengths.shape, bool),
        prompt_ids=np.arange(flags.prompts),
    )
    rewards = jnp.asarray(draws.standard_normal(lengths.shape), jnp.float32)
    prompts = common.draw_prompts(flags, learner.model)
    experience = make_experience(prompts, rollout, np.asarray(advantages(rewards)), None)
    return pack_batch(learner.config, learner.mesh, experience)


def timed(call):
    """What `call` gives, and its seconds."""
    began = time.perf_counter()
    found = jax.block_until_ready(call())
    return found, time.perf_counter() - began


def main(argv: Sequence[str]) -> None:
    began = time.perf_counter()
    flags = common.read_learning_flags(__doc__, EXAMPLES, argv)
    learner = common.make_learner(flags)
    cfg, model, mesh, state, reference, _ = learner
    jax.set_mesh(mesh)
    packed = random_work(flags, learner)
    batch = shard_rows(mesh, packed)
    compiling = time.perf_counter()
    score = score_reference.lower(
        model, state.params, batch, temperature=cfg.rollout.temperature, chunk_tokens=cfg.train.chunk_tokens
    ).compile()
    update = learner.update.lower(state, batch).compile()
    compile_s = time.perf_counter() - compiling
    common.say(began, f"compiled in {compile_s:.1f} s")
    packed = packed.replace(sampler_logps=gather_to_host(score(state.params, batch)))

    rounds = []
    for turn in range(flags.repeats + 1):
        batch, score_s = shard_rows(mesh, packed), 0.0
        if reference is not None:
            ref_logps, score_s = timed(lambda: score(reference, batch))
            batch = shard_rows(mesh, packed.replace(ref_logps=gather_to_host(ref_logps)))
        (state, metrics), update_s = timed(lambda: update(state, batch))
        if metrics["optim/skipped"]:
            raise RuntimeError("the gradient was not finite, and the update was left out")
        rounds.append({"score_s": score_s, "update_s": update_s})
        common.say(began, f"round {turn}: score {score_s:.3f} s, update {update_s:.3f} s")
    times, peak = common.medians(rounds), common.peak_rss_gib()

    common.say(began, "the limits")
    weights = place_for_rollout(model, state.params, mesh)
    del learner, state, reference  # what is left takes memory too
    real, sampled = packed.segments.prompt > 0, (packed.flat_index >= 0).sum(axis=1)
    rows, width = packed.tokens.shape
    tokens, used, learn_s = int(real.sum()), int(packed.num_micro_batches), sum(times.values())
    chunk = min(width, flags.chunk_tokens)
    limit_s = learn_limit_s(
        model,
        weights,
        width=width,
        micro_batches=used,
        chunk=chunk,
        chunks=int((-(-sampled // chunk)).sum()),
        scored=flags.kl_coef > 0,
        repeats=flags.repeats,
    )
    square = square_gflop_s(flags.dtype, flags.repeats)
    passes = 4 if flags.kl_coef else 3  # the reference's forward pass; one forwards and twice that backwards
    needed = passes * forward_flops(model, weights, packed.segments.position[real], int(sampled.sum())) / 1e12
    gib = lambda program: program.memory_analysis().temp_size_in_bytes / 2**30
    common.report(
        began,
        {
            **common.about(flags, weights),
            **times,
            "learn_s": learn_s,
            "tok_s": tokens / learn_s,
            "completion_tok_s": sampled.sum() / learn_s,
            "tokens": tokens,
            "prompt_tokens_computed": tokens - int(sampled.sum()),
            "padding_fraction": 1 - tokens / (used * width),
            "rows": rows,
            "width": width,
            "micro_batches": used,
            "needed_tflop": needed,
            "square_gflop_s": square,
            "model_flops_utilisation": 1e3 * needed / learn_s / square,
            "limit_s": limit_s,
            "limit_fraction": limit_s / learn_s,
            "score_temp_gib": gib(score) if flags.kl_coef else 0.0,
            "update_temp_gib": gib(update),
            "peak_rss_gib": peak,
            "compile_s": compile_s,
        },
    )


if __name__ == "__main__":
    run_entry_point(main)
