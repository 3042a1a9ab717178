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

from grpo_jax.architecture import Layer, ModelConfig
from grpo_jax.attend import UNLIMITED, alone, mix, plain, score, sees
from grpo_jax.blockwise import BLOCK, blockwise, plan
from grpo_jax.kernels import cudnn, cudnn_fits, splash, splash_fits, splash_masks
from grpo_jax.layers import Projection, RMSNorm, norm
from grpo_jax.mesh import ROWS, constrain, fit, mesh_platform
from grpo_jax.rope import apart, rotate, tables
from grpo_jax.types import Segments


class KV(NamedTuple):
    """What is cached of some tokens, of one layer or stacked over layers.

    Keys (after RoPE) and values of K heads; the keys lie with their columns last, as their product wants them. Latent
    attention: in `v` the latent vector, in `k` the rotated key that all heads share; K is 1.
    """

    k: Float[Array, "*layers N K E C"]
    v: Float[Array, "*layers N K C _"]


class View(NamedTuple):
    """What the tokens given see, for all layers of one kind."""

    rotation: Any  # their rotary tables
    queries: Segments  # whose tokens they are
    keys: Segments  # the same tokens, or a cache's columns
    window: Int[Array, ""]
    prepared: Any  # what the way in use makes of the mask, once for all layers


BEST = {"tpu": "splash", "gpu": "cudnn"}  # what `auto` takes on a platform, where it fits


def way(config: ModelConfig, length: int, cached: bool) -> str:
    """How attention of rows of L tokens is computed: `plain`, `blocks`, `splash` or `cudnn`.

    Rows that an accelerator's kernel does not take are computed in blocks, short ones by the definition.
    """
    if cached:
        return "plain"  # a few queries: their scores are no larger than the cache
    wanted = config.attention if config.attention != "auto" else BEST.get(mesh_platform(), "")
    widths = (config.head_dim,) * 2
    if config.latent:
        widths = config.latent.plain_width + config.latent.rope_width, config.latent.value_width
    fits = {
        "plain": True, "blocks": True, "splash": splash_fits(length),
        "cudnn": length % 2 == 0 and cudnn_fits(config.compute_dtype, *widths, config.score_cap)}
    if fits.get(wanted):
        return wanted
    return "blocks" if length > 2 * BLOCK else "plain"


def make_view(config: ModelConfig, layer: Layer, queries: Segments, columns: int = 0) -> View:
    """The view of a layer of that kind.

    Args:
      columns: of the cache; 0: no cache, the tokens given are the keys.
    """
    width = config.latent.rope_width if config.latent else config.head_dim
    rows, length = queries.position.shape
    keys = queries
    if columns:
        keys = alone(jnp.broadcast_to(jnp.arange(columns), (rows, columns)))
    window = jnp.int32(layer.window or UNLIMITED)
    chosen = way(config, length, columns > 0)
    if chosen == "blocks":  # of each shard's own rows
        first = lambda *args: jax.tree.map(lambda x: x[None], plan(*args))
        split = row_spec(rows)
        prepared = on_mesh(first, (split, split, P()), split)(queries, keys, window)
    else:
        prepared = constrain(sees(queries, keys, window), ROWS)
        if chosen == "splash":
            prepared = on_mesh(splash_masks, (row_spec(rows),), row_spec(rows))(prepared)
    return View(tables(layer.rope, width, queries.position), queries, keys, window, prepared)


def write(cache: KV, new: KV, columns: Int[Array, "N L"]) -> KV:
    """The cache with L new tokens a row in their columns."""

    def put(cache, new, columns):  # of one row: mapped over rows, the partitioner sees that no row meets another
        return KV(cache.k.at[:, :, columns].set(new.k), cache.v.at[:, columns].set(new.v))

    return jax.vmap(put)(cache, new, columns)


