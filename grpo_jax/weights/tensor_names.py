"""Maps parameters to the tensors of a Hugging Face checkpoint: their names, shapes and transposes.

Loading and saving both follow `TENSOR_TABLE`, which lists Llama's names; `FAMILY_NAMES` lists where a family differs.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import path_name


class TensorRow(NamedTuple):
    """The checkpoint tensor that holds one parameter, or one layer or one expert of it."""

    parameter: str  # path in the parameter tree; for a layer's parameter, the path within its layer stack
    tensor: str  # name without the decoder's prefix; {i} is the layer, {x} the expert
    transpose: bool = False  # PyTorch's Linear stores [outputs, inputs], our kernels are [inputs, outputs]


# Parameter path and tensor name of every linear layer: each has a weight and, in some families, a bias.
LINEAR_LAYERS = (
    ("attention/q", "layers.{i}.self_attn.q_proj"),
    ("attention/k", "layers.{i}.self_attn.k_proj"),
    ("attention/v", "layers.{i}.self_attn.v_proj"),
    ("attention/o", "layers.{i}.self_attn.o_proj"),
    ("attention/q_a", "layers.{i}.self_attn.q_a_proj"),
    ("attention/q_b", "layers.{i}.self_attn.q_b_proj"),
    ("attention/kv_a", "layers.{i}.self_attn.kv_a_proj_with_mqa"),
    ("mlp/gate", "layers.{i}.mlp.gate_proj"),
    ("mlp/up", "layers.{i}.mlp.up_proj"),
    ("mlp/down", "layers.{i}.mlp.down_proj"),
    ("moe/shared/gate", "layers.{i}.mlp.shared_experts.gate_proj"),
    ("moe/shared/up", "layers.{i}.mlp.shared_experts.up_proj"),
    ("moe/shared/down", "layers.{i}.mlp.shared_experts.down_proj"),
)

TENSOR_TABLE = (
    TensorRow("embed/embedding", "embed_tokens.weight"),
    TensorRow("attention_norm/scale", "layers.{i}.input_layernorm.weight"),
    *(TensorRow(f"{parameter}/kernel", f"{tensor}.weight", transpose=True) for parameter, tensor in LINEAR_LAYERS),
    *(TensorRow(f"{parameter}/bias", f"{tensor}.bias") for parameter, tensor in LINEAR_LAYERS),
    TensorRow("attention/q_norm/scale", "layers.{i}.self_attn.q_norm.weight"),
    TensorRow("attention/k_norm/scale", "layers.{i}.self_attn.k_norm.weight"),
    TensorRow("attention/q_a_norm/scale", "layers.{i}.self_attn.q_a_layernorm.weight"),
    TensorRow("attention/kv_a_norm/scale", "layers.{i}.self_attn.kv_a_layernorm.weight"),
    TensorRow("attention/kv_b", "layers.{i}.self_attn.kv_b_proj.weight", transpose=True),
    TensorRow("mlp_norm/scale", "layers.{i}.post_attention_layernorm.weight"),
    TensorRow("moe/router/kernel", "layers.{i}.mlp.gate.weight", transpose=True),
    TensorRow("moe/router/correction", "layers.{i}.mlp.gate.e_score_correction_bias"),
    TensorRow("moe/experts_gate", "layers.{i}.mlp.experts.{x}.gate_proj.weight", transpose=True),
    TensorRow("moe/experts_up", "layers.{i}.mlp.experts.{x}.up_proj.weight", transpose=True),
    TensorRow("moe/experts_down", "layers.{i}.mlp.experts.{x}.down_proj.weight", transpose=True),
    TensorRow("final_norm/scale", "norm.weight"),
    TensorRow("head/kernel", "lm_head.weight", transpose=True),
)

# Tensor names by family, where they differ from the table or the table has no such parameter.
GEMMA_NAMES = {
    "attention_post_norm/scale": "layers.{i}.post_attention_layernorm.weight",
    "mlp_norm/scale": "layers.{i}.pre_feedforward_layernorm.weight",
    "mlp_post_norm/scale": "layers.{i}.post_feedforward_layernorm.weight",
}
FAMILY_NAMES = {
    "gemma2": GEMMA_NAMES,
    "gemma3": GEMMA_NAMES,
    "gemma3_text": GEMMA_NAMES,
    "mixtral": {
        "moe/router/kernel": "layers.{i}.block_sparse_moe.gate.weight",
        "moe/experts_gate": "layers.{i}.block_sparse_moe.experts.{x}.w1.weight",
        "moe/experts_up": "layers.{i}.block_sparse_moe.experts.{x}.w3.weight",
        "moe/experts_down": "layers.{i}.block_sparse_moe.experts.{x}.w2.weight",
    },
}

# Prefix of the decoder's tensors -> prefix of lm_head. In a vision-language model the decoder is a submodule.
DECODER_PREFIXES = {"model.": "", "model.language_model.": "", "language_model.model.": "language_model."}

# Patterns of tensors that a checkpoint may hold and the decoder does not use. {n} is the number of layers.
SKIPPED_TENSORS = {
    "all": (r"rotary_emb\.inv_freq$",),
    "deepseek_v3": (r"^model\.layers\.{n}\.",),  # the multi-token prediction layer, stored after the last layer
    "gemma3": (r"vision_tower\.", r"multi_modal_projector\."),
}


class ParameterTensors(NamedTuple):
    """A parameter and the checkpoint tensors it is assembled from: one for each layer and expert that it stacks."""

    path: str  # in the parameter tree, such as layers/0/attention/q/kernel
    row: TensorRow
    names: np.ndarray  # names of the tensors: [], [layers] or [layers, experts]
    shape: tuple[int, ...]  # of one layer and expert: the parameter's shape without the axes of `names`

    @property
    def merged_axes(self) -> tuple[tuple[int, ...], ...]:
        """Groups the axes of `shape` by axis of the tensor: a checkpoint merges the heads with the head dimension."""
        axes = tuple(range(len(self.shape)))
        if self.row.parameter.endswith("bias"):
            return (axes,)
        if len(axes) == 3:
            first = 2 if self.row.parameter.endswith("/o/kernel") else 1
            return (axes[:first], axes[first:])
        return tuple((axis,) for axis in axes)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Returns the shape of each tensor in the checkpoint."""
        sizes = tuple(int(np.prod([self.shape[axis] for axis in axes])) for axes in self.merged_axes)
        return sizes[::-1] if self.row.transpose else sizes

    def stored_slices(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Converts slices of `shape` to slices of a checkpoint tensor.

        Raises:
            ValueError: `index` splits an axis that is not the first of its merged axes, so the part is not contiguous.
        """
        bounds = [cut.indices(size)[:2] for cut, size in zip(index, self.shape, strict=True)]
        slices = []
        for first, *inner in self.merged_axes:
            if any(bounds[axis] != (0, self.shape[axis]) for axis in inner):
                raise ValueError(f"{self.path}: only the first of merged axes may be split")
            width = int(np.prod([self.shape[axis] for axis in inner]))
            slices.append(slice(bounds[first][0] * width, bounds[first][1] * width))
        return tuple(slices[::-1] if self.row.transpose else slices)


def tensor_table(family: str) -> tuple[TensorRow, ...]:
    """Returns the rows of `TENSOR_TABLE` with the tensor names of a family."""
    names = FAMILY_NAMES.get(family, {})
    known = {row.parameter for row in TENSOR_TABLE}
    renamed = (row._replace(tensor=names.get(row.parameter, row.tensor)) for row in TENSOR_TABLE)
    added = (TensorRow(parameter, tensor) for parameter, tensor in names.items() if parameter not in known)
    return (*renamed, *added)


def parameter_tensors(model_cfg: ModelConfig, prefix: str) -> dict[str, ParameterTensors]:
    """Maps the path of each parameter of a model to the checkpoint tensors it is assembled from.

    Args:
        model_cfg: The model.
        prefix: The prefix of the decoder's tensor names, a key of `DECODER_PREFIXES`.

    Returns:
        The parameters by path, in the order of the parameter tree.
    """
    rows = {row.parameter: row for row in tensor_table(model_cfg.family)}
    first_layers = np.cumsum([0, *(len(stack) for stack in model_cfg.layer_stacks)])
    parameters = {}
    for key, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(model_cfg)):
        path = path_name(key)
        first_layer, name = 0, path
        if path.startswith("layers/"):
            _, stack, name = path.split("/", 2)
            first_layer = first_layers[int(stack)]
        row = rows[name]
        stacked_axes = ("{i}" in row.tensor) + ("{x}" in row.tensor)
        names = np.empty(leaf.shape[:stacked_axes], object)
        for index in np.ndindex(*names.shape):
            layer, expert = (*index, 0, 0)[:2]
            names[index] = prefix + row.tensor.format(i=first_layer + layer, x=expert)
        if name == "head/kernel":
            names = np.array(DECODER_PREFIXES[prefix] + row.tensor, object)
        parameters[path] = ParameterTensors(path, row, names, leaf.shape[stacked_axes:])
    return parameters


def skipped_tensors(model_cfg: ModelConfig, prefix: str, names: Iterable[str]) -> set[str]:
    """Returns the tensor names that the model's family may ship and the decoder does not use."""
    patterns = SKIPPED_TENSORS["all"] + SKIPPED_TENSORS.get(model_cfg.family, ())
    patterns = [pattern.replace("{n}", str(model_cfg.num_layers)) for pattern in patterns]
    tied_head = f"{DECODER_PREFIXES[prefix]}lm_head.weight" if model_cfg.tie_embeddings else None
    return {name for name in names if name == tied_head or any(re.search(pattern, name) for pattern in patterns)}
