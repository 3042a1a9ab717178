"""Finds models and reads their configs: model folders, GGUF files, the Hugging Face Hub and packaged models."""

import os
from collections.abc import Collection
from dataclasses import replace
from itertools import chain
from pathlib import Path

from safetensors import SafetensorError, safe_open

from grpo_jax.errors import UserError
from grpo_jax.foreign import name_problem, open_regular
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.weights.families import check_family
from grpo_jax.weights.hf_config import model_config_from_hf
from grpo_jax.weights.hub import download_from_hub, read_hub_id
from grpo_jax.weights.model_files import (
    GGUF_PART,
    SHARD_INDEX,
    USABLE_PATHS,
    check_content,
    check_is_model,
    check_model_files,
    check_shard_index,
    choose_gguf,
    list_names,
    read_json_object,
    refuse_adapter,
    refuse_folder_above,
    refuse_gguf_part,
    refuse_other_weights,
    refuse_run,
    safetensors_names,
)
from grpo_jax.weights.packaged import PACKAGED_MODELS, find_packaged_model
from grpo_jax.weights.quantization import fp8_block_shape

DTYPES = (
    "float32",
    "bfloat16",
    "float16",
    "float64",
    "float8_e4m3fn",
    "float8_e5m2",
)  # names that a config.json may use
# Other names of these dtypes. "auto" leaves the choice to the tensors, as does a config without a dtype.
DTYPE_NAMES = {
    "auto": "float32",
    "float": "float32",
    "fp32": "float32",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "double": "float64",
}

# Patterns of the files of a model folder that are copied to an export, besides config.json.
CARRIED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
# All files that we or `transformers` read whole.
SMALL_FILES = (*CARRIED_FILES, "config.json", SHARD_INDEX)


def find_model(path: str | Path) -> Path:
    """Returns the model folder or GGUF file that `path` names.

    The family is checked first, then the quantization, then the files.

    Args:
        path: A folder or GGUF file (`~` is expanded), a hub id such as `Qwen/Qwen2.5-0.5B` (taken from the Hub's cache
            or downloaded), `tiny` for the base model in this package, or a key of `PACKAGED_MODELS`, such as `smollm2`.

    Returns:
        A folder with config.json and *.safetensors, or a GGUF file.

    Raises:
        UserError: There is no model at `path`, it is not supported, files are missing or not what they should be (see
            `model_files`), or the download fails.
    """
    path = str(path)
    if path == "tiny":
        return Path(__file__).parent.parent / "tiny" / "base"
    if path in PACKAGED_MODELS:
        return find_packaged_model(path)
    folder = Path(os.path.expanduser(path))
    if problem := name_problem(folder):
        raise UserError(f"model.path must be the path of a model; found {path!r:.80} ({problem}). Correct it.")
    if not folder.exists() and (hub_id := read_hub_id(path)):
        folder = download_from_hub(hub_id)
    if folder.is_file():
        check_single_file(folder)
        return folder
    if not folder.is_dir():
        raise UserError(f"No model folder found at {folder}. {USABLE_PATHS}")
    return find_in_folder(folder)


def find_in_folder(folder: Path) -> Path:
    """Returns a model folder, after checking its config and its files, or the only GGUF file in it.

    Raises:
        UserError: See `find_model`.
    """
    names = list_names(folder)
    weights, hf_config = safetensors_names(names), None
    if "config.json" in names:
        check_model_files(folder, [folder / "config.json"], are_small=True)
        hf_config = read_json_object(folder / "config.json")
        check_is_model(hf_config, folder)
        check_family(hf_config, str(folder))
    if not weights and (gguf_file := choose_gguf(folder)):
        check_model_files(folder, [gguf_file], are_small=False)
        return gguf_file
    if hf_config is not None:
        fp8_block_shape(hf_config, folder)
    check_model_files(folder, chain.from_iterable(folder.glob(name) for name in SMALL_FILES), are_small=True)
    if {"adapter_config.json", "adapter_model.safetensors"} & {*names}:
        refuse_adapter(folder, weights if hf_config else ())
    if not weights:
        refuse_run(folder)
        check_shard_index(folder)
        refuse_other_weights(folder, names)
    if not weights or hf_config is None:
        refuse_folder_above(folder)
        found = "no config.json" if weights else "no *.safetensors" if names else "an empty folder"
        raise UserError(f"{folder} must be a model folder; found {found}. {USABLE_PATHS}")
    check_model_files(folder, [folder / name for name in weights], are_small=False)
    return folder


def check_single_file(path: Path) -> None:
    """Checks that a file is a whole GGUF file, by its name and its first bytes.

    Raises:
        UserError: It is something else.
    """
    check_content(path)
    match = GGUF_PART.fullmatch(path.name)
    if match and int(match[3]) > 1:
        refuse_gguf_part(path, int(match[3]))
    with open_regular(path) as file:
        is_gguf = path.suffix.lower() == ".gguf" or file.read(4) == b"GGUF"
    if not is_gguf:
        folder = path.parent
        advice = f"Set model.path to {folder}." if (folder / "config.json").is_file() else USABLE_PATHS
        raise UserError(f"model.path must be a folder, a GGUF file or a hub id; found the file {path}. {advice}")