def row_spec(rows: int) -> P:
    """The spec of an array of that many rows on the mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    return P() if mesh.empty else fit(P(ROWS), (rows,), mesh)


def on_mesh(function, in_specs, out_specs):
    """The function of each device's own part, on the mesh in force."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def copies(heads: int, key_heads: int, devices: int) -> int:
    """How often each key head must stand for the heads to be split over devices; 0: they cannot be."""
    fine = lambda times: key_heads * times % devices == 0 and heads % (key_heads * times) == 0
    return next((times for times in range(1, heads // key_heads + 1) if fine(times)), 0)


def attend(
    config: ModelConfig, q: Float[Array, "N L H E"], kv: KV, view: View, *, cached: bool
) -> Float[Array, "N L H _"]:
    """softmax(q k) v of one layer. Where a query sees nothing, the result is finite and of no meaning."""
    scale = dict(divisor=config.divisor, cap=config.score_cap)
    chosen = way(config, q.shape[1], cached)
    if chosen == "plain":
        return plain(q, kv.k, kv.v, view.prepared, **scale)

    def run(q, keys, values, view):
        if chosen == "splash":
            return splash(q, keys, values, view.prepared, interpret=mesh_platform() != "tpu", **scale)
        if chosen == "cudnn":
            return cudnn(q, keys, values, view.prepared, divisor=config.divisor)
        own = jax.tree.map(lambda x: x[0], view.prepared)
        return blockwise(q, keys, values, view.queries, view.keys, view.window, own, **scale)

    mesh = jax.sharding.get_abstract_mesh()
    times = 0 if mesh.empty else copies(q.shape[2], kv.k.shape[1], mesh.shape["tensor"])
    heads, (rows,) = ("tensor" if times else None), tuple(row_spec(q.shape[0])) or (None,)
    keys, values = (jnp.repeat(x, times, axis=1) if times > 1 else x for x in kv)
    by_row = view._replace(rotation=(), window=None)
    specs = jax.tree.map(lambda _: P(rows), by_row)._replace(window=P())
    return on_mesh(
        run, (P(rows, None, heads), P(rows, heads), P(rows, heads), specs), P(rows, None, heads))(
            q, keys, values, view._replace(rotation=()))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, view: View, cache: KV | None):
        c = self.config
        q = Projection((c.hidden_size,), (c.num_heads, c.head_dim), c.qkv_bias, name="q")(x)
        k = Projection((c.hidden_size,), (c.num_kv_heads, c.head_dim), c.qkv_bias, name="k")(x)
        v = Projection((c.hidden_size,), (c.num_kv_heads, c.head_dim), c.qkv_bias, name="v")(x)
        q, k, v = (constrain(y, ROWS, None, "tensor", None) for y in (q, k, v))
        if c.qk_norm:
            q, k = norm(c, "q_norm")(q), norm(c, "k_norm")(k)
        q = rotate(q, view.rotation)
        kv = KV(jnp.moveaxis(rotate(k, view.rotation), 1, -1), jnp.swapaxes(v, 1, 2))
        if cache is not None:
            kv = write(cache, kv, view.queries.position)
        out = attend(c, q, kv, view, cached=cache is not None)
        return Projection((c.num_heads, c.head_dim), (c.hidden_size,), c.out_bias, name="o")(out), kv


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V3, arXiv 2412.19437, eq. 1-11).

    Without a cache, keys and values are made from the latents. With one, that would be done again for every cached
    token: instead the queries are taken to the latent space, where the latents are keys and values of one head.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x, view: View, cache: KV | None):
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

        place = lambda y: rotate(apart(y) if z.interleaved else y, view.rotation)
        q = constrain(q, ROWS, None, "tensor", None)
        q_plain, q_rope = q[..., : z.plain_width], place(q[..., z.plain_width :])
        rope_key = place(compressed[..., None, z.kv_rank :])
        kv = KV(jnp.moveaxis(rope_key, 1, -1), latent[:, None])
        if cache is None:
            keys = jnp.einsum("nlr,rhe->nhel", latent, to_key)
            values = jnp.einsum("nlr,rhe->nhle", latent, to_value)
            by_position = jnp.broadcast_to(kv.k, (*keys.shape[:2], *kv.k.shape[2:]))
            both = KV(jnp.concatenate([keys, by_position], axis=2), values)
            out = attend(c, jnp.concatenate([q_plain, q_rope], axis=-1), both, view, cached=False)
        else:
            kv = write(cache, kv, view.queries.position)
            q_latent = jnp.einsum("nlhe,rhe->nlhr", q_plain, to_key)
            scores = score(q_latent, jnp.swapaxes(kv.v, -1, -2)) + score(q_rope, kv.k)
            mixed = mix(scores, kv.v, view.prepared, divisor=c.divisor, cap=c.score_cap)
            out = jnp.einsum("nlhr,rhe->nlhe", mixed, to_value)
        return Projection((heads, z.value_width), (c.hidden_size,), c.out_bias, name="o")(out), kv
