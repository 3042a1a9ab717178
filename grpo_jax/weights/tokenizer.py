"""Loads the tokenizers of model folders and GGUF files, never running code that comes with a model."""

import importlib.util
import logging
import os
import re
from pathlib import Path
from typing import NoReturn

from grpo_jax.errors import UserError
from grpo_jax.foreign import open_regular, read_json_file
from grpo_jax.weights.model_files import list_names

# Pre-tokenizers for which llama.cpp begins each text with BOS unless the file says otherwise.
BOS_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe", "tekken")
# Pre-tokenizers that transformers does not know -> one that splits text in the same way. Without this, transformers
# would use its default, GPT-2's.
SAME_SPLITS = {"glm4": "llama3", "chatglm-bpe": "llama3"}
DIGITS_APART = ("refact", "starcoder", "smollm")  # Granite's and SmolLM's: digits are split off, the rest as GPT-2's
GPT2_SPLITS = ("gpt-2", "phi-2", "olmo", "mpt")  # which are GPT-2's
# Seed-OSS's: words with the character before them, single digits, punctuation, line ends, and other white space.
SEED_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Vocabularies from which transformers makes a tokenizer if there is no tokenizer.json.
OTHER_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

log = logging.getLogger(__name__)


def load_tokenizer(source: str | Path):
    """Loads the Hugging Face tokenizer of a model folder or GGUF file.

    Args:
        source: The folder or file.

    Returns:
        A `transformers` tokenizer. If a folder comes with code for its tokenizer, tokenizer.json is read as it is, with
        the special tokens and the chat template of tokenizer_config.json.

    Raises:
        UserError: There are no tokenizer files, they cannot be read, or making a tokenizer from them would take code
            from the folder or a package that is not installed.
    """
    source = Path(source)
    if source.is_file():
        return read_gguf_tokenizer(source)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    code, has_file = tokenizer_code(source), (source / "tokenizer.json").is_file()
    if not has_file:
        check_vocabulary_files(source, code)
    reader = PreTrainedTokenizerFast if code and has_file else AutoTokenizer
    try:
        # Left to itself, transformers asks on the terminal whether it may run the code that `auto_map` names.
        tokenizer = reader.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # for some families, transformers makes one without files
            raise ValueError("no vocabulary")
        return tokenizer
    except Exception as error:  # transformers and tokenizers raise many kinds
        if code and not has_file:
            refuse_vocabulary(source, code)
        message = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"{source} must hold a readable tokenizer (tokenizer.json); found: {message}. "
            "Copy the tokenizer files of the model into the folder."
        ) from None


def tokenizer_code(source: Path) -> str:
    """Describes the Python code that a model folder names for its tokenizer; "" if it names none."""
    for name in ("tokenizer_config.json", "config.json"):
        try:
            classes = read_json_file(source / name).get("auto_map")
        except (OSError, ValueError, AttributeError):  # transformers reads the file again and reports what is wrong
            continue
        classes = classes.get("AutoTokenizer") if isinstance(classes, dict) else classes
        if classes:
            known = [str(text) for text in (classes if isinstance(classes, list) else [classes]) if text]
            where = f"{', '.join(known):.80} in auto_map of {name}"
            return f"a tokenizer in Python code, which is never run ({where})"
    return ""


def check_vocabulary_files(source: Path, code: str) -> None:
    """Checks that a model folder without tokenizer.json holds another vocabulary from which a tokenizer can be made.

    Args:
        source: The folder.
        code: What `tokenizer_code` returns for the folder.

    Raises:
        UserError: It holds only code, a vocabulary from which no tokenizer can be made, or one that requires a package
            that is not installed.
    """
    names = list_names(source)
    tiktoken = [name for name in names if name.endswith((".tiktoken", ".model")) and is_tiktoken(source / name)]
    if not ({*names} - {*tiktoken}) & {*OTHER_VOCABULARIES}:
        if code:
            refuse_vocabulary(source, code)
        if tiktoken:
            refuse_vocabulary(source, f"{tiktoken[0]}, a tiktoken vocabulary without the rule that splits text")
        if "tekken.json" in names:
            refuse_vocabulary(source, "tekken.json, which names no special tokens for prompts")
    elif "tokenizer.model" in names and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"Reading tokenizer.model in {source} requires the package sentencepiece, which is missing. "
            "Run: pip install sentencepiece protobuf"
        )


def is_tiktoken(path: Path) -> bool:
    """Returns whether a file holds a vocabulary for tiktoken: a token in base64 and its rank on each line."""
    if not path.is_file():
        return False
    with open_regular(path) as file:
        return re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", file.read(1000)) is not None


def refuse_vocabulary(source: Path, found: str) -> NoReturn:
    """Raises a UserError for a model folder that has its tokenizer only in a format that cannot be read."""
    raise UserError(
        f"{source} must hold a tokenizer.json; found {found}. Copy tokenizer.json and "
        "tokenizer_config.json from another copy of the model that has them, or use a GGUF file of it."
    )


def read_gguf_tokenizer(path: Path):
    """Reads the tokenizer of a GGUF file with the conversion that `transformers` uses, and Qwen's normalization.

    Args:
        path: The file.

    Returns:
        A `transformers` tokenizer.

    Raises:
        UserError: The file is not a readable GGUF file, or has no tokenizer of a kind that `transformers` converts.
    """
    from tokenizers.normalizers import NFC
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
    if model.get("pre_tokenizer_type") in SAME_SPLITS:
        model["pre_tokenizer_type"] = SAME_SPLITS[model["pre_tokenizer_type"]]
    try:
        backend, _ = convert_gguf_tokenizer(header.architecture, model)
        set_splits(backend, model.get("pre_tokenizer_type", ""), path)
        if header.architecture == "qwen2" or model.get("pre_tokenizer_type") == "qwen2":
            backend.normalizer = NFC()  # as in Qwen's own tokenizers; the file does not say so
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


def set_splits(backend, pre_tokenizer: str, path: Path) -> None:
    """Makes a byte-level tokenizer split texts as llama.cpp's pre-tokenizer of this name, if transformers does not.

    If neither knows the name, texts are split as for GPT-2, and a warning about the file at `path` says so.
    """
    from tokenizers import Regex, pre_tokenizers

    if pre_tokenizer in DIGITS_APART:
        splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif pre_tokenizer == "seed-coder":
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        splits = [pre_tokenizers.Split(Regex(SEED_SPLIT), "isolated"), whole]
    else:
        if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and pre_tokenizer not in GPT2_SPLITS:
            log.warning(
                "%s: texts are split into tokens as for GPT-2, because its tokenizer.ggml.pre %r is not known; ids may "
                "differ from those of the model's own tokenizer. Use its Hugging Face folder if you can.",
                path,
                pre_tokenizer,
            )
        return
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
