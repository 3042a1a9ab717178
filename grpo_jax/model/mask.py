"""Who sees whom, and attention as it is defined. Faster ways of the same are in blockwise.py and kernels.py."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.types import Segments

NO_WINDOW = 2**30  # a window that hides nothing


def single_sequence(position: Int[Array, "N L"], real: Bool[Array, "N L"] | None = None) -> Segments:
    """The segments of rows that are one sequence each; what is not `real` is padding."""
    prompt = jnp.ones_like(position) if real is None else real.astype(position.dtype)
    return Segments(position, prompt, jnp.zeros_like(position))


def attention_mask(queries: Segments, keys: Segments, window: int | Int[Array, ""] = NO_WINDOW) -> Bool[Array, "N L C"]:
    """[n, l, c] is True where query l of row n sees key c.

    A token sees the tokens of its prompt and, if it belongs to a completion, those of that completion, from itself
    backwards; at most `window` of them. Nothing is said of the order in which the tokens lie in their row.
    """
    across = lambda compare, name: compare(getattr(queries, name)[:, :, None], getattr(keys, name)[:, None, :])
    back = across(jnp.subtract, "position")
    own = across(jnp.equal, "completion") | (keys.completion == 0)[:, None, :]
    same = across(jnp.equal, "prompt") & (keys.prompt > 0)[:, None, :]
    return same & own & (back >= 0) & (back < window)


def attention_scores(q: Float[Array, "N L H E"], keys: Float[Array, "N K E C"]) -> Float[Array, "N K R L C"]:
    """q k, in float32; R = H / K query heads, one after another, share a key head."""
    rows, length, heads, width = q.shape
    shared = jnp.moveaxis(q, 1, 2).reshape(rows, keys.shape[1], -1, width)  # heads and tokens: one matrix a key head
    scores = jnp.matmul(shared, keys, preferred_element_type=jnp.float32)
    return scores.reshape(rows, keys.shape[1], -1, length, keys.shape[-1])


def weighted_values(
    scores: Float[Array, "N K R L C"],
    values: Float[Array, "N K C _"],
    mask: Bool[Array, "N L C"],
    *,
    divisor: float,
    cap: float = 0.0,
) -> Float[Array, "N L H _"]:
    """softmax(scores) values. A query that sees nothing gets the mean of all values.

    Args:
      divisor: the scores are divided by it,
      cap: and then become cap * tanh(score / cap); 0: no cap.
    """
    scores = scores / divisor
    if cap:
        scores = cap * jnp.tanh(scores / cap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    rows, heads, _, length, columns = probs.shape
    out = jnp.matmul(probs.reshape(rows, heads, -1, columns), values)
    return jnp.moveaxis(out.reshape(rows, -1, length, out.shape[-1]), 1, 2)


def plain_attention(
    q: Float[Array, "N L H E"],
    keys: Float[Array, "N K E C"],
    values: Float[Array, "N K C _"],
    mask: Bool[Array, "N L C"],
    *,
    divisor: float,
    cap: float = 0.0,
) -> Float[Array, "N L H _"]:
    """Attention as it is defined, all scores at once. Arguments as of `score` and `mix`."""
    return weighted_values(attention_scores(q, keys), values, mask, divisor=divisor, cap=cap)
