"""Exact attention in memory that grows with the row's length, not with its square (FlashAttention, arXiv 2205.14135).

A block of queries meets one block of keys after another, and only the blocks in which one of them sees something. What
was summed up so far is scaled down whenever a larger score turns up, which makes the end result that of a softmax over
all keys. Backwards the probabilities are computed again, from the logarithm of each query's sum, lse:

    p = exp(score - lse)     dvalues = p^T dout     dscore = p (dout values^T - dout out^T)

with dout the gradient with respect to the query's output. Queries are taken K heads and block * R rows at a time, R
heads sharing their keys: [N, K, R * block, _]. Every product is one of matrices as they lie in memory, [.., m, k] by
[.., k, n]: XLA on a CPU needs up to four times longer for the others, and transposing the operands once is nothing.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.model.mask import attention_mask
from grpo_jax.types import Segments

BLOCK_SIZE = 128  # queries, and keys, at a time
MIN_SCORE = -1e30  # below every score, and finite: -inf, a hidden key's score, minus it is defined


class BlockPlan(NamedTuple):
    """Which of J blocks of keys each of I blocks of queries needs, in any row."""

    order: Int[Array, "I J"]  # the needed blocks of keys first
    count: Int[Array, " I"]  # how many are needed


class MaskInputs(NamedTuple):
    """All that decides who sees whom; no gradients go here."""

    queries: Segments
    keys: Segments
    window: Int[Array, ""]
    plan: BlockPlan


def plan_blocks(queries: Segments, keys: Segments, window: int | Int[Array, ""]) -> BlockPlan:
    """A block of queries needs a block of keys if, in any row, any of its queries sees any of its keys."""
    queries, keys = pad_to_blocks(queries, 1), pad_to_blocks(keys, 1)

    def needed(block):  # one after another: all at once would hold [N, L, C]
        seen = attention_mask(take_block(queries, block, BLOCK_SIZE, 1), keys, window)
        return seen.reshape(*seen.shape[:2], -1, BLOCK_SIZE).any(axis=(0, 1, 3))

    needs = jax.lax.map(needed, jnp.arange(queries.prompt.shape[1] // BLOCK_SIZE))
    return BlockPlan(jnp.argsort(~needs, axis=1, stable=True), jnp.sum(needs, axis=1))


def blockwise_attention(
    q: Float[Array, "N L H E"],
    keys: Float[Array, "N K E C"],
    values: Float[Array, "N K C _"],
    queries: Segments,
    key_segments: Segments,
    window: int | Int[Array, ""],
    plan: BlockPlan,
    *,
    divisor: float,
    cap: float = 0.0,
) -> Float[Array, "N L H _"]:
    """attend.plain with the mask attend.sees(queries, key_segments, window); a query that sees nothing gets zeros.

    Args:
      plan: that of the same segments and window, or one with more blocks.
      divisor, cap: as in attend.plain.
    """
    # Tokens that padding adds belong to prompt 0: they see nothing and nothing sees them.
    sight = MaskInputs(pad_to_blocks(queries, 1), pad_to_blocks(key_segments, 1), jnp.asarray(window), plan)
    out = flash_attention(
        BLOCK_SIZE, divisor, cap, pad_to_blocks(q, 1), pad_to_blocks(keys, 3), pad_to_blocks(values, 2), sight
    )
    return out[:, : q.shape[1]]


def pad_to_blocks(arrays, axis: int):
    """Arrays with zeros up to a whole number of blocks along an axis."""
    widths = lambda x: [(0, -size % BLOCK_SIZE if i == axis else 0) for i, size in enumerate(x.shape)]
    return jax.tree.map(lambda x: jnp.pad(x, widths(x)), arrays)


def take_block(arrays, block: Int[Array, ""], size: int, axis: int):
    """Arrays' tokens in one block, tokens lying along an axis."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, block * size, size, axis), arrays)


def group_heads(x: Float[Array, "N _ H _"], heads: int) -> Float[Array, "N K _ _"]:
    """[N, block, H, _] -> [N, K, R * block, _]: one matrix a key head."""
    return jnp.moveaxis(x, 1, 2).reshape(x.shape[0], heads, -1, x.shape[-1])


def ungroup_heads(x: Float[Array, "N K _ _"], size: int) -> Float[Array, "N _ H _"]:
    """[N, K, R * block, _] -> [N, block, H, _]."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, x.shape[-1]), 2, 1)


def join_blocks(blocks: Float[Array, "I N _ H _"]) -> Float[Array, "N L H _"]:
    """[I, N, block, H, _] -> [N, L, H, _]."""
    return jnp.moveaxis(blocks, 0, 1).reshape(blocks.shape[1], -1, *blocks.shape[3:])


def transpose_last_two(x):
    return jnp.swapaxes(x, -1, -2)


def matmul_float32(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def zeros_varying_like(shape, like):
    """Sums before the first block. In shard_map they vary along the mesh's axes as `like` does, as the sums will."""
    return jnp.zeros_like(like, jnp.float32, shape)


