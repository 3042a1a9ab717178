"""Reads GGUF files, the format of llama.cpp, as Hugging Face checkpoints: the config and the tensors."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.model.parameters import PARAMETERS
from grpo_jax.weights.families import FAMILIES
from grpo_jax.weights.gguf_header import GGUF_ARCHITECTURES, GgufHeader, GgufTensor, read_gguf_header

# Architectures for which llama.cpp rotates pairs of adjacent rows, so its converter permutes the projections.
INTERLEAVED = ("llama", "mistral3", "smollm3", "granite")
PARTLY_ROTATED = ("phi3", "glm4")  # architectures whose rope.dimension_count may be less than the width of a head
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def read_gguf_config(path: Path) -> dict[str, Any]:
    """Returns the config.json that the metadata of a GGUF file describes.

    Raises:
        UserError: The header cannot be read (see `read_gguf_header`), or a field or tensor that is needed is missing.
    """
    header = read_gguf_header(path)
    get, architecture = header.get, header.architecture
    model_type, prefix = GGUF_ARCHITECTURES[architecture]
    experts = get("expert_count", 0)
    if architecture == "llama" and experts:
        model_type, prefix = "mixtral", "Mixtral"
    if architecture == "mistral3" and not get("attention.temperature_scale", 0.0):  # Mistral rather than Ministral 3
        model_type, prefix = "mistral", "Mistral"
    if architecture == "olmo2" and get("attention.sliding_window", 0):
        model_type, prefix = "olmo3", "Olmo3"
    hidden_size, heads, layers = get("embedding_length"), get("attention.head_count"), get("block_count")
    norm = "post_attention_norm" if architecture == "olmo2" else "attn_norm"
    for name in ("token_embd.weight", f"blk.{layers - 1}.{norm}.weight"):
        if name not in header.tensors:
            raise UserError(
                f"{header.path} must hold the tensor {name}; found {len(header.tensors)} other tensors. "
                "Use a file with the whole model."
            )
    head_dim = hidden_size // heads
    if architecture not in PARTLY_ROTATED:
        head_dim = get("rope.dimension_count", head_dim)
    head_dim = get("attention.key_length", head_dim)
    tokens = "bos", "eos", "eot", "eom", "padding"
    ids = {name: header.fields.get(f"tokenizer.ggml.{name}_token_id") for name in tokens}
    ends = [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]
    ends = [end for index, end in enumerate(ends) if end not in ends[:index]]
    quantizations = {tensor.quantization.name for tensor in header.tensors.values()}
    config = {
        "architectures": [f"{prefix}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rope_parameters": read_gguf_rope(header, head_dim),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
        "dtype": "float32" if quantizations == {"F32"} else "bfloat16",
    }
    return config | read_family_fields(header, model_type, head_dim)


def read_family_fields(header: GgufHeader, model_type: str, head_dim: int) -> dict[str, Any]:
    """Returns the fields of config.json that the family `model_type` has in addition to those of all families.

    Raises:
        UserError: A field of the header is missing or of another type.
    """
    get, architecture, layers = header.get, header.architecture, header.get("block_count")
    config: dict[str, Any] = {}
    if architecture.startswith("gemma"):
        # The file does not record the query scale, which is head_dim except in the largest model of each version.
        largest = layers == {"gemma2": 46, "gemma3": 62}[architecture]
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": get("embedding_length") // get("attention.head_count") if largest else head_dim,
            "sliding_window": get("attention.sliding_window"),
            "attn_logit_softcapping": get("attn_logit_softcapping", None),
            "final_logit_softcapping": get("final_logit_softcapping", None),
        }
    else:
        config["hidden_act"] = "silu"
    if model_type in ("llama", "smollm3", "granite", "olmo2", "olmo3", "glm4"):
        biased = "attn_q" if model_type == "glm4" else "attn_output"
        config["attention_bias"] = f"blk.0.{biased}.bias" in header.tensors
    if model_type in ("llama", "smollm3", "granite"):
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    if model_type == "mistral":
        config["sliding_window"] = None
    if model_type == "mixtral":
        config |= {"num_local_experts": get("expert_count"), "num_experts_per_tok": get("expert_used_count")}
    if model_type == "qwen3_moe":
        config |= {"num_experts": get("expert_count"), "num_experts_per_tok": get("expert_used_count")}
        config |= {"norm_topk_prob": True, "moe_intermediate_size": get("expert_feed_forward_length")}
    if model_type == "olmo3":
        sliding = header.fields.get(f"{architecture}.attention.sliding_window_pattern")
        sliding = sliding if isinstance(sliding, list) else [(layer + 1) % 4 for layer in range(layers)]
        config["sliding_window"] = get("attention.sliding_window")
        config["layer_types"] = ["sliding_attention" if x else "full_attention" for x in sliding]
    if model_type == "phi3":
        config["sliding_window"] = get("attention.sliding_window", 0) or None
        # Only scaling uses this length, and a file without it has no scaling.
        length = get("rope.scaling.original_context_length", get("context_length"))
        config["original_max_position_embeddings"] = length
    if model_type == "granite":
        config |= {
            "embedding_multiplier": get("embedding_scale", 1.0),
            "residual_multiplier": get("residual_scale", 1.0),
            "attention_multiplier": get("attention.scale", head_dim**-0.5),
            "logits_scaling": get("logit_scale", 1.0),
        }
    return config


def read_gguf_rope(header: GgufHeader, head_dim: int) -> dict[str, Any]:
    """Returns the `rope_parameters` of config.json.

    Raises:
        UserError: The kind of scaling is not supported.
    """
    rope = {"rope_type": "default", "rope_theta": header.get("rope.freq_base", 10000.0)}
    scaling, factor = header.get("rope.scaling.type", "linear"), header.get("rope.scaling.factor", 1.0)
    if scaling not in ("none", "linear", "yarn"):
        raise UserError(
            f"{header.architecture}.rope.scaling.type in {header.path} must be none, linear or yarn; "
            f"found {scaling!r}. Choose another model."
        )
    if header.architecture == "glm4" and f"{header.architecture}.rope.dimension_sections" in header.fields:
        raise UserError(
            f"{header.path} must hold a text-only GLM-4; found a vision-language model (glm4.rope.dimension_sections), "
            "whose projections are in another order. Choose another model."
        )
    if scaling == "yarn":
        names = {
            "original_max_position_embeddings": "original_context_length",
            "attention_factor": "yarn_attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        values = {ours: header.get(f"rope.scaling.{theirs}", None) for ours, theirs in names.items()}
        rope |= {name: value for name, value in values.items() if value is not None}
        if header.architecture == "mistral3":
            mscale = header.get("rope.scaling.yarn_log_multiplier", 0.0)
            rope |= {"mscale": mscale, "mscale_all_dim": mscale}
            rope["llama_4_scaling_beta"] = header.get("attention.temperature_scale", 0.0)
    if scaling != "none" and factor != 1:
        rope |= {"rope_type": scaling, "factor": factor}
    if "rope_freqs.weight" in header.tensors:
        rope |= read_llama3_rope(header, rope["rope_theta"], head_dim)
    if header.architecture in PARTLY_ROTATED:
        rope["partial_rotary_factor"] = header.get("rope.dimension_count", head_dim) / head_dim
    if "rope_factors_short.weight" in header.tensors:
        rope |= {"rope_type": "longrope"} | read_longrope_factor(header)
        for name in ("short", "long"):
            divisors = header.tensors[f"rope_factors_{name}.weight"].read((slice(None),))
            rope[f"{name}_factor"] = [float(str(divisor)) for divisor in divisors]
    if header.architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": header.get("rope.freq_base_swa", 10000.0)}
        return {"full_attention": rope, "sliding_attention": local}
    if header.architecture == "olmo2" and header.get("attention.sliding_window", 0):
        local = {"rope_type": "default", "rope_theta": rope["rope_theta"]}  # only full attention is scaled
        return {"full_attention": rope, "sliding_attention": local}
    return rope


def read_longrope_factor(header: GgufHeader) -> dict[str, float]:
    """Returns the factor of longrope's cosines and sines for `rope_parameters`.

    Returns no field if the factor is the one that follows from the context lengths, because transformers 4.57 refuses a
    config of Phi-3 that states it.
    """
    length = header.get("rope.scaling.original_context_length", header.get("context_length"))
    growth = header.get("context_length") / length
    implied = math.sqrt(1 + math.log(growth) / math.log(length)) if growth > 1 else 1.0
    factor = header.get("rope.scaling.attn_factor", implied)
    return {} if math.isclose(factor, implied, rel_tol=1e-5) else {"attention_factor": factor}


def read_llama3_rope(header: GgufHeader, theta: float, head_dim: int) -> dict[str, Any]:
    """Returns the scaling of Llama 3.1 to 3.3 for `rope_parameters`.

    The file records a divisor for each frequency instead of the scaling's parameters. Those models differ only in the
    factor, so the divisors are compared with the ones that the factor implies.

    Raises:
        UserError: The divisors are different.
    """
    tensor = header.tensors["rope_freqs.weight"]
    fits = tensor.shape == (head_dim // 2,) and head_dim > 1 and theta > 1
    if fits:
        divisors = tensor.read((slice(None),))
        scaling = {"factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        # How often each rotary pair turns within the original context length.
        turns = 8192 / (2 * np.pi) * theta ** (-np.arange(divisors.size) * 2 / head_dim)
        keep = np.clip((turns - 1) / (4 - 1), 0, 1)
        fits = scaling["factor"] > 0 and np.allclose(divisors * (keep + (1 - keep) / scaling["factor"]), 1, rtol=1e-3)
    if not fits:
        raise UserError(
            f"rope_freqs.weight in {header.path} must hold the {head_dim // 2} divisors of Llama 3.1 for "
            f"rope.freq_base={theta}; found others, of shape {tensor.shape}. Choose another model."
        )
    return {"rope_type": "llama3", **scaling, "original_max_position_embeddings": 8192}


def read_gguf_tensors(path: Path, hf_config: dict[str, Any]) -> dict[str, GgufTensor]:
    """Lists the tensors of a GGUF file under the names and in the shapes of a Hugging Face checkpoint.

    Args:
        path: The file.
        hf_config: The config that `read_gguf_config` returns for it.

    Returns:
        The tensors by name; experts are separate tensors.

    Raises:
        UserError: The header cannot be read (see `read_gguf_header`), or the file has a tensor that is not known.
    """
    header = read_gguf_header(path)
    import gguf

    layers, gemma = hf_config["num_hidden_layers"], header.architecture.startswith("gemma")
    architecture_ids = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    name_map = gguf.get_tensor_name_map(architecture_ids[header.architecture], layers)
    interleaved_heads = {}
    if header.architecture in INTERLEAVED:
        interleaved_heads = {"attn_q": hf_config["num_attention_heads"], "attn_k": hf_config["num_key_value_heads"]}
    family = FAMILIES[hf_config["model_type"]]
    # Fused tensors come before those of the table, because the file gives them the names of their parts.
    names = [f"model.{name}" for name in family.fused_tensors]
    for row in PARAMETERS:
        prefix = "" if row.path == "head/kernel" else "model."
        names.append(prefix + family.tensor_names.get(row.path, row.tensor))
    tensors, unread = {}, header.tensors.keys() - {*ROPE_TENSORS}
    for template, layer in itertools.product(names, range(layers)):
        hf_name = template.replace("{i}", str(layer))
        # The file stacks the experts of a layer in one tensor, whose name has no {x}.
        module, _, kind = hf_name.replace(".{x}", "").rpartition(".")
        name = f"{name_map.get_name(module)}.{kind}"
        if name not in unread:
            continue
        unread.remove(name)
        tensor = header.tensors[name]._replace(
            interleaved_heads=interleaved_heads.get(name.split(".")[-2], 0),
            added=float(gemma and name.endswith("norm.weight")),
        )
        if "{x}" not in hf_name:
            tensors[hf_name] = tensor
            continue
        experts, *byte_shape = tensor.byte_shape
        for x in range(experts):
            tensors[hf_name.format(x=x)] = tensor._replace(
                start=tensor.start + x * math.prod(byte_shape), byte_shape=tuple(byte_shape), shape=tensor.shape[1:]
            )
    if unread:
        raise UserError(
            f"{header.path} must hold only the tensors of {header.architecture}; found {len(unread)} others, such as "
            f"{min(unread)}. Choose another model."
        )
    return tensors
