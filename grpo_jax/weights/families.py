"""The supported model families: one row each, which describes how a family differs from Llama.

One decoder serves all families. `grpo_jax.weights.hf_config` uses these rows to read a config.json, and
`grpo_jax.weights.tensor_names` to read a checkpoint.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

from grpo_jax.errors import UserError
from grpo_jax.model.architecture import ExpertsConfig, LatentConfig
from grpo_jax.model.rope import yarn_attention_factor

NOTHING = MappingProxyType({})


class Family(NamedTuple):
    """How the config.json and the tensors of a family differ from Llama's.

    Functions in `fields` and `layer_fields` get the family's config object from `transformers`.
    """

    fields: Mapping[str, Any] = NOTHING  # of ModelConfig: a value, or a function of the config
    # Of LayerConfig: functions of the config and the index of the layer.
    layer_fields: Mapping[str, Callable[[Any, int], Any]] = NOTHING
    windows: str = "none"  # layers with a sliding window: "none", "all", or those named by the config: "layer_types"
    no_rope_layers: bool = False  # the config's no_rope_layers is 0 for layers without a rotary embedding
    prepare: Callable[[dict], dict] = dict  # rewrites a config.json that `transformers` would misread
    read_as: str = ""  # model_type of the config class in `transformers`; "": the family's own
    text_types: tuple[str, ...] = ()  # allowed model_types of the nested text_config; (): no nesting
    tensor_names: Mapping[str, str] = NOTHING  # path in the parameter table -> tensor, where it is not Llama's
    fused_tensors: Mapping[str, tuple[str, ...]] = NOTHING  # tensor -> Llama's tensors that it stacks by rows
    skipped_tensors: tuple[str, ...] = ()  # patterns of tensors that the decoder does not use; {n}: number of layers


def flag(name: str) -> Callable[[Any], bool]:
    """Returns a function that reads a boolean field of a config; False if the config lacks it."""
    return lambda hf: bool(getattr(hf, name, False))


def number(name: str) -> Callable[[Any], float]:
    """Returns a function that reads a number of a config; 0 if the config lacks it."""
    return lambda hf: float(getattr(hf, name, 0) or 0)


def read_mixtral_experts(hf) -> ExpertsConfig:
    """Returns the mixture of experts of a Mixtral config."""
    return ExpertsConfig(hf.num_local_experts, hf.num_experts_per_tok, hf.intermediate_size)


def read_qwen3_experts(hf) -> ExpertsConfig:
    """Returns the mixture of experts of a Qwen3-MoE config."""
    normalize = bool(hf.norm_topk_prob)
    return ExpertsConfig(hf.num_experts, hf.num_experts_per_tok, hf.moe_intermediate_size, normalize_weights=normalize)


def read_deepseek_experts(hf) -> ExpertsConfig:
    """Returns the mixture of experts of a DeepSeek-V3 config."""
    return ExpertsConfig(
        hf.n_routed_experts,
        hf.num_experts_per_tok,
        hf.moe_intermediate_size,
        shared_intermediate_size=hf.moe_intermediate_size * hf.n_shared_experts,
        sigmoid_gate=True,
        normalize_weights=bool(hf.norm_topk_prob),
        routed_scale=float(hf.routed_scaling_factor),
        num_groups=hf.n_group,
        num_top_groups=hf.topk_group,
    )


def read_latent_config(hf) -> LatentConfig:
    """Returns the multi-head latent attention of a DeepSeek-V3 config."""
    widths = hf.qk_nope_head_dim, hf.qk_rope_head_dim, hf.v_head_dim
    return LatentConfig(hf.q_lora_rank or 0, hf.kv_lora_rank, *widths)


def latent_score_divisor(hf) -> float:
    """Returns the divisor of DeepSeek-V3's attention scores, which YaRN lowers as it stretches the context."""
    rope_parameters = hf.rope_parameters
    growth = 1.0
    if rope_parameters.get("rope_type", "default") != "default" and rope_parameters.get("mscale_all_dim"):
        growth = yarn_attention_factor(rope_parameters["factor"], rope_parameters["mscale_all_dim"])
    return math.sqrt(hf.qk_nope_head_dim + hf.qk_rope_head_dim) / growth**2


