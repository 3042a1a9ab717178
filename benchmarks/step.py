"""How fast a whole GRPO step is, and what of it takes how long. Prints one JSON line.

A step is what training does between two states of the policy: rollout, advantages, scoring by the reference, one
update, AdamW's. Each begins from the state that the last one left. No token stops a sequence, so each has the length
that it is told to have; prompts are random tokens, and so are the rewards: no text is decoded and judged, which takes
milliseconds. Every time is a median of --repeats steps after one that compiles.

step_s        of a whole step
generate_s    of its rollout: a copy of the weights for decoding, prefill, decoding
score_s       of scoring by the reference; 0 without one
update_s      of the gradient and the optimizer
pack_s        of packing on the host: before the scoring, and before the update
other_s       of the rest: advantages, the experience, the reference's log-probabilities back to completions
gen_tok_s     completion tokens / generate_s; step_tok_s is the same / step_s
tokens        of the completions; peak_rss_gib is the most main memory the process held, no accelerator's memory
compile_s     what the first step took longer; little where JAX_COMPILATION_CACHE_DIR holds the programs
seconds       all of this, without imports
"""

import time
from collections.abc import Sequence

import common
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config.flags import run_entry_point
from grpo_jax.learn.grpo import advantages
from grpo_jax.learn.packing import unpack_completions
from grpo_jax.learn.update import make_experience, score_reference
from grpo_jax.parallel.mesh import gather_to_host, shard_rows
from grpo_jax.rollout.sampler import generate_rollout, place_for_rollout
from grpo_jax.run.train import pack_batch
from grpo_jax.text.stops import build_stop_table
from grpo_jax.types import TrainState

EXAMPLES = """  python benchmarks/step.py --model=smollm2 --prompts=4 --samples=8
  python benchmarks/step.py --model=smollm2 --prompts=16 --new_tokens=512 --lengths=lognormal --kl_coef=0"""


def step(flags, learner, prompts, limits: np.ndarray, turn: int) -> tuple[TrainState, dict[str, float]]:
    """The next state, and what took how long; as in grpo_jax.run.train.collect_experience and what follows it there."""
    cfg, model, mesh, state, reference, update = learner
    times, began = dict.fromkeys(("generate_s", "score_s", "update_s", "pack_s"), 0.0), time.perf_counter()

    def timed(name: str, call):
        begun = time.perf_counter()
        found = jax.block_until_ready(call())
        times[name] += time.perf_counter() - begun
        return found

    pack = lambda: shard_rows(mesh, pack_batch(cfg, mesh, experience))
    key = jax.random.fold_in(jax.random.key(flags.seed), turn)
    rollout = timed(
        "generate_s",
        lambda: gather_to_host(
            generate_rollout(
                model,
                place_for_rollout(model, state.params, mesh),
                prompts,
                key,
                samples=flags.samples,
                max_tokens=flags.new_tokens,
                temperature=cfg.rollout.temperature,
                stop_table=build_stop_table(model.vocab_size, (), (), None),
                limits=limits,
            )
        ),
    )
    rewards = jnp.asarray(np.random.default_rng([flags.seed, turn]).standard_normal(limits.shape), jnp.float32)
    experience = make_experience(prompts, rollout, np.asarray(advantages(rewards)), None)
    if reference is not None:
        packed = timed("pack_s", pack)
        ref_logps = timed(
            "score_s",
            lambda: gather_to_host(
                score_reference(
                    model, reference, packed, temperature=cfg.rollout.temperature, chunk_tokens=cfg.train.chunk_tokens
                )
            ),
        )
        experience = experience.replace(
            ref_logps=unpack_completions(ref_logps, gather_to_host(packed.flat_index), experience.mask.shape)
        )
    packed = timed("pack_s", pack)
    state, metrics = timed("update_s", lambda: update(state, packed))
    step_s = time.perf_counter() - began
    if (rollout.lengths != limits).any() or metrics["optim/skipped"]:
        raise RuntimeError("a sequence had another length than it was told to, or the update was left out")
    return state, {"step_s": step_s, **times, "other_s": step_s - sum(times.values())}


def main(argv: Sequence[str]) -> None:
    began = time.perf_counter()
    flags = common.read_learning_flags(__doc__, EXAMPLES, argv)
    learner = common.make_learner(flags)
    jax.set_mesh(learner.mesh)
    prompts, limits = common.draw_prompts(flags, learner.model), common.draw_lengths(flags)
    rounds = []
    for turn in range(flags.repeats + 1):
        state, times = step(flags, learner, prompts, limits, turn)
        learner = learner._replace(state=state)
        rounds.append(times)
        common.say(began, f"step {turn}{'' if turn else ', which compiles'}: {times['step_s']:.2f} s")
    times, tokens = common.medians(rounds), int(limits.sum())
    common.report(
        began,
        {
            **common.about(flags, learner.state.params),
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
