"""The decoder as pure functions of its parameters.

`hidden_states` runs tokens through all layers. Each layer attends to the given tokens, or writes their keys and values
into a KV cache and attends to the cache.

Parameters are nested dicts. `params["layers"]` is a tuple of layer stacks: trees whose leaves are stacked over
consecutive layers of equal shapes. A layer stack is scanned, so it is compiled once and sharded as one array. Most
models have one; DeepSeek-V3 has two, because its first layers have no experts. `unstack_layers` makes each layer a
stack of its own, which is not scanned: decoding then copies no weights out of a larger array for every token.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.model.architecture import LayerConfig, ModelConfig
from grpo_jax.model.attention import KV, Attention, AttentionInputs, LatentAttention, make_attention_inputs
from grpo_jax.model.experts import MixtureOfExperts
from grpo_jax.model.kernels import CUDNN_FORWARD
from grpo_jax.model.layers import MLP, Embed, Projection, make_norm
from grpo_jax.model.mask import single_sequence, soft_cap
from grpo_jax.model.parameters import Layout
from grpo_jax.parallel.mesh import ROW_AXES, constrain
from grpo_jax.types import Segments


def add_residual(model_cfg: ModelConfig, x: Float[Array, "N L D"], delta) -> Float[Array, "N L D"]:
    """Adds the output of attention or MLP to the hidden states, scaled in float32 by `model_cfg.residual_scale`."""
    if model_cfg.residual_scale != 1:
        delta = (delta.astype(jnp.float32) * model_cfg.residual_scale).astype(x.dtype)
    return constrain(x + delta, ROW_AXES, None, None)


class DecoderLayer(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + mlp(norm(x)).

    With `model_cfg.post_norms`, the outputs of attention and MLP are normalized before they are added; without
    `model_cfg.pre_norms`, their inputs are not.
    """

    model_cfg: ModelConfig
    experts: bool = False

    @nn.compact
    def __call__(self, x, inputs: AttentionInputs, cache: KV | None = None):
        """Returns the layer's output [N, L, D] and its keys and values, or the updated cache if one is given."""
        model_cfg = self.model_cfg
        attention = (LatentAttention if model_cfg.latent else Attention)(model_cfg, name="attention")
        if self.experts:
            mlp = MixtureOfExperts(model_cfg, name="moe")
        else:
            mlp = MLP(model_cfg, model_cfg.intermediate_size, name="mlp")
        delta, kv = attention(make_norm(model_cfg, "attention_norm")(x) if model_cfg.pre_norms else x, inputs, cache)
        if model_cfg.post_norms:
            delta = make_norm(model_cfg, "attention_post_norm")(delta)
        x = add_residual(model_cfg, x, delta)
        delta = mlp(make_norm(model_cfg, "mlp_norm")(x) if model_cfg.pre_norms else x)
        if model_cfg.post_norms:
            delta = make_norm(model_cfg, "mlp_post_norm")(delta)
        return add_residual(model_cfg, x, delta), kv


def init_params(model_cfg: ModelConfig, key: jax.Array) -> dict:
    """Returns random float32 parameters."""
    key_embed, key_layers, key_norm, key_head = jax.random.split(key, 4)
    x, token = jnp.zeros((1, 1, model_cfg.hidden_size)), jnp.zeros((1, 1), jnp.int32)
    inputs = make_attention_inputs(model_cfg, model_cfg.layers[0], single_sequence(token))
    layer_keys, stacks = jax.random.split(key_layers, model_cfg.num_layers), []
    for layers in model_cfg.layer_stacks:
        init_layer = jax.vmap(DecoderLayer(model_cfg, layers[0].use_experts).init, in_axes=(0, None, None))
        stacks.append(init_layer(layer_keys[: len(layers)], x, inputs)["params"])
        layer_keys = layer_keys[len(layers) :]
    embed = Embed(model_cfg.vocab_size, model_cfg.hidden_size, name="embed").init(key_embed, token)["params"]
    final_norm = make_norm(model_cfg, "final_norm").init(key_norm, x)["params"]
    params = {"embed": embed, "layers": tuple(stacks), "final_norm": final_norm}
    if not model_cfg.tie_embeddings:
        head = Projection((model_cfg.hidden_size,), (model_cfg.vocab_size,), name="head")
        params["head"] = head.init(key_head, x)["params"]
    return params


