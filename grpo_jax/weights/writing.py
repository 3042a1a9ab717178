"""Saves models: `save` writes a Hugging Face folder that `transformers` loads."""

import json
import shutil
from itertools import chain
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from grpo_jax.errors import UserError
from grpo_jax.model.architecture import LayerConfig, ModelConfig, RopeConfig
from grpo_jax.parallel.mesh import gather_to_host, path_name
from grpo_jax.weights.fused_tensors import join_fused
from grpo_jax.weights.model_files import read_json_object
from grpo_jax.weights.portable import (
    FILE_TOKENIZER,
    plain_dtypes,
    portable_config,
    portable_tensor_name,
    portable_tokenizer_config,
    without_code,
)
from grpo_jax.weights.reading import ModelTensors, open_model_tensors
from grpo_jax.weights.source import CARRIED_FILES, read_hf_config
from grpo_jax.weights.tensor_names import ParameterTensors, parameter_tensors
from grpo_jax.weights.tensors import StoredTensor
from grpo_jax.weights.tokenizer import OTHER_VOCABULARIES, load_tokenizer

MAX_SHARD_BYTES = 5_000_000_000  # a larger model is written as several files


def save(folder: str | Path, model_cfg: ModelConfig, params: dict) -> None:
    """Writes a Hugging Face folder that `transformers` loads: weights, config, generation config and tokenizer.

    Everything but the weights comes from `model_cfg.source`. Each weight has the dtype that it has there (bfloat16 if
    it was quantized), and tensors that the decoder skips, such as a vision tower, are copied. Every process must call
    this function; only process 0 writes.

    Args:
        folder: The folder to write.
        model_cfg: The model. Without a source it must be a plain Llama.
        params: Its parameters.

    Raises:
        UserError: `folder` is the source itself, or holds the weights of another model.
        ValueError: The model has no source and is not a plain Llama.
    """
    folder, source = Path(folder).expanduser(), Path(model_cfg.source) if model_cfg.source else None
    if source and source.resolve() == folder.resolve():
        raise UserError(
            f"A model must be saved to a new folder; found {folder}, where it was loaded from. Choose another."
        )
    if source:
        hf_config, tensors = read_hf_config(source), open_model_tensors(source, model_cfg)
        for section in (hf_config, hf_config.get("text_config")):
            if isinstance(section, dict):
                section.pop("quantization_config", None)  # FP8 weights were dequantized
        hf_config = plain_dtypes(hf_config, str(next(iter(tensors.stored.values())).dtype))
    else:
        hf_config, tensors = (
            llama_hf_config(model_cfg),
            ModelTensors(parameter_tensors(model_cfg, "model."), {}, {}, {}),
        )
    dtypes = {name: tensor.dtype for name, tensor in tensors.stored.items()}
    written = tensors_from_params(tensors.parameters, params, dtypes, model_cfg.dtype)
    embedding = written[str(tensors.parameters["embed/embedding"].names)]
    for name, tensor in tensors.skipped.items():  # a tied head must follow the embedding, which may have been trained
        written[portable_tensor_name(name, model_cfg.family)] = embedding if name.endswith("lm_head.weight") else tensor
    written = join_fused(written, tensors.fused)
    write_safetensors(folder, written)
    if jax.process_index() == 0:
        write_other_files(folder, source, hf_config)


