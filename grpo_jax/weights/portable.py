"""Rewrites config files for an export, so that older releases of `transformers`, which engines pin, read them as we do.

Releases before 5 silently ignore the spellings of release 5, and no release finds the code that `auto_map` names,
because exports never hold code.
"""

import re
from typing import Any

from grpo_jax.weights.families import FAMILIES, check_family
from grpo_jax.weights.hf_config import normalize_hf_config, ties_embeddings
from grpo_jax.weights.source import DTYPES

# By family: fields of config.json that transformers 4 knows by another name.
OLDER_FIELDS = {"qwen3_moe": {"num_local_experts": "num_experts"}}

# Families whose config class in transformers 4 refuses the key rope_type.
OLDER_TYPE_KEYS = {"olmo2": "type", "phi3": "type"}

# By family: the rope_scaling without which transformers 4 does not read a config. It reads no empty one in any family.
NEEDS_ROPE_SCALING = {"qwen3_vl_text": {"rope_type": "default"}}

# By family: a pattern of the tensor names in transformers 5, and its replacement in transformers 4, whose names
# release 5 reads as well.
OLDER_TENSORS = {"gemma3": (r"^((?:model\.)?vision_tower\.)(?!vision_model\.)", r"\1vision_model.")}

# Classes of transformers 5 for tokenizers without a class of their own, and the class that both releases know.
TOKENIZER_BACKENDS = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend")
FILE_TOKENIZER = "PreTrainedTokenizerFast"


def portable_config(hf_config: dict[str, Any], where: str) -> dict[str, Any]:
    """Adds the older spellings of rotary embeddings and dtype to a config.json that has only the newer ones.

    Args:
        hf_config: The contents of config.json.
        where: The model folder or GGUF file, for error messages.

    Returns:
        The contents of the config.json to write. They equal `hf_config` if it has no `auto_map` and has both spellings,
        or only the older one, which all releases read.

    Raises:
        UserError: `transformers` cannot read the config.
    """
    portable = without_code(hf_config)
    family = check_family(hf_config, where)
    portable["model_type"] = FAMILIES[family].read_as or family
    hf = normalize_hf_config(hf_config, where)
    section = portable
    if isinstance(portable.get("text_config"), dict):
        tied = ties_embeddings(hf_config, family, hf)
        # Release 4 reads this field from the text config, release 5 from the outer config.
        section = portable["text_config"] | {"tie_word_embeddings": tied}
        portable |= {"text_config": section, "tie_word_embeddings": tied}
    if section.get("rope_scaling") == {} or hf.model_type in NEEDS_ROPE_SCALING:
        section["rope_scaling"] = section.get("rope_scaling") or NEEDS_ROPE_SCALING.get(hf.model_type)
    if not section.get("rope_parameters"):
        return portable
    older = older_rope_fields(hf)
    for newer_name, older_name in OLDER_FIELDS.get(hf.model_type, {}).items():
        older[older_name] = getattr(hf, newer_name)
    if any(name not in section or section[name] != value for name, value in older.items()):
        section |= {"rope_parameters": hf.rope_parameters} | older
        if "dtype" in portable:
            portable.setdefault("torch_dtype", portable["dtype"])
    return portable


def plain_dtypes(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the contents of a config.json with dtypes that `transformers` reads where PyTorch is installed.

    Args:
        fields: The contents, or a section of them.
        dtype: Replaces FP8 dtypes and names such as "auto", "half" and "torch.bfloat16".
    """
    plain = {
        name: plain_dtypes(value, dtype) if isinstance(value, dict) and name.endswith("_config") else value
        for name, value in fields.items()
    }
    stated = [name for name in ("dtype", "torch_dtype") if plain.get(name) is not None]
    replaced = [name for name in stated if plain[name] not in DTYPES or plain[name].startswith("float8")]
    return plain | dict.fromkeys(replaced, dtype)


def portable_tensor_name(name: str, family: str) -> str:
    """Returns the name under which every release of `transformers` finds a tensor of an exported model."""
    pattern, replacement = OLDER_TENSORS.get(family, ("$^", ""))
    return re.sub(pattern, replacement, name)


def older_rope_fields(hf) -> dict[str, Any]:
    """Returns the fields that releases before 5 read from a config.json instead of `rope_parameters`.

    Args:
        hf: The `transformers` config of the decoder.
    """
    rope = hf.rope_parameters.get("full_attention") or hf.rope_parameters
    fields = {"rope_theta": rope["rope_theta"]}
    if "sliding_attention" in hf.rope_parameters:
        fields["rope_local_base_freq"] = hf.rope_parameters["sliding_attention"]["rope_theta"]
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    elsewhere = {*fields, "rope_type", "type"}
    if hasattr(hf, "original_max_position_embeddings"):
        elsewhere.add("original_max_position_embeddings")
    scaling = {name: value for name, value in rope.items() if name not in elsewhere}
    if rope["rope_type"] != "default" or "mrope_section" in scaling:
        fields["rope_scaling"] = {OLDER_TYPE_KEYS.get(hf.model_type, "rope_type"): rope["rope_type"], **scaling}
    return fields


def portable_tokenizer_config(tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    """Rewrites the tokenizer_config.json that belongs to a tokenizer.json so that all releases read it.

    Returns:
        The contents of the tokenizer_config.json to write. They equal `tokenizer_config` if all releases read that.
    """
    portable = without_code(tokenizer_config)
    if "auto_map" in tokenizer_config or tokenizer_config.get("tokenizer_class") in TOKENIZER_BACKENDS:
        portable["tokenizer_class"] = FILE_TOKENIZER
    if isinstance(portable.get("extra_special_tokens"), list):
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    if isinstance(portable.get("model_specific_special_tokens"), dict):
        portable["extra_special_tokens"] = portable.pop("model_specific_special_tokens")
    return portable


def without_code(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of a JSON file without `auto_map`, which names classes in Python files of the folder."""
    return {name: value for name, value in fields.items() if name != "auto_map"}