def uses_qwen3_experts(hf, layer: int) -> bool:
    """Returns whether a layer of a Qwen3-MoE config has experts."""
    return layer not in hf.mlp_only_layers and hf.num_experts > 0 and (layer + 1) % hf.decoder_sparse_step == 0


def uses_listed_experts(hf, layer: int) -> bool:
    """Returns whether a layer of a GLM-4.7-Flash config has experts.

    Raises:
        ValueError: `mlp_layer_types` ends before the layer.
    """
    if layer >= len(hf.mlp_layer_types):
        raise ValueError(f"mlp_layer_types {hf.mlp_layer_types}, without layer {layer}")
    return hf.mlp_layer_types[layer] == "sparse"


def read_rotary_dim(hf) -> int:
    """Returns how many dimensions of each head the rotary embedding covers, according to a config.

    Raises:
        ValueError: It covers none.
    """
    factor = hf.rope_parameters.get("partial_rotary_factor", 1.0)
    rotary_dim = int((getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads) * factor)
    if rotary_dim < 2:
        raise ValueError(f"partial_rotary_factor {factor}")
    return rotary_dim


def share_rope_theta(hf_config: dict) -> dict:
    """Returns an OLMo 3 config whose rope_theta applies to all layers, as before version 5 of `transformers`.

    Version 5 would use its default for the layers with a sliding window.
    """
    if "rope_theta" not in hf_config or hf_config.get("rope_parameters"):
        return hf_config
    rope = {"rope_type": "default", "rope_theta": hf_config["rope_theta"]}
    return hf_config | {"rope_parameters": {"sliding_attention": rope, "full_attention": dict(rope)}}


BIASES = {"qkv_bias": flag("attention_bias"), "out_bias": flag("attention_bias")}
QWEN3 = BIASES | {"qk_norm": True}
GEMMA2 = BIASES | {
    "unit_offset": True,
    "post_norms": True,
    "activation": attrgetter("hidden_activation"),
    "embed_scale": lambda hf: math.sqrt(hf.hidden_size),
    "score_divisor": lambda hf: math.sqrt(hf.query_pre_attn_scalar),
}
DEEPSEEK_V3_LAYERS = {"use_experts": lambda hf, layer: layer >= hf.first_k_dense_replace}
GEMMA3 = GEMMA2 | {"qk_norm": True}
GEMMA_NAMES = {"mlp_norm/scale": "layers.{i}.pre_feedforward_layernorm.weight"}
MIXTRAL_NAMES = {
    "moe/router/kernel": "layers.{i}.block_sparse_moe.gate.weight",
    "moe/experts_gate": "layers.{i}.block_sparse_moe.experts.{x}.w1.weight",
    "moe/experts_up": "layers.{i}.block_sparse_moe.experts.{x}.w3.weight",
    "moe/experts_down": "layers.{i}.block_sparse_moe.experts.{x}.w2.weight",
}
ALL_BIASES = BIASES | {"mlp_bias": flag("mlp_bias")}
OLMO2 = BIASES | {"qk_norm": True, "qk_norm_all_heads": True, "pre_norms": False, "post_norms": True}
GRANITE = ALL_BIASES | {
    "embed_scale": number("embedding_multiplier"),
    "residual_scale": number("residual_multiplier"),
    "score_divisor": lambda hf: 1 / hf.attention_multiplier,
    "logit_divisor": number("logits_scaling"),
}
GLM4 = {
    "qkv_bias": flag("attention_bias"),
    "post_norms": True,
    "rotary_dim": read_rotary_dim,
    "rope_interleave": True,
}
GLM4_NAMES = {
    "attention_post_norm/scale": "layers.{i}.post_self_attn_layernorm.weight",
    "mlp_post_norm/scale": "layers.{i}.post_mlp_layernorm.weight",
}
FUSED_QKV = {
    "layers.{i}.self_attn.qkv_proj.weight": tuple(f"layers.{{i}}.self_attn.{part}_proj.weight" for part in "qkv")
}
FUSED_GATE_UP = {
    "layers.{i}.mlp.gate_up_proj.weight": tuple(f"layers.{{i}}.mlp.{part}_proj.weight" for part in ("gate", "up"))
}
DEEPSEEK_V3 = BIASES | {
    "latent": read_latent_config,
    "experts": read_deepseek_experts,
    "score_divisor": latent_score_divisor,
    "rope_interleave": flag("rope_interleave"),
}

