"""Reads the header of GGUF files, the format of llama.cpp, and dequantizes their tensors.

Only the header is parsed up front (its format is described in ggml's docs/gguf.md); tensors are dequantized in parts.
The package `gguf` provides the quantization formats and llama.cpp's tensor names. Its reader is not used, because it
takes seconds to parse the header of a file with a large vocabulary.
"""

import io
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.foreign import open_regular
from grpo_jax.weights.model_files import refuse_gguf_part

# general.architecture -> model_type and prefix of the class names in transformers.
GGUF_ARCHITECTURES = {
    "llama": ("llama", "Llama"),
    "mistral3": ("ministral3", "Ministral3"),
    "qwen2": ("qwen2", "Qwen2"),
    "qwen2vl": ("qwen2", "Qwen2"),  # the vision tower is another file; without it, only the name differs
    "qwen3": ("qwen3", "Qwen3"),
    "qwen3vl": ("qwen3", "Qwen3"),
    "qwen3moe": ("qwen3_moe", "Qwen3Moe"),
    "gemma2": ("gemma2", "Gemma2"),
    "gemma3": ("gemma3_text", "Gemma3"),
    "seed_oss": ("seed_oss", "SeedOss"),
    "smollm3": ("smollm3", "SmolLM3"),
    "olmo2": ("olmo2", "Olmo2"),
    "phi3": ("phi3", "Phi3"),
    "granite": ("granite", "Granite"),
    "glm4": ("glm4", "Glm4"),
}

# The format's value types as struct codes; strings and arrays have no fixed size.
SCALAR_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# Limits that keep a broken header from filling the memory. Gemma 3's has 262,144 tokens and 514,906 merges.
MAX_HEADER_BYTES = 1 << 25
MAX_ELEMENTS = 1_000_000
MAX_TOKEN_BYTES = 4096  # of a string in an array; converting a token takes time that is quadratic in its length


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file, or one expert of it, as a Hugging Face checkpoint would hold it."""

    path: Path
    name: str  # in the file
    quantization: Any  # a gguf.GGMLQuantizationType
    start: int  # byte offset of the data in the file
    byte_shape: tuple[int, ...]  # `shape` with the last dimension in bytes
    shape: tuple[int, ...]  # in PyTorch's order: [outputs, inputs]
    interleaved_heads: int = 0  # heads of a projection whose rotary pairs are adjacent rows in the file
    added: float = 0.0  # constant that llama.cpp's converter added to the values

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads and dequantizes the part of the tensor that the slices, one per dimension, select.

        Other rows are not read, nor are other columns, except in the quantized blocks that the part begins and ends in.
        Dequantizing takes several times the memory of the part, so large tensors should be read in parts.

        Returns:
            The values, float32.

        Raises:
            UserError: The package `gguf` cannot dequantize this quantization.
        """
        import gguf
        from gguf.quants import dequantize

        rows = np.arange(self.shape[0])
        if self.interleaved_heads:
            rows = rows.reshape(self.interleaved_heads, -1, 2).swapaxes(1, 2).reshape(-1)
            if len(self.shape) == 1:
                return self._replace(interleaved_heads=0).read((slice(None),))[rows[index[0]]]
        bounds = [cut.indices(size)[:2] for cut, size in zip(index, self.shape, strict=True)]
        sizes = [stop - start for start, stop in bounds]
        if 0 in sizes:
            return np.zeros(sizes, np.float32)
        *_, (first, last) = bounds
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.quantization]
        first_block, last_block = first // block, -(-last // block)
        stored = np.memmap(self.path, np.uint8, "r", self.start, self.byte_shape)
        if self.interleaved_heads:  # the rows of a part are not adjacent in the file
            stored = stored[rows[index[0]]]
        else:
            stored = stored[index[:-1]]
        stored = stored[..., first_block * block_bytes : last_block * block_bytes].reshape(math.prod(sizes[:-1]), -1)
        # As one row, because `dequantize` would divide several into small groups, which takes several times as long.
        row = np.ascontiguousarray(stored).reshape(1, -1)
        try:
            values = dequantize(row, self.quantization).reshape(len(stored), -1)
        except NotImplementedError:
            raise UserError(
                f"{self.name} must have a quantization that the package gguf reads; found {self.quantization.name} in "
                f"{self.path}. Use another file of the model, such as Q8_0."
            ) from None
        values = values[:, first - first_block * block : last - first_block * block].reshape(sizes)
        return values - np.float32(self.added) if self.added else values


