"""Measures decode steps without prefill.

Compiling prefill would take longer than measuring the decode steps. The KV cache of the prompts is therefore random;
everything else is as `grpo_jax.rollout.sampler.start_rollout` returns it.
"""

import statistics
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.attention import KV
from grpo_jax.model.decoder import param_shapes
from grpo_jax.rollout.draws import NO_FILTER
from grpo_jax.rollout.sampler import place_for_rollout
from grpo_jax.rollout.slots import DecodeState, RolloutQueue, decode_tokens
from grpo_jax.text.problem import Prompts
from grpo_jax.text.stops import build_stop_table
from parts.shapes import random_params

WARM_UP_STEPS, REPEATS = 8, 3


class RolloutSizes(NamedTuple):
    """The sizes of a rollout in which every sequence has a decode slot, and all prompts have the same length."""

    slots: int
    samples: int = 16  # completions per prompt; divides `slots`
    prompt_tokens: int = 512
    columns: int = 768  # of the KV cache: its first size in a rollout of up to 1,024 new tokens

    @property
    def max_tokens(self) -> int:
        """Returns the most tokens that a completion, and thus a measurement, may have."""
        return self.columns - self.prompt_tokens


def random_prompts(model_cfg: ModelConfig, sizes: RolloutSizes) -> Prompts:
    """Returns prompts of random tokens."""
    shape = sizes.slots // sizes.samples, sizes.prompt_tokens
    tokens = np.random.default_rng(0).integers(model_cfg.sampleable_vocab_size, size=shape, dtype=np.int32)
    return Prompts(tokens, np.full(len(tokens), shape[1], np.int32), np.arange(len(tokens), dtype=np.int32))


@partial(jax.jit, static_argnames=("model_cfg", "sizes"))
def random_prompt_kv(model_cfg: ModelConfig, sizes: RolloutSizes, key) -> KV:
    """Returns random keys and values of all prompts, for one layer."""
    lead, width = (1, sizes.slots // sizes.samples, model_cfg.num_kv_heads), model_cfg.head_dim
    shapes = (*lead, width, sizes.prompt_tokens), (*lead, sizes.prompt_tokens, width)
    return KV(*(jax.random.uniform(key, shape, model_cfg.compute_dtype, -1, 1) for shape in shapes))


@partial(jax.jit, static_argnames=("sizes",))
def fill_cache(sizes: RolloutSizes, prompt_kv: KV) -> KV:
    """Returns the KV cache of one layer: each prompt's keys and values in the slots of its completions."""
    k, v = (jnp.repeat(x, sizes.samples, axis=1) for x in prompt_kv)
    free = 0, sizes.max_tokens
    return KV(jnp.pad(k, [(0, 0)] * 4 + [free]), jnp.pad(v, [(0, 0)] * 3 + [free, (0, 0)]))


@jax.jit
def sequence_keys(key, prompt_ids, sample_ids):
    """Returns the random key of each sequence."""
    fold = jax.vmap(jax.random.fold_in)
    return fold(fold(jnp.broadcast_to(key, prompt_ids.shape), prompt_ids), sample_ids)


def start_decoding(
    sizes: RolloutSizes, prompts: Prompts, prompt_kv: tuple[KV, ...], key
) -> tuple[DecodeState, RolloutQueue]:
    """Returns what `start_rollout` returns, given the keys and values of the prompts, one `KV` per layer."""
    count, sequence = sizes.slots, np.arange(sizes.slots, dtype=np.int32)
    prompt_index, sample_ids = np.divmod(sequence, np.int32(sizes.samples))

    def filled(value, *shape, dtype=np.int32):
        return jnp.asarray(np.full(shape, value, dtype))

    queue = RolloutQueue(
        prompts=jax.tree.map(jnp.asarray, prompts),
        prompt_kv=prompt_kv,
        prompt_index=jnp.asarray(prompt_index),
        limits=filled(sizes.max_tokens, count),
        keys=sequence_keys(key, prompts.ids[prompt_index], sample_ids),
    )
    state = DecodeState(
        kv_cache=tuple(fill_cache(sizes, kv) for kv in prompt_kv),
        sequence=jnp.asarray(sequence),
        last_token=jnp.asarray(prompts.tokens[prompt_index, -1]),
        position=filled(sizes.prompt_tokens - 1, count),
        num_sampled=filled(0, count),
        stop_state=filled(0, count),
        num_started=filled(count, 1),
        longest=filled(sizes.prompt_tokens),
        tokens=filled(0, count, sizes.max_tokens),
        logps=filled(0, count, sizes.max_tokens, dtype=np.float32),
        lengths=filled(0, count),
        stopped=filled(0, count),
    )
    return state, queue


def random_decoding(model_cfg: ModelConfig, sizes: RolloutSizes) -> tuple[DecodeState, RolloutQueue]:
    """Returns the state and the queue of a rollout of random prompts."""
    keys = jax.random.split(jax.random.key(0, impl="rbg"), model_cfg.num_layers)
    prompt_kv = tuple(random_prompt_kv(model_cfg, sizes, key) for key in keys)
    return start_decoding(sizes, random_prompts(model_cfg, sizes), prompt_kv, jax.random.key(1))


def place_random_params(model_cfg: ModelConfig, mesh: Mesh | None) -> dict:
    """Returns random parameters, placed for the rollout like those of a float32 policy."""
    return place_for_rollout(model_cfg, random_params(model_cfg, "float32"), mesh)


def lower_decode(model_cfg: ModelConfig, sizes: RolloutSizes):
    """Lowers `decode_tokens` for the current mesh, without allocating its arguments."""
    params = jax.eval_shape(lambda params: place_for_rollout(model_cfg, params), param_shapes(model_cfg))
    state, queue = jax.eval_shape(partial(random_decoding, model_cfg, sizes))
    stop_table = build_stop_table(model_cfg.vocab_size, ())
    scalars = np.float32(1), np.int32(0), np.int32(0)
    return decode_tokens.lower(model_cfg, params, state, queue, stop_table, *scalars, greedy=False, filter=NO_FILTER)


def decode_ms(program, model_cfg: ModelConfig, sizes: RolloutSizes, params, steps: int) -> float:
    """Returns the milliseconds of a decode step: the median of `REPEATS` runs of the compiled loop.

    Args:
        program: The compiled result of `lower_decode`.
        model_cfg: The model.
        sizes: The sizes of the rollout.
        params: Parameters placed for the rollout.
        steps: Number of steps per run. Each run continues where the previous one ended, and all come after
            `WARM_UP_STEPS` warm-up steps.

    Raises:
        RuntimeError: Not every slot has sampled a token in every step.
    """
    state, queue = random_decoding(model_cfg, sizes)
    stop_table, milliseconds = jnp.asarray(build_stop_table(model_cfg.vocab_size, ())), []
    for count in [WARM_UP_STEPS] + [steps] * REPEATS:
        start = time.perf_counter()
        state = program(params, state, queue, stop_table, np.float32(1), np.int32(0), np.int32(count))
        jax.block_until_ready(state)
        milliseconds.append(1e3 * (time.perf_counter() - start) / count)
    sampled = np.asarray(state.num_sampled)
    if (sampled != WARM_UP_STEPS + steps * REPEATS).any():
        raise RuntimeError(f"Every slot must sample a token per step; one has sampled {sampled.min()} in all.")
    return statistics.median(milliseconds[1:])


def live_columns(sizes: RolloutSizes, steps: int) -> float:
    """Returns the number of columns that a slot attends to, averaged over the steps that `decode_ms` times."""
    return sizes.prompt_tokens + WARM_UP_STEPS + (steps * REPEATS - 1) / 2