def block_scores(q, keys, divisor: float, cap: float) -> Float[Array, "N K _ _"]:
    """[N, K, R * block, E], [N, K, E, block] -> [N, K, R * block, block], in float32 and before the mask."""
    scores = matmul_float32(q, keys) / divisor
    return cap * jnp.tanh(scores / cap) if cap else scores


def mask_scores(scores: Float[Array, "N K _ _"], mask: Bool[Array, "N _ _"]) -> Float[Array, "N K _ _"]:
    """The scores [N, K, R * block, block], -inf where the mask [N, block, block] is False."""
    grouped = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], grouped, -jnp.inf).reshape(scores.shape)


def flash_forward(size, divisor, cap, q, keys, values, sight):
    """The output [N, L, H, _], and lse by blocks, [I, N, K, R * block, 1]."""

    def of_queries(block):
        segments = take_block(sight.queries, block, size, 1)
        q_block = group_heads(take_block(q, block, size, 1), keys.shape[1])

        def meet(number, state):
            top, total, out = state  # the largest score, the sum of exp(score - top), that of exp(score - top) value
            other = sight.plan.order[block, number]
            mask = attention_mask(segments, take_block(sight.keys, other, size, 1), sight.window)
            scores = mask_scores(block_scores(q_block, take_block(keys, other, size, 3), divisor, cap), mask)
            higher = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            probs, shrink = jnp.exp(scores - higher), jnp.exp(top - higher)
            total = total * shrink + jnp.sum(probs, axis=-1, keepdims=True)
            return (
                higher,
                total,
                out * shrink + matmul_float32(probs.astype(values.dtype), take_block(values, other, size, 2)),
            )

        zero = zeros_varying_like((*q_block.shape[:-1], 1), q)
        out = zeros_varying_like((*q_block.shape[:-1], values.shape[-1]), q)
        top, total, out = jax.lax.fori_loop(0, sight.plan.count[block], meet, (zero + MIN_SCORE, zero, out))
        total = jnp.where(total > 0, total, 1.0)  # 0: such a query sees nothing
        return ungroup_heads((out / total).astype(values.dtype), size), top + jnp.log(total)

    out, lse = jax.lax.map(of_queries, jnp.arange(q.shape[1] // size))
    return join_blocks(out), lse


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def flash_attention(size, divisor, cap, q, keys, values, sight):
    """`blockwise` of whole blocks of `size` tokens."""
    return flash_forward(size, divisor, cap, q, keys, values, sight)[0]


def flash_attention_fwd(size, divisor, cap, q, keys, values, sight):
    # Named, so that a layer that is computed again backwards can keep them: they cost the most and weigh the least.
    out, lse = checkpoint_name(flash_forward(size, divisor, cap, q, keys, values, sight), "attention")
    return out, (q, keys, values, sight, out, lse)


def flash_attention_bwd(size, divisor, cap, residuals, dout):
    q, keys, values, sight, out, lse = residuals
    swapped_keys, swapped_values = transpose_last_two(keys), transpose_last_two(values)
    along = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)  # dout out^T

    def of_queries(sums, block_and_lse):
        block, lse = block_and_lse
        segments = take_block(sight.queries, block, size, 1)
        q_block, dout_block, along_block = (
            group_heads(take_block(x, block, size, 1), keys.shape[1]) for x in (q, dout, along)
        )
        swapped_q, swapped_dout = transpose_last_two(q_block), transpose_last_two(dout_block)

        def meet(number, state):
            dq, dkeys, swapped_dvalues = state
            other = sight.plan.order[block, number]
            mask = attention_mask(segments, take_block(sight.keys, other, size, 1), sight.window)
            scores = block_scores(q_block, take_block(keys, other, size, 3), divisor, cap)
            probs = jnp.exp(mask_scores(scores, mask) - lse)
            dscores = probs * (matmul_float32(dout_block, take_block(swapped_values, other, size, 3)) - along_block)
            if cap:
                dscores *= 1 - jnp.square(scores / cap)
            probs, dscores = probs.astype(values.dtype), dscores.astype(q.dtype)

            def add(total, new):  # XLA does this in place
                return jax.lax.dynamic_update_slice_in_dim(
                    total, take_block(total, other, size, 3) + new, other * size, 3
                )

            dq += matmul_float32(dscores, take_block(swapped_keys, other, size, 2))
            return (
                dq,
                add(dkeys, matmul_float32(swapped_q, dscores)),
                add(swapped_dvalues, matmul_float32(swapped_dout, probs)),
            )

        dq = zeros_varying_like(q_block.shape, q)
        dq, *sums = jax.lax.fori_loop(0, sight.plan.count[block], meet, (dq, *sums))
        return tuple(sums), ungroup_heads((dq / divisor).astype(q.dtype), size)

    sums = zeros_varying_like(keys.shape, q), zeros_varying_like(swapped_values.shape, q)
    (dkeys, swapped_dvalues), dq = jax.lax.scan(of_queries, sums, (jnp.arange(len(lse)), lse))
    return (
        join_blocks(dq),
        (dkeys / divisor).astype(keys.dtype),
        transpose_last_two(swapped_dvalues).astype(values.dtype),
        None,
    )


flash_attention.defvjp(flash_attention_fwd, flash_attention_bwd)
