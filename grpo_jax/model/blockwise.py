"""Exact attention in memory linear in the row length (FlashAttention, arXiv 2205.14135), in plain XLA operations.

Each block of queries visits the blocks of keys that any of its queries attends to, and no others. The softmax is
accumulated online: whenever a block raises a query's maximum score, the sums so far are rescaled. The backward pass
recomputes the probabilities from `lse`, the log-sum-exp of each query's scores:

    p = exp(score - lse)     dvalues = p^T dout     dscore = p (dout values^T - dout out^T)

where `dout` is the gradient with respect to the output. The R query heads that share a key head are stacked into one
matrix: blocks of queries have shape [N, K, R * block, _]. All matrix products are [.., m, k] by [.., k, n] in their
memory layout, because XLA on a CPU is up to four times slower on transposed operands and transposing an array once
costs next to nothing.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.model.mask import attention_mask, soft_cap
from grpo_jax.types import Segments

BLOCK_SIZE = 128  # tokens in a block of queries or keys
MIN_SCORE = -1e30  # initial maximum; finite, so that subtracting it from the -inf of a masked score is defined


class BlockPlan(NamedTuple):
    """For each of I blocks of queries, which of J blocks of keys it visits, in any row of the batch."""

    order: Int[Array, "I J"]  # indices of the key blocks, needed ones first
    num_needed: Int[Array, " I"]


class MaskInputs(NamedTuple):
    """The inputs that determine the mask. None of them has a gradient."""

    queries: Segments
    keys: Segments
    window: Int[Array, ""]
    plan: BlockPlan


def plan_blocks(queries: Segments, keys: Segments, window: int | Int[Array, ""]) -> BlockPlan:
    """Finds the blocks of keys that each block of queries needs: those with a key that any query attends to."""
    queries, keys = pad_to_blocks(queries, 1), pad_to_blocks(keys, 1)

    def needed_by(query_block):
        mask = attention_mask(take_block(queries, query_block, BLOCK_SIZE, 1), keys, window)
        return mask.reshape(*mask.shape[:2], -1, BLOCK_SIZE).any(axis=(0, 1, 3))

    # One block of queries at a time: the mask of all queries would take [N, L, C].
    needed = jax.lax.map(needed_by, jnp.arange(queries.prompt.shape[1] // BLOCK_SIZE))
    return BlockPlan(jnp.argsort(~needed, axis=1, stable=True), jnp.sum(needed, axis=1))


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
    softcap: float = 0.0,
) -> Float[Array, "N L H _"]:
    """Computes `plain_attention` with the mask `attention_mask(queries, key_segments, window)`, block by block.

    Unlike in `plain_attention`, the output of a query that attends to no key is zero.

    Args:
        q: Query heads.
        keys: Key heads.
        values: Value heads.
        queries: The segments of the queries.
        key_segments: The segments of the keys.
        window: The sliding window.
        plan: The result of `plan_blocks` for the same segments and window, or a plan that visits more blocks.
        divisor: Divides the scores.
        softcap: As in `weighted_values`.
    """
    # Tokens added by padding have prompt id 0: they attend to nothing and nothing attends to them.
    mask_inputs = MaskInputs(pad_to_blocks(queries, 1), pad_to_blocks(key_segments, 1), jnp.asarray(window), plan)
    padded = pad_to_blocks(q, 1), pad_to_blocks(keys, 3), pad_to_blocks(values, 2)
    return flash_attention(BLOCK_SIZE, divisor, softcap, *padded, mask_inputs)[:, : q.shape[1]]


def pad_to_blocks(arrays, axis: int):
    """Pads every array with zeros along `axis` to a whole number of blocks."""

    def pad(x):
        return jnp.pad(x, [(0, -size % BLOCK_SIZE if i == axis else 0) for i, size in enumerate(x.shape)])

    return jax.tree.map(pad, arrays)


def take_block(arrays, index: Int[Array, ""], size: int, axis: int):
    """Returns block `index`, of `size` elements along `axis`, of every array."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size, axis), arrays)


def add_to_block(total, update, index: Int[Array, ""], size: int, axis: int):
    """Adds `update` to block `index` of `total`. XLA does so in place."""
    updated = take_block(total, index, size, axis) + update
    return jax.lax.dynamic_update_slice_in_dim(total, updated, index * size, axis)


def group_heads(x: Float[Array, "N _ H _"], num_kv_heads: int) -> Float[Array, "N K _ _"]:
    """Reshapes [N, block, H, _] to [N, K, R * block, _]: one matrix per key head."""
    return jnp.moveaxis(x, 1, 2).reshape(x.shape[0], num_kv_heads, -1, x.shape[-1])


def ungroup_heads(x: Float[Array, "N K _ _"], size: int) -> Float[Array, "N _ H _"]:
    """Reshapes [N, K, R * block, _] to [N, block, H, _], with blocks of `size` tokens."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, x.shape[-1]), 2, 1)


def join_blocks(blocks: Float[Array, "I N _ H _"]) -> Float[Array, "N L H _"]:
    """Concatenates blocks of tokens, [I, N, block, H, _] to [N, L, H, _]."""
    return jnp.moveaxis(blocks, 0, 1).reshape(blocks.shape[1], -1, *blocks.shape[3:])


def matmul_float32(a, b):
    """Multiplies matrices with a float32 result."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def zeros_varying_like(shape, like):
    """Returns float32 zeros to accumulate in. Inside shard_map they vary over the same mesh axes as `like`."""
    return jnp.zeros_like(like, jnp.float32, shape)


