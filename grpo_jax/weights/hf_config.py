"""Translates a Hugging Face config.json to a ModelConfig, using the rows of `grpo_jax.weights.families`.

The config classes of `transformers`, which do not need PyTorch, fill in defaults and read older forms of config.json.
"""

import copy
import dataclasses
import math
from typing import Any

import jax

from grpo_jax.errors import UserError
from grpo_jax.model.architecture import LayerConfig, ModelConfig, RopeConfig
from grpo_jax.model.layers import ACTIVATIONS
from grpo_jax.model.rope import ROPE_SCALINGS, yarn_attention_factor
from grpo_jax.weights.families import FAMILIES, Family, check_family

# Sizes of lists and arrays that are built while a config is read. They are bounded so that a broken file cannot
# exhaust the memory.
MAX_FIELD_VALUES = {"num_hidden_layers": 1024} | dict.fromkeys(
    ("num_local_experts", "num_experts", "n_routed_experts", "head_dim", "qk_rope_head_dim"), 65536
)

POSITIVE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def model_config_from_hf(hf_config: dict, where: str, **fields) -> ModelConfig:
    """Builds the ModelConfig that a config.json describes.

    Args:
        hf_config: The contents of config.json.
        where: The model folder or GGUF file, for error messages.
        **fields: Further fields of the ModelConfig, such as `eos_ids` and `source`.

    Returns:
        The config of the decoder.

    Raises:
        UserError: The family is not supported, or a field is missing or has a value that the decoder does not support.
    """
    name = check_family(hf_config, where)
    hf = normalize_hf_config(hf_config, where)
    try:
        model_cfg = translate_hf_config(hf, name, where, tie_embeddings=ties_embeddings(hf_config, name, hf), **fields)
        check_architecture(model_cfg, where)
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise UserError(
            f"The config of {where} must describe a decoder; found a value that cannot be used ({error}). "
            "Download the model again."
        ) from None
    return model_cfg


def normalize_hf_config(hf_config: dict, where: str):
    """Reads a config.json with the config class of `transformers`, which fills in every field.

    Args:
        hf_config: The contents of config.json.
        where: The model folder or GGUF file, for error messages.

    Returns:
        The `transformers` config of the decoder (the text config of a vision-language model).

    Raises:
        UserError: The family is not supported, a size is out of bounds, or `transformers` refuses a field.
    """
    name = check_family(hf_config, where)
    hf_config = copy.deepcopy(hf_config)  # transformers adds to nested dicts
    for section in (hf_config, hf_config.get("text_config")):
        if not isinstance(section, dict):
            continue
        for field, most in MAX_FIELD_VALUES.items():
            value = section.get(field)
            if isinstance(value, int) and value > most:
                raise UserError(f"{field} in {where} must be at most {most}; found {value}. Download the model again.")
        scaling = section.get("rope_scaling")
        if isinstance(scaling, dict) and "type" in scaling:  # transformers 5 ignores this key in some families
            scaling.setdefault("rope_type", scaling["type"])
    from transformers import CONFIG_MAPPING

    read_as = FAMILIES[name].read_as or name
    try:
        hf = CONFIG_MAPPING[read_as].from_dict(
            without_dtypes(FAMILIES[name].prepare(hf_config)) | {"model_type": read_as}
        )
        return hf.get_text_config() if FAMILIES[name].text_types else hf
    except Exception as error:  # the validation in transformers raises many kinds
        message = " ".join(str(error).split())[:300]
        raise UserError(
            f"The config of {where} must be one that transformers reads as {name}; found: {message}. "
            "Download the model again."
        ) from None


def ties_embeddings(hf_config: dict, name: str, hf) -> bool:
    """Returns whether the head is the embedding table.

    Versions of `transformers` disagree on the level of a vision-language model's config that says so, and each writes
    false at the other level, so true at either counts.
    """
    sections = (hf_config, hf_config.get("text_config")) if FAMILIES[name].text_types else (hf_config,)
    stated = [section["tie_word_embeddings"] for section in sections if "tie_word_embeddings" in (section or ())]
    return any(stated) if stated else bool(getattr(hf, "tie_word_embeddings", False))