def param_shapes(model_cfg: ModelConfig, dtype: str = "float32") -> dict:
    """Returns the tree of `init_params` as `jax.ShapeDtypeStruct` leaves of a dtype, without allocating any array."""
    shapes = jax.eval_shape(lambda: init_params(model_cfg, jax.random.key(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


def num_stacked_layers(stack) -> int:
    """Returns the number of layers in a layer stack."""
    return jax.tree.leaves(stack)[0].shape[0]


def unstack_layers(params: dict) -> dict:
    """Returns the same parameters with every layer in a layer stack of its own."""

    def split(stack):
        return [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], stack) for i in range(num_stacked_layers(stack))]

    return params | {"layers": tuple(layer for stack in params["layers"] for layer in split(stack))}


def merge_projections(stack: dict, tensor: int) -> dict:
    """Returns a layer stack that projects queries, keys and values with one matrix, and gate and up with another.

    A decode step then has fewer and larger products. A merged kernel is [D, shards, outputs of a shard], so that every
    device has the columns of its own heads. Projections that `tensor` does not divide stay apart, because it may still
    divide the query heads.

    Args:
        stack: The layer stack.
        tensor: Size of the mesh axis that splits the heads and the MLP's columns.
    """

    def merge(module, name, parts, axis):
        if parts[-1] not in module or module[parts[-1]]["kernel"].shape[axis] % tensor:
            return module

        def side_by_side(path, *leaves):
            lead = 2 if path[-1].key == "kernel" else 1  # kernels [layers, D, *outputs], biases [layers, *outputs]
            return jnp.concatenate([leaf.reshape(*leaf.shape[:lead], tensor, -1) for leaf in leaves], axis=-1)

        merged = jax.tree_util.tree_map_with_path(side_by_side, *(module[part] for part in parts))
        return {name: merged} | {key: value for key, value in module.items() if key not in parts}

    def merge_modules(module):
        module = merge(merge(module, "qkv", ("q", "k", "v"), -2), "gate_up", ("gate", "up"), -1)
        return {key: merge_modules(value) if isinstance(value, dict) else value for key, value in module.items()}

    return merge_modules(stack)


def apply_layer_stack(
    model_cfg: ModelConfig,
    stack,
    layers: tuple[LayerConfig, ...],
    x,
    inputs: dict[LayerConfig, AttentionInputs],
    cache: KV | None,
):
    """Applies the layers of one layer stack to x [N, L, D].

    Returns:
        The output [N, L, D], and the stacked keys and values of the layers, or their updated caches.
    """
    module = DecoderLayer(model_cfg, layers[0].use_experts)

    def apply(x, weights, layer_inputs, cache):
        return module.apply({"params": weights}, x, layer_inputs, cache)

    if model_cfg.remat != "none":
        saved = ("attention", "matmul") if model_cfg.remat == "matmuls" else ("attention",)
        has_name = jax.checkpoint_policies.save_only_these_names(*saved)

        def policy(primitive, *args, **params):
            return primitive.name == CUDNN_FORWARD or has_name(primitive, *args, **params)

        apply = jax.checkpoint(apply, policy=policy, prevent_cse=len(layers) == 1)

    if len(layers) == 1:
        weights, layer_cache = jax.tree.map(lambda leaf: leaf[0], (stack, cache))
        x, kv = apply(x, weights, inputs[layers[0]], layer_cache)
        return x, jax.tree.map(lambda leaf: leaf[None], kv)
    kinds = list(dict.fromkeys(layers))
    if len(kinds) == 1:
        return jax.lax.scan(lambda x, scanned: apply(x, scanned[0], inputs[kinds[0]], scanned[1]), x, (stack, cache))
    stacked_inputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(inputs[kind] for kind in kinds))
    kind_of_layer = jnp.asarray([kinds.index(layer) for layer in layers])

    def step(x, scanned):
        weights, cache, kind = scanned
        return apply(x, weights, jax.tree.map(lambda leaf: leaf[kind], stacked_inputs), cache)

    return jax.lax.scan(step, x, (stack, cache, kind_of_layer))


