"""Splits tensors that a family stores fused when a checkpoint is opened, and joins them when one is written.

Splitting reads no values: each part later reads only its own rows of the fused tensor.
"""

from pathlib import Path

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.weights.families import FAMILIES
from grpo_jax.weights.tensors import StoredTensor


def fused_names(model_cfg: ModelConfig, prefix: str) -> dict[str, list[str]]:
    """Maps the name of each fused tensor of a model to the names of its parts, in the order of their rows.

    Args:
        model_cfg: The model.
        prefix: The prefix of the decoder's tensor names, a key of `tensor_names.DECODER_PREFIXES`.
    """
    names = {}
    for fused, parts in FAMILIES[model_cfg.family].fused_tensors.items():
        for layer in range(model_cfg.num_layers):
            whole, *pieces = ((prefix + name).format(i=layer) for name in (fused, *parts))
            names[whole] = pieces
    return names


def split_fused(
    tensors: dict[str, StoredTensor], fused: dict[str, list[str]], shapes: dict[str, tuple[int, ...]], source: Path
) -> dict[str, StoredTensor]:
    """Returns the tensors of a checkpoint with each fused tensor replaced by its parts.

    Args:
        tensors: The tensors by name.
        fused: The result of `fused_names`.
        shapes: The shapes of the parts by name.
        source: The model folder or GGUF file, for error messages.

    Raises:
        UserError: The shape of a fused tensor is not that of its parts joined.
    """
    split = {name: tensor for name, tensor in tensors.items() if name not in fused}
    for name in fused.keys() & tensors.keys():
        tensor, rows = tensors[name], [shapes[part][0] for part in fused[name]]
        expected = (sum(rows), *shapes[fused[name][0]][1:])
        if tensor.shape != expected:
            raise UserError(
                f"{name} in {source} must have shape {expected} according to its config; found {tensor.shape}. "
                "Download the model again."
            )
        starts = np.cumsum([0, *rows])
        for part, start in zip(fused[name], starts, strict=False):
            split[part] = select_rows(tensor, int(start), shapes[part])
    return split


def select_rows(tensor: StoredTensor, first: int, shape: tuple[int, ...]) -> StoredTensor:
    """Returns a view of the rows of a tensor from `first` on. `shape` is the shape of the view."""

    def read(index):
        start, stop, _ = index[0].indices(shape[0])
        return tensor.read((slice(first + start, first + stop), *index[1:]))

    return StoredTensor(shape, tensor.dtype, read)


def join_fused(tensors: dict[str, StoredTensor], fused: dict[str, list[str]]) -> dict[str, StoredTensor]:
    """Returns the tensors of a checkpoint with the parts of each fused tensor joined: the inverse of `split_fused`."""
    joined = dict(tensors)
    for name, parts in fused.items():
        joined[name] = join_rows([joined.pop(part) for part in parts])
    return joined


def join_rows(parts: list[StoredTensor]) -> StoredTensor:
    """Joins tensors of the same dtype and number of columns along their rows."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def read(index):
        return np.concatenate([part.read_all() for part in parts])[index]

    return StoredTensor(shape, parts[0].dtype, read)
