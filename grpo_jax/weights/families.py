"""The supported model families: one row each, which says how a family differs from Llama.

One decoder serves all families. `grpo_jax.weights.hf_config` reads a config.json by these rows, and
`grpo_jax.weights.tensor_names` a checkpoint.
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
    windows: str = "none"  # layers with a sliding window: "none", "all", or "layer_types": those that it names
    read_as: str = ""  # model_type of the config class in `transformers`; "": the family's own
    text_types: tuple[str, ...] = ()  # model_type of text_config, where the decoder's config is nested; (): it is not
    tensor_names: Mapping[str, str] = NOTHING  # path in the parameter table -> tensor, if not Llama's
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
    return LatentConfig(hf.q_lora_rank or 0, hf.kv_lora_rank, *widths, rope_interleave=bool(hf.rope_interleave))


def latent_score_divisor(hf) -> float:
    """Returns the divisor of DeepSeek-V3's attention scores, which YaRN lowers as it stretches the context."""
    rope_parameters = hf.rope_parameters
    growth = 1.0
    if rope_parameters.get("rope_type", "default") != "default" and rope_parameters.get("mscale_all_dim"):
        growth = yarn_attention_factor(rope_parameters["factor"], rope_parameters["mscale_all_dim"])
    return math.sqrt(hf.qk_nope_head_dim + hf.qk_rope_head_dim) / growth**2


def uses_qwen3_experts(hf, layer: int) -> bool:
    """Tells whether a layer of a Qwen3-MoE config has experts."""
    return layer not in hf.mlp_only_layers and hf.num_experts > 0 and (layer + 1) % hf.decoder_sparse_step == 0


BIASES = {"qkv_bias": flag("attention_bias"), "out_bias": flag("attention_bias")}
QWEN3 = BIASES | {"qk_norm": True}
GEMMA2 = BIASES | {
    "unit_offset": True,
    "post_norms": True,
    "activation": attrgetter("hidden_activation"),
    "embed_scale": lambda hf: math.sqrt(hf.hidden_size),
    "score_divisor": lambda hf: math.sqrt(hf.query_pre_attn_scalar),
}
GEMMA3 = GEMMA2 | {"qk_norm": True}
GEMMA_NAMES = {"mlp_norm/scale": "layers.{i}.pre_feedforward_layernorm.weight"}
MIXTRAL_NAMES = {
    "moe/router/kernel": "layers.{i}.block_sparse_moe.gate.weight",
    "moe/experts_gate": "layers.{i}.block_sparse_moe.experts.{x}.w1.weight",
    "moe/experts_up": "layers.{i}.block_sparse_moe.experts.{x}.w3.weight",
    "moe/experts_down": "layers.{i}.block_sparse_moe.experts.{x}.w2.weight",
}
DEEPSEEK_V3 = BIASES | {
    "latent": read_latent_config,
    "experts": read_deepseek_experts,
    "score_divisor": latent_score_divisor,
}

FAMILIES = {
    "llama": Family(BIASES | {"mlp_bias": flag("mlp_bias")}),
    "mistral": Family(windows="layer_types"),
    "mixtral": Family(
        {"experts": read_mixtral_experts},
        {"use_experts": lambda hf, layer: True},
        windows="all",
        tensor_names=MIXTRAL_NAMES,
    ),
    "qwen2": Family({"qkv_bias": True}, windows="layer_types"),
    "qwen3": Family(QWEN3, windows="layer_types"),
    "qwen3_moe": Family(QWEN3 | {"experts": read_qwen3_experts}, {"use_experts": uses_qwen3_experts}, windows="all"),
    "gemma2": Family(
        GEMMA2
        | {"score_softcap": number("attn_logit_softcapping"), "logit_softcap": number("final_logit_softcapping")},
        windows="layer_types",
        tensor_names=GEMMA_NAMES,
    ),
    # The vision-language model of transformers does not apply the cap of gemma3_text to the logits.
    "gemma3": Family(
        GEMMA3,
        windows="layer_types",
        text_types=("gemma3_text",),
        tensor_names=GEMMA_NAMES,
        skipped_tensors=(r"vision_tower\.", r"multi_modal_projector\."),
    ),
    "gemma3_text": Family(
        GEMMA3 | {"logit_softcap": number("final_logit_softcapping")},
        windows="layer_types",
        tensor_names=GEMMA_NAMES,
    ),
    "deepseek_v3": Family(
        DEEPSEEK_V3,
        {"use_experts": lambda hf, layer: layer >= hf.first_k_dense_replace},
        skipped_tensors=(r"^model\.layers\.{n}\.",),  # the multi-token prediction layer, stored after the last layer
    ),
}


def check_family(hf_config: dict, where: str) -> None:
    """Checks that a config.json is of a supported family.

    Args:
        hf_config: The contents of config.json.
        where: The model folder or GGUF file, for error messages.

    Raises:
        UserError: It is not; the message lists the supported families and names the nearest.
    """
    family = hf_config.get("model_type")
    if isinstance(family, str) and family in FAMILIES:
        return
    nearest = difflib.get_close_matches(str(family)[:80], FAMILIES, n=1)
    raise UserError(
        f"model_type in {where} must be one of {', '.join(FAMILIES)}; found {family!r:.80}. "
        f"Choose a model of a supported family{f', such as {nearest[0]}' if nearest else ''}."
    )