# Tensors that the decoder does not use.
VISION_TOWER = (r"vision_tower\.", r"multi_modal_projector\.")
QWEN_VISION_TOWER = (r"^(model\.)?visual\.",)
NEXT_TOKENS_LAYER = (r"^model\.layers\.{n}\.",)  # the multi-token prediction layer, stored after the last layer

FAMILIES = {
    "llama": Family(ALL_BIASES),
    "mistral": Family(windows="layer_types"),
    "ministral3": Family(windows="layer_types"),
    "mistral3": Family(windows="layer_types", text_types=("mistral", "ministral3"), skipped_tensors=VISION_TOWER),
    "mixtral": Family(
        {"experts": read_mixtral_experts},
        {"use_experts": lambda hf, layer: True},
        windows="all",
        tensor_names=MIXTRAL_NAMES,
    ),
    "qwen2": Family({"qkv_bias": True}, windows="layer_types"),
    # The rotary embedding of Qwen's vision-language models has sections for time, height and width. A text token has
    # the same position in all three, which makes it a plain rotary embedding.
    "qwen2_5_vl": Family(
        {"qkv_bias": True}, windows="layer_types", text_types=("qwen2_5_vl_text",), skipped_tensors=QWEN_VISION_TOWER
    ),
    "qwen3": Family(QWEN3, windows="layer_types"),
    "qwen3_vl": Family(QWEN3, text_types=("qwen3_vl_text",), skipped_tensors=QWEN_VISION_TOWER),
    "qwen3_moe": Family(QWEN3 | {"experts": read_qwen3_experts}, {"use_experts": uses_qwen3_experts}, windows="all"),
    "gemma2": Family(
        GEMMA2
        | {"score_softcap": number("attn_logit_softcapping"), "logit_softcap": number("final_logit_softcapping")},
        windows="layer_types",
        tensor_names=GEMMA_NAMES,
    ),
    # In transformers, the vision-language model does not cap the logits as gemma3_text does.
    "gemma3": Family(
        GEMMA3,
        windows="layer_types",
        text_types=("gemma3_text",),
        tensor_names=GEMMA_NAMES,
        skipped_tensors=VISION_TOWER,
    ),
    "gemma3_text": Family(
        GEMMA3 | {"logit_softcap": number("final_logit_softcapping")},
        windows="layer_types",
        tensor_names=GEMMA_NAMES,
    ),
    "smollm3": Family(ALL_BIASES, windows="layer_types", no_rope_layers=True),
    "olmo2": Family(OLMO2),
    "olmo3": Family(OLMO2, windows="layer_types", prepare=share_rope_theta),
    "phi3": Family({"rotary_dim": read_rotary_dim}, windows="all", fused_tensors=FUSED_QKV | FUSED_GATE_UP),
    "granite": Family(GRANITE),
    "glm4": Family(GLM4, tensor_names=GLM4_NAMES, fused_tensors=FUSED_GATE_UP),
    "seed_oss": Family(
        {"qkv_bias": flag("attention_bias"), "out_bias": flag("attention_out_bias"), "mlp_bias": flag("mlp_bias")}
    ),
    "cwm": Family({"mlp_bias": flag("mlp_bias")}, windows="layer_types"),
    "glm4_moe_lite": Family(
        DEEPSEEK_V3,
        {"use_experts": uses_listed_experts},
        skipped_tensors=NEXT_TOKENS_LAYER,
    ),
    # Kimi K2 is DeepSeek-V3 under another name, which transformers does not know.
    "kimi_k2": Family(DEEPSEEK_V3, DEEPSEEK_V3_LAYERS, read_as="deepseek_v3", skipped_tensors=NEXT_TOKENS_LAYER),
    "deepseek_v3": Family(DEEPSEEK_V3, DEEPSEEK_V3_LAYERS, skipped_tensors=NEXT_TOKENS_LAYER),
}

