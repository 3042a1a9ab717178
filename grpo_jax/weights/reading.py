"""Loads models: `load` reads a model folder or GGUF file, layer by layer, into its sharding."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from grpo_jax.errors import UserError
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import path_name
from grpo_jax.weights.fused_tensors import fused_names, split_fused
from grpo_jax.weights.mismatches import check_tensor_names
from grpo_jax.weights.placing import ParameterTarget, Placer
from grpo_jax.weights.quantization import UNQUANTIZED, fp8_block_shape
from grpo_jax.weights.source import find_model, read_hf_config, read_model_config
from grpo_jax.weights.tensor_names import DECODER_PREFIXES, ParameterTensors, parameter_tensors, skipped_tensors
from grpo_jax.weights.tensors import StoredTensor, open_gguf_tensors, open_safetensors_folder

log = logging.getLogger(__name__)


class ModelTensors(NamedTuple):
    """The parameters of a model and the tensors of its checkpoint."""

    parameters: dict[str, ParameterTensors]  # by path in the parameter tree
    stored: dict[str, StoredTensor]  # by name; the tensors that the parameters are assembled from
    skipped: dict[str, StoredTensor]  # by name; the tensors that the decoder does not use
    fused: dict[str, list[str]]  # the tensors that the checkpoint holds in one piece, and their parts in `stored`


def open_model_tensors(source: Path, model_cfg: ModelConfig) -> ModelTensors:
    """Opens the tensors of a model and checks them against its config, without reading any values.

    Raises:
        UserError: A tensor is missing, unknown, stored twice, not floating-point, or of a shape that contradicts the
            config.
    """
    hf_config = read_hf_config(source)
    if source.is_file():
        tensors = open_gguf_tensors(source, hf_config)
    else:
        tensors = open_safetensors_folder(source, fp8_block_shape(hf_config, source))
    # Checked before the expected names are listed, because a broken config could make that list huge.
    at_least = sum(model_cfg.experts.num_experts if layer.use_experts else 1 for layer in model_cfg.layers)
    if at_least > len(tensors):
        raise UserError(
            f"{source} must hold at least {at_least} tensors according to its config; found {len(tensors)}. "
            "Download the model again."
        )
    prefix = next((prefix for prefix in DECODER_PREFIXES if f"{prefix}embed_tokens.weight" in tensors), "model.")
    parameters = parameter_tensors(model_cfg, prefix)
    expected = {name: parameter for parameter in parameters.values() for name in parameter.names.flat}
    fused = fused_names(model_cfg, prefix)
    shapes = {name: parameter.stored_shape for name, parameter in expected.items()}
    tensors = split_fused(tensors, fused, shapes, source)
    others = tensors.keys() - expected.keys()
    skipped = skipped_tensors(model_cfg, prefix, others)
    whole = {part: name for name, parts in fused.items() for part in parts}
    missing = {whole.get(name, name) for name in expected.keys() - tensors.keys()}
    check_tensor_names(source, expected, missing, others - skipped)
    for name, parameter in expected.items():
        if tensors[name].shape != parameter.stored_shape:
            raise UserError(
                f"{name} in {source} must have shape {parameter.stored_shape} according to its config; "
                f"found {tensors[name].shape}. Download the model again."
            )
        if tensors[name].dtype.kind in "iub":
            raise UserError(f"{name} in {source} must be float; found {tensors[name].dtype}. {UNQUANTIZED}")
    stored = {name: tensors[name] for name in expected}
    return ModelTensors(parameters, stored, {name: tensors[name] for name in skipped}, fused)


def check_tied_head(source: Path, tensors: ModelTensors) -> None:
    """Checks that a tied head, if the checkpoint stores one anyway, equals the embedding.

    Raises:
        UserError: It differs, so the checkpoint does not say which of the two to use.
    """
    embedding = tensors.stored[str(tensors.parameters["embed/embedding"].names)]
    blocks = [(slice(row, row + 4096), slice(None)) for row in range(0, embedding.shape[0], 4096)]
    heads = {name: tensor for name, tensor in tensors.skipped.items() if name.endswith("lm_head.weight")}
    for name, head in heads.items():
        same_shape = head.shape == embedding.shape
        if not same_shape or not all(np.array_equal(head.read(block), embedding.read(block)) for block in blocks):
            raise UserError(
                f"{name} in {source} must equal the embedding, because config.json sets tie_word_embeddings; found "
                "different values. Set tie_word_embeddings to false in config.json to use the head."
            )


def load(
    source: str | Path,
    *,
    mesh: Mesh | None = None,
    param_dtype: str = "float32",
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[ModelConfig, dict]:
    """Loads a model, layer by layer, directly into its sharding.

    Args:
        source: A model folder, a GGUF file, a hub id, `tiny`, `smollm2` or `gemma3-270m`; see `find_model`.
        mesh: The mesh to shard the parameters over (`grpo_jax.model.parameters`). Each process reads only the parts
            that its devices hold. Without a mesh, the parameters are placed on the first local device.
        param_dtype: The dtype of the parameters.
        on_progress: Called with the bytes of the parameters read so far, and the bytes of all parameters.

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

    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    targets = [
        ParameterTarget(tensors.parameters[path_name(path)], shape, sharding)
        for (path, shape), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    ]
    placer = Placer(source, tensors.stored, sum(target.nbytes for target in targets), on_progress)
    try:
        # In the order of the tree, the embedding and the head come first, when the most memory is free.
        groups = [list(group) for _, group in itertools.groupby(targets, lambda target: target.parameter.stack)]
        placed = [array for group in groups for array in placer.assemble_stack(group)]
    finally:
        placer.close()
    return model_cfg, jax.tree.unflatten(structure, placed)
