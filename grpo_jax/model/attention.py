"""The layers' attention: grouped-query, and multi-head latent (DeepSeek-V3's), over the tokens given or a cache.

Column c of a row's cache holds the token at position c. With a cache, a layer first writes the tokens given into it and
then attends to its columns: a compiled loop that carries the cache then updates it in place.

`attend` is the one function that attention is computed by. On each platform it takes the way that is best there; all
follow `attend.sees`, and `attend.plain` is what they are tested against.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.model.architecture import LayerConfig, ModelConfig
from grpo_jax.model.blockwise import BLOCK_SIZE, blockwise_attention, plan_blocks
from grpo_jax.model.kernels import cudnn_attention, cudnn_supports, make_splash_masks, splash_attention, splash_supports
from grpo_jax.model.layers import Projection, RMSNorm, make_norm
from grpo_jax.model.mask import (
    NO_WINDOW,
    attention_mask,
    attention_scores,
    plain_attention,
    single_sequence,
    weighted_values,
)
from grpo_jax.model.rope import apply_rope, deinterleave, rope_tables
from grpo_jax.parallel.mesh import ROW_AXES, constrain, drop_indivisible_axes, mesh_platform
from grpo_jax.types import Segments


class KV(NamedTuple):
    """What is cached of some tokens, of one layer or stacked over layers.

    Keys (after RoPE) and values of K heads; the keys lie with their columns last, as their product wants them. Latent
    attention: in `v` the latent vector, in `k` the rotated key that all heads share; K is 1.
    """

    k: Float[Array, "*layers N K E C"]
    v: Float[Array, "*layers N K C _"]


class AttentionInputs(NamedTuple):
    """What the tokens given see, for all layers of one kind."""

    rotation: Any  # their rotary tables
    queries: Segments  # whose tokens they are
    keys: Segments  # the same tokens, or a cache's columns
    window: Int[Array, ""]
    prepared: Any  # what the way in use makes of the mask, once for all layers


PLATFORM_KERNELS = {"tpu": "splash", "gpu": "cudnn"}  # what `auto` takes on a platform, where it fits


def choose_kernel(model_cfg: ModelConfig, length: int, cached: bool) -> str:
    """How attention of rows of L tokens is computed: `plain`, `blocks`, `splash` or `cudnn`.

    Rows that an accelerator's kernel does not take are computed in blocks, short ones by the definition.
    """
    if cached:
        return "plain"  # a few queries: their scores are no larger than the cache
    wanted = model_cfg.attention if model_cfg.attention != "auto" else PLATFORM_KERNELS.get(mesh_platform(), "")
    widths = (model_cfg.head_dim,) * 2
    if model_cfg.latent:
        widths = model_cfg.latent.qk_nope_head_dim + model_cfg.latent.qk_rope_head_dim, model_cfg.latent.v_head_dim
    fits = {
        "plain": True,
        "blocks": True,
        "splash": splash_supports(length),
        "cudnn": length % 2 == 0 and cudnn_supports(model_cfg.compute_dtype, *widths, model_cfg.score_softcap),
    }
    if fits.get(wanted):
        return wanted
    return "blocks" if length > 2 * BLOCK_SIZE else "plain"


def make_attention_inputs(
    model_cfg: ModelConfig, layer: LayerConfig, queries: Segments, columns: int = 0
) -> AttentionInputs:
    """The view of a layer of that kind.

    Args:
      columns: of the cache; 0: no cache, the tokens given are the keys.
    """
    width = model_cfg.latent.qk_rope_head_dim if model_cfg.latent else model_cfg.head_dim
    rows, length = queries.position.shape
    keys = queries
    if columns:
        keys = single_sequence(jnp.broadcast_to(jnp.arange(columns), (rows, columns)))
    window = jnp.int32(layer.window or NO_WINDOW)
    chosen = choose_kernel(model_cfg, length, columns > 0)
    if chosen == "blocks":  # of each shard's own rows
        first = lambda *args: jax.tree.map(lambda x: x[None], plan_blocks(*args))
        split = row_spec(rows)
        prepared = shard_map_on_mesh(first, (split, split, P()), split)(queries, keys, window)
    else:
        prepared = constrain(attention_mask(queries, keys, window), ROW_AXES)
        if chosen == "splash":
            prepared = shard_map_on_mesh(make_splash_masks, (row_spec(rows),), row_spec(rows))(prepared)
    return AttentionInputs(rope_tables(layer.rope, width, queries.position), queries, keys, window, prepared)


def write_cache(cache: KV, new: KV, columns: Int[Array, "N L"]) -> KV:
    """The cache with L new tokens a row in their columns."""

    def put(cache, new, columns):  # of one row: mapped over rows, the partitioner sees that no row meets another
        return KV(cache.k.at[:, :, columns].set(new.k), cache.v.at[:, columns].set(new.v))

    return jax.vmap(put)(cache, new, columns)


def row_spec(rows: int) -> P:
    """The spec of an array of that many rows on the mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    return P() if mesh.empty else drop_indivisible_axes(P(ROW_AXES), (rows,), mesh)


