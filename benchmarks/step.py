"""Measures the time of a whole GRPO step and of its parts. Prints one JSON line.

A step is everything between two states of the policy: rollout, advantages, scoring by the reference and one AdamW
update. Each step continues from the state that the previous one returned. Prompts and rewards are random, so no text is
decoded or graded, which would take milliseconds. No token stops a completion, so each has the length that it is given.
Times are medians over --repeats steps after one that compiles.

step_s        seconds of a step
generate_s    the rollout: a copy of the weights for decoding, prefill, decoding
score_s       scoring by the reference; 0 without one
update_s      the gradient and the optimizer
pack_s        packing on the host, before scoring and before the update
other_s       the rest: advantages, the experience, unpacking the reference's log-probs
gen_tok_s     completion tokens per second of the rollout; step_tok_s is the same per second of the step
tokens        completion tokens; peak_rss_gib is the peak main memory of the process, without accelerator memory
compile_s     extra seconds of the first step; small if JAX_COMPILATION_CACHE_DIR has the programs
seconds       total time, without imports
"""

import time
from argparse import Namespace
from collections.abc import Sequence

import common
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config.flags import run_entry_point
from grpo_jax.learn.advantages import advantages
from grpo_jax.learn.packing import unpack_completions
from grpo_jax.learn.update import make_experience, score_completions
from grpo_jax.parallel.mesh import gather_to_host, shard_rows
from grpo_jax.rollout.sampler import generate_rollout, place_for_rollout
from grpo_jax.run.stages import pack_rows
from grpo_jax.text.problem import Prompts
from grpo_jax.text.stops import build_stop_table
from grpo_jax.types import TrainState

EXAMPLES = """  python benchmarks/step.py --model=smollm2 --prompts=4 --samples=8
  python benchmarks/step.py --model=smollm2 --prompts=16 --new_tokens=512 --lengths=lognormal --kl_coef=0"""


def run_step(
    flags: Namespace, learner: common.Learner, prompts: Prompts, lengths: np.ndarray, turn: int
) -> tuple[TrainState, dict[str, float]]:
    """Runs one step like `grpo_jax.run.train` does and returns the new state and the seconds of each part."""
    cfg, model_cfg, mesh, state, reference, update = learner
    times, start = dict.fromkeys(("generate_s", "score_s", "update_s", "pack_s"), 0.0), time.perf_counter()

    def timed(name: str, call):
        part_start = time.perf_counter()
        result = jax.block_until_ready(call())
        times[name] += time.perf_counter() - part_start
        return result

    def generate():
        rollout = generate_rollout(
            model_cfg,
            place_for_rollout(model_cfg, state.params, mesh),
            prompts,
            jax.random.fold_in(jax.random.key(flags.seed), turn),
            samples=flags.samples,
            max_tokens=flags.new_tokens,
            temperature=cfg.rollout.temperature,
            stop_table=build_stop_table(model_cfg.vocab_size, (), (), None),
            limits=lengths,
        )
        return gather_to_host(rollout)

    def score():
        options = dict(temperature=cfg.rollout.temperature, chunk_tokens=cfg.train.chunk_tokens)
        return gather_to_host(score_completions(model_cfg, reference, packed, **options))

    def pack():
        return shard_rows(mesh, pack_rows(cfg, mesh, experience, lengths.size))

    rollout = timed("generate_s", generate)
    rewards = jnp.asarray(np.random.default_rng([flags.seed, turn]).standard_normal(lengths.shape), jnp.float32)
    experience = make_experience(prompts, rollout).replace(advantages=np.asarray(advantages(rewards)).reshape(-1))
    if reference is not None:
        packed = timed("pack_s", pack)
        ref_logps = timed("score_s", score)
        ref_logps = unpack_completions(ref_logps, gather_to_host(packed.flat_index), experience.mask.shape)
        experience = experience.replace(ref_logps=ref_logps)
    packed = timed("pack_s", pack)
    state, metrics = timed("update_s", lambda: update(state, packed))
    step_s = time.perf_counter() - start
    if (rollout.lengths != lengths).any() or metrics["optim/skipped"]:
        raise RuntimeError("a completion does not have the length that it was given, or the update was skipped")
    return state, {"step_s": step_s, **times, "other_s": step_s - sum(times.values())}


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark."""
    start = time.perf_counter()
    flags = common.read_learning_flags(__doc__, EXAMPLES, argv)
    learner = common.make_learner(flags)
    jax.set_mesh(learner.mesh)
    prompts, lengths = common.draw_prompts(flags, learner.model_cfg), common.draw_lengths(flags)
    rounds = []
    for turn in range(flags.repeats + 1):
        state, times = run_step(flags, learner, prompts, lengths, turn)
        learner = learner._replace(state=state)
        rounds.append(times)
        note = "" if turn else " (with compilation)"
        common.print_progress(start, f"step {turn}{note}: {times['step_s']:.2f} s")
    times, tokens = common.medians(rounds), int(lengths.sum())
    common.print_result(
        start,
        {
            **common.describe_setup(flags, learner.state.params),
            **times,
            "tokens": tokens,
            "gen_tok_s": tokens / times["generate_s"],
            "step_tok_s": tokens / times["step_s"],
            "peak_rss_gib": common.peak_rss_gib(),
            "compile_s": rounds[0]["step_s"] - times["step_s"],
        },
    )


if __name__ == "__main__":
    run_entry_point(main)
