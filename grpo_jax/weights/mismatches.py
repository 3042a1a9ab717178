"""Explains tensors that do not belong to the decoder that a config describes: what wrote them, and what would help."""

import re
from collections.abc import Collection
from pathlib import Path

from grpo_jax.errors import UserError
from grpo_jax.weights.quantization import UNQUANTIZED

# Modules that wrap others while a model is trained, and whose names end up in those of its tensors.
WRAPPER = re.compile(
    r"(?:^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|module|base_model\.model)\."
)
# {wrappers}: those that occur, as a regular expression.
RENAME = (
    'Rename them with: python -c "import glob, ml_dtypes, os, re; from safetensors.numpy import load_file, save_file; '
    "[(save_file({{re.sub(r'({wrappers})\\.', '', name): value for name, value in load_file(file).items()}}, "
    "file + '.new', {{'format': 'pt'}}), os.replace(file + '.new', file)) "
    "for file in glob.glob('{source}/*.safetensors')]\""
)

# Patterns of tensors that the decoder lacks, what they are, and what to do; the first that occurs explains all.
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
        "Use the language model that it was made from.",
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
        UserError: A tensor is missing or unknown; the message says why, if the names tell.
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
            "such tensor. If the embedding is the head too, set tie_word_embeddings to true in config.json; otherwise "
            "download the model again."
        )
    for problem, names in (("missing", missing), ("unknown", unknown)):
        if names:
            raise UserError(
                f"The config of {source} describes {len(expected)} tensors; found {len(names)} {problem}, such as "
                f"{min(names)}. Download the model again."
            )
