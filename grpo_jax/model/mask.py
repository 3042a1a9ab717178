"""Attention masks and a reference implementation of attention.

See blockwise.py and kernels.py for implementations that do not hold all scores in memory at once.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.model.architecture import NO_WINDOW
from grpo_jax.types import Segments


def single_sequence(position: Int[Array, "N L"], real: Bool[Array, "N L"] | None = None) -> Segments:
    """Builds `Segments` for rows that each hold a single sequence. Positions where `real` is False are padding."""
    prompt = jnp.ones_like(position) if real is None else real.astype(position.dtype)
    return Segments(position, prompt, jnp.zeros_like(position))


def attention_mask(queries: Segments, keys: Segments, window: int | Int[Array, ""] = NO_WINDOW) -> Bool[Array, "N L C"]:
    """Returns the attention mask: `[n, l, c]` is True where query `l` of row `n` attends to key `c`.

    A token attends to its prompt and, if it belongs to a completion, to that completion; in both to tokens at its own
    position or before, at most `window` of them. Nothing attends to padding. The mask depends on segment ids and
    positions only, not on the order of tokens within a row.
    """
    same_prompt = (queries.prompt[:, :, None] == keys.prompt[:, None, :]) & (keys.prompt > 0)[:, None, :]
    same_completion = queries.completion[:, :, None] == keys.completion[:, None, :]
    visible = same_prompt & (same_completion | (keys.completion == 0)[:, None, :])
    distance = queries.position[:, :, None] - keys.position[:, None, :]
    return visible & (distance >= 0) & (distance < window)


def attention_scores(q: Float[Array, "N L H E"], keys: Float[Array, "N K E C"]) -> Float[Array, "N K R L C"]:
    """Computes `q @ keys` in float32. Each key head serves R = H / K consecutive query heads."""
    rows, length, _, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    grouped = jnp.moveaxis(q, 1, 2).reshape(rows, num_kv_heads, -1, head_dim)  # one matrix [R * L, E] per key head
    scores = jnp.matmul(grouped, keys, preferred_element_type=jnp.float32)
    return scores.reshape(rows, num_kv_heads, -1, length, keys.shape[-1])


def soft_cap(x: Float[Array, "*shape"], cap: float) -> Float[Array, "*shape"]:
    """Returns `cap * tanh(x / cap)`, which lies between -cap and cap, or x if `cap` is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


def weighted_values(
    scores: Float[Array, "N K R L C"],
    values: Float[Array, "N K C _"],
    mask: Bool[Array, "N L C"],
    *,
    divisor: float,
    softcap: float = 0.0,
) -> Float[Array, "N L H _"]:
    """Computes `softmax(scores) @ values`. A query that attends to no key gets the mean of all values.

    Args:
        scores: Products of queries and keys, from `attention_scores`.
        values: The values, one head per key head.
        mask: True where a query attends to a key.
        divisor: Divides the scores.
        softcap: The cap of the divided scores (see `soft_cap`); 0 for none.

    Returns:
        The output of each query head, in the dtype of `values`.
    """
    scores = soft_cap(scores / divisor, softcap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    rows, num_kv_heads, _, length, num_keys = probs.shape
    out = jnp.matmul(probs.reshape(rows, num_kv_heads, -1, num_keys), values)
    return jnp.moveaxis(out.reshape(rows, -1, length, out.shape[-1]), 1, 2)


def plain_attention(
    q: Float[Array, "N L H E"],
    keys: Float[Array, "N K E C"],
    values: Float[Array, "N K C _"],
    mask: Bool[Array, "N L C"],
    *,
    divisor: float,
    softcap: float = 0.0,
) -> Float[Array, "N L H _"]:
    """Computes attention with all scores in memory: the reference that other implementations are tested against.

    The arguments are those of `attention_scores` and `weighted_values`.
    """
    return weighted_values(attention_scores(q, keys), values, mask, divisor=divisor, softcap=softcap)
