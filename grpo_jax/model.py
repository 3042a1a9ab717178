"""The decoder (Llama's), as pure functions of its parameters.

`hidden_states` runs tokens through all layers. Each layer attends to the tokens given and, where there is one, to a
key/value cache that it only reads: the new keys and values are returned, and the caller writes them.

The parameters are a dict of dicts. `params["layers"]` is either one tree whose leaves are stacked on a leading layer
axis, which is scanned (training: compiled once, sharded as one array), or a tuple of one tree a layer, which is
unrolled (decoding: no weight is copied out of a stack for every token). `unstack` turns the first into the second.

This is the only file that imports flax.linen.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.mesh import ROWS, constrain


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, hashable, so that it is a static argument of jitted functions."""

    vocab_size: int  # V, rows of the embedding
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # E
    max_positions: int  # the longest row the model is made for, in tokens
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False  # the head is the embedding, transposed
    token_count: int = 0  # ids the tokenizer knows; rows beyond are never drawn. 0: all rows are ids
    eos_ids: tuple[int, ...] = ()
    source: str = ""  # the folder it was loaded from
    dtype: str = "float32"  # of the weights in that folder
    compute_dtype: str = "float32"  # of activations and of weights where they are used

    @property
    def drawable(self) -> int:
        """How many of the V columns of the logits stand for a token."""
        return self.token_count or self.vocab_size


class KV(NamedTuple):
    """Keys (after RoPE) and values of some tokens, of one layer or stacked over layers."""

    k: Float[Array, "*layers N K C E"]
    v: Float[Array, "*layers N K C E"]


class Past(NamedTuple):
    """What a layer may read besides the tokens given."""

    kv: Any  # KV of all layers: stacked if the layers are stacked, else a tuple of one KV a layer
    mask: Bool[Array, "N L C"]  # True where token l of row n sees cache column c


class Projection(nn.Module):
    """x[..., *inputs] -> [..., *outputs], as one matrix product over [tokens, features]."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
        init = nn.initializers.normal(1 / math.sqrt(fan_in))
        kernel = self.param("kernel", init, (*self.inputs, *self.outputs))
        lead = x.shape[: x.ndim - len(self.inputs)]
        # Two dimensions: the backward pass of the same product on [N, L, D] is over twice slower on a CPU.
        out = x.reshape(-1, fan_in) @ kernel.reshape(fan_in, fan_out).astype(x.dtype)
        return out.reshape(*lead, *self.outputs)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype)


class Embed(nn.Module):
    """The token table."""

    vocab_size: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        init = nn.initializers.normal(1 / math.sqrt(self.width))
        table = self.param("embedding", init, (self.vocab_size, self.width))
        return constrain(table, "tensor", None)[tokens]  # gathered over fsdp here, so that activations need not be


def rope_tables(config: ModelConfig, positions: Int[Array, "N L"]):
    """cos and sin [N, L, 1, E/2] of the rotary angles (RoFormer, arXiv 2104.09864), float32."""
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "N L heads E"], tables) -> Float[Array, "N L heads E"]:
    """Rotates the pairs (x[i], x[i + E/2]), the pairing of Hugging Face checkpoints."""
    cos, sin = tables
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend(q: Float[Array, "N L H E"], own: KV, mask: Bool[Array, "N L L"], past: KV | None, past_mask):
    """softmax(q k / sqrt(E)) v over a row's own tokens and its cache, each group of H/K query heads on one KV head."""
    rows, length, heads, width = q.shape
    grouped = q.reshape(rows, length, own.k.shape[1], heads // own.k.shape[1], width)

    def scores(keys, allowed):
        s = jnp.einsum("nlkre,nkce->nkrlc", grouped, keys, preferred_element_type=jnp.float32)
        return jnp.where(allowed[:, None, None], s / math.sqrt(width), jnp.finfo(jnp.float32).min)

    def mix(probs, values):
        return jnp.einsum("nkrlc,nkch->nlkrh", probs.astype(values.dtype), values)

    s = scores(own.k, mask)
    if past is None:
        out = mix(jax.nn.softmax(s, axis=-1), own.v)
    else:
        columns = past.k.shape[2]
        probs = jax.nn.softmax(jnp.concatenate([scores(past.k, past_mask), s], axis=-1), axis=-1)
        out = mix(probs[..., :columns], past.v) + mix(probs[..., columns:], own.v)
    return out.reshape(rows, length, heads, width)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, tables, mask, past, past_mask):
        c = self.config
        q = Projection((c.hidden_size,), (c.num_heads, c.head_dim), name="q")(x)
        k = Projection((c.hidden_size,), (c.num_kv_heads, c.head_dim), name="k")(x)
        v = Projection((c.hidden_size,), (c.num_kv_heads, c.head_dim), name="v")(x)
        q, k, v = (constrain(y, ROWS, None, "tensor", None) for y in (q, k, v))
        own = KV(jnp.swapaxes(rotate(k, tables), 1, 2), jnp.swapaxes(v, 1, 2))
        out = attend(rotate(q, tables), own, mask, past, past_mask)
        return Projection((c.num_heads, c.head_dim), (c.hidden_size,), name="o")(out), own


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        gate = Projection((c.hidden_size,), (c.intermediate_size,), name="gate")(x)
        up = Projection((c.hidden_size,), (c.intermediate_size,), name="up")(x)
        hidden = constrain(jax.nn.silu(gate) * up, ROWS, None, "tensor")
        return Projection((c.intermediate_size,), (c.hidden_size,), name="down")(hidden)


