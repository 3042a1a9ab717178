"""Tokenizers of model folders and GGUF files."""

import os
from pathlib import Path

from grpo_jax.errors import UserError
from grpo_jax.weights.gguf_file import read_gguf_header

# Pre-tokenizers whose texts llama.cpp begins with BOS if the file does not say.
BOS_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe", "tekken")


def load_tokenizer(folder: str | Path):
    """The Hugging Face tokenizer of a model folder or GGUF file.

    Raises:
      UserError: there are no tokenizer files, or they cannot be read.
    """
    if Path(folder).suffix == ".gguf":
        return read_gguf_tokenizer(Path(folder))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds
        found = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"expected a tokenizer (tokenizer.json) in {folder}; found: {found}; "
            "copy the tokenizer files of the model into the folder"
        ) from None


def read_gguf_tokenizer(path: str | Path):
    """The tokenizer, as transformers reads it from the file.

    Raises:
      UserError: as `read_head`; the file has no tokenizer, or one of a kind that transformers does not read.
    """
    head = read_gguf_header(path)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing
    from transformers import PreTrainedTokenizerFast

    try:
        from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer
    except ImportError:
        raise UserError(
            f"expected transformers 5.23 or newer, to read the tokenizer in {path}; found an older one; "
            "pip install --upgrade transformers"
        ) from None
    model, options = (
        {
            ours: head.fields[f"tokenizer.{theirs}"]
            for theirs, ours in GGUF_TOKENIZER_MAPPING[part].items()
            if f"tokenizer.{theirs}" in head.fields
        }
        for part in ("tokenizer", "tokenizer_config")
    )
    if model.get("tokenizer_type") == "llama" or model.get("pre_tokenizer_type") in BOS_BY_DEFAULT:
        options.setdefault("add_bos_token", True)
    try:
        backend, _ = convert_gguf_tokenizer(head.architecture, model)
        for name in ("bos", "eos", "unk", "pad"):
            token = model.get(f"{name}_token_id")
            options[f"{name}_token"] = None if token is None else model["tokens"][token]
        return PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise UserError(
            f"expected a tokenizer that transformers reads in {path}; found: {type(error).__name__} "
            f"{' '.join(str(error).split())[:200]}; take another file of the model"
        ) from None
