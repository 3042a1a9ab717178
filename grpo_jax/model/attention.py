"""Attention layers: grouped-query attention and DeepSeek-V3's multi-head latent attention, with or without a KV cache.

Column c of a row's cache holds the token at position c. With a cache, a layer first writes the new tokens into it and
then attends to its columns, so that a compiled loop that carries the cache updates it in place.

All attention without a cache goes through `attend`, which uses the best implementation for the platform. All
implementations follow `attention_mask` and are tested against `plain_attention`.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.model.architecture import NO_WINDOW, LayerConfig, ModelConfig
from grpo_jax.model.blockwise import BLOCK_SIZE, blockwise_attention, plan_blocks
from grpo_jax.model.cache import KV, write_cache
from grpo_jax.model.kernels import (
    CausalMask,
    causal_splash_attention,
    cudnn_attention,
    cudnn_supports,
    make_splash_masks,
    splash_attention,
    splash_supports,
)
from grpo_jax.model.layers import MergedProjection, Projection, RMSNorm, make_norm
from grpo_jax.model.mask import attention_mask, attention_scores, plain_attention, single_sequence, weighted_values
from grpo_jax.model.parameters import module_param
from grpo_jax.model.rope import apply_rope, query_scale, rope_tables
from grpo_jax.model.token_attention import token_attention, token_attention_supports
from grpo_jax.parallel.mesh import ROW_AXES, constrain, mesh_platform, row_spec, shard_map_on_mesh
from grpo_jax.types import Segments


class AttentionInputs(NamedTuple):
    """Rotary tables and mask of a batch, shared by all layers with the same `LayerConfig`."""

    cos_sin: Any  # rotary tables of the queries' positions
    query_scale: Any  # factor of the rotated queries [N, L, 1, 1], or None
    queries: Segments
    keys: Segments  # those of the queries, or of the cache's columns
    window: Int[Array, ""]
    mask: Any  # in the format of the chosen kernel: bool [N, L, C], SplashMasks, CausalMask, or BlockPlan of each shard


PLATFORM_KERNELS = {"tpu": "splash", "gpu": "cudnn"}  # used for "auto", if the kernel supports the shapes


def choose_kernel(model_cfg: ModelConfig, length: int, cached: bool) -> str:
    """Returns the attention implementation for rows of `length` tokens: "plain", "blocks", "splash" or "cudnn".

    Where the wanted kernel does not support the shapes, long rows use "blocks" and short ones "plain".
    """
    if cached:
        return "plain"  # there are few queries, so the scores are no larger than the cache
    wanted = model_cfg.attention if model_cfg.attention != "auto" else PLATFORM_KERNELS.get(mesh_platform(), "")
    widths = model_cfg.head_dim, model_cfg.head_dim  # of keys and values
    if latent := model_cfg.latent:
        widths = latent.qk_nope_head_dim + latent.qk_rope_head_dim, latent.v_head_dim
    supported = {
        "plain": True,
        "blocks": True,
        "splash": splash_supports(length),
        "cudnn": length % 2 == 0 and cudnn_supports(model_cfg.compute_dtype, *widths, model_cfg.score_softcap),
    }
    if supported.get(wanted):
        return wanted
    return "blocks" if length > 2 * BLOCK_SIZE else "plain"


def make_attention_inputs(
    model_cfg: ModelConfig, layer: LayerConfig, queries: Segments, columns: int = 0, *, causal: bool = False
) -> AttentionInputs:
    """Builds the `AttentionInputs` of all layers with the config `layer`.

    Args:
        model_cfg: The model's config.
        layer: The layers' RoPE and sliding window.
        queries: The segments of the given tokens.
        columns: The number of columns of the cache. 0: there is no cache, and the tokens attend to one another.
        causal: Whether every row is one sequence from position 0 on, without padding before its end.
    """
    rope_dim = model_cfg.latent.qk_rope_head_dim if model_cfg.latent else model_cfg.rotary_dim or model_cfg.head_dim
    rows, length = queries.position.shape
    keys = queries
    if columns:
        keys = single_sequence(jnp.broadcast_to(jnp.arange(columns), (rows, columns)))
    window = jnp.int32(layer.window or NO_WINDOW)
    kernel = choose_kernel(model_cfg, length, columns > 0)
    by_row = row_spec(rows)

    def plan_on_shard(*args):  # every shard plans for its own rows
        return jax.tree.map(lambda x: x[None], plan_blocks(*args))

    if kernel == "splash" and causal:
        mask = CausalMask(layer.window)
    elif kernel == "blocks":
        mask = shard_map_on_mesh(plan_on_shard, (by_row, by_row, P()), by_row)(queries, keys, window)
    else:
        mask = constrain(attention_mask(queries, keys, window), ROW_AXES)
        if kernel == "splash":
            mask = shard_map_on_mesh(make_splash_masks, (by_row,), by_row)(mask)
    position = queries.position
    rope = rope_tables(layer.rope, rope_dim, position), query_scale(layer.rope, position)
    return AttentionInputs(*rope, queries, keys, window, mask)


def kv_head_copies(num_heads: int, num_kv_heads: int, num_shards: int) -> int:
    """Returns how many copies of each key head let the heads be divided among shards; 0 if no number does."""
    for copies in range(1, num_heads // num_kv_heads + 1):
        if num_kv_heads * copies % num_shards == 0 and num_heads % (num_kv_heads * copies) == 0:
            return copies
    return 0


def attend(
    model_cfg: ModelConfig, q: Float[Array, "N L H E"], kv: KV, inputs: AttentionInputs, *, cached: bool
) -> Float[Array, "N L H _"]:
    """Computes `softmax(q k) v` of one layer. The output of a query that attends to no key is finite but undefined."""
    options = dict(divisor=model_cfg.effective_score_divisor, softcap=model_cfg.score_softcap)
    kernel = choose_kernel(model_cfg, q.shape[1], cached)
    if kernel == "plain":
        return plain_attention(q, kv.k, kv.v, inputs.mask, **options)

    def attend_on_shard(q, keys, values, queries, key_segments, window, mask):
        if kernel == "splash":
            splash = causal_splash_attention if isinstance(mask, CausalMask) else splash_attention
            return splash(q, keys, values, mask, interpret=mesh_platform() != "tpu", **options)
        if kernel == "cudnn":
            return cudnn_attention(q, keys, values, mask, divisor=options["divisor"])
        plan = jax.tree.map(lambda x: x[0], mask)
        return blockwise_attention(q, keys, values, queries, key_segments, window, plan, **options)

    mesh = jax.sharding.get_abstract_mesh()
    copies = 0 if mesh.empty else kv_head_copies(q.shape[2], kv.k.shape[1], mesh.shape["tensor"])
    keys, values = (jnp.repeat(x, copies, axis=1) if copies > 1 else x for x in kv)
    by_row, head_axis = row_spec(q.shape[0]), ("tensor" if copies else None)
    q_spec, kv_spec = P(*by_row, None, head_axis), P(*by_row, head_axis)
    in_specs = q_spec, kv_spec, kv_spec, by_row, by_row, P(), by_row
    args = q, keys, values, inputs.queries, inputs.keys, inputs.window, inputs.mask
    return shard_map_on_mesh(attend_on_shard, in_specs, q_spec)(*args)


class Attention(nn.Module):
    """Grouped-query attention with rotary position embeddings."""

    model_cfg: ModelConfig

    @nn.compact
    def __call__(self, x, inputs: AttentionInputs, cache: KV | None):
        """Returns the output for hidden states x [N, L, D], and the new keys and values or the written cache."""
        c = self.model_cfg
        if self.has_variable("params", "qkv"):
            heads = c.num_heads, c.num_kv_heads, c.num_kv_heads
            q, k, v = MergedProjection(tuple((h, c.head_dim) for h in heads), c.qkv_bias, name="qkv")(x)
        else:
            q = Projection((c.hidden_size,), (c.num_heads, c.head_dim), c.qkv_bias, name="q")(x)
            k = Projection((c.hidden_size,), (c.num_kv_heads, c.head_dim), c.qkv_bias, name="k")(x)
            v = Projection((c.hidden_size,), (c.num_kv_heads, c.head_dim), c.qkv_bias, name="v")(x)
        q, k, v = (constrain(y, ROW_AXES, None, "tensor", None) for y in (q, k, v))
        if c.qk_norm and c.qk_norm_all_heads:
            flat = (y.reshape(*y.shape[:2], -1) for y in (q, k))
            normed = (make_norm(c, name)(y) for name, y in zip(("q_all_norm", "k_all_norm"), flat, strict=True))
            q, k = (y.reshape(*y.shape[:2], -1, c.head_dim) for y in normed)
        elif c.qk_norm:
            q, k = make_norm(c, "q_norm")(q), make_norm(c, "k_norm")(k)
        q, k = (apply_rope(y, inputs.cos_sin, interleave=c.rope_interleave) for y in (q, k))
        if inputs.query_scale is not None:
            q = q * inputs.query_scale.astype(q.dtype)
        kv = KV(jnp.moveaxis(k, 1, -1), jnp.swapaxes(v, 1, 2))
        position = inputs.queries.position
        if cache is not None and token_attention_supports(c, *position.shape, cache.v.shape[2]):
            options = dict(divisor=c.effective_score_divisor, softcap=c.score_softcap)
            out, kv = token_attention(q, kv, cache, position, inputs.window, **options)
        else:
            kv = kv if cache is None else write_cache(cache, kv, position)
            out = attend(c, q, kv, inputs, cached=cache is not None)
        return Projection((c.num_heads, c.head_dim), (c.hidden_size,), c.out_bias, name="o")(out), kv


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V3, arXiv 2412.19437, eq. 1-11).

    Without a cache, keys and values are projected from the compressed vectors. With a cache that would project every
    cached token again in each step, so the queries are projected instead: in the compressed space, the cached vectors
    are the keys and values of a single head.
    """

    model_cfg: ModelConfig

    @nn.compact
    def __call__(self, x, inputs: AttentionInputs, cache: KV | None):
        """Returns the output for hidden states x [N, L, D], and the new latents or the written cache."""
        c, z = self.model_cfg, self.model_cfg.latent
        heads, key_width = c.num_heads, z.qk_nope_head_dim + z.qk_rope_head_dim

        def rotate(y):
            return apply_rope(y, inputs.cos_sin, interleave=c.rope_interleave)

        if z.q_lora_rank:
            # DeepSeek's own code ignores rms_norm_eps in the norms of the compressed vectors.
            compressed_q = Projection((c.hidden_size,), (z.q_lora_rank,), c.qkv_bias, name="q_a")(x)
            compressed_q = RMSNorm(1e-6, name="q_a_norm")(compressed_q)
            q = Projection((z.q_lora_rank,), (heads, key_width), name="q_b")(compressed_q)
        else:
            q = Projection((c.hidden_size,), (heads, key_width), name="q")(x)
        compressed = Projection((c.hidden_size,), (z.kv_lora_rank + z.qk_rope_head_dim,), c.qkv_bias, name="kv_a")(x)
        latent = RMSNorm(1e-6, name="kv_a_norm")(compressed[..., : z.kv_lora_rank])
        expand = module_param(self, "kv_b", z.kv_lora_rank, heads, z.qk_nope_head_dim + z.v_head_dim)
        to_key, to_value = jnp.split(expand.astype(x.dtype), [z.qk_nope_head_dim], axis=-1)

        q = constrain(q, ROW_AXES, None, "tensor", None)
        q_nope, q_rope = q[..., : z.qk_nope_head_dim], rotate(q[..., z.qk_nope_head_dim :])
        rope_key = rotate(compressed[..., None, z.kv_lora_rank :])
        kv = KV(jnp.moveaxis(rope_key, 1, -1), latent[:, None])
        if cache is None:
            keys = jnp.einsum("nlr,rhe->nhel", latent, to_key)
            values = jnp.einsum("nlr,rhe->nhle", latent, to_value)
            rope_keys = jnp.broadcast_to(kv.k, (*keys.shape[:2], *kv.k.shape[2:]))
            expanded = KV(jnp.concatenate([keys, rope_keys], axis=2), values)
            out = attend(c, jnp.concatenate([q_nope, q_rope], axis=-1), expanded, inputs, cached=False)
        else:
            kv = write_cache(cache, kv, inputs.queries.position)
            q_latent = jnp.einsum("nlhe,rhe->nlhr", q_nope, to_key)
            scores = attention_scores(q_latent, kv.v.mT) + attention_scores(q_rope, kv.k)
            out = weighted_values(scores, kv.v, inputs.mask, divisor=c.effective_score_divisor, softcap=c.score_softcap)
            out = jnp.einsum("nlhr,rhe->nlhe", out, to_value)
        return Projection((heads, z.v_head_dim), (c.hidden_size,), c.out_bias, name="o")(out), kv
