"""Attention: grouped-query, and multi-head latent (DeepSeek-V3's). Both read a key/value cache and never write it."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.architecture import ModelConfig
from grpo_jax.layers import Projection, RMSNorm, norm
from grpo_jax.mesh import ROWS, constrain
from grpo_jax.rope import apart, rotate


class KV(NamedTuple):
    """What is cached of some tokens, of one layer or stacked over layers.

    Keys (after RoPE) and values of K heads. Latent attention: in `k` the latent vector, in `v` the rotated key that all
    heads share; K is 1.
    """

    k: Float[Array, "*layers N K C E"]
    v: Float[Array, "*layers N K C _"]


class View(NamedTuple):
    """What the tokens given see: their rotary tables, themselves, and the cache (None without one)."""

    tables: Any
    mask: Bool[Array, "N L L"]
    past_mask: Bool[Array, "N L C"] | None


class Columns(NamedTuple):
    """Some columns that a row of queries attends to; R = H / K query heads share a key/value head."""

    scores: Float[Array, "N K R L C"]  # float32, before scale, cap and mask
    mask: Bool[Array, "N L C"]
    values: Float[Array, "N K C E"]


def grouped(q: Float[Array, "N L H E"], kv_heads: int) -> Float[Array, "N L K R E"]:
    """The query heads by the key/value head that they share."""
    rows, length, heads, width = q.shape
    return q.reshape(rows, length, kv_heads, heads // kv_heads, width)


def score(q: Float[Array, "N L H E"], keys: Float[Array, "N K C E"]) -> Float[Array, "N K R L C"]:
    """q k, in float32."""
    return jnp.einsum("nlkre,nkce->nkrlc", grouped(q, keys.shape[1]), keys, preferred_element_type=jnp.float32)


def mix(config: ModelConfig, blocks: list[Columns]) -> Float[Array, "N L H E"]:
    """softmax(scores) values over the columns of all blocks together."""

    def ready(block):
        s = block.scores / config.divisor
        if config.score_cap:
            s = config.score_cap * jnp.tanh(s / config.score_cap)
        return jnp.where(block.mask[:, None, None], s, jnp.finfo(jnp.float32).min)

    probs = jax.nn.softmax(jnp.concatenate([ready(block) for block in blocks], axis=-1), axis=-1)
    out, first = 0, 0
    for block in blocks:
        last = first + block.values.shape[2]
        part = probs[..., first:last].astype(block.values.dtype)
        out = out + jnp.einsum("nkrlc,nkch->nlkrh", part, block.values).astype(jnp.float32)
        first = last
    return out.reshape(*out.shape[:2], -1, out.shape[-1]).astype(blocks[0].values.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, view: View, past: KV | None):
        c = self.config
        q = Projection((c.hidden_size,), (c.num_heads, c.head_dim), c.qkv_bias, name="q")(x)
        k = Projection((c.hidden_size,), (c.num_kv_heads, c.head_dim), c.qkv_bias, name="k")(x)
        v = Projection((c.hidden_size,), (c.num_kv_heads, c.head_dim), c.qkv_bias, name="v")(x)
        q, k, v = (constrain(y, ROWS, None, "tensor", None) for y in (q, k, v))
        if c.qk_norm:
            q, k = norm(c, "q_norm")(q), norm(c, "k_norm")(k)
        q = rotate(q, view.tables)
        own = KV(jnp.swapaxes(rotate(k, view.tables), 1, 2), jnp.swapaxes(v, 1, 2))
        blocks = [Columns(score(q, own.k), view.mask, own.v)]
        if past is not None:
            blocks.insert(0, Columns(score(q, past.k), view.past_mask, past.v))
        return Projection((c.num_heads, c.head_dim), (c.hidden_size,), c.out_bias, name="o")(mix(c, blocks)), own


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V3, arXiv 2412.19437, eq. 1-11).

    Without a cache, keys and values are made from the latents. With one, that would be done again for every cached
    token: instead the queries are taken to the latent space, where the latents are keys and values of one head.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x, view: View, past: KV | None):
        c, z = self.config, self.config.latent
        heads, key_width = c.num_heads, z.plain_width + z.rope_width
        latent_norm = lambda name: RMSNorm(1e-6, name=name)  # the model's own code does not pass rms_norm_eps here
        if z.q_rank:
            low = Projection((c.hidden_size,), (z.q_rank,), c.qkv_bias, name="q_a")(x)
            q = Projection((z.q_rank,), (heads, key_width), name="q_b")(latent_norm("q_a_norm")(low))
        else:
            q = Projection((c.hidden_size,), (heads, key_width), name="q")(x)
        compressed = Projection((c.hidden_size,), (z.kv_rank + z.rope_width,), c.qkv_bias, name="kv_a")(x)
        latent = latent_norm("kv_a_norm")(compressed[..., : z.kv_rank])
        init = nn.initializers.normal(z.kv_rank**-0.5)
        expand = self.param("kv_b", init, (z.kv_rank, heads, z.plain_width + z.value_width))
        to_key, to_value = jnp.split(expand.astype(x.dtype), [z.plain_width], axis=-1)

        place = lambda y: rotate(apart(y) if z.interleaved else y, view.tables)
        q = constrain(q, ROWS, None, "tensor", None)
        q_plain, q_rope = q[..., : z.plain_width], place(q[..., z.plain_width :])
        rope_key = place(compressed[..., None, z.kv_rank :])
        own = KV(latent[:, None], jnp.swapaxes(rope_key, 1, 2))
        if past is None:
            keys = jnp.einsum("nlr,rhe->nhle", latent, to_key)
            values = jnp.einsum("nlr,rhe->nhle", latent, to_value)
            by_position = score(q_rope, own.v)  # [N, 1, H, L, L]
            scores = score(q_plain, keys) + jnp.swapaxes(by_position, 1, 2)
            out = mix(c, [Columns(scores, view.mask, values)])
        else:
            q_latent = jnp.einsum("nlhe,rhe->nlhr", q_plain, to_key)
            blocks = [Columns(score(q_latent, kv.k) + score(q_rope, kv.v), mask, kv.k)
                      for kv, mask in ((past, view.past_mask), (own, view.mask))]
            out = jnp.einsum("nlhr,rhe->nlhe", mix(c, blocks), to_value)
        return Projection((heads, z.value_width), (c.hidden_size,), c.out_bias, name="o")(out), own
