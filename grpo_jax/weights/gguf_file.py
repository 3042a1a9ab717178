"""GGUF files, as llama.cpp writes them, read as if they were Hugging Face folders: config, tensors, tokenizer.

Only the head of a file is read at once (format: ggml's docs/gguf.md); numbers are made of its blocks tensor by tensor.
The package `gguf` knows the kinds of blocks and llama.cpp's names. Its own reader is not used: it takes seconds for the
head of a file with a large vocabulary.
"""

import itertools
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.errors import UserError

# general.architecture -> model_type and the prefix of the classes in transformers.
GGUF_ARCHITECTURES = {
    "llama": ("llama", "Llama"),
    "qwen2": ("qwen2", "Qwen2"),
    "qwen3": ("qwen3", "Qwen3"),
    "qwen3moe": ("qwen3_moe", "Qwen3Moe"),
    "gemma2": ("gemma2", "Gemma2"),
    "gemma3": ("gemma3_text", "Gemma3"),
}

# The modules of a Hugging Face checkpoint with tensors of their own: all but the layers', those of a layer, and those
# that some families have besides. {x} is the expert. The package gguf knows llama.cpp's name of each.
TOP_MODULES = ("model.embed_tokens", "model.norm", "lm_head")
LAYER_MODULES = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
FAMILY_MODULES = {
    "mixtral": (
        "block_sparse_moe.gate",
        "block_sparse_moe.experts.{x}.w1",
        "block_sparse_moe.experts.{x}.w2",
        "block_sparse_moe.experts.{x}.w3",
    ),
    "qwen3_moe": ("mlp.gate", "mlp.experts.{x}.gate_proj", "mlp.experts.{x}.up_proj", "mlp.experts.{x}.down_proj"),
    "gemma2": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}

# Codes of struct for the format's kinds of value; two kinds have no fixed size.
SCALAR_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class GgufTensor(NamedTuple):
    """A tensor, or one expert of it, as a Hugging Face checkpoint would hold it."""

    path: Path
    name: str  # in the file
    kind: Any  # a gguf.GGMLQuantizationType
    start: int  # of its bytes in the file
    rows: tuple[int, ...]  # `shape` with bytes for the last dimension
    shape: tuple[int, ...]  # torch's order: [outputs, inputs]
    heads: int = 0  # of a projection whose rotary pairs are neighbouring rows in the file
    offset: float = 0.0  # was added to the numbers

    def read(self) -> np.ndarray:
        """The numbers, float32 in `shape`.

        Raises:
          UserError: `gguf` does not know this kind of block.
        """
        from gguf.quants import dequantize

        try:
            values = dequantize(np.memmap(self.path, np.uint8, "r", self.start, self.rows), self.kind)
        except NotImplementedError:
            raise UserError(
                f"expected {self.name} in a quantization that the package gguf reads; "
                f"found {self.kind.name}; take another file of the model, such as Q8_0"
            ) from None
        values = np.asarray(values).reshape(self.shape)
        if self.heads:
            pairs = values.reshape(self.heads, -1, 2, *self.shape[1:])
            values = pairs.swapaxes(1, 2).reshape(self.shape)
        return values - np.float32(self.offset) if self.offset else values


class GgufHeader(NamedTuple):
    """What stands before the numbers."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]  # by the names in the file

    @property
    def architecture(self) -> str:
        return self.fields["general.architecture"]

    def get(self, name: str, *default):
        """A field of the architecture.

        Raises:
          UserError: it is not a number above 0 and there is no default, or it differs from layer to layer.
        """
        key = f"{self.architecture}.{name}"
        value = self.fields.get(key, *default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list) or not default and (not isinstance(value, (int, float)) or value <= 0):
            raise UserError(
                f"expected {key} in {self.path} to be one number above 0; found {value}; this model is not supported"
            )
        return value


class GgufCursor:
    """Reads values one after the other."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def take(self, codes: str) -> tuple:
        values = struct.unpack_from(f"<{codes}", self.data, self.at)
        self.at += struct.calcsize(f"<{codes}")
        return values

    def string(self) -> str:
        (length,) = self.take("Q")
        return str(self.take(f"{length}s")[0], "utf-8")

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.take("IQ")
            if kind == STRING:
                return [self.string() for _ in range(count)]
            return list(self.take(f"{count}{SCALAR_CODES[kind]}"))
        (value,) = self.take(SCALAR_CODES[kind])
        # 1e-5 in the model's config is 1e-5 again, and not the digits of its float32.
        return float(str(np.float32(value))) if SCALAR_CODES[kind] == "f" else value