# Features of other families that the decoder lacks.
UNSUPPORTED_FEATURES = {
    "attention sinks": ("gpt_oss",),
    "per-layer embeddings": ("gemma3n", "gemma3n_text"),
    "attention heads of two widths": ("gemma4", "gemma4_text"),
    "layers with linear attention": (
        *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "kimi_linear", "minimax"),
        "olmo_hybrid",
    ),
    "state-space layers": (
        *("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba", "zamba2", "falcon_h1", "nemotron_h"),
        "granitemoehybrid",
    ),
    "recurrent layers": ("rwkv", "recurrent_gemma", "xlstm"),
    "convolutional layers": ("lfm2", "lfm2_moe", "lfm2_vl"),
    "an indexer that selects the keys to attend to": ("deepseek_v32", "glm_moe_dsa"),
    "experts with a sigmoid gate but no latent attention": ("glm4_moe", "glm4v_moe", "minimax_m2"),
    "groups of experts with a softmax gate": ("deepseek_v2",),
    "a gated shared expert": ("qwen2_moe",),
    "experts stored in one tensor": ("qwen3_vl_moe",),
    "INT4 experts": ("kimi_k25",),
    "chunked attention": ("llama4", "llama4_text"),
    "cross-attention to images": ("mllama",),
    "layer norms instead of RMS norms": (
        *("gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "mpt", "falcon", "phi", "stablelm"),
        *("starcoder2", "cohere", "cohere2", "codegen", "dbrx"),
    ),
    "an encoder": (
        *("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "albert", "electra", "deberta", "deberta-v2"),
        *("modernbert", "t5", "mt5", "umt5", "t5gemma", "bart", "mbart", "pegasus", "whisper", "clip", "siglip", "vit"),
    ),
}


def check_family(hf_config: dict, where: str) -> str:
    """Checks that a config.json is of a supported family.

    Args:
        hf_config: The contents of config.json.
        where: The model folder or GGUF file, for error messages.

    Returns:
        The family: `model_type`, or the vision-language family if the config has that of its text decoder there.

    Raises:
        UserError: The family is not supported. The message lists those that are, the most similar name, and what the
            decoder lacks, if known.
    """
    name, text_config = hf_config.get("model_type"), hf_config.get("text_config")
    if not isinstance(name, str) or name not in FAMILIES:
        missing = next((feature for feature, names in UNSUPPORTED_FEATURES.items() if name in names), "")
        nearest = difflib.get_close_matches(str(name)[:80], FAMILIES, n=1)
        raise UserError(
            f"model_type in {where} must be one of {', '.join(FAMILIES)}; found {name!r:.80}"
            f"{f', which has {missing}' if missing else ''}. "
            f"Choose a model of a supported family{f', such as {nearest[0]}' if nearest else ''}."
        )
    if not isinstance(text_config, dict):
        return name
    if not FAMILIES[name].text_types:
        return next((family for family, row in FAMILIES.items() if name in row.text_types), name)
    text_type = text_config.get("model_type", FAMILIES[name].text_types[0])
    if text_type not in (*FAMILIES[name].text_types, name):  # early Qwen2.5-VL configs repeat the outer model_type
        raise UserError(
            f"model_type of text_config in {where} must be one of {', '.join(FAMILIES[name].text_types)} in a model of "
            f"{name}; found {text_type!r:.80}. Choose another model."
        )
    return name
