"""A random model of a few thousand parameters, and rollouts made up for it."""

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.architecture import Layer, ModelConfig
from grpo_jax.model import init_params
from grpo_jax.types import Experience

CONFIG = ModelConfig(
    vocab_size=48, hidden_size=32, intermediate_size=48, layers=(Layer(),) * 2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_positions=64, tie_embeddings=False, token_count=45, eos_ids=(0,))


def params(config=CONFIG, seed=0):
    """Random parameters whose norms are not all 1, so that they matter."""
    made = init_params(config, jax.random.key(seed))
    noise = lambda path, x: x + 0.2 * jax.random.normal(jax.random.key(len(str(path))), x.shape)
    return jax.tree_util.tree_map_with_path(lambda p, x: noise(p, x) if "scale" in str(p) else x, made)


def experience(rows=8, prompt=5, sampled=6, seed=0, config=CONFIG) -> Experience:
    """Rows of unequal lengths, off-policy log-probs, advantages of both signs."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, prompt + 1, rows)
    drawn = draw.integers(1, sampled + 1, rows)
    tokens = draw.integers(1, config.token_count, (rows, prompt + sampled))
    columns = np.arange(prompt + sampled)
    tokens = np.where(columns < (lengths + drawn)[:, None], tokens, 0)
    logps = -2 - draw.random((rows, sampled))
    return Experience(
        tokens=jnp.asarray(tokens, jnp.int32), prompt_lengths=jnp.asarray(lengths, jnp.int32),
        mask=jnp.asarray(np.arange(sampled) < drawn[:, None]), sampler_logps=jnp.asarray(logps, jnp.float32),
        ref_logps=jnp.asarray(logps + 0.3 * draw.standard_normal(logps.shape), jnp.float32),
        advantages=jnp.asarray(draw.standard_normal(rows), jnp.float32))