def write_other_files(folder: Path, source: Path | None, hf_config: dict) -> None:
    """Writes config.json, generation_config.json and the tokenizer, in forms that older `transformers` read too.

    A file that needs no change is copied byte for byte from the source.
    """
    if source and source.is_dir():
        for path in chain.from_iterable(source.glob(name) for name in (*CARRIED_FILES, "config.json")):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    write_json(folder / "config.json", portable_config(hf_config, str(source or folder)))
    tokenizer_config = folder / "tokenizer_config.json"
    # From a GGUF file or a vocabulary, different releases of transformers make different tokenizers.
    is_converted = source and (source.is_file() or any((source / name).is_file() for name in OTHER_VOCABULARIES))
    if is_converted and not (folder / "tokenizer.json").is_file():
        load_tokenizer(source).save_pretrained(folder)
        write_json(tokenizer_config, read_json_object(tokenizer_config) | {"tokenizer_class": FILE_TOKENIZER})
    if tokenizer_config.is_file() and (folder / "tokenizer.json").is_file():
        write_json(tokenizer_config, portable_tokenizer_config(read_json_object(tokenizer_config)))
    for path in folder.glob("*_config.json"):  # those of processors may name code, too
        write_json(path, without_code(read_json_object(path)))
    if not (folder / "generation_config.json").is_file():
        text_config = hf_config.get("text_config")
        fields = (text_config if isinstance(text_config, dict) else {}) | hf_config
        ids = {name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        known = {name: value for name, value in ids.items() if value is not None}
        write_json(folder / "generation_config.json", known)


def write_json(path: Path, fields: dict) -> None:
    """Writes a JSON object, unless the file already holds an equal one."""
    if not path.is_file() or read_json_object(path) != fields:
        path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def tensors_from_params(
    parameters: dict[str, ParameterTensors], params: dict, dtypes: dict[str, np.dtype], default_dtype: str
) -> dict[str, StoredTensor]:
    """Converts parameters to the tensors of a checkpoint.

    Args:
        parameters: The tensors that each parameter is stored in, by its path.
        params: The parameter tree.
        dtypes: The dtypes of tensors by name.
        default_dtype: The dtype of tensors that are not in `dtypes`.

    Returns:
        The tensors by name. Reading one gathers it to every process, so all processes must read the same tensors.
    """
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def convert(parameter: ParameterTensors, position: tuple[int, ...]) -> StoredTensor:
        dtype, shape = dtypes.get(parameter.names[position], np.dtype(default_dtype)), parameter.stored_shape

        def read(index):
            value = np.asarray(gather_to_host(leaves[parameter.path][position])).astype(dtype)
            value = value.reshape(shape[::-1]).T if parameter.row.transpose else value.reshape(shape)
            return np.ascontiguousarray(value[index])

        return StoredTensor(shape, dtype, read)

    return {
        parameter.names[position]: convert(parameter, position)
        for parameter in parameters.values()
        for position in np.ndindex(*parameter.names.shape)
    }


def write_safetensors(folder: Path, tensors: dict[str, StoredTensor]) -> None:
    """Writes tensors as one safetensors file, or as several of at most `MAX_SHARD_BYTES` with an index.

    The tensors of only one file are in memory at a time.

    Raises:
        UserError: The folder holds other safetensors, which would be loaded together with the new ones.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    options = dict(filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD_BYTES)
    split = split_state_dict_into_shards_factory(tensors, get_storage_size=lambda tensor: tensor.nbytes, **options)
    stale = {path.name for path in folder.glob("*.safetensors")} - split.filename_to_tensors.keys()
    if stale:
        raise UserError(f"{folder} must not hold another model; found {min(stale)}. Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for file, names in split.filename_to_tensors.items():
        values = {name: tensors[name].read_all() for name in names}
        if jax.process_index() == 0:
            save_file(values, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)  # the library makes it readable by its owner only
    if split.is_sharded and jax.process_index() == 0:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def llama_hf_config(model_cfg: ModelConfig) -> dict:
    """Returns the config.json of a plain Llama.

    Raises:
        ValueError: The model is of another family, or its layers have windows, experts or scaled rotary embeddings.
    """
    theta = model_cfg.layers[0].rope.theta
    if model_cfg.family != "llama" or set(model_cfg.layers) != {LayerConfig(rope=RopeConfig(theta))}:
        raise ValueError(
            f"Without a source, only a plain Llama can be saved; found {model_cfg.family} with layers "
            f"{set(model_cfg.layers)}. Set model_cfg.source to the folder the model came from."
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model_cfg.vocab_size,
        "hidden_size": model_cfg.hidden_size,
        "intermediate_size": model_cfg.intermediate_size,
        "num_hidden_layers": model_cfg.num_layers,
        "num_attention_heads": model_cfg.num_heads,
        "num_key_value_heads": model_cfg.num_kv_heads,
        "head_dim": model_cfg.head_dim,
        "max_position_embeddings": model_cfg.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "rms_norm_eps": model_cfg.norm_eps,
        "hidden_act": model_cfg.activation,
        "attention_bias": model_cfg.qkv_bias,
        "mlp_bias": model_cfg.mlp_bias,
        "tie_word_embeddings": model_cfg.tie_embeddings,
        "eos_token_id": list(model_cfg.eos_ids) if len(model_cfg.eos_ids) != 1 else model_cfg.eos_ids[0],
        "bos_token_id": None,
        "dtype": model_cfg.dtype,
    }