class Block(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, tables, mask, past=None, past_mask=None):
        c = self.config
        mixed, own = Attention(c, name="attention")(
            RMSNorm(c.norm_eps, name="attention_norm")(x), tables, mask, past, past_mask
        )
        x = constrain(x + mixed, ROWS, None, None)
        x = x + MLP(c, name="mlp")(RMSNorm(c.norm_eps, name="mlp_norm")(x))
        return constrain(x, ROWS, None, None), own


def init_params(config: ModelConfig, key: jax.Array) -> dict:
    """Random float32 parameters, layers stacked."""
    key_embed, key_layers, key_norm, key_head = jax.random.split(key, 4)
    x = jnp.zeros((1, 1, config.hidden_size))
    tables = rope_tables(config, jnp.zeros((1, 1), jnp.int32))
    mask = jnp.ones((1, 1, 1), bool)

    def layer(key):
        return Block(config).init(key, x, tables, mask)["params"]

    embed = Embed(config.vocab_size, config.hidden_size)
    params = {
        "embed": embed.init(key_embed, jnp.zeros((1, 1), jnp.int32))["params"],
        "layers": jax.vmap(layer)(jax.random.split(key_layers, config.num_layers)),
        "final_norm": RMSNorm(config.norm_eps).init(key_norm, x)["params"],
    }
    if not config.tie_embeddings:
        params["head"] = Projection((config.hidden_size,), (config.vocab_size,)).init(key_head, x)["params"]
    return params


def param_shapes(config: ModelConfig) -> dict:
    """The tree of `init_params` as jax.ShapeDtypeStruct, without making an array."""
    return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))


def unstack(params: dict) -> dict:
    """The same parameters with `layers` as a tuple of one tree a layer."""
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    layers = tuple(jax.tree.map(lambda leaf: leaf[i], params["layers"]) for i in range(count))
    return params | {"layers": layers}


def hidden_states(
    config: ModelConfig,
    params: dict,
    tokens: Int[Array, "N L"],
    positions: Int[Array, "N L"],
    mask: Bool[Array, "N L L"],
    past: Past | None = None,
) -> tuple[Float[Array, "N L D"], Any]:
    """The final layer's output after its norm, and the new keys and values of all layers.

    Args:
      mask: [n, l, m] is True where token l of row n sees token m of the same call.
      past: a cache to read before them; None when there is none.
    Returns:
      hidden [N, L, D] in the compute dtype, and KV [layers, N, K, L, E] (or a tuple of KV, if the layers are unrolled).
    """
    tables = rope_tables(config, positions)
    x = Embed(config.vocab_size, config.hidden_size).apply({"params": params["embed"]}, tokens)
    x = constrain(x.astype(config.compute_dtype), ROWS, None, None)
    past_mask = None if past is None else past.mask

    def layer(x, weights, kv):
        return Block(config).apply({"params": weights}, x, tables, mask, kv, past_mask)

    if isinstance(params["layers"], tuple):
        news = []
        for i, weights in enumerate(params["layers"]):
            x, own = layer(x, weights, None if past is None else past.kv[i])
            news.append(own)
        new = tuple(news)
    elif past is None:
        x, new = jax.lax.scan(lambda x, weights: layer(x, weights, None), x, params["layers"])
    else:
        x, new = jax.lax.scan(lambda x, scanned: layer(x, *scanned), x, (params["layers"], past.kv))
    return RMSNorm(config.norm_eps).apply({"params": params["final_norm"]}, x), new


def logits_of(config: ModelConfig, params: dict, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """Hidden states through the head, float32."""
    if config.tie_embeddings:
        head = params["embed"]["embedding"].T
    else:
        head = params["head"]["kernel"]
    flat = hidden.reshape(-1, config.hidden_size)
    logits = jnp.matmul(flat, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits.reshape(*hidden.shape[:-1], config.vocab_size)


def token_logits(config: ModelConfig, params: dict, hidden: Float[Array, "*rows D"], temperature: float | Float[Array, ""]):
    """The logits that tokens are drawn from and scored with: at the temperature, and -inf for rows that are no token.

    Sampler and trainer both use this function, so that the ratio of a fresh rollout is 1 up to rounding.
    """
    logits = logits_of(config, params, hidden) / temperature
    drawable = jnp.arange(config.vocab_size) < config.drawable
    return jnp.where(drawable, logits, -jnp.inf)


def causal_mask(rows: int, length: int) -> Bool[Array, "N L L"]:
    """Each token sees itself and those before it."""
    return jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, length, length))


def forward(
    config: ModelConfig,
    params: dict,
    tokens: Int[Array, "N L"],
    *,
    positions: Int[Array, "N L"] | None = None,
    mask: Int[Array, "N L"] | Bool[Array, "N L"] | None = None,
) -> Float[Array, "N L V"]:
    """Logits of every token of every row, float32.

    Args:
      positions: each token's position; by default its place among the real tokens of its row.
      mask: 1 on real tokens, 0 on padding, which may stand on either side. By default all tokens are real.
    """
    tokens = jnp.asarray(tokens)
    real = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    seen = causal_mask(*tokens.shape) & real[:, None, :]
    hidden, _ = hidden_states(config, params, tokens, jnp.asarray(positions), seen)
    return logits_of(config, params, hidden)
