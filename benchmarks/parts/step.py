"""Measures a whole training step of a model in the shape of Qwen2.5-1.5B: its speed, and where the time goes.

The step is that of `configs/r1zero.py:qwen2.5-1.5b` with 32 prompts of 128 tokens and 16 completions of 1,024 tokens
each. It calls the same functions as training, in the same order. Weights and prompts are random, and no token stops a
completion. There is no tokenizer for random tokens, so grading decodes their ids as ids of the tiny base model (modulo
the size of its vocabulary). The rewards are then replaced by random numbers, because equal rewards give no gradient.

All programs are compiled first, in parallel. The step is then estimated from a few tokens and micro-batches, and run
once, with nothing left to compile. Every line has all times; those of stages that have not run yet are estimates.

measured       the last stage that has run: estimate, rollout, scoring or update
place_s        time to copy the weights for the rollout
prefill_s      time to prefill the prompts
decode_s       the rest of the rollout
reward_s       time to decode and grade the completions, while the device computes the reference's log-probs
pack_s         time to build the experience and to pack it, for scoring and for the update
score_s        time that scoring with the reference takes in addition to reward_s
update_s       time of the update
step_s         the sum of these times; step_tok_s is completion tokens per second, decode_tok_s the same for decode_s
tokens         completion tokens of the step
slots          decode slots of the rollout
decode_ms      milliseconds of a decode step, by the number of columns of the KV cache
needed_tflop   floating-point operations that the step needs, in 1e12 (see `needed_flops`)
square_tflop_s rate of a large matmul
mfu            needed_tflop / step_s / square_tflop_s
peak_gib       peak memory of the device so far; on a CPU, of the process
compile_s      seconds to compile all programs
compilations   names of the programs that the step compiled all the same
ok             only in the last line: whether all completions have their full length and the update changed the policy
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from common import peak_rss_gib
from limits import forward_flops, square_gflop_s
from transformers import CONFIG_MAPPING, AutoTokenizer  # noqa: F401  (imported here, because it takes seconds)

from grpo_jax.learn.update import make_experience, score_completions
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.parallel.mesh import gather_to_host, shard_rows
from grpo_jax.rollout.sampler import place_for_rollout, to_rollout
from grpo_jax.run.stages import draw_completions, start_scoring
from grpo_jax.run.train import timed
from grpo_jax.types import Rollout
from parts.line import extrapolate
from parts.shapes import device_name  # noqa: F401
from parts.step_programs import (
    SEED,
    Work,
    all_cache_sizes,
    compile_programs,
    count_compilations,
    decode,
    grade,
    make_work,
    pack_update,
    random_rollout,
    score_options,
    start,
    visit_cache_sizes,
)

ESTIMATE_TOKENS = 8  # tokens per slot to decode with each size of the KV cache
WARM_UP_TOKENS = 4  # decoded first and not timed, because a GPU loads kernels and captures graphs in a first run
ESTIMATE_MICRO_BATCHES = 1, 4
PHASES = ("place_s", "prefill_s", "decode_s", "reward_s", "pack_s", "score_s", "update_s")


def seconds_of(call: Callable, *arguments, **options) -> tuple[float, Any]:
    """Returns the seconds of a call and its result."""
    begin = time.perf_counter()
    result = jax.block_until_ready(call(*arguments, **options))
    return time.perf_counter() - begin, result


def estimate_rollout(work: Work, placed) -> tuple[dict[str, float], dict[int, float]]:
    """Times the start of a rollout, and a few decode steps with each size of the KV cache.

    Returns:
        prefill_s and decode_s of the whole rollout; and the milliseconds of a decode step, by the number of columns of
        the cache.
    """
    decode_ms, sizes = {}, all_cache_sizes(work)

    def time_decode(columns: int, placed, state, queue):
        _, state = seconds_of(decode, work, placed, state, queue, WARM_UP_TOKENS)
        seconds, state = seconds_of(decode, work, placed, state, queue, ESTIMATE_TOKENS)
        decode_ms[columns] = 1e3 * seconds / ESTIMATE_TOKENS
        if columns == sizes[-1]:
            gather_to_host(to_rollout(state, work.prompts, work.cfg.rollout.samples))  # compiles small programs
        return state

    prefill_s, _ = seconds_of(start, work, placed)
    visit_cache_sizes(work, time_decode, placed)
    tokens = np.diff([work.prompts.tokens.shape[1], *sizes])  # tokens per slot with each size
    decode_s = sum(count * decode_ms[columns] / 1e3 for count, columns in zip(tokens, sizes, strict=True))
    return {"prefill_s": prefill_s, "decode_s": decode_s}, decode_ms


def estimate_learning(work: Work) -> tuple[Work, dict[str, float]]:
    """Times all stages after the rollout, with only a few micro-batches for scoring and the update.

    Returns:
        The work with the updated policy, and the estimated seconds of each stage of a whole step.
    """
    learner, mesh, times = work.learner, work.context.mesh, {}
    rollout = random_rollout(work)
    with timed(times, "experience_s", "Assembling the experience"):
        experience = make_experience(work.prompts, rollout)
    with timed(times, "reward_s", "Grading"):
        experience = grade(work, experience, rollout)
    with timed(times, "pack_s", "Packing"):
        packed = pack_update(work, experience)
        shard_rows(mesh, packed)
    state, scores, updates = learner.state, [], []
    for count in (ESTIMATE_MICRO_BATCHES[0], *ESTIMATE_MICRO_BATCHES):  # the first loads the programs
        batch = shard_rows(mesh, packed.replace(num_micro_batches=np.int32(count)))
        options = score_options(work.cfg)
        seconds, _ = seconds_of(score_completions, learner.model_cfg, learner.reference, batch, **options)
        scores.append(seconds)
        seconds, (state, _) = seconds_of(learner.update, state, batch)
        updates.append(seconds)
    count = int(packed.num_micro_batches)
    score_s = extrapolate(ESTIMATE_MICRO_BATCHES, scores[1:], count)
    return work._replace(learner=learner._replace(state=state)), {
        "reward_s": times["reward_s"],
        "pack_s": times["experience_s"] + 2 * times["pack_s"],
        "score_s": max(0.0, score_s - times["reward_s"]),
        "update_s": extrapolate(ESTIMATE_MICRO_BATCHES, updates[1:], count),
    }


def run_rollout(work: Work, times: dict[str, float]) -> Rollout:
    """Samples the completions of the step, and writes decode_s into `times`."""
    rollout_s, rollout = seconds_of(
        draw_completions, work.cfg, work.context, work.learner.state.params, work.prompts, jax.random.key(SEED)
    )
    times["decode_s"] = rollout_s - times["place_s"] - times["prefill_s"]
    return rollout


def run_learning(work: Work, rollout: Rollout, times: dict[str, float]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs the rest of the step and writes its seconds into `times`. Yields each stage's name and its own fields."""
    cfg, context, pack = work.cfg, work.context, {}
    with timed(pack, "experience_s", "Assembling the experience"):
        experience = make_experience(work.prompts, rollout)
    with timed(pack, "score_s", "Scoring with the reference"):
        wait_for_ref_logps = start_scoring(cfg, context, work.learner.reference, experience)
    with timed(times, "reward_s", "Grading"):
        experience = grade(work, experience, rollout)
    with timed(times, "score_s", "Scoring with the reference"):
        experience = experience.replace(ref_logps=wait_for_ref_logps())
    yield "scoring", {}
    with timed(pack, "update_s", "Updating"):
        batch = jax.block_until_ready(shard_rows(context.mesh, pack_update(work, experience)))
    times["pack_s"] = sum(pack.values())
    times["update_s"], (_, metrics) = seconds_of(work.learner.update, work.learner.state, batch)
    complete = bool((rollout.lengths == cfg.rollout.max_tokens).all())
    yield "update", {"ok": complete and not metrics["optim/skipped"] and not metrics["optim/no_signal"]}