class GgufHeader(NamedTuple):
    """The header of a GGUF file: its metadata and where its tensors are."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]  # by their names in the file

    @property
    def architecture(self) -> str:
        """Returns llama.cpp's name of the architecture, a key of `GGUF_ARCHITECTURES`."""
        return self.fields["general.architecture"]

    def get(self, name: str, *default):
        """Returns a metadata field of the architecture.

        Args:
            name: The field, without the architecture's prefix.
            *default: What to return if the field is absent. Without a default, the field must be a positive number;
                with one, it must be a string if the default is a string, and a number otherwise.

        Raises:
            UserError: The field is absent or not positive and has no default, is of another type, or differs between
                layers.
        """
        key = f"{self.architecture}.{name}"
        value = self.fields.get(key, *default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        is_text = bool(default) and isinstance(default[0], str)
        is_number = isinstance(value, int | float) and (bool(default) or value > 0)
        if not (isinstance(value, str) if is_text else is_number or (default and value is default[0])):
            expected = "a string" if is_text else "one number" if default else "one number above 0"
            raise UserError(f"{key} in {self.path} must be {expected}; found {value!r:.80}. Use another model file.")
        return value


def unpack(file: BinaryIO, codes: str) -> tuple:
    """Reads values with the given struct codes at the file's position."""
    return struct.unpack(f"<{codes}", file.read(struct.calcsize(f"<{codes}")))


def read_string(file: BinaryIO) -> str:
    """Reads a string of a GGUF header."""
    (length,) = unpack(file, "Q")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a string of {length:,} bytes")
    return str(unpack(file, f"{length}s")[0], "utf-8")


def read_tokens(file: io.BytesIO, count: int) -> list[str]:
    """Reads the strings of an array as `read_string` would, but faster: a vocabulary has hundreds of thousands."""
    header, position, tokens = file.getvalue(), file.tell(), []
    read_length = struct.Struct("<Q").unpack_from
    for _ in range(count):
        (length,) = read_length(header, position)
        if length > MAX_TOKEN_BYTES:
            raise ValueError(f"a string of {length:,} bytes")
        start, position = position + 8, position + 8 + length
        tokens.append(str(header[start:position], "utf-8"))
    file.seek(position)  # if this is past the end of the header, the next read fails
    return tokens


def read_value(file: io.BytesIO, value_type: int):
    """Reads a metadata value of the given type."""
    if value_type == STRING:
        return read_string(file)
    if value_type == ARRAY:
        value_type, count = unpack(file, "IQ")
        if count > MAX_ELEMENTS:
            raise ValueError(f"an array of {count:,} elements")
        if value_type == STRING:
            return read_tokens(file, count)
        return list(unpack(file, f"{count}{SCALAR_CODES[value_type]}"))
    (value,) = unpack(file, SCALAR_CODES[value_type])
    # The shortest decimal: 1e-5 in the model's config must be 1e-5 again, not the exact value of its float32.
    return float(str(np.float32(value))) if SCALAR_CODES[value_type] == "f" else value


def read_gguf_header(path: Path) -> GgufHeader:
    """Reads the metadata and the list of tensors of a GGUF file.

    Raises:
        UserError: The package `gguf` is not installed, the file is truncated or not in GGUF format, its architecture is
            not supported, or it is one part of several.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(f"Reading {path} requires the package gguf, which is missing. Run: pip install gguf") from None
    try:
        with open_regular(path) as opened:
            file, file_size = io.BytesIO(opened.read(MAX_HEADER_BYTES)), path.stat().st_size
        magic = file.read(4)
        if magic != b"GGUF":
            raise ValueError(f"it begins with {magic}")
        version, tensor_count, field_count = unpack(file, "IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        if max(tensor_count, field_count) > MAX_ELEMENTS:
            raise ValueError(f"{field_count:,} fields and {tensor_count:,} tensors")
        fields = {read_string(file): read_value(file, *unpack(file, "I")) for _ in range(field_count)}
        if fields.get("split.count", 1) not in (0, 1):
            refuse_gguf_part(path, fields["split.count"])
        architecture = fields.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in GGUF_ARCHITECTURES:
            raise UserError(
                f"general.architecture in {path} must be one of {', '.join(GGUF_ARCHITECTURES)}; found "
                f"{architecture!r:.80}. Use the model's safetensors if its family is supported, or another model."
            )
        entries = []
        for _ in range(tensor_count):
            name, (dimensions,) = read_string(file), unpack(file, "I")
            entries.append((name, unpack(file, f"{dimensions}Q")[::-1], *unpack(file, "IQ")))
        header_size, alignment = file.tell(), fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment {alignment!r:.40}")
        data_start = -(-header_size // alignment) * alignment
        tensors = {}
        for name, shape, type_id, offset in entries:
            quantization = gguf.GGMLQuantizationType(type_id)
            byte_shape = gguf.quant_shape_to_byte_shape(shape, quantization)
            end = data_start + offset + math.prod(byte_shape)
            if end > file_size:
                raise ValueError(f"{file_size} bytes, while {name} ends at byte {end}")
            tensors[name] = GgufTensor(path, name, quantization, data_start + offset, byte_shape, shape)
    except (OSError, struct.error, LookupError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        found = str(error) or type(error).__name__
        if isinstance(error, struct.error):
            whole = "the file" if file_size <= MAX_HEADER_BYTES else f"{MAX_HEADER_BYTES:,} bytes"
            found = f"a header that goes beyond the end of {whole}"
        raise UserError(
            f"{path} must be a complete GGUF file of version 2 or 3; found: {found}. Download it again."
        ) from None
    return GgufHeader(path, fields, tensors)
