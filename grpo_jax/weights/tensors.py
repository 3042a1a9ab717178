"""The tensors of a checkpoint on disk, by name: their shapes and dtypes now, their numbers a part at a time, later.

Safetensors (whole or sharded, FP8 block-scaled among them) and GGUF are read, pickles never.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from grpo_jax.errors import UserError

SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class StoredTensor(NamedTuple):
    """One tensor on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]  # the part that the slices, one a dimension, cut out

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        return self.read(tuple(slice(None) for _ in self.shape))


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
      UserError: the file is cut off or is no safetensors file.
    """
    try:
        with safe_open(path, framework="np") as file:  # checks the header against the size of the file
            names = set(file.keys())
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"expected a whole safetensors file at {path}; found: {error}; download it again") from None

    def stored(name: str) -> StoredTensor:
        entry = header[name]
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise UserError(f"expected {name} in {path} as {', '.join(SAFETENSORS_DTYPES)}; found {entry['dtype']}")
        dtype, shape = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        start = 8 + size + entry["data_offsets"][0]

        def read(index):  # mapped for this one read: pages of a mapping that stays would count as memory in use
            if 0 in shape:
                return np.zeros(shape, dtype)[index]
            return np.array(
                np.memmap(path, np.uint8, "r", start, int(np.prod(shape)) * dtype.itemsize)
                .view(dtype)
                .reshape(shape)[index]
            )

        return StoredTensor(shape, dtype, read)

    return {name: stored(name) for name in names}


def open_safetensors_folder(folder: Path, block: tuple[int, int] | None = None) -> dict[str, StoredTensor]:
    """The tensors of all safetensors files of a folder.

    Args:
      block: rows and columns that share a scale in FP8 weights; those are dequantized.
    Raises:
      UserError: a file is cut off, or a tensor is there twice.
    """
    check_shard_index(folder)
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("consolidated"):  # the same model again, under Mistral's own names
            continue
        for name, stored in open_safetensors(path).items():
            if name in found:
                raise UserError(f"expected each tensor once in {folder}; found {name} in two files; remove one")
            found[name] = stored
    if not block:
        return found
    scales = {name for name in found if name.endswith("_scale_inv")}
    return {
        name: dequantize_fp8(stored, found[f"{name}_scale_inv"], block) if f"{name}_scale_inv" in scales else stored
        for name, stored in found.items()
        if name not in scales
    }


def check_shard_index(folder: Path) -> None:
    """Checks that the files that the index of a sharded checkpoint names are there; what is in them is read from them.

    Raises:
      UserError: it names the file.
    """
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return
    try:
        names = {str(name) for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"expected a weight_map in {path}; found: {error}; download it again") from None
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise UserError(
            f"expected the {len(names)} files that {path} names; found {len(missing)} missing, such as "
            f"{missing[0]}; download them"
        )


def dequantize_fp8(stored: StoredTensor, scales: StoredTensor, block: tuple[int, int]) -> StoredTensor:
    """An FP8 weight times the scale of its block (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), as bfloat16.

    Raises:
      UserError: there is not one scale a block.
    """
    blocks = tuple(-(-size // width) for size, width in zip(stored.shape, block))
    if scales.shape != blocks:
        raise UserError(
            f"expected scales of shape {blocks} for an FP8 weight of {stored.shape} in blocks of {block}; "
            f"found {scales.shape}"
        )

    def read(index):
        lines = [np.arange(size)[cut] // width for size, cut, width in zip(stored.shape, index, block)]
        wide = stored.read(index).astype(np.float32) * scales.whole().astype(np.float32)[np.ix_(*lines)]
        return wide.astype(ml_dtypes.bfloat16)

    return StoredTensor(stored.shape, np.dtype(ml_dtypes.bfloat16), read)


def open_gguf_tensors(path: Path, fields: dict) -> dict[str, StoredTensor]:
    """The tensors of a GGUF file under their Hugging Face names, dequantized; `fields` are those of its config."""
    from grpo_jax.weights.gguf_file import read_gguf_tensors

    dtype = np.dtype(SAFETENSORS_DTYPES["F32"] if fields["dtype"] == "float32" else SAFETENSORS_DTYPES["BF16"])
    return {
        name: StoredTensor(tuple(tensor.shape), dtype, lambda index, tensor=tensor: tensor.read()[index])
        for name, tensor in read_gguf_tensors(path, fields).items()
    }