def read_hf_config(source: Path) -> dict:
    """Returns the contents of a model folder's config.json, or the equivalent of a GGUF file's metadata.

    Versions of `transformers` have different defaults for `tie_word_embeddings` in vision-language models. If the
    config of one leaves it out, it is set to true unless the weights include a head.
    """
    if source.is_file():
        from grpo_jax.weights.gguf_file import read_gguf_config  # imported here, because only GGUF files need it

        return read_gguf_config(source)
    hf_config = read_json_object(source / "config.json")
    sections = hf_config, hf_config.get("text_config")
    is_stated = not isinstance(sections[1], dict) or any("tie_word_embeddings" in section for section in sections)
    if not is_stated and not has_head(source):
        hf_config["tie_word_embeddings"] = True
    return hf_config


def has_head(folder: Path) -> bool:
    """Returns whether the weights in a model folder include a head; True if there are none, or none can be read."""
    try:
        files = safetensors_names(list_names(folder))
        for name in files:
            with safe_open(folder / name, framework="np") as file:
                if any(tensor.endswith("lm_head.weight") for tensor in file.keys()):
                    return True
    except (OSError, SafetensorError):  # reported when the weights are loaded
        return True
    return not files


def read_model_config(source: str | Path) -> ModelConfig:
    """Reads the ModelConfig of a model folder or a GGUF file.

    Raises:
        UserError: The config cannot be read, lacks a field, or describes a decoder that is not supported.
    """
    source = Path(source)
    hf_config = read_hf_config(source)
    check_is_model(hf_config, source)
    check_family(hf_config, str(source))  # first, because the meaning of the other fields depends on the family
    fp8_block_shape(hf_config, source)  # raises if the quantization is not supported
    dtype = read_dtype(hf_config, source)
    eos_ids = read_eos_ids(source, hf_config)
    model_cfg = model_config_from_hf(hf_config, str(source), eos_ids=eos_ids, source=str(source), dtype=dtype)
    return replace(model_cfg, tokenizer_vocab_size=count_tokenizer_ids(source, model_cfg.vocab_size))


def read_dtype(hf_config: dict, source: Path) -> str:
    """Returns the dtype that a config states for its weights, as NumPy calls it; float32 if it states none.

    Raises:
        UserError: Weights of that dtype cannot be read.
    """
    text_config = hf_config.get("text_config")
    decoder_config = hf_config | (text_config if isinstance(text_config, dict) else {})
    stated = decoder_config.get("dtype") or decoder_config.get("torch_dtype") or "auto"
    name = str(stated).removeprefix("torch.")
    dtype = DTYPE_NAMES.get(name, name)
    if dtype not in DTYPES:
        raise UserError(
            f"dtype in {source} must be one of {', '.join(DTYPES)}; found {stated!r:.80}. Use the checkpoint in "
            "bfloat16 or float32."
        )
    return dtype


def read_eos_ids(source: Path, hf_config: dict) -> tuple[int, ...]:
    """Returns every id that ends a text, from config.json and generation_config.json; many models list them only there.

    Raises:
        UserError: An id is not an integer.
    """
    ids = []
    path = source / "generation_config.json"
    generation_config = read_json_object(path) if path.is_file() else {}
    for section in (hf_config, hf_config.get("text_config"), generation_config):
        eos = section.get("eos_token_id") if isinstance(section, dict) else None
        ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int for token in ids):
        raise UserError(
            f"eos_token_id in {source} must be an integer or a list of integers; found {str(ids)[:80]}. "
            "Download the model again."
        )
    return tuple(dict.fromkeys(ids))


def count_token_ids(vocabulary: dict[str, int], added: Collection[str], rows: int, source: str | Path) -> int:
    """Returns one more than the largest token id that can occur in a prompt or a completion.

    Added tokens without a row in the embedding, such as a padding token that somebody added by hand, do not count.
    Neither does Gemma 3's placeholder for an image, which text decoders never use.

    Args:
        vocabulary: The tokenizer's ids by token.
        added: The tokens that were added to the vocabulary that the tokenizer was trained with.
        rows: The number of rows of the model's embedding.
        source: The model folder or GGUF file.

    Raises:
        UserError: A token that was not added has no row, so the tokenizer belongs to another model.
    """
    most = max((index for token, index in vocabulary.items() if token not in added), default=-1)
    if most >= rows:
        raise UserError(
            f"The model needs an embedding row for each of its tokenizer's {most + 1} ids, but {source} has {rows} "
            "rows. Use the tokenizer that belongs to the model."
        )
    usable = (index for token, index in vocabulary.items() if index < rows and token != "<image_soft_token>")
    return 1 + max(usable, default=-1)


def count_tokenizer_ids(source: Path, rows: int) -> int:
    """Returns `count_token_ids` of a model folder's tokenizer, or 0 without a tokenizer.json.

    Raises:
        UserError: tokenizer.json cannot be read, or is that of another model.
    """
    path = source / "tokenizer.json"
    if not path.is_file():
        return 0
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a plain Exception
        raise UserError(
            f"tokenizer.json in {source} must be a readable tokenizer; found: {error}. Download it again."
        ) from None
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return count_token_ids(tokenizer.get_vocab(with_added_tokens=True), added, rows, source)
