"""Reads GGUF files, the format of llama.cpp, as Hugging Face checkpoints: the config and the tensors.

Only the header is parsed up front (its format is described in ggml's docs/gguf.md); tensors are dequantized one by one.
The package `gguf` provides the quantization formats and llama.cpp's tensor names. Its reader is not used, because it
needs seconds to parse the header of a file with a large vocabulary.
"""

import io
import itertools
import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.foreign import open_regular
from grpo_jax.model.parameters import PARAMETERS
from grpo_jax.weights.families import FAMILIES

# general.architecture -> model_type and prefix of the class names in transformers.
GGUF_ARCHITECTURES = {
    "llama": ("llama", "Llama"),
    "qwen2": ("qwen2", "Qwen2"),
    "qwen3": ("qwen3", "Qwen3"),
    "qwen3moe": ("qwen3_moe", "Qwen3Moe"),
    "gemma2": ("gemma2", "Gemma2"),
    "gemma3": ("gemma3_text", "Gemma3"),
}

# The format's value types as struct codes; strings and arrays have no fixed size.
SCALAR_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# Of the header, so that a broken one cannot fill the memory. Gemma 3's has 262,144 tokens and 514,906 merges.
MAX_HEADER_BYTES = 1 << 25
MAX_ELEMENTS = 1_000_000
MAX_TOKEN_BYTES = 4096  # of a string in an array; the conversion of tokens takes time that is quadratic in it


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

    def read(self) -> np.ndarray:
        """Reads and dequantizes the tensor.

        Returns:
            The values, float32 of `shape`.

        Raises:
            UserError: The package `gguf` cannot dequantize this quantization.
        """
        from gguf.quants import dequantize

        if 0 in self.shape:
            return np.zeros(self.shape, np.float32)
        try:
            values = dequantize(np.memmap(self.path, np.uint8, "r", self.start, self.byte_shape), self.quantization)
        except NotImplementedError:
            raise UserError(
                f"{self.name} must have a quantization that the package gguf reads; found {self.quantization.name} in "
                f"{self.path}. Use another file of the model, such as Q8_0."
            ) from None
        values = np.asarray(values).reshape(self.shape)
        if self.interleaved_heads:
            pairs = values.reshape(self.interleaved_heads, -1, 2, *self.shape[1:])
            values = pairs.swapaxes(1, 2).reshape(self.shape)
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
            *default: What to return if the field is absent; without it the field must be a positive number. If it is a
                text, so must be the field, which is a number otherwise.

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
            expected = "a text" if is_text else "one number" if default else "one number above 0"
            raise UserError(f"{key} in {self.path} must be {expected}; found {value!r:.80}. Use another model file.")
        return value


def unpack(file: BinaryIO, codes: str) -> tuple:
    """Reads values with the given struct codes at the file's position."""
    return struct.unpack(f"<{codes}", file.read(struct.calcsize(f"<{codes}")))


def read_string(file: BinaryIO, max_bytes: int = MAX_HEADER_BYTES) -> str:
    """Reads a string of a GGUF header."""
    (length,) = unpack(file, "Q")
    if length > max_bytes:
        raise ValueError(f"a string of {length:,} bytes")
    return str(unpack(file, f"{length}s")[0], "utf-8")


def read_value(file: BinaryIO, value_type: int):
    """Reads a metadata value of the given type."""
    if value_type == STRING:
        return read_string(file)
    if value_type == ARRAY:
        value_type, count = unpack(file, "IQ")
        if count > MAX_ELEMENTS:
            raise ValueError(f"an array of {count:,} elements")
        if value_type == STRING:
            return [read_string(file, MAX_TOKEN_BYTES) for _ in range(count)]
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
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF_ARCHITECTURES:
        raise UserError(
            f"general.architecture in {path} must be one of {', '.join(GGUF_ARCHITECTURES)}; found {architecture!r}. "
            "Choose a model of a supported architecture."
        )
    if fields.get("split.count", 1) not in (0, 1):
        raise UserError(
            f"{path} must hold the whole model; found one of {fields['split.count']} parts. "
            "Merge them with llama-gguf-split --merge."
        )
    return GgufHeader(path, fields, tensors)