def block_scores(q, keys, divisor: float, softcap: float) -> Float[Array, "N K _ _"]:
    """Computes float32 scores before masking, [N, K, R * block, E] and [N, K, E, block] to [N, K, R * block, block]."""
    return soft_cap(matmul_float32(q, keys) / divisor, softcap)


def mask_scores(scores: Float[Array, "N K _ _"], mask: Bool[Array, "N _ _"]) -> Float[Array, "N K _ _"]:
    """Sets scores [N, K, R * block, block] to -inf where the mask [N, block, block] is False."""
    grouped = scores.reshape(*scores.shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], grouped, -jnp.inf).reshape(scores.shape)


def flash_forward(size, divisor, softcap, q, keys, values, mask_inputs):
    """Returns the output [N, L, H, _] and the log-sum-exp of the scores by query block, [I, N, K, R * block, 1]."""
    plan = mask_inputs.plan

    def attend_block(query_block):
        segments = take_block(mask_inputs.queries, query_block, size, 1)
        q_block = group_heads(take_block(q, query_block, size, 1), keys.shape[1])

        def visit(step, state):
            # The maximum score so far, the sum of exp(score - maximum), and the sum of exp(score - maximum) * value.
            top, total, out = state
            key_block = plan.order[query_block, step]
            mask = attention_mask(segments, take_block(mask_inputs.keys, key_block, size, 1), mask_inputs.window)
            scores = mask_scores(block_scores(q_block, take_block(keys, key_block, size, 3), divisor, softcap), mask)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            probs, rescale = jnp.exp(scores - new_top), jnp.exp(top - new_top)
            total = total * rescale + jnp.sum(probs, axis=-1, keepdims=True)
            update = matmul_float32(probs.astype(values.dtype), take_block(values, key_block, size, 2))
            return new_top, total, out * rescale + update

        zero = zeros_varying_like((*q_block.shape[:-1], 1), q)
        out = zeros_varying_like((*q_block.shape[:-1], values.shape[-1]), q)
        with jax.named_scope("key_blocks"):
            start = zero + MIN_SCORE, zero, out
            top, total, out = jax.lax.fori_loop(0, plan.num_needed[query_block], visit, start)
        total = jnp.where(total > 0, total, 1.0)  # 0 where a query attends to no key
        return ungroup_heads((out / total).astype(values.dtype), size), top + jnp.log(total)

    out, lse = jax.lax.map(attend_block, jnp.arange(q.shape[1] // size))
    return join_blocks(out), lse


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def flash_attention(size, divisor, softcap, q, keys, values, mask_inputs):
    """Computes `blockwise_attention` for lengths that are multiples of the block `size`."""
    return flash_forward(size, divisor, softcap, q, keys, values, mask_inputs)[0]


def flash_attention_fwd(size, divisor, softcap, q, keys, values, mask_inputs):
    """Computes `flash_attention` and the residuals of its backward pass."""
    # Named, so that remat policies can save them: no other activations cost as much to recompute per byte.
    out, lse = checkpoint_name(flash_forward(size, divisor, softcap, q, keys, values, mask_inputs), "attention")
    return out, (q, keys, values, mask_inputs, out, lse)


def flash_attention_bwd(size, divisor, softcap, residuals, dout):
    """Computes the gradients of `flash_attention` with respect to q, keys and values."""
    q, keys, values, mask_inputs, out, lse = residuals
    plan = mask_inputs.plan
    keys_t, values_t = keys.mT, values.mT
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)  # dout out^T

    def backward_block(kv_grads, block_and_lse):
        query_block, lse = block_and_lse
        segments = take_block(mask_inputs.queries, query_block, size, 1)
        q_block, dout_block, delta_block = (
            group_heads(take_block(x, query_block, size, 1), keys.shape[1]) for x in (q, dout, delta)
        )
        q_block_t, dout_block_t = q_block.mT, dout_block.mT

        def visit(step, grads):
            dq, dkeys, dvalues_t = grads
            key_block = plan.order[query_block, step]
            mask = attention_mask(segments, take_block(mask_inputs.keys, key_block, size, 1), mask_inputs.window)
            scores = block_scores(q_block, take_block(keys, key_block, size, 3), divisor, softcap)
            probs = jnp.exp(mask_scores(scores, mask) - lse)
            dscores = probs * (matmul_float32(dout_block, take_block(values_t, key_block, size, 3)) - delta_block)
            if softcap:
                dscores *= 1 - jnp.square(scores / softcap)
            probs, dscores = probs.astype(values.dtype), dscores.astype(q.dtype)
            dq += matmul_float32(dscores, take_block(keys_t, key_block, size, 2))
            dkeys = add_to_block(dkeys, matmul_float32(q_block_t, dscores), key_block, size, 3)
            dvalues_t = add_to_block(dvalues_t, matmul_float32(dout_block_t, probs), key_block, size, 3)
            return dq, dkeys, dvalues_t

        grads = zeros_varying_like(q_block.shape, q), *kv_grads
        with jax.named_scope("key_blocks"):
            dq, *kv_grads = jax.lax.fori_loop(0, plan.num_needed[query_block], visit, grads)
        return tuple(kv_grads), ungroup_heads((dq / divisor).astype(q.dtype), size)

    kv_grads = zeros_varying_like(keys.shape, q), zeros_varying_like(values_t.shape, q)
    (dkeys, dvalues_t), dq = jax.lax.scan(backward_block, kv_grads, (jnp.arange(len(lse)), lse))
    dkeys, dvalues = (dkeys / divisor).astype(keys.dtype), dvalues_t.mT.astype(values.dtype)
    return join_blocks(dq), dkeys, dvalues, None


flash_attention.defvjp(flash_attention_fwd, flash_attention_bwd)