def without_dtypes(hf_config: dict) -> dict:
    """Returns a config without its dtypes: `transformers` refuses some, and a ModelConfig states its own."""
    return {
        key: without_dtypes(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in hf_config.items()
        if key not in ("dtype", "torch_dtype")
    }


def translate_hf_config(hf, name: str, where: str, **fields) -> ModelConfig:
    """Translates a normalized `transformers` config of the family `name` to a ModelConfig.

    Does not check how the sizes fit together; see `check_architecture`.

    Raises:
        UserError: A field has a value that the decoder does not support.
    """

    def get(field: str, default=None):
        return getattr(hf, field, default)

    family = FAMILIES[name]
    values = {field: value(hf) if callable(value) else value for field, value in family.fields.items()}
    activation = values.setdefault("activation", get("hidden_act"))
    for ok, field, supported, value in (
        (activation in ACTIVATIONS, "hidden_act", f"one of {', '.join(ACTIVATIONS)}", activation),
        (not get("use_bidirectional_attention"), "use_bidirectional_attention", "false", True),
    ):
        if not ok:
            raise UserError(f"{field} in {where} must be {supported}; found {value!r}. Choose another model.")
    for field in POSITIVE_FIELDS:
        if type(get(field)) is not int or get(field) < 1:
            raise UserError(
                f"{field} in {where} must be an integer of at least 1; found {get(field)!r}. Download the model again."
            )
    layers = read_layer_configs(hf, family, where)
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        layers=layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=1 if "latent" in values else hf.num_key_value_heads,
        head_dim=get("head_dim") or hf.hidden_size // hf.num_attention_heads,
        max_positions=count_positions(hf.max_position_embeddings, [layer.rope for layer in layers if layer.rope]),
        norm_eps=float(hf.rms_norm_eps),
        family=name,
        **values,
        **fields,
    )


def check_architecture(model_cfg: ModelConfig, where: str) -> None:
    """Checks that the numbers of a config are finite and that its sizes fit together.

    Raises:
        UserError: A number is out of range, or sizes contradict each other; the message names the requirement.
    """
    # A model may have thousands of equal layers.
    distinct = dataclasses.replace(model_cfg, layers=tuple(dict.fromkeys(model_cfg.layers)))
    for path, value in jax.tree_util.tree_leaves_with_path(dataclasses.asdict(distinct)):
        if not isinstance(value, str) and not 0 <= value < 2**31:  # NaN is refused too
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise UserError(
                f"Numbers in the config of {where} must be at least 0 and less than 2**31; found {value} for {name}. "
                "Download the model again."
            )

    def check(ok: bool, requirement: str, value) -> None:
        if not ok:
            raise UserError(f"{requirement}; found {value} in {where}. Download the model again.")

    heads, kv_heads, rows, ids = model_cfg.num_heads, model_cfg.num_kv_heads, model_cfg.vocab_size, model_cfg.eos_ids
    latent, experts = model_cfg.latent, model_cfg.experts
    rotated_dim = latent.qk_rope_head_dim if latent else model_cfg.rotary_dim or model_cfg.head_dim
    check(heads % kv_heads == 0, "num_attention_heads must be a multiple of num_key_value_heads", (heads, kv_heads))
    check(rotated_dim > 0 and rotated_dim % 2 == 0, "head_dim (or qk_rope_head_dim) must be even", rotated_dim)
    check(all(0 <= token < rows for token in ids), "eos_token_id must be less than vocab_size", ids)
    check(model_cfg.logit_divisor > 0, "logits_scaling must exceed 0", model_cfg.logit_divisor)
    for rope in {layer.rope for layer in model_cfg.layers if layer.rope}:
        check(rope.theta > 1 and rope.factor > 0, "rope_theta must exceed 1 and the rope factor must exceed 0", rope)
        if rope.scaling in ("llama3", "yarn") or rope.query_growth:
            low, high = rope.low_freq_bound, rope.high_freq_bound
            ordered = 0 < low <= high and (low < high or rope.scaling != "llama3")  # equal in Kimi K2, which has YaRN
            requirement = "The original length and the frequency bounds of a scaled rope must be positive and ordered"
            check(ordered and rope.original_max_positions > 0, requirement, rope)
        if rope.scaling == "longrope":
            fits = len(rope.divisors) == rotated_dim // 2 and min(rope.divisors) > 0 and rope.original_max_positions > 1
            check(fits, "short_factor must hold a number above 0 for each pair of rotated dimensions", rope)
    if latent:
        smallest = min(latent.kv_lora_rank, latent.qk_nope_head_dim, latent.v_head_dim)
        check(smallest > 0, "kv_lora_rank, qk_nope_head_dim and v_head_dim must be at least 1", latent)
    if experts:
        count, groups, top_groups = experts.num_experts, experts.num_groups, experts.num_top_groups
        check(experts.intermediate_size > 0, "moe_intermediate_size must be at least 1", experts)
        check(0 < top_groups <= groups, "topk_group must be at least 1 and at most n_group", experts)
        chosen, eligible = experts.num_experts_per_token, count // groups * top_groups
        requirement = "num_experts_per_tok must be at least 1 and at most the number of eligible experts"
        check(0 < chosen <= eligible, requirement, (chosen, eligible))
        equal = (count % groups == 0 and count >= 2 * groups) or not experts.sigmoid_gate
        check(equal, "n_group must divide the experts into equal groups of at least 2", (count, groups))