def shard_map_on_mesh(function, in_specs, out_specs):
    """The function of each device's own part, on the mesh in force."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def kv_head_copies(heads: int, key_heads: int, devices: int) -> int:
    """How often each key head must stand for the heads to be split over devices; 0: they cannot be."""
    fine = lambda times: key_heads * times % devices == 0 and heads % (key_heads * times) == 0
    return next((times for times in range(1, heads // key_heads + 1) if fine(times)), 0)


def attend(
    model_cfg: ModelConfig, q: Float[Array, "N L H E"], kv: KV, view: AttentionInputs, *, cached: bool
) -> Float[Array, "N L H _"]:
    """softmax(q k) v of one layer. Where a query sees nothing, the result is finite and of no meaning."""
    scale = dict(divisor=model_cfg.effective_score_divisor, cap=model_cfg.score_softcap)
    chosen = choose_kernel(model_cfg, q.shape[1], cached)
    if chosen == "plain":
        return plain_attention(q, kv.k, kv.v, view.prepared, **scale)

    def run(q, keys, values, view):
        if chosen == "splash":
            return splash_attention(q, keys, values, view.prepared, interpret=mesh_platform() != "tpu", **scale)
        if chosen == "cudnn":
            return cudnn_attention(q, keys, values, view.prepared, divisor=model_cfg.effective_score_divisor)
        own = jax.tree.map(lambda x: x[0], view.prepared)
        return blockwise_attention(q, keys, values, view.queries, view.keys, view.window, own, **scale)

    mesh = jax.sharding.get_abstract_mesh()
    times = 0 if mesh.empty else kv_head_copies(q.shape[2], kv.k.shape[1], mesh.shape["tensor"])
    heads, (rows,) = ("tensor" if times else None), tuple(row_spec(q.shape[0])) or (None,)
    keys, values = (jnp.repeat(x, times, axis=1) if times > 1 else x for x in kv)
    by_row = view._replace(rotation=(), window=None)
    specs = jax.tree.map(lambda _: P(rows), by_row)._replace(window=P())
    return shard_map_on_mesh(run, (P(rows, None, heads), P(rows, heads), P(rows, heads), specs), P(rows, None, heads))(
        q, keys, values, view._replace(rotation=())
    )


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    model_cfg: ModelConfig

    @nn.compact
    def __call__(self, x, view: AttentionInputs, cache: KV | None):
        c = self.model_cfg
        q = Projection((c.hidden_size,), (c.num_heads, c.head_dim), c.qkv_bias, name="q")(x)
        k = Projection((c.hidden_size,), (c.num_kv_heads, c.head_dim), c.qkv_bias, name="k")(x)
        v = Projection((c.hidden_size,), (c.num_kv_heads, c.head_dim), c.qkv_bias, name="v")(x)
        q, k, v = (constrain(y, ROW_AXES, None, "tensor", None) for y in (q, k, v))
        if c.qk_norm:
            q, k = make_norm(c, "q_norm")(q), make_norm(c, "k_norm")(k)
        q = apply_rope(q, view.rotation)
        kv = KV(jnp.moveaxis(apply_rope(k, view.rotation), 1, -1), jnp.swapaxes(v, 1, 2))
        if cache is not None:
            kv = write_cache(cache, kv, view.queries.position)
        out = attend(c, q, kv, view, cached=cache is not None)
        return Projection((c.num_heads, c.head_dim), (c.hidden_size,), c.out_bias, name="o")(out), kv


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V3, arXiv 2412.19437, eq. 1-11).

    Without a cache, keys and values are made from the latents. With one, that would be done again for every cached
    token: instead the queries are taken to the latent space, where the latents are keys and values of one head.
    """

    model_cfg: ModelConfig

    @nn.compact
    def __call__(self, x, view: AttentionInputs, cache: KV | None):
        c, z = self.model_cfg, self.model_cfg.latent
        heads, key_width = c.num_heads, z.qk_nope_head_dim + z.qk_rope_head_dim
        latent_norm = lambda name: RMSNorm(1e-6, name=name)  # the model's own code does not pass rms_norm_eps here
        if z.q_lora_rank:
            low = Projection((c.hidden_size,), (z.q_lora_rank,), c.qkv_bias, name="q_a")(x)
            q = Projection((z.q_lora_rank,), (heads, key_width), name="q_b")(latent_norm("q_a_norm")(low))
        else:
            q = Projection((c.hidden_size,), (heads, key_width), name="q")(x)
        compressed = Projection((c.hidden_size,), (z.kv_lora_rank + z.qk_rope_head_dim,), c.qkv_bias, name="kv_a")(x)
        latent = latent_norm("kv_a_norm")(compressed[..., : z.kv_lora_rank])
        init = nn.initializers.normal(z.kv_lora_rank**-0.5)
        expand = self.param("kv_b", init, (z.kv_lora_rank, heads, z.qk_nope_head_dim + z.v_head_dim))
        to_key, to_value = jnp.split(expand.astype(x.dtype), [z.qk_nope_head_dim], axis=-1)

        place = lambda y: apply_rope(deinterleave(y) if z.rope_interleave else y, view.rotation)
        q = constrain(q, ROW_AXES, None, "tensor", None)
        q_plain, q_rope = q[..., : z.qk_nope_head_dim], place(q[..., z.qk_nope_head_dim :])
        rope_key = place(compressed[..., None, z.kv_lora_rank :])
        kv = KV(jnp.moveaxis(rope_key, 1, -1), latent[:, None])
        if cache is None:
            keys = jnp.einsum("nlr,rhe->nhel", latent, to_key)
            values = jnp.einsum("nlr,rhe->nhle", latent, to_value)
            by_position = jnp.broadcast_to(kv.k, (*keys.shape[:2], *kv.k.shape[2:]))
            both = KV(jnp.concatenate([keys, by_position], axis=2), values)
            out = attend(c, jnp.concatenate([q_plain, q_rope], axis=-1), both, view, cached=False)
        else:
            kv = write_cache(cache, kv, view.queries.position)
            q_latent = jnp.einsum("nlhe,rhe->nlhr", q_plain, to_key)
            scores = attention_scores(q_latent, jnp.swapaxes(kv.v, -1, -2)) + attention_scores(q_rope, kv.k)
            mixed = weighted_values(scores, kv.v, view.prepared, divisor=c.effective_score_divisor, cap=c.score_softcap)
            out = jnp.einsum("nlhr,rhe->nlhe", mixed, to_value)
        return Projection((heads, z.v_head_dim), (c.hidden_size,), c.out_bias, name="o")(out), kv
