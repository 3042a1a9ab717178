"""Opens the tensors of a checkpoint by name: shapes and dtypes at once, values later and only the part that is needed.

Reads safetensors (single files, shards, FP8 with block scales) and GGUF; never reads pickles.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from grpo_jax.errors import UserError
from grpo_jax.foreign import MAX_BYTES, open_regular, parse_json
from grpo_jax.weights.model_files import check_shard_index, list_names, safetensors_names

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
    """A tensor on disk, or one that is computed when it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]  # returns the part that the slices, one per dimension, select

    @property
    def nbytes(self) -> int:
        """Returns the size of the values in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read_all(self) -> np.ndarray:
        """Reads the whole tensor."""
        return self.read(tuple(slice(None) for _ in self.shape))


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Opens the tensors of a safetensors file.

    Raises:
        UserError: The file is truncated, is not a safetensors file, or has a tensor of an unknown dtype.
    """
    try:
        with open_regular(path) as file:
            header_size = int.from_bytes(file.read(8), "little")
            if header_size > MAX_BYTES:
                raise ValueError(f"a header of {header_size:,} bytes")
            header = parse_json(file.read(header_size).decode("utf-8"))
        with safe_open(path, framework="np"):  # checks the header against the size of the file
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} must be a complete safetensors file; found: {error}. Download it again.") from None

    def open_tensor(name: str, entry: dict) -> StoredTensor:
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise UserError(
                f"The dtype of {name} in {path} must be one of {', '.join(SAFETENSORS_DTYPES)}; "
                f"found {entry['dtype']}. Convert the checkpoint."
            )
        dtype, shape = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        start = 8 + header_size + entry["data_offsets"][0]

        def read(index):
            if 0 in shape:
                return np.zeros(shape, dtype)[index]
            # Mapped for this read only: the pages of a longer-lived mapping would count as memory in use.
            mapped = np.memmap(path, np.uint8, "r", start, int(np.prod(shape)) * dtype.itemsize)
            return np.array(mapped.view(dtype).reshape(shape)[index])

        return StoredTensor(shape, dtype, read)

    return {name: open_tensor(name, entry) for name, entry in header.items() if name != "__metadata__"}


def open_safetensors_folder(folder: Path, block: tuple[int, int] | None = None) -> dict[str, StoredTensor]:
    """Opens the tensors of all safetensors files in a folder.

    Args:
        folder: The model folder.
        block: The rows and columns that share a scale in FP8 weights, which are then dequantized.

    Returns:
        The tensors by name.

    Raises:
        UserError: A file is missing or truncated, or two files hold a tensor of the same name.
    """
    check_shard_index(folder)
    tensors = {}
    for file in safetensors_names(list_names(folder)):
        for name, tensor in open_safetensors(folder / file).items():
            if name in tensors:
                raise UserError(f"{folder} must hold each tensor once; found {name} in two files. Remove one of them.")
            tensors[name] = tensor
    if not block:
        return tensors
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    for name, tensor in tensors.items():
        if f"{name}_scale_inv" in scales:
            tensors[name] = dequantize_fp8(name, tensor, scales[f"{name}_scale_inv"], block)
    return tensors


def dequantize_fp8(name: str, weight: StoredTensor, scales: StoredTensor, block: tuple[int, int]) -> StoredTensor:
    """Multiplies an FP8 weight by the scales of its blocks (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).

    Args:
        name: The name of the weight, for error messages.
        weight: The FP8 weight [rows, columns].
        scales: One scale for each block.
        block: The rows and columns of a block.

    Returns:
        The weight in bfloat16.

    Raises:
        UserError: There is not one scale for each block.
    """
    expected = tuple(-(-size // width) for size, width in zip(weight.shape, block, strict=False))
    if scales.shape != expected:
        raise UserError(
            f"The scales of the FP8 weight {name} must have shape {expected}, one for each block of {block} in "
            f"{weight.shape}; found {scales.shape}. Download the model again."
        )

    def read(index):
        blocks = [np.arange(size)[cut] // width for size, cut, width in zip(weight.shape, index, block, strict=False)]
        scaled = weight.read(index).astype(np.float32) * scales.read_all().astype(np.float32)[np.ix_(*blocks)]
        return scaled.astype(ml_dtypes.bfloat16)

    return StoredTensor(weight.shape, np.dtype(ml_dtypes.bfloat16), read)


def open_gguf_tensors(path: Path, hf_config: dict) -> dict[str, StoredTensor]:
    """Opens the tensors of a GGUF file under their Hugging Face names; reading dequantizes them.

    Args:
        path: The file.
        hf_config: The config that `read_gguf_config` returns for the file.

    Returns:
        The tensors by name.

    Raises:
        UserError: The file cannot be read, or has a tensor that its architecture does not have.
    """
    from grpo_jax.weights.gguf_file import read_gguf_tensors  # imported here, because only GGUF files need it

    dtype = np.dtype(SAFETENSORS_DTYPES["F32" if hf_config["dtype"] == "float32" else "BF16"])
    return {
        name: StoredTensor(tuple(tensor.shape), dtype, tensor.read)
        for name, tensor in read_gguf_tensors(path, hf_config).items()
    }