def needed_flops(
    model_cfg: ModelConfig, placed, prompts: int, prompt_tokens: int, samples: int, max_tokens: int
) -> int:
    """Returns the floating-point operations that a step needs, including those of attention and of the head.

    The rollout computes each prompt and each completion once, and so does scoring. The update takes three times as many
    operations as scoring: once for the forward pass, twice for the backward pass. Rematerialization and padding are not
    counted.

    Args:
        model_cfg: The model.
        placed: Parameters placed for the rollout, or their shapes.
        prompts: Number of prompts.
        prompt_tokens: Tokens of each prompt.
        samples: Completions per prompt.
        max_tokens: Tokens of each completion.
    """
    completions = prompts * samples
    prompt_positions = np.tile(np.arange(prompt_tokens), prompts)
    positions = np.tile(prompt_tokens + np.arange(max_tokens), completions)
    # Each token is sampled from the output for the previous one, which for the first is the last token of the prompt.
    prefill = forward_flops(model_cfg, placed, prompt_positions, 0)
    decode = forward_flops(model_cfg, placed, positions - 1, len(positions))
    forward = forward_flops(model_cfg, placed, np.concatenate([prompt_positions, positions]), len(positions))
    return prefill + decode + 4 * forward


def peak_gib() -> float:
    """Returns the peak memory of the device in GiB; on a CPU, that of the process."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 2**30 if stats else peak_rss_gib()


def measure(small: bool, seconds_left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yields an estimate of the step, and then its times after each stage has run."""
    work = make_work(small)
    with jax.set_mesh(work.context.mesh):
        yield from measure_step(work, seconds_left)


