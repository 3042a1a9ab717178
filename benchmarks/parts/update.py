"""Measures the MFU of an update: the rate of the floating-point operations that it needs, relative to a large matmul's.

The update is that of `configs/r1zero.py:qwen2.5-1.5b` for rollouts of 32 prompts of at most 256 tokens with 16
completions of at most 768 tokens each. The weights are random. Only the completions of a few prompts are packed, which
keeps the update short. There is one line per row length (`train.micro_tokens`):

row_tokens      length of a row; each row is a micro-batch
rows, tokens    number of rows, and of the tokens in them without padding; padding_fraction is the fraction of padding
needed_tflop    floating-point operations that the update needs, in 1e12: those of 3 forward passes as counted in
                `benchmarks/learn.py`. Rematerialization is not counted
update_s        mean time of two updates, or the time of one if there is no time for two
product_tflop_s rate of one large matmul in the same dtype
mfu             needed_tflop / update_s / product_tflop_s
temp_gib        memory of the compiled program besides its arguments and results
state_gib       memory of the train state: the policy and the optimizer state
peak_gib        peak memory of the device so far; missing if the device does not report it
compile_s       seconds to lower and compile the program
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import Learner
from learn import temp_gib, timed
from limits import forward_flops, square_gflop_s

from grpo_jax.config import Config
from grpo_jax.learn.advantages import advantages
from grpo_jax.learn.update import make_experience
from grpo_jax.parallel.mesh import shard_rows
from grpo_jax.rollout.sampler import pad_prompts, place_for_rollout
from grpo_jax.run.stages import pack_rows
from grpo_jax.types import PackedBatch, Rollout, TrainState
from parts import NotHere
from parts.programs import is_out_of_memory
from parts.shapes import QWEN_1_5B, device_name, random_learner, require_accelerator, shrink, training_config  # noqa: F401


class UpdateSizes(NamedTuple):
    """The sizes of the rollouts, and how much of one an update learns from."""

    prompts: int = 6  # whose completions an update learns from
    rollout_prompts: int = 32
    samples: int = 16
    max_prompt_tokens: int = 256
    max_tokens: int = 768
    row_tokens: tuple[int, ...] = (8192, 1024)


SMALL_SIZES = UpdateSizes(prompts=1, max_prompt_tokens=32, max_tokens=96, row_tokens=(512,))
REPEATS = 2
AIM = 0.35


def make_config(sizes: UpdateSizes, row_tokens: int) -> Config:
    """Returns the config of a run with rows of `row_tokens` tokens."""
    return training_config(
        prompts=sizes.rollout_prompts,
        samples=sizes.samples,
        max_prompt_tokens=sizes.max_prompt_tokens,
        max_tokens=sizes.max_tokens,
        micro_tokens=row_tokens,
    )


def make_batch(cfg: Config, learner: Learner, prompts: int) -> PackedBatch:
    """Returns a packed batch of random completions of random prompts, on the host.

    Prompt lengths are uniform between half the maximum and the maximum; completion lengths are lognormal.
    """
    rng, rollout, model_cfg = np.random.default_rng(1), cfg.rollout, learner.model_cfg
    longest_prompt, longest = rollout.max_prompt_tokens, rollout.max_tokens
    prompt_lengths = rng.integers(longest_prompt // 2, longest_prompt + 1, prompts)
    lengths = rng.lognormal(math.log(0.4 * longest), 0.5, (prompts, rollout.samples))
    lengths = np.clip(np.round(lengths), 1, longest).astype(int)
    tokens = rng.integers(model_cfg.sampleable_vocab_size, size=(*lengths.shape, longest), dtype=np.int32)
    completions = Rollout(
        tokens=tokens,
        logps=np.full(tokens.shape, -math.log(model_cfg.vocab_size), np.float32),  # about what random weights return
        lengths=lengths,
        truncated=np.zeros(lengths.shape, bool),
        prompt_ids=np.arange(prompts),
    )
    encoded = pad_prompts([rng.integers(model_cfg.sampleable_vocab_size, size=n).tolist() for n in prompt_lengths])
    experience = make_experience(encoded, completions)
    rewards = jnp.asarray(rng.standard_normal(lengths.shape), jnp.float32)
    experience = experience.replace(
        advantages=np.asarray(advantages(rewards)).reshape(-1), ref_logps=experience.sampler_logps
    )
    return pack_rows(cfg, learner.mesh, experience, rollout.prompts * rollout.samples)


def needed_tflop(learner: Learner, batch: PackedBatch) -> float:
    """Returns the floating-point operations that an update needs for this batch, in 1e12."""
    shapes = jax.eval_shape(lambda params: place_for_rollout(learner.model_cfg, params), learner.state.params)
    positions = batch.segments.position[batch.segments.prompt > 0]
    return 3 * forward_flops(learner.model_cfg, shapes, positions, int((batch.flat_index >= 0).sum())) / 1e12


def time_updates(program, state: TrainState, batch: PackedBatch, seconds_left) -> tuple[TrainState, float]:
    """Returns the state after a few updates and the mean of their seconds, without the warm-up update.

    Raises:
        RuntimeError: An update was skipped.
    """
    state, _ = jax.block_until_ready(program(state, batch.replace(num_micro_batches=np.int32(1))))  # warms up
    seconds = []
    while not seconds or (len(seconds) < REPEATS and seconds_left() > 2 * seconds[-1]):
        (state, _), update_s = timed(program, state, batch)
        seconds.append(update_s)
    if state.skipped:
        raise RuntimeError("A gradient was not finite, so its update was skipped.")
    return state, statistics.mean(seconds)


def peak_gib() -> dict[str, float]:
    """Returns the field `peak_gib`, if the device reports its peak memory."""
    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_gib": stats["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in stats else {}


def measure_rows(sizes: UpdateSizes, small: bool, seconds_left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yields a line per row length."""
    configs = [make_config(sizes, row_tokens) for row_tokens in sizes.row_tokens]
    learner = random_learner(shrink(QWEN_1_5B) if small else QWEN_1_5B, configs[0])  # the update is the same for all
    jax.set_mesh(learner.mesh)
    batches = [make_batch(cfg, learner, sizes.prompts) for cfg in configs]
    product = square_gflop_s(learner.model_cfg.compute_dtype, 5) / 1e3
    needed = [needed_tflop(learner, batch) for batch in batches]
    state, learner, longest = learner.state, learner._replace(state=None), 0.0  # updates donate the state
    for batch, tflop in zip(batches, needed, strict=True):
        start, (rows, width) = time.perf_counter(), (int(batch.num_micro_batches), batch.tokens.shape[1])
        if seconds_left() < longest:
            yield {"left_out": f"rows of {width}", "reason": "no time"}
            continue
        on_device = shard_rows(learner.mesh, batch)
        program = learner.update.lower(state, on_device).compile()
        compile_s = time.perf_counter() - start
        state, update_s = time_updates(program, state, on_device, seconds_left)
        tokens, mfu = int((batch.segments.prompt > 0).sum()), tflop / update_s / product
        yield {
            "row_tokens": width,
            "rows": rows,
            "tokens": tokens,
            "padding_fraction": 1 - tokens / (rows * width),
            "needed_tflop": tflop,
            "update_s": update_s,
            "product_tflop_s": product,
            "mfu": mfu,
            "temp_gib": temp_gib(program),
            "state_gib": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**30,
            **peak_gib(),
            "compile_s": compile_s,
            **({} if small else {"aim": {"name": f"MFU of an update, rows of {width}", "measured": mfu, "aim": AIM}}),
        }
        longest = max(longest, time.perf_counter() - start)


def measure(small: bool, seconds_left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Yields a line per row length.

    Raises:
        NotHere: The device is a CPU or does not have enough memory.
    """
    require_accelerator(jax.default_backend(), small)
    try:
        yield from measure_rows(SMALL_SIZES if small else UpdateSizes(), small, seconds_left)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise NotHere("the train state and an update do not fit in the device's memory") from error
