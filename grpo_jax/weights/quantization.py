"""Recognizes quantized checkpoints. Only FP8 with block scales is read; other methods are refused by name."""

from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.weights.model_files import read_json_object

# `quant_method` in a config.json -> the method's name in messages. Other methods go by their `quant_method`.
QUANTIZATION_NAMES = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8 without block scales",
    "gptq": "GPTQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
}
# Fields that say more about a method, and how messages show their values.
QUANTIZATION_DETAILS = {
    "quant_algo": "{}",
    "format": "{}",
    "bits": "{} bits",
    "w_bit": "{} bits",
    "load_in_4bit": "4 bits",
    "load_in_8bit": "8 bits",
    "weight_block_size": "weight_block_size {}",
}
UNQUANTIZED = "Use the unquantized checkpoint, or a GGUF file of the model."


def fp8_block_shape(hf_config: dict, source: Path) -> tuple[int, int] | None:
    """Returns the rows and columns of the blocks that share a scale in an FP8 checkpoint, or None without quantization.

    Args:
        hf_config: The contents of config.json, or their equivalent for a GGUF file.
        source: The model folder or GGUF file.

    Raises:
        UserError: The checkpoint is quantized in another way.
    """
    text_config = hf_config.get("text_config")
    sections = (hf_config, text_config if isinstance(text_config, dict) else {})
    fields = ("quantization_config", "compression_config", "quantization")
    found = next((section[field] for section in sections for field in fields if section.get(field)), None)
    block = found.get("weight_block_size") if isinstance(found, dict) else None
    is_pair = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    if is_pair and found.get("quant_method") == "fp8":
        return tuple(block)
    if found:
        raise UserError(
            f"quantization_config in {source} must be absent, or fp8 with a weight_block_size; "
            f"found {describe_quantization(found)}. {UNQUANTIZED}"
        )
    path = source / "hf_quant_config.json"  # NVIDIA's ModelOpt writes this file and may leave config.json unchanged
    quantization = read_json_object(path).get("quantization") if path.is_file() else None
    if isinstance(quantization, dict) and quantization.get("quant_algo"):
        name = describe_quantization(quantization | {"quant_method": "modelopt"})
        raise UserError(
            f"{path} must be absent, because weights of ModelOpt are not supported; found {name}. {UNQUANTIZED}"
        )
    return None


def describe_quantization(quantization: Any) -> str:
    """Returns the name of a quantization with details from its config, such as "GPTQ (4 bits)"."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is None and isinstance(quantization, dict) and {"bits", "group_size"} <= quantization.keys():
        method = "MLX"  # which names no method
    if not isinstance(method, str):
        return f"{quantization!s:.80}"
    details = [
        f"{form.format(quantization[field])!s:.60}"
        for field, form in QUANTIZATION_DETAILS.items()
        if quantization.get(field)
    ]
    return f"{QUANTIZATION_NAMES.get(method, method)!s:.40}" + f" ({', '.join(details)})" * bool(details)
