"""Measures drift, how far the sampler's log-probs are from the trainer's, by depth of the context."""

from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Float

from grpo_jax.config.schema import LossSection
from grpo_jax.learn.packing import packed_shape, unpack_completions
from grpo_jax.learn.update import make_experience, pack_minibatch, score_completions
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.rollout.sampler import generate_rollout, pad_prompts, place_for_rollout
from grpo_jax.text.stops import build_stop_table
from parts.verdicts import BOUNDS, Result, precision, verdict

PROMPTS, SAMPLES, NEW_TOKENS = 2, 2, 256
TEMPERATURE = 0.8  # not 1, so that log-probs differ if the sampler or the trainer ignores it
# Relative to the largest log-prob, which is about as large as the largest logit. Sampler and trainer round in different
# places, so in bfloat16 their errors may add up. In float32 the bound is large enough: a CPU's error is 1e-6.
GAP_BOUNDS = BOUNDS | {"bfloat16": 2 * BOUNDS["bfloat16"]}


def logps_at(model_cfg: ModelConfig, params, depth: int) -> tuple[Float[np.ndarray, "N S"], Float[np.ndarray, "N S"]]:
    """Returns the sampler's and the trainer's log-probs of completions that end at a depth of the context, in nats.

    Prompts are random tokens. Their length must be a multiple of 128, because attention kernels need that. The KV cache
    grows once at a depth of 512. At larger ones it has a single size, so that few programs are compiled.
    """
    prompt_tokens = depth - NEW_TOKENS
    ids = np.random.default_rng(depth).integers(model_cfg.sampleable_vocab_size, size=(PROMPTS, prompt_tokens))
    prompts = pad_prompts(ids.tolist())
    rollout = generate_rollout(
        model_cfg,
        place_for_rollout(model_cfg, params),
        prompts,
        jax.random.key(0),
        samples=SAMPLES,
        max_tokens=NEW_TOKENS,
        temperature=TEMPERATURE,
        stop_table=build_stop_table(model_cfg.vocab_size, ()),
    )
    experience = make_experience(prompts, rollout)
    width = prompt_tokens + SAMPLES * NEW_TOKENS  # a row holds a prompt and its completions
    shape = packed_shape(PROMPTS * SAMPLES, SAMPLES, prompt_tokens, NEW_TOKENS, width, shards=1)
    batch = pack_minibatch(experience, LossSection(), shape, shards=1)
    logps = score_completions(model_cfg, params, batch, temperature=TEMPERATURE, chunk_tokens=512)
    return experience.sampler_logps, unpack_completions(np.asarray(logps), batch.flat_index, experience.mask.shape)


def check_depth(model_cfg: ModelConfig, params, depth: int) -> Iterator[Result]:
    """Compares the sampler's and the trainer's log-probs at a depth."""
    dtype = model_cfg.compute_dtype
    with precision(dtype):
        sampler, trainer = logps_at(replace(model_cfg, max_positions=depth), params, depth)
    gaps = np.abs(sampler - trainer)
    fields = dict(depth=depth, mean_gap=float(gaps.mean()), max_gap=float(gaps.max()))
    yield verdict("depth", dtype, gaps.max() / np.abs(trainer).max(), GAP_BOUNDS[dtype], **fields)
