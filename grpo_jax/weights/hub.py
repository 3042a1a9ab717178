"""Downloads models from the Hugging Face Hub."""

import re
from pathlib import Path

from grpo_jax.errors import UserError
from grpo_jax.weights.families import check_family
from grpo_jax.weights.model_files import check_is_model, read_json_object, refuse_other_weights
from grpo_jax.weights.quantization import fp8_block_shape

DOWNLOADED_FILES = ("*.json", "tokenizer.model", "merges.txt", "*.jinja")  # besides the weights; no code, no pickles
# The same weights in other formats. Of subfolders, only chat templates are read.
REPEATED_FILES = ("consolidated*", "*/*.json", "*/*.safetensors", "*/tokenizer.model", "*/merges.txt")

HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
HUB_ADDRESS = re.compile(rf"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)({HUB_ID})")


def read_hub_id(path: str) -> str | None:
    """Returns `path` without trailing slashes if it has the form of a hub id, `owner/name`, and None otherwise.

    Raises:
        UserError: It is an address, such as that of the model's page.
    """
    if match := HUB_ADDRESS.match(path):
        raise UserError(
            f"model.path must be a folder, a GGUF file or a hub id; found an address. Set model.path to {match[1]}."
        )
    if "://" in path:
        raise UserError(
            f"model.path must be a folder, a GGUF file or a hub id; found the address {path:.80}. Download the model, "
            "and set model.path to its folder."
        )
    return path.rstrip("/") if re.fullmatch(rf"{HUB_ID}/*", path) else None


def download_from_hub(hub_id: str) -> Path:
    """Downloads the config, tokenizer and safetensors of a model from the Hugging Face Hub, or finds them in its cache.

    The weights, which may be large, come last, after the family and the quantization have been checked.

    Returns:
        The folder in the Hub's cache.

    Raises:
        UserError: The model cannot be downloaded, or is not supported, or its weights are in another format.
    """
    from huggingface_hub import HfApi, snapshot_download

    names = []
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[*DOWNLOADED_FILES], ignore_patterns=[*REPEATED_FILES]))
        if (folder / "config.json").is_file():
            hf_config = read_json_object(folder / "config.json")
            check_is_model(hf_config, folder)
            check_family(hf_config, hub_id)
            fp8_block_shape(hf_config, folder)
        folder = Path(snapshot_download(hub_id, allow_patterns=["*.safetensors"], ignore_patterns=[*REPEATED_FILES]))
        if not any(folder.glob("*.safetensors")):
            names = HfApi().list_repo_files(hub_id)
    except UserError:
        raise
    except Exception as error:  # the network, the Hub and the cache raise many kinds
        message = " ".join(str(error).split())[:160]
        raise UserError(
            f"No model folder found at {hub_id}, and the Hub model of that name cannot be downloaded "
            f"({type(error).__name__}: {message}). On a machine with network access run "
            f"`hf download {hub_id} --local-dir {hub_id.split('/')[1]}`, copy the folder here and set model.path to it."
        ) from None
    if "adapter_config.json" not in names:
        refuse_other_weights(hub_id, names)
    return folder