def read_rope_config(hf, rope_parameters: dict[str, Any], where: str, partial: bool) -> RopeConfig:
    """Translates a `rope_parameters` entry of a `transformers` config.

    Args:
        hf: The config.
        rope_parameters: The entry.
        where: The model folder or GGUF file, for error messages.
        partial: Whether the family supports rotating only a part of each head.

    Raises:
        UserError: The kind of scaling is not supported, or only a part of each head is rotated.
    """
    scaling = rope_parameters.get("rope_type", "default")
    covered = partial or rope_parameters.get("partial_rotary_factor", 1.0) == 1.0
    if scaling not in ROPE_SCALINGS or not covered:
        raise UserError(
            f"rope_type in {where} must be one of {', '.join(ROPE_SCALINGS)} and cover whole heads; "
            f"found {rope_parameters}. Choose another model."
        )
    names = {"query_growth": "llama_4_scaling_beta"}
    if scaling != "default" or rope_parameters.get("llama_4_scaling_beta"):
        names |= {"original_max_positions": "original_max_position_embeddings"}
    if scaling != "default":
        names |= {"factor": "factor"}
    if scaling == "llama3":
        names |= {"low_freq_bound": "low_freq_factor", "high_freq_bound": "high_freq_factor"}
    values = {ours: rope_parameters.get(theirs) for ours, theirs in names.items()}
    if scaling == "yarn":
        factor = values["factor"] or hf.max_position_embeddings / values["original_max_positions"]
        values |= {
            "factor": factor,
            "low_freq_bound": rope_parameters.get("beta_slow") or 1,
            "high_freq_bound": rope_parameters.get("beta_fast") or 32,
            "truncate": rope_parameters.get("truncate", True),
            "attention_factor": yarn_rope_factor(rope_parameters, factor),
        }
    if scaling == "longrope":
        length = values["original_max_positions"] or hf.original_max_position_embeddings
        factor = values["factor"] or hf.max_position_embeddings / length
        default = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
        attention_factor = rope_parameters.get("attention_factor")
        values |= {
            "factor": factor,
            "original_max_positions": length,
            "attention_factor": default if attention_factor is None else attention_factor,
            "divisors": tuple(rope_parameters["short_factor"]),
        }
    given = {name: value for name, value in values.items() if value is not None}
    return RopeConfig(theta=float(rope_parameters["rope_theta"]), scaling=scaling, **given)


def count_positions(stated: int, ropes: list[RopeConfig]) -> int:
    """Returns the number of positions that a model supports.

    Whoever switches YaRN on, as the pages of Qwen's models describe, does not change max_position_embeddings. LongRoPE
    uses other frequencies for sequences longer than those of pretraining; these are not supported.

    Args:
        stated: The config's max_position_embeddings.
        ropes: The rotary embeddings of all layers that have one.
    """
    stretched = [int(rope.factor * rope.original_max_positions) for rope in ropes if rope.scaling == "yarn"]
    pretrained = [rope.original_max_positions for rope in ropes if rope.scaling == "longrope"]
    return min([max([stated, *stretched]), *pretrained])


def yarn_rope_factor(rope_parameters: dict[str, Any], factor: float) -> float:
    """Returns YaRN's factor on cosines and sines: as given, from DeepSeek's two weights, or by the paper's formula."""
    if rope_parameters.get("attention_factor") is not None:
        return rope_parameters["attention_factor"]
    mscale, all_dim = rope_parameters.get("mscale"), rope_parameters.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_attention_factor(factor, mscale) / yarn_attention_factor(factor, all_dim)
    return yarn_attention_factor(factor, 1.0)


def read_layer_configs(hf, family: Family, where: str) -> tuple[LayerConfig, ...]:
    """Returns the attention window, the rotary embedding and the kind of MLP of each layer.

    Raises:
        UserError: `layer_types` does not give a known type for each layer, or a rotary embedding is not supported.
    """
    count, window = hf.num_hidden_layers, getattr(hf, "sliding_window", None) or 0
    given = getattr(hf, "layer_types", None)
    if family.windows == "none":
        window = 0
        if set(given or ()) - {"full_attention"}:
            raise UserError(
                f"layer_types in {where} must be full_attention in every layer; found {given!r:.80}. "
                "Choose another model."
            )
    types = ["sliding_attention" if window else "full_attention"] * count
    if given and family.windows == "layer_types":
        types = given
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown or len(types) != count:
        raise UserError(
            f"layer_types in {where} must list sliding_attention or full_attention for each of {count} layers; "
            f"found {types}. Download the model again."
        )
    partial = "rotary_dim" in family.fields
    ropes = {
        layer_type: read_rope_config(hf, hf.rope_parameters.get(layer_type) or hf.rope_parameters, where, partial)
        for layer_type in set(types)
    }
    has_rope = hf.no_rope_layers if family.no_rope_layers else [1] * count
    if len(has_rope) < count:
        raise UserError(
            f"no_rope_layers in {where} must have a number for each of {count} layers; found {has_rope!r:.80}. "
            "Download the model again."
        )
    return tuple(
        LayerConfig(
            window if layer_type == "sliding_attention" else 0,
            ropes[layer_type] if has_rope[layer] else None,
            **{field: value(hf, layer) for field, value in family.layer_fields.items()},
        )
        for layer, layer_type in enumerate(types)
    )