def read_gguf_header(path: str | Path) -> GgufHeader:
    """The fields and the tensors of a file.

    Raises:
      UserError: the package `gguf` is missing, or this is not a whole GGUF file of a known architecture.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(f"expected the package gguf, to read {path}; found none; pip install gguf") from None
    path = Path(path)
    try:
        data = np.memmap(path, np.uint8, mode="r")
        if bytes(data[:4]) != b"GGUF":
            raise ValueError(f"it begins with {bytes(data[:4])}")
        cursor = GgufCursor(memoryview(data))
        _, version, tensor_count, field_count = cursor.take("IIQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version}")
        fields = {cursor.string(): cursor.value(*cursor.take("I")) for _ in range(field_count)}
        places = []
        for _ in range(tensor_count):
            name, (dimensions,) = cursor.string(), cursor.take("I")
            places.append((name, cursor.take(f"{dimensions}Q")[::-1], *cursor.take("IQ")))
        align = fields.get("general.alignment", 32)
        start = -(-cursor.at // align) * align
        tensors = {}
        for name, shape, kind, offset in places:
            kind = gguf.GGMLQuantizationType(kind)
            rows = gguf.quant_shape_to_byte_shape(shape, kind)
            end = start + offset + math.prod(rows)
            if end > len(data):
                raise ValueError(f"{len(data)} bytes, and {name} ends at byte {end}")
            tensors[name] = GgufTensor(path, name, kind, start + offset, rows, shape)
    except (OSError, struct.error, LookupError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        raise UserError(
            f"expected a whole GGUF file (version 2 or 3) at {path}; found: {error}; download it again"
        ) from None
    if fields.get("general.architecture") not in GGUF_ARCHITECTURES:
        raise UserError(
            f"expected general.architecture in {path} to be one of {', '.join(GGUF_ARCHITECTURES)}; "
            f"found {fields.get('general.architecture')!r}; this architecture is not supported"
        )
    if fields.get("split.count", 1) > 1:
        raise UserError(
            f"expected a model in one file at {path}; found one of {fields['split.count']}; "
            "merge them with llama-gguf-split --merge"
        )
    return GgufHeader(path, fields, tensors)


def read_gguf_config(path: str | Path) -> dict[str, Any]:
    """The fields of the model's config.json, as far as it matters here.

    Raises:
      UserError: as `read_head`; a field is missing, or describes a model that transformers does not have.
    """
    head = read_gguf_header(path)
    get, architecture = head.get, head.architecture
    model_type, prefix = GGUF_ARCHITECTURES[architecture]
    experts = get("expert_count", 0)
    if architecture == "llama" and experts:
        model_type, prefix = "mixtral", "Mixtral"
    hidden_size, heads, layers = get("embedding_length"), get("attention.head_count"), get("block_count")
    for name in ("token_embd.weight", f"blk.{layers - 1}.attn_norm.weight"):
        if name not in head.tensors:
            raise UserError(
                f"expected {name} in {head.path}; found {len(head.tensors)} other tensors; "
                "take a file with the whole model"
            )
    head_dim = get("attention.key_length", get("rope.dimension_count", hidden_size // heads))
    ids = {name: head.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding")}
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if ids[name] is not None))
    config = {
        "architectures": [f"{prefix}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": head.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        "rope_parameters": read_gguf_rope(head, head_dim),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in head.tensors,
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
        "dtype": "float32" if all(tensor.kind.name == "F32" for tensor in head.tensors.values()) else "bfloat16",
    }
    if architecture.startswith("gemma"):
        # The file has no scale of the queries. The largest model of each version alone has another than head_dim.
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
        config |= {
            "attention_bias": "blk.0.attn_output.bias" in head.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in head.tensors,
        }
    if model_type == "mixtral":
        config |= {"num_local_experts": experts, "num_experts_per_tok": get("expert_used_count")}
    if model_type == "qwen3_moe":
        config |= {
            "num_experts": experts,
            "num_experts_per_tok": get("expert_used_count"),
            "norm_topk_prob": True,
            "moe_intermediate_size": get("expert_feed_forward_length"),
        }
    return config


def read_gguf_rope(head: GgufHeader, head_dim: int) -> dict[str, Any]:
    """The rope_parameters of config.json.

    Raises:
      UserError: the positions are scaled in a way that is not known.
    """
    rope = {"rope_type": "default", "rope_theta": head.get("rope.freq_base", 10000.0)}
    scaling, factor = head.get("rope.scaling.type", "linear"), head.get("rope.scaling.factor", 1.0)
    if scaling not in ("none", "linear", "yarn"):
        raise UserError(
            f"expected {head.architecture}.rope.scaling.type in {head.path} to be none, linear or yarn; "
            f"found {scaling!r}; other rotary positions are not supported"
        )
    if scaling == "yarn":
        names = {
            "original_max_position_embeddings": "original_context_length",
            "attention_factor": "yarn_attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        values = {ours: head.get(f"rope.scaling.{theirs}", None) for ours, theirs in names.items()}
        rope |= {name: value for name, value in values.items() if value is not None}
    if scaling != "none" and factor != 1:
        rope |= {"rope_type": scaling, "factor": factor}
    if "rope_freqs.weight" in head.tensors:
        rope |= read_llama3_rope(head, rope["rope_theta"], head_dim)
    if head.architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": head.get("rope.freq_base_swa", 10000.0)}
        return {"full_attention": rope, "sliding_attention": local}
    return rope


def read_llama3_rope(head: GgufHeader, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's part of rope_parameters. The file has the divisors of the frequencies instead, so they are compared.

    Raises:
      UserError: they are not those of Llama 3.1, 3.2 or 3.3, which differ in nothing but the factor.
    """
    divisors = head.tensors["rope_freqs.weight"].read()
    rope = {
        "rope_type": "llama3",
        "factor": float(divisors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    turns = 8192 / (2 * np.pi) * theta ** (-np.arange(divisors.size) * 2 / head_dim)  # of each pair in the first 8192
    keep = np.clip((turns - 1) / (4 - 1), 0, 1)
    expected = 1 / (keep + (1 - keep) / rope["factor"])
    if divisors.shape != (head_dim // 2,) or not np.allclose(divisors, expected, rtol=1e-3):
        raise UserError(
            f"expected rope_freqs.weight in {head.path} as for Llama 3.1, {expected.round(3).tolist()}; "
            f"found {divisors.round(3).tolist()}; other rotary positions are not supported"
        )
    return rope


def read_gguf_tensors(path: str | Path, config: dict[str, Any]) -> dict[str, GgufTensor]:
    """The tensors under the names and in the shapes of a Hugging Face checkpoint; `config` is `read_config`'s.

    Raises:
      UserError: as `read_head`; the file has a tensor that its architecture has not.
    """
    head = read_gguf_header(path)
    import gguf

    layers, gemma = config["num_hidden_layers"], head.architecture.startswith("gemma")
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    theirs = gguf.get_tensor_name_map(known[head.architecture], layers)
    # llama.cpp rotates neighbours in this architecture, and its converter moved the rows there.
    moved = (
        {}
        if head.architecture != "llama"
        else {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    )
    layer_modules = LAYER_MODULES + FAMILY_MODULES.get(config["model_type"], ())
    modules = [*TOP_MODULES, *(f"model.layers.{i}.{module}" for i in range(layers) for module in layer_modules)]
    found, rest = {}, head.tensors.keys() - {"rope_freqs.weight"}
    for module, suffix in itertools.product(modules, (".weight", ".bias")):
        # A layer's experts are one tensor in the file.
        name = f"{theirs.get_name(module.replace('.{x}', ''))}{suffix}"
        if name not in rest:
            continue
        rest.remove(name)
        tensor = head.tensors[name]._replace(
            heads=moved.get(name.split(".")[-2], 0), offset=float(gemma and name.endswith("norm.weight"))
        )
        if "{x}" not in module:
            found[module + suffix] = tensor
            continue
        experts, *rows = tensor.rows
        for x in range(experts):
            found[module.format(x=x) + suffix] = tensor._replace(
                start=tensor.start + x * math.prod(rows), rows=tuple(rows), shape=tensor.shape[1:]
            )
    if rest:
        raise UserError(
            f"expected the tensors of {head.architecture} in {head.path}; found {len(rest)} others, "
            f"such as {min(rest)}; this form of the model is not supported"
        )
    return found