def read_gguf_config(path: Path) -> dict[str, Any]:
    """Returns the config.json that the metadata of a GGUF file describes.

    Raises:
        UserError: The header cannot be read (see `read_gguf_header`), or a field or tensor that is needed is missing.
    """
    header = read_gguf_header(path)
    get, architecture = header.get, header.architecture
    model_type, prefix = GGUF_ARCHITECTURES[architecture]
    experts = get("expert_count", 0)
    if architecture == "llama" and experts:
        model_type, prefix = "mixtral", "Mixtral"
    hidden_size, heads, layers = get("embedding_length"), get("attention.head_count"), get("block_count")
    for name in ("token_embd.weight", f"blk.{layers - 1}.attn_norm.weight"):
        if name not in header.tensors:
            raise UserError(
                f"{header.path} must hold the tensor {name}; found {len(header.tensors)} other tensors. "
                "Use a file with the whole model."
            )
    head_dim = get("attention.key_length", get("rope.dimension_count", hidden_size // heads))
    tokens = "bos", "eos", "eot", "eom", "padding"
    ids = {name: header.fields.get(f"tokenizer.ggml.{name}_token_id") for name in tokens}
    ends = [ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None]
    ends = [end for index, end in enumerate(ends) if end not in ends[:index]]
    quantizations = {tensor.quantization.name for tensor in header.tensors.values()}
    config = {
        "architectures": [f"{prefix}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rope_parameters": read_gguf_rope(header, head_dim),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
        "dtype": "float32" if quantizations == {"F32"} else "bfloat16",
    }
    if architecture.startswith("gemma"):
        # The file does not record the query scale, which is head_dim except in the largest model of each version.
        largest = layers == {"gemma2": 46, "gemma3": 62}[architecture]
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": hidden_size // heads if largest else head_dim,
            "sliding_window": get("attention.sliding_window"),
            "attn_logit_softcapping": get("attn_logit_softcapping", None),
            "final_logit_softcapping": get("final_logit_softcapping", None),
        }
    else:
        config["hidden_act"] = "silu"
    if model_type == "llama":
        config["attention_bias"] = "blk.0.attn_output.bias" in header.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    if model_type == "mixtral":
        config |= {"num_local_experts": experts, "num_experts_per_tok": get("expert_used_count")}
    if model_type == "qwen3_moe":
        config |= {"num_experts": experts, "num_experts_per_tok": get("expert_used_count"), "norm_topk_prob": True}
        config["moe_intermediate_size"] = get("expert_feed_forward_length")
    return config


def read_gguf_rope(header: GgufHeader, head_dim: int) -> dict[str, Any]:
    """Returns the `rope_parameters` of config.json.

    Raises:
        UserError: The kind of scaling is not supported.
    """
    rope = {"rope_type": "default", "rope_theta": header.get("rope.freq_base", 10000.0)}
    scaling, factor = header.get("rope.scaling.type", "linear"), header.get("rope.scaling.factor", 1.0)
    if scaling not in ("none", "linear", "yarn"):
        raise UserError(
            f"{header.architecture}.rope.scaling.type in {header.path} must be none, linear or yarn; "
            f"found {scaling!r}. Choose another model."
        )
    if scaling == "yarn":
        names = {
            "original_max_position_embeddings": "original_context_length",
            "attention_factor": "yarn_attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        values = {ours: header.get(f"rope.scaling.{theirs}", None) for ours, theirs in names.items()}
        rope |= {name: value for name, value in values.items() if value is not None}
    if scaling != "none" and factor != 1:
        rope |= {"rope_type": scaling, "factor": factor}
    if "rope_freqs.weight" in header.tensors:
        rope |= read_llama3_rope(header, rope["rope_theta"], head_dim)
    if header.architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": header.get("rope.freq_base_swa", 10000.0)}
        return {"full_attention": rope, "sliding_attention": local}
    return rope


def read_llama3_rope(header: GgufHeader, theta: float, head_dim: int) -> dict[str, Any]:
    """Returns the scaling of Llama 3.1 to 3.3 for `rope_parameters`.

    The file records a divisor for each frequency instead of the scaling's parameters. Those models differ only in the
    factor, so the divisors are compared with the ones that the factor implies.

    Raises:
        UserError: The divisors are different.
    """
    tensor = header.tensors["rope_freqs.weight"]
    fits = tensor.shape == (head_dim // 2,) and head_dim > 1 and theta > 1
    if fits:
        divisors = tensor.read()
        scaling = {"factor": float(divisors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        # How often each rotary pair turns within the original context length.
        turns = 8192 / (2 * np.pi) * theta ** (-np.arange(divisors.size) * 2 / head_dim)
        keep = np.clip((turns - 1) / (4 - 1), 0, 1)
        fits = scaling["factor"] > 0 and np.allclose(divisors * (keep + (1 - keep) / scaling["factor"]), 1, rtol=1e-3)
    if not fits:
        raise UserError(
            f"rope_freqs.weight in {header.path} must hold the {head_dim // 2} divisors of Llama 3.1 for "
            f"rope.freq_base={theta}; found others, of shape {tensor.shape}. Choose another model."
        )
    return {"rope_type": "llama3", **scaling, "original_max_position_embeddings": 8192}


def read_gguf_tensors(path: Path, hf_config: dict[str, Any]) -> dict[str, GgufTensor]:
    """Lists the tensors of a GGUF file under the names and in the shapes of a Hugging Face checkpoint.

    Args:
        path: The file.
        hf_config: The config that `read_gguf_config` returns for it.

    Returns:
        The tensors by name; experts are separate tensors.

    Raises:
        UserError: The header cannot be read (see `read_gguf_header`), or the file has a tensor that is not known.
    """
    header = read_gguf_header(path)
    import gguf

    layers, gemma = hf_config["num_hidden_layers"], header.architecture.startswith("gemma")
    architecture_ids = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    name_map = gguf.get_tensor_name_map(architecture_ids[header.architecture], layers)
    # llama.cpp rotates pairs of adjacent rows in this architecture, so its converter permutes the projections.
    interleaved_heads = {}
    if header.architecture == "llama":
        interleaved_heads = {"attn_q": hf_config["num_attention_heads"], "attn_k": hf_config["num_key_value_heads"]}
    family_names = FAMILIES[hf_config["model_type"]].tensor_names
    tensors, unread = {}, header.tensors.keys() - {"rope_freqs.weight"}
    for row, layer in itertools.product(PARAMETERS, range(layers)):
        prefix = "" if row.path == "head/kernel" else "model."
        hf_name = prefix + family_names.get(row.path, row.tensor).replace("{i}", str(layer))
        # The file stacks the experts of a layer in one tensor, whose name has no {x}.
        module, _, kind = hf_name.replace(".{x}", "").rpartition(".")
        name = f"{name_map.get_name(module)}.{kind}"
        if name not in unread:
            continue
        unread.remove(name)
        tensor = header.tensors[name]._replace(
            interleaved_heads=interleaved_heads.get(name.split(".")[-2], 0),
            added=float(gemma and name.endswith("norm.weight")),
        )
        if "{x}" not in hf_name:
            tensors[hf_name] = tensor
            continue
        experts, *byte_shape = tensor.byte_shape
        for x in range(experts):
            tensors[hf_name.format(x=x)] = tensor._replace(
                start=tensor.start + x * math.prod(byte_shape), byte_shape=tuple(byte_shape), shape=tensor.shape[1:]
            )
    if unread:
        raise UserError(
            f"{header.path} must hold only the tensors of {header.architecture}; found {len(unread)} others, such as "
            f"{min(unread)}. Choose another model."
        )
    return tensors
