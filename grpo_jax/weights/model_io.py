"""Loads and saves models: `load` reads a model folder or GGUF file, `save` writes a Hugging Face folder."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from safetensors.numpy import save_file

from grpo_jax.errors import UserError
from grpo_jax.model.architecture import LayerConfig, ModelConfig, RopeConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import gather_to_host, path_name
from grpo_jax.weights.source import CARRIED_FILES, find_model, fp8_block_shape, read_hf_config, read_model_config
from grpo_jax.weights.tensor_names import DECODER_PREFIXES, ParameterTensors, parameter_tensors, skipped_tensors
from grpo_jax.weights.tensors import StoredTensor, open_gguf_tensors, open_safetensors_folder
from grpo_jax.weights.tokenizer import read_gguf_tokenizer

MAX_SHARD_BYTES = 5_000_000_000  # a larger model is written as several files

log = logging.getLogger(__name__)


class ModelTensors(NamedTuple):
    """The parameters of a model and the tensors of its checkpoint."""

    parameters: dict[str, ParameterTensors]  # by path in the parameter tree
    stored: dict[str, StoredTensor]  # by name; the tensors that the parameters are assembled from
    skipped: dict[str, StoredTensor]  # by name; the tensors that the decoder does not use


def open_model_tensors(source: Path, model_cfg: ModelConfig) -> ModelTensors:
    """Opens the tensors of a model and checks them against its config, without reading any values.

    Raises:
        UserError: A tensor is missing, unknown, stored twice, not floating-point, or of a shape that contradicts the
            config.
    """
    hf_config = read_hf_config(source)
    if source.suffix == ".gguf":
        tensors = open_gguf_tensors(source, hf_config)
    else:
        tensors = open_safetensors_folder(source, fp8_block_shape(hf_config, source))
    # Checked before the tensors' names are listed, because a broken config would make that list huge.
    at_least = sum(model_cfg.experts.num_experts if layer.use_experts else 1 for layer in model_cfg.layers)
    if at_least > len(tensors):
        raise UserError(
            f"The config of {source} describes at least {at_least} tensors; found {len(tensors)}. Download them again."
        )
    prefix = next((prefix for prefix in DECODER_PREFIXES if f"{prefix}embed_tokens.weight" in tensors), "model.")
    parameters = parameter_tensors(model_cfg, prefix)
    expected = {name: parameter for parameter in parameters.values() for name in parameter.names.flat}
    others = tensors.keys() - expected.keys()
    skipped = skipped_tensors(model_cfg, prefix, others)
    for problem, names in (("missing", expected.keys() - tensors.keys()), ("unknown", others - skipped)):
        if names:
            raise UserError(
                f"The config of {source} describes {len(expected)} tensors; found {len(names)} {problem}, such as "
                f"{min(names)}. Download the model again."
            )
    for name, parameter in expected.items():
        if tensors[name].shape != parameter.stored_shape:
            raise UserError(
                f"{name} in {source} must have shape {parameter.stored_shape} according to its config; "
                f"found {tensors[name].shape}. Download the model again."
            )
        if tensors[name].dtype.kind in "iub":
            raise UserError(f"{name} in {source} must be float; found {tensors[name].dtype}. Use an unquantized model.")
    stored = {name: tensors[name] for name in expected}
    return ModelTensors(parameters, stored, {name: tensors[name] for name in skipped})


def check_tied_head(source: Path, tensors: ModelTensors) -> None:
    """Checks that a tied head, if the checkpoint stores one anyway, equals the embedding.

    Raises:
        UserError: It differs, so the checkpoint does not say which of the two is meant.
    """
    embedding = tensors.stored[str(tensors.parameters["embed/embedding"].names)]
    blocks = [(slice(row, row + 4096), slice(None)) for row in range(0, embedding.shape[0], 4096)]
    heads = {name: tensor for name, tensor in tensors.skipped.items() if name.endswith("lm_head.weight")}
    for name, head in heads.items():
        same_shape = head.shape == embedding.shape
        if not same_shape or not all(np.array_equal(head.read(block), embedding.read(block)) for block in blocks):
            raise UserError(
                f"{name} in {source} must equal the embedding, because config.json sets tie_word_embeddings; found "
                "different values. Set tie_word_embeddings to false in config.json if the head is meant."
            )


def load(source: str | Path, *, mesh: Mesh | None = None, param_dtype: str = "float32") -> tuple[ModelConfig, dict]:
    """Loads a model, tensor by tensor, directly into its sharding.

    Args:
        source: A model folder, a GGUF file, a Hub id, `tiny` or `smollm2`; see `find_model`.
        mesh: The mesh to shard the parameters over (`grpo_jax.model.parameters`). Each process reads only the parts
            that its devices hold. Without a mesh, the parameters are placed on the first local device.
        param_dtype: The dtype of the parameters.

    Returns:
        The model's config and its parameters.

    Raises:
        UserError: There is no model at `source`, it is not supported, its tensors do not match its config, or one holds
            a number that is not finite.
    """
    source = find_model(source)
    model_cfg = read_model_config(source)
    tensors = open_model_tensors(source, model_cfg)
    check_tied_head(source, tensors)
    if tensors.skipped:
        count, example = len(tensors.skipped), min(tensors.skipped)
        log.warning("%s: skipped %d tensors that the decoder does not use, such as %s", source, count, example)
    shapes = param_shapes(model_cfg, param_dtype)
    device = SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: device, shapes) if mesh is None else tree_shardings(mesh, shapes)

    def load_parameter(path, leaf, sharding):
        parameter = tensors.parameters[path_name(path)]
        return assemble_array(leaf.shape, sharding, partial(read_part, parameter, tensors.stored, leaf.dtype, source))

    return model_cfg, jax.tree_util.tree_map_with_path(load_parameter, shapes, shardings)


def read_part(
    parameter: ParameterTensors,
    stored: dict[str, StoredTensor],
    dtype: np.dtype,
    source: Path,
    index: tuple[slice, ...],
) -> np.ndarray:
    """Reads the part of a parameter that `index` selects, in the given dtype.

    Raises:
        UserError: A tensor of the model, which is in `source`, holds a number that is not finite in this dtype.
    """
    stacked_axes = parameter.names.ndim
    names, index = parameter.names[index[:stacked_axes]], index[stacked_axes:]
    names = np.asarray(names, object)  # indexing an array without axes gives its only name
    shape = tuple(len(range(*cut.indices(size))) for cut, size in zip(index, parameter.shape, strict=True))
    slices = parameter.stored_slices(index)
    part = np.empty((*names.shape, *shape), dtype)
    for position in np.ndindex(*names.shape):
        value = stored[names[position]].read(slices)
        with np.errstate(over="ignore"):  # infinity is reported below
            part[position] = (value.T if parameter.row.transpose else value).reshape(shape)
        if not is_finite(part[position]):
            raise UserError(
                f"{names[position]} in {source} must hold finite numbers; found NaN or infinity in {dtype}. "
                "Download the model again."
            )
    return part


def is_finite(values: np.ndarray) -> bool:
    """Returns whether all values, float32 or bfloat16, are finite."""
    if values.dtype == np.float32:
        return bool(np.isfinite(values).all())
    exponent = np.uint16(0x7F80)  # all ones in NaN and infinity; `isfinite` takes seven times as long for bfloat16
    return not np.any((values.view(np.uint16) & exponent) == exponent)


def assemble_array(
    shape: tuple[int, ...], sharding: Sharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Assembles a sharded array from parts that `read` returns.

    Each part is read once, however many devices hold it, and only one is in host memory at a time.
    """
    devices_by_part = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices_by_part.setdefault(str(index), (index, []))[1].append(device)
    arrays = []
    for index, devices in devices_by_part.values():
        part = read(index)
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


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
        hf_config.pop("quantization_config", None)  # FP8 weights were dequantized
    else:
        hf_config, tensors = llama_hf_config(model_cfg), ModelTensors(parameter_tensors(model_cfg, "model."), {}, {})
    dtypes = {name: tensor.dtype for name, tensor in tensors.stored.items()}
    written = tensors_from_params(tensors.parameters, params, dtypes, model_cfg.dtype)
    embedding = written[str(tensors.parameters["embed/embedding"].names)]
    for name, tensor in tensors.skipped.items():  # a tied head must follow the embedding, which may have been trained
        written[name] = embedding if name.endswith("lm_head.weight") else tensor
    write_safetensors(folder, written)
    if jax.process_index() == 0:
        write_other_files(folder, source, hf_config)


def write_other_files(folder: Path, source: Path | None, hf_config: dict) -> None:
    """Writes the tokenizer, config.json (byte for byte as in the source if unchanged) and generation_config.json."""
    if source and source.suffix == ".gguf":
        read_gguf_tokenizer(source).save_pretrained(folder)
    for name in CARRIED_FILES:
        if source and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    unchanged = source and source.is_dir() and hf_config == read_hf_config(source)
    text = (source / "config.json").read_text(encoding="utf-8") if unchanged else json.dumps(hf_config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    if not (folder / "generation_config.json").is_file():
        ids = {name: hf_config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        known = {name: value for name, value in ids.items() if value is not None}
        (folder / "generation_config.json").write_text(json.dumps(known, indent=2) + "\n")


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

    One file's tensors are in memory at a time.

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
