"""The decoder, as pure functions of its parameters.

`hidden_states` runs tokens through all layers. Each layer attends to the tokens given, or writes their keys and values into
a cache and attends to that.

The parameters are a dict of dicts. `params["layers"]` is a tuple of runs: a run is a tree whose leaves are stacked over
consecutive layers of one shape, and is scanned (compiled once, sharded as one array). Most models are one run;
DeepSeek-V3 is two, its first layers having no experts. `unstack` cuts the runs into single layers, which are unrolled:
decoding then copies no weight out of a stack for every token.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.model.architecture import LayerConfig, ModelConfig
from grpo_jax.model.attention import KV, Attention, AttentionInputs, LatentAttention, make_attention_inputs
from grpo_jax.model.experts import MixtureOfExperts
from grpo_jax.model.layers import MLP, Embed, Projection, make_norm
from grpo_jax.model.mask import single_sequence
from grpo_jax.parallel.mesh import ROW_AXES, Layout, constrain
from grpo_jax.types import Segments


class DecoderLayer(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x)); with `post_norms`, both are normed once more."""

    model_cfg: ModelConfig
    experts: bool = False

    @nn.compact
    def __call__(self, x, view: AttentionInputs, cache: KV | None = None):
        c = self.model_cfg
        attention = LatentAttention if c.latent else Attention
        mixed, kv = attention(c, name="attention")(make_norm(c, "attention_norm")(x), view, cache)
        if c.post_norms:
            mixed = make_norm(c, "attention_post_norm")(mixed)
        x = constrain(x + mixed, ROW_AXES, None, None)
        mlp = MixtureOfExperts(c, name="moe") if self.experts else MLP(c, c.intermediate_size, name="mlp")
        mixed = mlp(make_norm(c, "mlp_norm")(x))
        if c.post_norms:
            mixed = make_norm(c, "mlp_post_norm")(mixed)
        return constrain(x + mixed, ROW_AXES, None, None), kv


def init_params(model_cfg: ModelConfig, key: jax.Array) -> dict:
    """Random float32 parameters."""
    key_embed, key_layers, key_norm, key_head = jax.random.split(key, 4)
    x = jnp.zeros((1, 1, model_cfg.hidden_size))
    seen = make_attention_inputs(model_cfg, model_cfg.layers[0], single_sequence(jnp.zeros((1, 1), jnp.int32)))
    keys, runs = jax.random.split(key_layers, model_cfg.num_layers), []
    for run in model_cfg.layer_stacks:
        block = DecoderLayer(model_cfg, run[0].use_experts)
        runs.append(jax.vmap(lambda key: block.init(key, x, seen)["params"])(keys[: len(run)]))
        keys = keys[len(run) :]
    embed = Embed(model_cfg.vocab_size, model_cfg.hidden_size)
    params = {
        "embed": embed.init(key_embed, jnp.zeros((1, 1), jnp.int32))["params"],
        "layers": tuple(runs),
        "final_norm": make_norm(model_cfg).init(key_norm, x)["params"],
    }
    if not model_cfg.tie_embeddings:
        params["head"] = Projection((model_cfg.hidden_size,), (model_cfg.vocab_size,)).init(key_head, x)["params"]
    return params


def param_shapes(model_cfg: ModelConfig, dtype: str = "float32") -> dict:
    """The tree of `init_params` as jax.ShapeDtypeStruct in a dtype, without making an array."""
    shapes = jax.eval_shape(lambda key: init_params(model_cfg, key), jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def num_stacked_layers(run) -> int:
    """The number of layers in a run."""
    return jax.tree.leaves(run)[0].shape[0]


def unstack_layers(params: dict) -> dict:
    """The same parameters with every layer a run of its own."""
    layers = tuple(
        jax.tree.map(lambda leaf: leaf[i : i + 1], run)
        for run in params["layers"]
        for i in range(num_stacked_layers(run))
    )
    return params | {"layers": layers}


def run_layers(
    model_cfg: ModelConfig,
    run,
    layers: tuple[LayerConfig, ...],
    x,
    views: dict[LayerConfig, AttentionInputs],
    cache: KV | None,
):
    """x through consecutive layers of one shape; and their keys and values or written caches, stacked."""
    block = DecoderLayer(model_cfg, layers[0].use_experts)

    def apply(x, weights, view, cache):
        return block.apply({"params": weights}, x, view, cache)

    if model_cfg.remat != "none":
        kept = ("attention", "matmul") if model_cfg.remat == "matmuls" else ("attention",)
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        apply = jax.checkpoint(apply, policy=policy, prevent_cse=len(layers) == 1)

    if len(layers) == 1:
        first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)
        x, kv = apply(x, first(run), views[layers[0]], first(cache))
        return x, jax.tree.map(lambda leaf: leaf[None], kv)
    kinds = list(dict.fromkeys(layers))
    if len(kinds) == 1:
        return jax.lax.scan(lambda x, scanned: apply(x, scanned[0], views[kinds[0]], scanned[1]), x, (run, cache))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(views[kind] for kind in kinds))
    kind_of_layer = jnp.asarray([kinds.index(layer) for layer in layers])

    def step(x, scanned):
        weights, cache, kind = scanned
        return apply(x, weights, jax.tree.map(lambda leaf: leaf[kind], stacked), cache)

    return jax.lax.scan(step, x, (run, cache, kind_of_layer))