def measure_step(work: Work, seconds_left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yields the lines of `measure`; the mesh must be set."""
    compiled, begin, model_cfg = count_compilations(), time.perf_counter(), work.context.model_cfg
    placement = place_for_rollout, model_cfg, work.learner.state.params, work.context.rollout_mesh
    _, placed = seconds_of(*placement)
    if not compile_programs(work, placed, seconds_left):
        yield {"left_out": "the step", "reason": "no time: its programs are not compiled yet"}
        return
    compile_s, times = time.perf_counter() - begin, dict.fromkeys(PHASES, 0.0)
    times["place_s"], _ = seconds_of(*placement)
    square_tflop_s = square_gflop_s(model_cfg.compute_dtype, repeats=5) / 1e3
    rollout_times, decode_ms = estimate_rollout(work, placed)
    sizes = *work.prompts.tokens.shape, work.cfg.rollout.samples, work.cfg.rollout.max_tokens
    needed_tflop, tokens = needed_flops(model_cfg, placed, *sizes) / 1e12, sizes[0] * sizes[2] * sizes[3]
    del placed
    work, learning_times = estimate_learning(work)
    times |= rollout_times | learning_times
    setup = {
        "compile_s": compile_s,
        "tokens": tokens,
        "slots": work.context.rollout_plan.slots,
        "decode_ms": decode_ms,
        "needed_tflop": needed_tflop,
        "square_tflop_s": square_tflop_s,
    }

    def describe(stage: str, **results) -> dict[str, Any]:
        step_s = sum(times.values())
        speeds = {"step_s": step_s, "step_tok_s": tokens / step_s, "decode_tok_s": tokens / times["decode_s"]}
        mfu = needed_tflop / step_s / square_tflop_s
        return {"measured": stage} | results | speeds | {"mfu": mfu, "peak_gib": peak_gib()} | times | setup

    def left_out(stage: str, phases: Sequence[str]) -> list[dict[str, Any]]:
        late = sum(times[name] for name in phases) > seconds_left()
        return [{"left_out": stage, "reason": "no time; its times above are estimates"}] if late else []

    yield describe("estimate")
    if late := left_out("the rollout, scoring and the update", PHASES[:3]):
        yield from late
        return
    earlier, rollout = len(compiled), run_rollout(work, times)
    yield describe("rollout")
    if late := left_out("scoring and the update", PHASES[3:]):
        yield from late
        return
    for stage, results in run_learning(work, rollout, times):
        yield describe(stage, **results, compilations=compiled[earlier:])
