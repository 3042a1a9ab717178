"""A Llama decoder on weights in Hugging Face's layout, written for reading; nothing here knows `grpo_jax`.

Weights are a dict from Hugging Face's tensor names to arrays. Run it with JAX_ENABLE_X64=1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

LAYER_TENSORS = {  # the name in a checkpoint -> the name in a Hugging Face folder
    "attention_norm/scale": "input_layernorm",
    "attention/q/kernel": "self_attn.q_proj",
    "attention/k/kernel": "self_attn.k_proj",
    "attention/v/kernel": "self_attn.v_proj",
    "attention/o/kernel": "self_attn.o_proj",
    "mlp_norm/scale": "post_attention_layernorm",
    "mlp/gate/kernel": "mlp.gate_proj",
    "mlp/up/kernel": "mlp.up_proj",
    "mlp/down/kernel": "mlp.down_proj",
}


def read_base(folder):
    """Reads the weights of a Hugging Face folder in float64."""
    return {name: x.astype(np.float64) for name, x in load_file(folder / "model.safetensors").items()}


def from_checkpoint(tree):
    """Renames the parameters of a checkpoint, or moments of the same shapes, to Hugging Face's layout in float64."""
    embedding, norm, (stack,) = tree["embed"]["embedding"], tree["final_norm"]["scale"], tree["layers"]
    weights, width = {"model.embed_tokens.weight": embedding, "model.norm.weight": norm}, len(norm)
    for path, name in LAYER_TENSORS.items():
        stacked = stack
        for key in path.split("/"):
            stacked = stacked[key]
        for i, x in enumerate(stacked):
            if x.ndim == 3:  # heads: [width, heads, head width], or for `o` [heads, head width, width]
                x = x.reshape(-1, width) if name.endswith("o_proj") else x.reshape(width, -1)
            weights[f"model.layers.{i}.{name}.weight"] = x.T
    return {name: np.asarray(x, np.float64) for name, x in weights.items()}


def rms_norm(x, scale, eps):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(x, theta):
    """Rotates the pairs (x[i], x[i + half]) of `x[tokens, heads, width]` by position * theta^(-i / half)."""
    tokens, _, width = x.shape
    half = width // 2
    angle = np.arange(tokens)[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None].astype(x.dtype), np.sin(angle)[:, None].astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(config, weights, prefix, x):
    heads, kv_heads, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    tokens = len(x)
    q, k, v = (
        (x @ weights[f"{prefix}.{name}_proj.weight"].T).reshape(tokens, count, width)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    theta = config["rope_parameters"]["rope_theta"]
    q, k = rotate(q, theta), jnp.repeat(rotate(k, theta), heads // kv_heads, axis=1)
    v = jnp.repeat(v, heads // kv_heads, axis=1)
    scores = jnp.einsum("qhe,khe->hqk", q, k) / width**0.5
    causal = np.arange(tokens)[:, None] >= np.arange(tokens)
    probs = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.einsum("hqk,khe->qhe", probs, v).reshape(tokens, -1) @ weights[f"{prefix}.o_proj.weight"].T


def logits(config, weights, tokens):
    """Returns the logits `[L, V]` of one sequence of token ids `[L]`."""
    x, eps = weights["model.embed_tokens.weight"][tokens], config["rms_norm_eps"]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], eps)
        x = x + attend(config, weights, f"{layer}.self_attn", h)
        h = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], eps)
        gate, up = (h @ weights[f"{layer}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (jax.nn.silu(gate) * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["model.embed_tokens.weight"].T
