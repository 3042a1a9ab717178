"""Loads the tokenizers of model folders and GGUF files, never running code that comes with a model."""

import os
from pathlib import Path

from grpo_jax.errors import UserError

# Pre-tokenizers for which llama.cpp begins each text with BOS unless the file says otherwise.
BOS_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe", "tekken")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def load_tokenizer(source: str | Path):
    """Loads the Hugging Face tokenizer of a model folder or GGUF file.

    Args:
        source: The folder or file.

    Returns:
        A `transformers` tokenizer.

    Raises:
        UserError: There are no tokenizer files, they cannot be read, or reading them would run code from the folder.
    """
    if Path(source).is_file():
        return read_gguf_tokenizer(Path(source))
    from transformers import AutoTokenizer

    try:
        # Left to itself, transformers asks on the terminal whether it may run the code that `auto_map` names.
        tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # for some families, transformers makes one without files
            raise ValueError("no vocabulary")
        return tokenizer
    except Exception as error:  # transformers and tokenizers raise many kinds
        message = " ".join(str(error).split())[:300] or type(error).__name__
        if "trust_remote_code" in str(error):
            raise UserError(
                f"The tokenizer in {source} must load without running code; found one that needs Python code from the "
                "folder (auto_map in tokenizer_config.json). Save it as a tokenizer.json without auto_map."
            ) from None
        raise UserError(
            f"{source} must hold a readable tokenizer (tokenizer.json); found: {message}. "
            "Copy the tokenizer files of the model into the folder."
        ) from None


def read_gguf_tokenizer(path: Path):
    """Reads the tokenizer of a GGUF file with the conversion that `transformers` uses.

    Args:
        path: The file.

    Returns:
        A `transformers` tokenizer.

    Raises:
        UserError: The file is not a readable GGUF file, or has no tokenizer of a kind that `transformers` converts.
    """
    from transformers import PreTrainedTokenizerFast

    from grpo_jax.weights.gguf_header import read_gguf_header  # imported here, because only GGUF files need it

    header = read_gguf_header(path)

    try:
        from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer
    except ImportError:
        raise UserError(
            f"Reading the tokenizer in {path} requires transformers 5.23 or newer; found an older version. "
            "Run: pip install --upgrade transformers"
        ) from None

    def read_fields(section: str) -> dict:
        keys = {ours: f"tokenizer.{theirs}" for theirs, ours in GGUF_TOKENIZER_MAPPING[section].items()}
        return {name: header.fields[key] for name, key in keys.items() if key in header.fields}

    model, options = read_fields("tokenizer"), read_fields("tokenizer_config")
    if model.get("tokenizer_type") == "llama" or model.get("pre_tokenizer_type") in BOS_BY_DEFAULT:
        options.setdefault("add_bos_token", True)
    try:
        backend, _ = convert_gguf_tokenizer(header.architecture, model)
        for name in ("bos", "eos", "unk", "pad"):
            token = model.get(f"{name}_token_id")
            options[f"{name}_token"] = None if token is None else model["tokens"][token]
        return PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    except Exception as error:  # transformers and tokenizers raise many kinds
        message = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} must hold a tokenizer that transformers can convert; found: {type(error).__name__} {message}. "
            "Use another file of the model."
        ) from None
