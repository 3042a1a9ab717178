"""Maps parameters to the tensors of a Hugging Face checkpoint: their names, shapes and transposes.

Loading and saving both follow the table in `grpo_jax.model.parameters`, which uses Llama's names;
`grpo_jax.weights.families` lists where a family differs.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.parameters import ParameterRow, row_for
from grpo_jax.parallel.mesh import path_name
from grpo_jax.weights.families import FAMILIES

# Prefix of the decoder's tensors -> prefix of lm_head. In a vision-language model the decoder is a submodule.
DECODER_PREFIXES = {"model.": "", "model.language_model.": "", "language_model.model.": "language_model."}

SKIPPED_TENSORS = (r"rotary_emb\.inv_freq$",)  # patterns of tensors that no decoder uses


class ParameterTensors(NamedTuple):
    """A parameter and the checkpoint tensors it is assembled from: one for each layer and expert that it stacks."""

    path: str  # in the parameter tree, such as layers/0/attention/q/kernel
    row: ParameterRow
    names: np.ndarray  # names of the tensors: [], [layers] or [layers, experts]
    shape: tuple[int, ...]  # of one layer and expert: the parameter's shape without the axes of `names`

    @property
    def stack(self) -> str:
        """Returns the path of the layer stack that the parameter belongs to, or its own path if it belongs to none."""
        return self.path.removesuffix(f"/{self.row.path}")

    @property
    def is_stacked(self) -> bool:
        """Returns whether the parameter belongs to a layer stack."""
        return self.path != self.row.path

    @property
    def merged_axes(self) -> tuple[tuple[int, ...], ...]:
        """Groups the axes of `shape` by axis of the tensor: a checkpoint merges the heads with the head dimension."""
        axes, first = tuple(range(len(self.shape))), len(self.row.inputs)
        return tuple(group for group in (axes[:first], axes[first:]) if group)

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


def parameter_tensors(model_cfg: ModelConfig, prefix: str) -> dict[str, ParameterTensors]:
    """Maps the path of each parameter of a model to the checkpoint tensors it is assembled from.

    Args:
        model_cfg: The model.
        prefix: The prefix of the decoder's tensor names, a key of `DECODER_PREFIXES`.

    Returns:
        The parameters by path, in the order of the parameter tree.
    """
    first_layers = np.cumsum([0, *(len(stack) for stack in model_cfg.layer_stacks)])
    tensor_names = FAMILIES[model_cfg.family].tensor_names
    parameters = {}
    for key, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(model_cfg)):
        path = path_name(key)
        row = row_for(path)
        tensor = tensor_names.get(row.path, row.tensor)
        first_layer = first_layers[int(path.split("/")[1])] if path != row.path else 0
        start = DECODER_PREFIXES[prefix] if path == "head/kernel" else prefix
        stacked_axes = leaf.ndim - len(row.inputs + row.outputs)
        names = np.empty(leaf.shape[:stacked_axes], object)
        for index in np.ndindex(*names.shape):
            layer, expert = (*index, 0, 0)[:2]
            names[index] = start + tensor.format(i=first_layer + layer, x=expert)
        parameters[path] = ParameterTensors(path, row, names, leaf.shape[stacked_axes:])
    return parameters


def skipped_tensors(model_cfg: ModelConfig, prefix: str, names: Iterable[str]) -> set[str]:
    """Returns the tensor names that the model's family may ship and the decoder does not use."""
    patterns = SKIPPED_TENSORS + FAMILIES[model_cfg.family].skipped_tensors
    patterns = [pattern.replace("{n}", str(model_cfg.num_layers)) for pattern in patterns]
    tied_head = f"{DECODER_PREFIXES[prefix]}lm_head.weight" if model_cfg.tie_embeddings else None
    return {name for name in names if name == tied_head or any(re.search(pattern, name) for pattern in patterns)}