def hidden_states(
    model_cfg: ModelConfig,
    params: dict,
    tokens: Int[Array, "N L"],
    segments: Segments,
    cache: tuple[KV, ...] | None = None,
    *,
    layout: Layout = "training",
) -> tuple[Float[Array, "N L D"], tuple[KV, ...]]:
    """The final layer's output after its norm, and the keys and values of all layers.

    Args:
      segments: whose tokens they are, [N, L]. They see each other as `attend.sees` says.
      cache: a KV for each run of the parameters, of rows that are one sequence each. The tokens given are written into
        the columns of their positions, and then see all columns up to their own.
      layout: How the parameters are placed on the mesh; see `tree_shardings`.
    Returns:
      hidden [N, L, D] in the compute dtype, and a KV for each run of the parameters: of the tokens given, or the cache.
    """
    x = Embed(model_cfg.vocab_size, model_cfg.hidden_size, layout).apply({"params": params["embed"]}, tokens)
    x = x.astype(model_cfg.compute_dtype)
    if model_cfg.embed_scale != 1:
        x = x * jnp.asarray(model_cfg.embed_scale, x.dtype)
    x = constrain(x, ROW_AXES, None, None)
    columns = 0 if cache is None else cache[0].v.shape[-2]
    views = {
        layer: make_attention_inputs(model_cfg, layer, segments, columns) for layer in dict.fromkeys(model_cfg.layers)
    }
    kv, first = [], 0
    for index, run in enumerate(params["layers"]):
        layers = model_cfg.layers[first : first + num_stacked_layers(run)]
        x, own = run_layers(model_cfg, run, layers, x, views, None if cache is None else cache[index])
        kv.append(own)
        first += len(layers)
    return make_norm(model_cfg).apply({"params": params["final_norm"]}, x), tuple(kv)


def head_path(model_cfg: ModelConfig) -> str:
    """The path of the parameter that makes logits."""
    return "embed/embedding" if model_cfg.tie_embeddings else "head/kernel"


def head_kernel(model_cfg: ModelConfig, params: dict) -> Float[Array, "D V"]:
    """The matrix from hidden states to logits."""
    return params["embed"]["embedding"].T if model_cfg.tie_embeddings else params["head"]["kernel"]


def head_matmul(model_cfg: ModelConfig, params: dict, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """Hidden states times the head, in `config.logit_dtype`."""
    flat = hidden.reshape(-1, model_cfg.hidden_size)
    kernel = head_kernel(model_cfg, params).astype(hidden.dtype)
    out = jnp.matmul(flat, kernel, preferred_element_type=model_cfg.logit_dtype)
    return out.reshape(*hidden.shape[:-1], -1)


def cap_logits(model_cfg: ModelConfig, product: Float[Array, "*rows _"]) -> Float[Array, "*rows _"]:
    """Logits from what `head_product` gives, float32."""
    logits = product.astype(jnp.float32)
    return model_cfg.logit_softcap * jnp.tanh(logits / model_cfg.logit_softcap) if model_cfg.logit_softcap else logits


def logits_from_hidden(
    model_cfg: ModelConfig, params: dict, hidden: Float[Array, "*rows D"]
) -> Float[Array, "*rows V"]:
    """Hidden states through the head, float32."""
    return cap_logits(model_cfg, head_matmul(model_cfg, params, hidden))


def temperature_logits(
    model_cfg: ModelConfig,
    product: Float[Array, "*rows _"],
    temperature: float | Float[Array, ""],
    first: int | Int[Array, ""] = 0,
) -> Float[Array, "*rows _"]:
    """The logits that tokens are drawn from and scored with: at the temperature, and -inf for rows that are no token.

    Sampler and trainer both use this function, so that the ratio of a fresh rollout is 1 up to rounding.

    Args:
      product: of hidden states and the head, as of `head_product`,
      first: and the id of its first column, where it is a part of the vocabulary's.
    """
    logits = cap_logits(model_cfg, product) / temperature
    if model_cfg.sampleable_vocab_size == model_cfg.vocab_size:
        return logits
    return jnp.where(first + jnp.arange(logits.shape[-1]) < model_cfg.sampleable_vocab_size, logits, -jnp.inf)


def sampling_logits(
    model_cfg: ModelConfig, params: dict, hidden: Float[Array, "*rows D"], temperature: float | Float[Array, ""]
):
    """`temper` of hidden states."""
    return temperature_logits(model_cfg, head_matmul(model_cfg, params, hidden), temperature)


def forward(
    model_cfg: ModelConfig,
    params: dict,
    tokens: Int[Array, "N L"],
    *,
    positions: Int[Array, "N L"] | None = None,
    mask: Int[Array, "N L"] | Bool[Array, "N L"] | None = None,
) -> Float[Array, "N L V"]:
    """Logits of every token of every row, float32.

    Args:
      positions: each token's position; by default its place among the real tokens of its row. A token sees the real
        tokens of its row whose position is not after its own.
      mask: 1 on real tokens, 0 on padding, which may stand on either side. By default all tokens are real.
    """
    tokens = jnp.asarray(tokens)
    real = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    hidden, _ = hidden_states(model_cfg, params, tokens, single_sequence(jnp.asarray(positions), real))
    return logits_from_hidden(model_cfg, params, hidden)
