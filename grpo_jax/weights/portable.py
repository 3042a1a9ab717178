"""Rewrites config files for an export, so that older releases of `transformers`, which engines pin, read them as we do.

Releases before 5 ignore the spellings of release 5 in silence, and no release finds the code that `auto_map` names,
because exports never hold code.
"""

from typing import Any

from grpo_jax.weights.families import FAMILIES, check_family
from grpo_jax.weights.hf_config import normalize_hf_config, ties_embeddings
from grpo_jax.weights.source import DTYPES

# Families whose config class in transformers 4 refuses the key rope_type.
OLDER_TYPE_KEYS = {"olmo2": "type", "phi3": "type"}

# What transformers 5 calls tokenizers without a class of their own; release 4 has another name for them.
TOKENIZER_BACKENDS = ("TokenizersBackend", "PythonBackend", "SentencePieceBackend", "MistralCommonBackend")
FILE_TOKENIZER = "PreTrainedTokenizerFast"


def portable_config(hf_config: dict[str, Any], where: str) -> dict[str, Any]:
    """Adds the older spelling of rotary embeddings and dtype to a config.json that has only the newer one.

    Args:
        hf_config: The contents of config.json.
        where: The model folder or GGUF file, for error messages.

    Returns:
        The contents of the config.json to write: equal to `hf_config` if that has both spellings or only the older one,
        which all releases read, and no `auto_map`.

    Raises:
        UserError: `transformers` cannot read the config.
    """
    portable = without_code(hf_config)
    family = check_family(hf_config, where)
    portable["model_type"] = FAMILIES[family].read_as or family
    if isinstance(portable.get("text_config"), dict):
        tied = ties_embeddings(hf_config, family, normalize_hf_config(hf_config, where))
        # Release 4 reads this from the text's config, release 5 from the model's.
        portable |= {
            "text_config": portable["text_config"] | {"tie_word_embeddings": tied},
            "tie_word_embeddings": tied,
        }
    nested = isinstance(portable.get("text_config"), dict) and "rope_parameters" in portable["text_config"]
    section = dict(portable["text_config"]) if nested else portable
    if not section.get("rope_parameters"):
        return portable
    hf = normalize_hf_config(hf_config, where)
    older = older_rope_fields(hf.rope_parameters, OLDER_TYPE_KEYS.get(hf.model_type, "rope_type"))
    if any(name not in section or section[name] != value for name, value in older.items()):
        section |= {"rope_parameters": hf.rope_parameters} | older
        if nested:
            portable["text_config"] = section
        if "dtype" in portable:
            portable.setdefault("torch_dtype", portable["dtype"])
    return portable


def plain_dtypes(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the contents of a config.json with dtypes that `transformers` reads where PyTorch is installed.

    Args:
        fields: The contents, or a section of them.
        dtype: The dtype that takes the place of a name such as "auto", "half" or "torch.bfloat16".
    """
    plain = {
        name: plain_dtypes(value, dtype) if isinstance(value, dict) and name.endswith("_config") else value
        for name, value in fields.items()
    }
    odd = [name for name in ("dtype", "torch_dtype") if plain.get(name) is not None and plain[name] not in DTYPES]
    return plain | dict.fromkeys(odd, dtype)


def older_rope_fields(rope_parameters: dict[str, Any], type_key: str) -> dict[str, Any]:
    """Returns the fields that stand for `rope_parameters` in a config.json of releases before 5.

    Args:
        rope_parameters: The rotary embedding of all layers, or a dict of them by the type of layer.
        type_key: The key for the kind of scaling, `rope_type` or `type`.
    """
    rope = rope_parameters.get("full_attention") or rope_parameters
    fields = {"rope_theta": rope["rope_theta"]}
    if "sliding_attention" in rope_parameters:
        fields["rope_local_base_freq"] = rope_parameters["sliding_attention"]["rope_theta"]
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {name: value for name, value in rope.items() if name not in (*fields, "rope_type", "type")}
    if rope["rope_type"] != "default" or "mrope_section" in scaling:
        fields["rope_scaling"] = {type_key: rope["rope_type"], **scaling}
    return fields


def portable_tokenizer_config(tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    """Rewrites a tokenizer_config.json, beside which there is a tokenizer.json, in the spelling that all releases read.

    Returns:
        The contents of the tokenizer_config.json to write, equal to `tokenizer_config` if all releases read that.
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
