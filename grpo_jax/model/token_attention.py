"""Attention of one new token per row on GPUs: a kernel that writes the token into the KV cache and attends to it.

A decode step of a small model takes as long as launching its kernels, and XLA would launch five for what this one does.
Each program of the kernel serves one key head of one row, and reads only the columns that the token attends to.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.cache import KV
from grpo_jax.model.mask import soft_cap
from grpo_jax.parallel.mesh import mesh_platform, num_data_shards, row_spec, shard_map_on_mesh

MIN_PROGRAMS = 64  # with fewer, most of a GPU's multiprocessors would be idle
MIN_QUERIES = 16  # rows of the smallest product that Triton computes
BLOCK_ELEMENTS = 8192  # of the keys, and of the values, that a program reads at once


def token_attention_supports(model_cfg: ModelConfig, rows: int, length: int, columns: int) -> bool:
    """Returns whether rows of `length` new tokens and a cache of `columns` columns use `token_attention`.

    The mesh is the current one. Triton needs powers of two, and would round the factors of float32 products. Where the
    keys of a head do not begin at multiples of 16 bytes, it would read them one by one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    heads, tensor = model_cfg.num_kv_heads, 1 if mesh.empty else mesh.shape["tensor"]
    shards = num_data_shards()
    return (
        mesh_platform() == "gpu"
        and model_cfg.attention in ("auto", "cudnn")
        and jnp.dtype(model_cfg.compute_dtype) in (jnp.bfloat16, jnp.float16)
        and model_cfg.latent is None
        and model_cfg.head_dim in (16, 32, 64, 128, 256)
        and length == 1
        and columns % 8 == rows % shards == heads % tensor == 0
        and rows // shards * heads // tensor >= MIN_PROGRAMS
    )


def token_attention(
    q: Float[Array, "N 1 H E"],
    new: KV,
    cache: KV,
    position: Int[Array, "N 1"],
    window: Int[Array, ""],
    *,
    divisor: float,
    softcap: float = 0.0,
    interpret: bool = False,
) -> tuple[Float[Array, "N 1 H E"], KV]:
    """Computes `write_cache`, and `plain_attention` to the columns up to the token's own. The cache changes in place.

    Args:
        q: Query heads.
        new: Keys [N, K, E, 1] and values [N, K, 1, E] of the tokens.
        cache: The cache. Columns after the token's own do not matter.
        position: The column of each row's token, at least 0. Nothing is written into columns that do not exist.
        window: How many columns a token attends to at most, including its own.
        divisor: Divides the scores.
        softcap: As in `weighted_values`.
        interpret: Whether to interpret the kernel operation by operation, which works on any device.

    Returns:
        The output of each query head, and the written cache.
    """

    def attend(q, new_keys, new_values, position, first, keys, values):
        token = jnp.concatenate([q, new_keys, new_values], axis=1)  # one array, which XLA makes with one kernel
        kernel = partial(attend_to_columns, num_heads=q.shape[1], divisor=divisor, softcap=softcap)
        return pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, keys, values)],
            grid=keys.shape[:2],
            input_output_aliases={3: 1, 4: 2},
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
            interpret=interpret,
            name="token_attention",
        )(token, position, first, keys, values)

    by_row = row_spec(q.shape[0])
    by_head = P(*by_row, "tensor")
    position = position[:, 0]
    args = q[:, 0], new.k[..., 0], new.v[:, :, 0], position, jnp.maximum(position - window + 1, 0), *cache
    in_specs = by_head, by_head, by_head, by_row, by_row, by_head, by_head
    out, *written = shard_map_on_mesh(attend, in_specs, (by_head,) * 3)(*args)
    return out[:, None], KV(*written)


def attend_to_columns(
    token_ref, position_ref, first_ref, _, __, out_ref, keys_ref, values_ref, *, num_heads, divisor, softcap
):
    """Attends to one key head of one row: to the columns from `first` up to the token's own, and to the token.

    The token's key and value come from the arguments, because a kernel may not see what it has written itself.

    Args:
        token_ref: Query heads, new keys and new values [N, H + K + K, E].
        position_ref: The column of each row's token [N].
        first_ref: The first column that each row attends to [N].
        _: The keys before this kernel, in the same memory as those after it.
        __: The values before this kernel.
        out_ref: The output [N, H, E].
        keys_ref: The keys [N, K, E, C].
        values_ref: The values [N, K, C, E].
        num_heads: Query heads H.
        divisor: Divides the scores.
        softcap: As in `weighted_values`.
    """
    row, head = pl.program_id(0), pl.program_id(1)
    _, heads, width, columns = keys_ref.shape
    position, first = position_ref[row], first_ref[row]
    end = jnp.minimum(position, columns)
    new_key, new_value = token_ref[row, num_heads + head], token_ref[row, num_heads + heads + head]
    exists = jnp.broadcast_to(position < columns, (width,))
    triton.store(keys_ref.at[row, head, :, position], new_key, mask=exists)
    triton.store(values_ref.at[row, head, position], new_value, mask=exists)

    queries = num_heads // heads
    padded, block = max(MIN_QUERIES, pl.next_power_of_2(queries)), min(128, BLOCK_ELEMENTS // width)
    own_queries = row, pl.ds(head * queries, padded)
    is_query = (jnp.arange(padded) < queries)[:, None]
    q = triton.load(token_ref.at[own_queries], mask=is_query, other=0.0)

    def scale(scores):
        return soft_cap(scores / divisor, softcap)

    def attend_to_block(i, carry):
        top, total, out = carry
        span, column = pl.ds(i * block, block), i * block + jnp.arange(block)
        seen = (column >= first) & (column < end)
        # Masked by `seen`, keys would be loaded one by one, because they lie along the columns.
        keys = triton.load(keys_ref.at[row, head, :, span], mask=(column < columns)[None], other=0.0)
        values = triton.load(values_ref.at[row, head, span], mask=seen[:, None], other=0.0)
        scores = jnp.where(seen[None], scale(triton.dot(q, keys)), -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        shrink, weights = jnp.exp(top - new_top), jnp.exp(scores - new_top[:, None])
        out = out * shrink[:, None] + triton.dot(weights.astype(values.dtype), values)
        return new_top, total * shrink + jnp.sum(weights, axis=1), out

    own_score = scale(jnp.sum(q.astype(jnp.float32) * new_key.astype(jnp.float32)[None], axis=1))
    own_value = jnp.broadcast_to(new_value.astype(jnp.float32)[None], (padded, width))
    start = own_score, jnp.ones_like(own_score), own_value
    _, total, out = jax.lax.fori_loop(first // block, pl.cdiv(end, block), attend_to_block, start)
    triton.store(out_ref.at[own_queries], (out / total[:, None]).astype(out_ref.dtype), mask=is_query)