def hidden_states(
    model_cfg: ModelConfig,
    params: dict,
    tokens: Int[Array, "N L"],
    segments: Segments,
    cache: tuple[KV, ...] | None = None,
    *,
    layout: Layout = "training",
    causal: bool = False,
) -> tuple[Float[Array, "N L D"], tuple[KV, ...]]:
    """Computes the hidden states after the final norm.

    Args:
        model_cfg: The model's config.
        params: The parameters, as from `init_params` or `unstack_layers`.
        tokens: Token ids [N, L].
        segments: The prompt and completion that each token belongs to, [N, L]. They decide which tokens attend to
            each other (`grpo_jax.model.mask.attention_mask`).
        cache: One KV cache for each layer stack, in which every row is a single sequence. The tokens are written into
            the columns of their positions and then attend to all columns up to their own.
        layout: How the parameters are placed on the current mesh; see `grpo_jax.model.parameters.Layout`.
        causal: Promises that every row is one sequence from position 0 on, that nothing is differentiated, and that
            layers that differ in their attention are not stacked.

    Returns:
        The hidden states [N, L, D] in the compute dtype, and a KV for each layer stack: the keys and values of the
        tokens, or the updated cache.
    """
    embed = Embed(model_cfg.vocab_size, model_cfg.hidden_size, layout, name="embed")
    x = embed.apply({"params": params["embed"]}, tokens).astype(model_cfg.compute_dtype)
    if model_cfg.embed_scale != 1:
        x = x * jnp.asarray(model_cfg.embed_scale, x.dtype)
    x = constrain(x, ROW_AXES, None, None)
    columns = 0 if cache is None else cache[0].v.shape[-2]
    kinds = dict.fromkeys(model_cfg.layers)
    inputs = {layer: make_attention_inputs(model_cfg, layer, segments, columns, causal=causal) for layer in kinds}
    stacked_kv, start = [], 0
    for index, stack in enumerate(params["layers"]):
        layers = model_cfg.layers[start : start + num_stacked_layers(stack)]
        x, kv = apply_layer_stack(model_cfg, stack, layers, x, inputs, None if cache is None else cache[index])
        stacked_kv.append(kv)
        start += len(layers)
    return make_norm(model_cfg, "final_norm").apply({"params": params["final_norm"]}, x), tuple(stacked_kv)


def head_path(model_cfg: ModelConfig) -> str:
    """Returns the path of the parameter that maps hidden states to logits."""
    return "embed/embedding" if model_cfg.tie_embeddings else "head/kernel"


def head_kernel(model_cfg: ModelConfig, params: dict) -> Float[Array, "D V"]:
    """Returns the matrix that maps hidden states to logits."""
    return params["embed"]["embedding"].T if model_cfg.tie_embeddings else params["head"]["kernel"]


def head_matmul(model_cfg: ModelConfig, params: dict, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """Multiplies hidden states with the head, in `model_cfg.logit_dtype`."""
    flat = hidden.reshape(-1, model_cfg.hidden_size)
    kernel = head_kernel(model_cfg, params).astype(hidden.dtype)
    out = jnp.matmul(flat, kernel, preferred_element_type=model_cfg.logit_dtype)
    return out.reshape(*hidden.shape[:-1], -1)


def cap_logits(model_cfg: ModelConfig, product: Float[Array, "*rows _"]) -> Float[Array, "*rows _"]:
    """Returns float32 logits from the output of `head_matmul`, divided and soft-capped if the model requires it."""
    logits = product.astype(jnp.float32)
    return soft_cap(
        logits / model_cfg.logit_divisor if model_cfg.logit_divisor != 1 else logits, model_cfg.logit_softcap
    )


def compute_logits(model_cfg: ModelConfig, params: dict, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
    """Returns the float32 logits of hidden states."""
    return cap_logits(model_cfg, head_matmul(model_cfg, params, hidden))


def temperature_logits(
    model_cfg: ModelConfig,
    product: Float[Array, "*rows _"],
    temperature: float | Float[Array, ""],
    first_id: int | Int[Array, ""] = 0,
) -> Float[Array, "*rows _"]:
    """Returns the logits that tokens are sampled from: float32, divided by the temperature, -inf for ids of no token.

    The sampler and the trainer both use this function, so that the ratio of a fresh rollout is 1 up to rounding.

    Args:
        model_cfg: The model's config.
        product: The output of `head_matmul`, or a slice of its columns.
        temperature: The sampling temperature, above 0.
        first_id: The token id of the first column of `product`.
    """
    logits = cap_logits(model_cfg, product) / temperature
    if model_cfg.sampleable_vocab_size == model_cfg.vocab_size:
        return logits
    return jnp.where(first_id + jnp.arange(logits.shape[-1]) < model_cfg.sampleable_vocab_size, logits, -jnp.inf)


def forward(
    model_cfg: ModelConfig,
    params: dict,
    tokens: Int[Array, "N L"],
    *,
    positions: Int[Array, "N L"] | None = None,
    mask: Int[Array, "N L"] | Bool[Array, "N L"] | None = None,
) -> Float[Array, "N L V"]:
    """Computes the float32 logits of every token, for rows that each hold a single sequence.

    Args:
        model_cfg: The model's config.
        params: The parameters.
        tokens: Token ids [N, L].
        positions: The position of each token in its sequence, by default its index among the real tokens of its row.
            A token attends to the real tokens of its row whose position is at most its own.
        mask: 1 on real tokens and 0 on padding, which may be on either side. By default all tokens are real.
    """
    tokens = jnp.asarray(tokens)
    real = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask).astype(bool)
    if positions is None:
        positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    hidden, _ = hidden_states(model_cfg, params, tokens, single_sequence(jnp.asarray(positions), real))
    return compute_logits(model_cfg, params, hidden)
