"""Finds the architecture of a run's model without its weights, so that a plan downloads nothing."""

import json
import os
from dataclasses import replace
from pathlib import Path

from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.weights.hf_config import model_config_from_hf
from grpo_jax.weights.hub import read_hub_id
from grpo_jax.weights.packaged import PACKAGED_MODELS
from grpo_jax.weights.source import find_model, read_model_config

# For each hub model of a preset, what its config.json says about the decoder, and the number of its tokenizer's ids.
PUBLISHED = Path(__file__).parent / "models.json"


def plan_model(cfg: Config) -> ModelConfig:
    """Returns the architecture of `model.path`, with the dtypes, attention kernel and rematerialization of the run.

    A folder needs only its config.json, and its tokenizer.json if the vocabulary is padded. A hub model is taken from
    the hub's cache, or else from the table of published architectures.

    Raises:
        UserError: The model is not on this machine, and it is not in the table either.
    """
    options = dict(compute_dtype=cfg.model.compute_dtype, logit_dtype=cfg.model.logit_dtype, remat=cfg.train.remat)
    return replace(read_architecture(cfg.model.path), attention=cfg.model.attention, **options)


def read_architecture(path: str) -> ModelConfig:
    """Returns the architecture of the model at `path`, which may be anything that `model.path` may be."""
    folder = Path(os.path.expanduser(path))
    if not folder.exists():
        path = read_hub_id(path) or path
    if folder.exists() and (folder / "config.json").is_file():
        return read_model_config(folder)
    if folder.exists() or path == "tiny" or path in PACKAGED_MODELS:
        return read_model_config(find_model(path))
    if cached := cached_folder(path):
        return read_model_config(cached)
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    if path not in published:
        raise UserError(
            f"A plan needs the config.json of the model; found no folder {path}, no such model in the hub's cache and "
            f"none in {PUBLISHED.name}. Run `hf download {path} config.json tokenizer.json --local-dir FOLDER` and set "
            "model.path to the folder."
        )
    return model_config_from_hf(published[path]["config"], path, tokenizer_vocab_size=published[path]["tokenizer_ids"])


def cached_folder(hub_id: str) -> Path | None:
    """Returns the folder of a hub model in the hub's cache, or None if its config.json is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(hub_id, "config.json")
    except HFValidationError:  # not a hub id
        return None
    return Path(config).parent if isinstance(config, str) else None
