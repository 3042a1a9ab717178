"""Explains tensors that the decoder described by a config does not have: what they are, and what to do about them."""

import re
from collections.abc import Collection
from pathlib import Path

from grpo_jax.errors import UserError
from grpo_jax.weights.quantization import UNQUANTIZED

# Names of modules that wrap others during training, and that end up in the names of tensors.
WRAPPER = re.compile(
    r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module|base_model\.model)\."
)
# {wrappers} is a regular expression that matches the wrappers found in the checkpoint.
RENAME = (
    'Rename them with: python -c "import glob, ml_dtypes, os, re; from safetensors.numpy import load_file, save_file; '
    "[(save_file({{re.sub(r'({wrappers})\\.', '', name): value for name, value in load_file(file).items()}}, "
    "file + '.new', {{'format': 'pt'}}), os.replace(file + '.new', file)) "
    "for file in glob.glob('{source}/*.safetensors')]\""
)

# Patterns of tensor names that the decoder lacks, what such tensors are, and what to do. The first match is reported.
FOREIGN_TENSORS = (
    (
        r"\.(lora_\w+|base_layer|modules_to_save)\.",
        "those of an adapter",
        "Merge it where it was trained (`merge_and_unload` of peft), and save the model again.",
    ),
    (r"\.(qweight|qzeros|g_idx|scales)$", "weights quantized by GPTQ or AWQ", UNQUANTIZED),
    (r"\.(absmax|quant_map|quant_state\..*|SCB)$", "weights quantized by bitsandbytes", UNQUANTIZED),
    (r"\.(weight_packed|weight_scale(_2|_inv)?|input_scale)$", "quantized weights with scales", UNQUANTIZED),
    (r"_(blocks|scales)$", "weights quantized as MXFP4", UNQUANTIZED),
    (WRAPPER.pattern, "names with the prefix of a wrapper", RENAME),
    (
        r"(^|\.)(score|v_head|value_head|reward_head|classifier|regression_head|qa_outputs)\.",
        "the head of a reward model, a value model or a classifier",
        "Use the language model that it was trained from.",
    ),
    (
        r"^(embed_tokens|layers\.\d+|norm)\.",
        "a decoder without its head, whose names lack the prefix model.",
        "Save the whole model with AutoModelForCausalLM where it was trained.",
    ),
)


def check_tensor_names(source: Path, expected: Collection[str], missing: Collection[str], unknown: Collection[str]):
    """Checks that a checkpoint holds the tensors of the decoder that its config describes.

    Args:
        source: The model folder or GGUF file.
        expected: The names of the decoder's tensors.
        missing: Those that the checkpoint lacks.
        unknown: The checkpoint's tensors that the decoder does not have, except those that may be skipped.

    Raises:
        UserError: A tensor is missing or unknown. The message says why if the names reveal it.
    """
    for pattern, what, cure in FOREIGN_TENSORS:
        if names := sorted(name for name in unknown if re.search(pattern, name)):
            wrappers = sorted({match[1] for name in names for match in WRAPPER.finditer(name)})
            advice = cure.format(source=source, wrappers="|".join(map(re.escape, wrappers)))
            raise UserError(
                f"The tensors in {source} must be those of the decoder that its config describes; found {what}, such "
                f"as {names[0]:.200}. {advice}"
            )
    if len(missing) == 1 and (head := min(missing)).endswith("lm_head.weight"):
        raise UserError(
            f"{source} must hold {head}, because tie_word_embeddings is false or absent in its config; found no "
            "such tensor. If the model uses its embedding as the head, set tie_word_embeddings to true in config.json; "
            "otherwise download the model again."
        )
    for problem, names in (("missing", missing), ("unknown", unknown)):
        if names:
            raise UserError(
                f"{source} must hold exactly the {len(expected)} tensors that its config describes; found {len(names)} "
                f"{problem}, such as {min(names)}. Download the model again."
            )
