"""Tests loading of Hugging Face folders: what is read, and the errors for folders that are broken or not supported."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from grpo_jax import load, save
from grpo_jax.errors import UserError
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.layers import ACTIVATIONS
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.weights.source import count_token_ids, find_model, read_model_config
from grpo_jax.weights.tokenizer import load_tokenizer
from tests import tiny

GOLDEN = Path(__file__).parent / "golden"
LLAMA = GOLDEN / "llama"


@pytest.fixture
def folder(tmp_path):
    """Copies the golden Llama, for a test to change."""
    return Path(shutil.copytree(LLAMA, tmp_path / "model"))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, fields):
    """Sets fields of a folder's config.json; None removes a field."""
    raw = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return folder


def changed_copy(tmp_path, case, fields):
    """Copies a golden model and sets fields of its decoder's config, and of its rope_parameters under `rope`."""
    folder = Path(shutil.copytree(GOLDEN / case, tmp_path / case))
    raw = json.loads((folder / "config.json").read_text())
    section = raw.get("text_config", raw)
    section |= {key: value for key, value in fields.items() if key != "rope"}
    section["rope_parameters"] |= fields.get("rope", {})
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


# What is read


@pytest.mark.parametrize("has_head", [True, False])
def test_weights_without_a_head_are_tied_if_the_config_of_a_vision_language_model_leaves_it_open(tmp_path, has_head):
    """Mistral Small 3.1 leaves it out and has a head; transformers 5 leaves it out of a tied model, its default."""
    folder = changed_copy(tmp_path, "mistral3", {})
    raw = json.loads((folder / "config.json").read_text())
    for section in (raw, raw["text_config"]):
        section.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(raw))
    if not has_head:
        change_tensors(folder, lambda tensors: [tensors.pop(name) for name in [*tensors] if "lm_head" in name])
    model_cfg, params = load(folder)
    assert model_cfg.tie_embeddings != has_head and ("head" in params) == has_head
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert not read_model_config(folder).tie_embeddings  # a plan of a config alone
    (tmp_path / "model.safetensors").rename(folder / "model.safetensors")
    save(tmp_path / "out", model_cfg, params)
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {exported["tie_word_embeddings"], exported["text_config"]["tie_word_embeddings"]} == {not has_head}


def test_the_packaged_base_model_loads_by_name():
    model_cfg, params = load("tiny")
    assert 0 < model_cfg.tokenizer_vocab_size <= model_cfg.vocab_size
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, param_shapes(model_cfg))
    assert sum(file.stat().st_size for file in find_model("tiny").iterdir()) < 6_000_000


def test_a_home_directory_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_model("~/model") == folder
    assert load("~/model")[0].source == str(folder)


def test_a_config_written_without_a_source_reads_back_the_same(tmp_path):
    save(tmp_path, tiny.CONFIG, tiny.params())
    model_cfg, params = load(tmp_path)
    assert model_cfg == replace(tiny.CONFIG, source=str(tmp_path), tokenizer_vocab_size=0)
    jax.tree.map(np.testing.assert_array_equal, params, tiny.params())


def test_tied_embeddings_have_no_head(tmp_path):
    tied = replace(tiny.CONFIG, tie_embeddings=True)
    params = tiny.params(tied)
    save(tmp_path, tied, params)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model_cfg, loaded = load(tmp_path)
    assert model_cfg.tie_embeddings and "head" not in loaded
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


# Of 6 heads and 2 KV heads, a tensor axis of 8 splits none.
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_loading_onto_a_mesh_gives_the_same_values(sizes):
    _, expected = load(LLAMA)
    _, params = load(LLAMA, mesh=make_mesh(*sizes))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    split = [leaf for leaf in jax.tree.leaves(params) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 3


def test_parameters_have_the_requested_dtype():
    _, params = load(LLAMA, param_dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_a_config_is_hashable_and_records_its_source():
    model_cfg = read_model_config(LLAMA)
    assert hash(model_cfg) == hash(read_model_config(LLAMA))
    assert model_cfg.source == str(LLAMA) and model_cfg.dtype == "float32" and model_cfg.eos_ids == (2, 5)


def test_eos_ids_include_those_of_the_generation_config(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert read_model_config(folder).eos_ids == (2, 5, 7)


def test_a_vision_language_model_may_state_its_eos_and_dtype_in_its_text_config(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "gemma3_vision", tmp_path / "model"))
    (folder / "generation_config.json").unlink()
    raw = json.loads((folder / "config.json").read_text())
    del raw["dtype"]
    raw["text_config"] |= {"eos_token_id": [2, 5], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(raw))
    model_cfg = read_model_config(folder)
    assert (model_cfg.eos_ids, model_cfg.dtype) == ((2, 5), "bfloat16")


def test_layer_types_of_a_mistral_say_which_layers_have_a_window(tmp_path):
    folder = changed_copy(tmp_path, "mistral", {"layer_types": ["sliding_attention", "full_attention"]})
    assert [layer.window for layer in read_model_config(folder).layers] == [5, 0]


@pytest.mark.parametrize(
    "case, fields",
    [
        ("llama", {"sliding_window": 3}),
        ("deepseek_v3", {"sliding_window": 3}),
        ("qwen2", {"mlp_bias": True}),
        ("mistral", {"attention_bias": True}),
        ("gemma3_vision", {"final_logit_softcapping": 0.5}),
        ("mixtral", {"layer_types": ["full_attention"] * 2}),
    ],
)
def test_fields_that_a_family_does_not_use_are_ignored(tmp_path, case, fields):
    model_cfg, _ = load(changed_copy(tmp_path, case, fields))
    assert replace(model_cfg, source="") == replace(read_model_config(GOLDEN / case), source="")


def test_swish_is_another_name_for_silu(folder):
    model_cfg = read_model_config(change_config(folder, {"hidden_act": "swish"}))
    assert ACTIVATIONS[model_cfg.activation] is ACTIVATIONS["silu"]


# Tied heads


def test_a_stored_tied_head_is_saved_as_the_trained_embedding(tmp_path):
    """Some tied checkpoints store a copy of the head, which `transformers` would use: it must follow the embedding."""
    source = Path(shutil.copytree(GOLDEN / "llama31", tmp_path / "in"))
    table = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(source, lambda tensors: tensors.update({"lm_head.weight": table.copy()}))
    model_cfg, params = load(source)
    save(tmp_path / "out", model_cfg, params | {"embed": {"embedding": params["embed"]["embedding"] + 1}})
    saved = load_file(tmp_path / "out/model.safetensors")
    assert saved.keys() == load_file(source / "model.safetensors").keys()
    np.testing.assert_array_equal(saved["lm_head.weight"], table + 1)
    np.testing.assert_array_equal(saved["model.embed_tokens.weight"], table + 1)


def test_a_stored_tied_head_that_differs_is_refused(folder):
    change_config(folder, {"tie_word_embeddings": True})
    with pytest.raises(UserError, match=r"lm_head.weight .* must equal the embedding.*tie_word_embeddings"):
        load(folder)


# Tensors that do not match the config


def test_a_missing_tensor_is_refused(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"1 missing.*model.layers.1.mlp.up_proj.weight"):
        load(folder)


def test_an_unknown_tensor_is_refused(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.extra.weight": np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match=r"unknown.*model.extra.weight"):
        load(folder)


def test_a_transposed_tensor_is_refused(folder):
    name = "model.layers.0.self_attn.k_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].T)}))
    with pytest.raises(UserError, match=r"k_proj.weight.*\(24, 48\).*found \(48, 24\)"):
        load(folder)


def test_a_tensor_in_two_files_is_refused(folder):
    shutil.copyfile(folder / "model.safetensors", folder / "again.safetensors")
    with pytest.raises(UserError, match="in two files"):
        load(folder)


def test_a_truncated_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="complete safetensors file"):
        load(folder)


def test_a_missing_shard_and_a_broken_index_are_refused(tmp_path):
    source = Path(shutil.copytree(GOLDEN / "qwen3", tmp_path / "in"))
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"1 missing, such as {shard.name}"):
        load(source)
    (source / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="weight_map"):
        load(source)


# Files


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_config_or_weights_is_refused(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(UserError, match=f"found no {'.*safetensors' if 'model' in missing else missing}"):
        find_model(folder)


def test_an_adapter_without_its_model_is_refused(folder):
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base", "peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"a whole model; found an adapter for owner/base\. .*merge_and_unload"):
        find_model(folder)


def test_a_path_without_a_folder_is_refused():
    with pytest.raises(UserError, match="No model folder found at nowhere"):
        find_model("nowhere")


def test_a_pickle_is_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"must hold \*.safetensors; found pytorch_model.bin, a pickle"):
        find_model(folder)


def test_one_of_several_gguf_files_is_not_guessed(tmp_path):
    (tmp_path / "mmproj-x.gguf").write_bytes(b"GGUF")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    assert find_model(tmp_path) == tmp_path / "b.gguf"
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"single GGUF file; found a.gguf, b.gguf"):
        find_model(tmp_path)


@pytest.mark.parametrize("text, message", [("[]", "JSON object"), ("[" * 200_000, "must be a readable JSON file")])
def test_a_config_that_is_not_a_json_object_is_refused(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_model_config(folder)


# Tokenizers


def test_a_tokenizer_with_more_ids_than_rows_is_refused(folder):
    """The embedding has 96 rows and the tokenizer over 400 ids; JAX would silently clamp the lookups."""
    shutil.copyfile(find_model("tiny") / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer's 4.. ids, but .* has 96 rows"):
        read_model_config(folder)


def test_a_tokenizer_without_tokens_has_no_ids(folder):
    Tokenizer(WordLevel({}, unk_token="?")).save(str(folder / "tokenizer.json"))
    assert read_model_config(folder).tokenizer_vocab_size == 0


def test_an_image_token_needs_no_row(folder):
    """Gemma 3 1B's tokenizer has a placeholder for an image that its text decoder never uses."""
    raw = json.loads((find_model("tiny") / "tokenizer.json").read_text())
    count = 1 + max(raw["model"]["vocab"].values())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    raw["added_tokens"].append({"id": count, "content": "<image_soft_token>", "special": True, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"tokenizer's {count} ids, but .* has 96 rows"):
        read_model_config(folder)


def test_an_image_token_with_a_row_is_not_drawn():
    vocabulary = {"a": 0, "b": 1, "<image_soft_token>": 2}
    assert count_token_ids(vocabulary, {"<image_soft_token>"}, 3, "here") == 2


def test_an_added_token_without_a_row_is_not_drawn(tmp_path):
    """An example is a padding token that somebody added to the tokenizer without resizing the embedding."""
    folder = Path(shutil.copytree(find_model("tiny"), tmp_path / "model"))
    rows = read_model_config(folder).vocab_size
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"<extra {n}>" for n in range(tokenizer.get_vocab_size(), rows)])
    tokenizer.add_special_tokens(["<pad>"])
    assert tokenizer.token_to_id("<pad>") == rows
    tokenizer.save(str(folder / "tokenizer.json"))
    model_cfg = read_model_config(folder)
    assert (model_cfg.vocab_size, model_cfg.sampleable_vocab_size) == (rows, rows)


@pytest.fixture
def hostile_folder(folder, monkeypatch):
    """Adds code that leaves a file `ran` when it is imported, and answers `y` to every question on the terminal."""
    (folder / "tokenizer.json").write_bytes((find_model("tiny") / "tokenizer.json").read_bytes())
    code = f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()\n"
    (folder / "custom.py").write_text(
        code + "from transformers import PreTrainedTokenizerFast as Tokenizer, LlamaConfig as Config\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    yield folder
    assert sys.stdin.tell() == 0 and not (folder / "ran").exists()


@pytest.mark.parametrize("config_file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "unknown"])
def test_a_tokenizer_with_code_is_read_from_tokenizer_json_alone(hostile_folder, capsys, config_file, model_type):
    change_config(hostile_folder, {"model_type": model_type})
    fields = {"tokenizer_class": "Custom", "eos_token": "<|endoftext|>", "chat_template": "{{ messages[0].content }}"}
    (hostile_folder / "tokenizer_config.json").write_text(json.dumps(fields))
    raw = json.loads((hostile_folder / config_file).read_text())
    raw["auto_map"] = {"AutoTokenizer": ["custom.Tokenizer", None]}
    (hostile_folder / config_file).write_text(json.dumps(raw))
    tokenizer, expected = load_tokenizer(hostile_folder), load_tokenizer(find_model("tiny"))
    assert tokenizer("What is 1 + 2?")["input_ids"] == expected("What is 1 + 2?")["input_ids"]
    assert tokenizer.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|endoftext|>", fields["chat_template"])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("config_file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("vocabulary", ["", "tiktoken.model", "tokenizer.model", "vocab.json"])
def test_a_tokenizer_that_is_code_is_refused_and_not_run(hostile_folder, monkeypatch, config_file, vocabulary):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (hostile_folder / "tokenizer.json").unlink()
    change_config(hostile_folder, {"model_type": "unknown"})
    if vocabulary:
        (hostile_folder / vocabulary).write_text(TIKTOKEN if vocabulary.endswith(".model") else '{"a": 0}')
    path = hostile_folder / config_file
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(raw | {"auto_map": {"AutoTokenizer": ["custom.Tokenizer", None]}}))
    with pytest.raises(UserError, match=r"must hold a tokenizer.json; .* never run \(custom.Tokenizer .*Copy") as error:
        load_tokenizer(hostile_folder)
    assert "\n" not in str(error.value) and "trust_remote_code" not in str(error.value)


TIKTOKEN = "IQ== 0\nIg== 1\nIw== 2\n"


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "tokenizer.model",
            b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02",
            "requires the package sentencepiece, .*pip install",
        ),
        ("tokenizer.model", TIKTOKEN.encode(), "found tokenizer.model, a tiktoken vocabulary"),
        ("qwen.tiktoken", TIKTOKEN.encode(), "found qwen.tiktoken, a tiktoken vocabulary"),
        ("tekken.json", b'{"vocab": []}', "found tekken.json, which names no special tokens"),
    ],
)
def test_a_vocabulary_that_is_not_enough_for_a_tokenizer_is_refused(folder, name, content, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma3"])
def test_a_folder_without_tokenizer_files_has_no_tokenizer(case):
    with pytest.raises(UserError, match=r"must hold a readable tokenizer .*Copy the tokenizer files"):
        load_tokenizer(GOLDEN / case)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3", "unknown"])
def test_an_ordinary_tokenizer_loads_although_the_folder_brings_code(hostile_folder, capsys, model_type):
    change_config(hostile_folder, {"model_type": model_type, "auto_map": {"AutoConfig": "custom.Config"}})
    (hostile_folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": [null, "custom.Tokenizer"]}}'
    )
    assert load_tokenizer(hostile_folder)("What is 1 + 2?")["input_ids"]
    assert not capsys.readouterr().out


def test_a_config_class_in_the_folder_is_not_run(hostile_folder):
    (hostile_folder / "tokenizer.json").unlink()
    change_config(hostile_folder, {"auto_map": {"AutoConfig": "custom.Config"}})
    assert load(hostile_folder)[0].vocab_size == 96
    change_config(hostile_folder, {"model_type": "unknown"})
    with pytest.raises(UserError, match="model_type"):
        load(hostile_folder)


# Configs that are not supported or contradict themselves


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model_type": "gpt2"}, "model_type.*one of llama, mistral.*; found 'gpt2'"),
        ({"model_type": None}, "model_type"),
        ({"attention_bias": True}, "missing, such as .*bias"),
        ({"hidden_act": "relu"}, "hidden_act.*silu.*relu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}}, "rope_type.*llama3, yarn"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "whole heads"),
        ({"hidden_size": None}, "hidden size .4096"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.*fp8.*GPTQ .4 bits"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}}, "quantization_config.*128"),
        ({"vocab_size": "96"}, "vocab_size.*int"),
        ({"vocab_size": 0}, "vocab_size.*at least 1"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        ({"head_dim": 11}, "even.*head_dim"),
        ({"eos_token_id": [2, 600]}, "eos_token_id must be less than vocab_size"),
        ({"eos_token_id": "x"}, "eos_token_id .* list of integers"),
        ({"rms_norm_eps": 1e-5, "hidden_size": []}, "hidden_size.*int"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_with_its_field(folder, fields, message):
    with pytest.raises(UserError, match=message):
        load(change_config(folder, fields))


@pytest.mark.parametrize(
    "case, fields",
    [
        ("llama", {"eos_token_id": {}}),
        ("llama", {"eos_token_id": [[2]]}),
        ("llama", {"rms_norm_eps": float("nan")}),
        ("llama", {"vocab_size": 2**40}),
        ("llama", {"num_hidden_layers": 10**9}),
        ("llama", {"intermediate_size": 10**400}),
        ("llama", {"rope": {"rope_theta": None}}),
        ("llama", {"rope": {"rope_theta": "x"}}),
        ("llama", {"rope": {"rope_theta": -1.0}}),
        ("llama31", {"rope": {"factor": 0.0}}),
        ("llama31", {"rope": {"high_freq_factor": 0.5}}),
        ("mistral", {"sliding_window": -1}),
        ("mistral", {"layer_types": ["full_attention"]}),
        ("gemma2", {"query_pre_attn_scalar": -1}),
        ("gemma3", {"layer_types": ["chunked_attention"] * 4}),
        ("mixtral", {"num_experts_per_tok": 6}),
        ("mixtral", {"num_experts_per_tok": None}),
        ("mixtral", {"num_local_experts": 10**9}),
        ("qwen3_moe", {"decoder_sparse_step": 0}),
        ("qwen3_moe", {"moe_intermediate_size": 0}),
        ("deepseek_v3", {"first_k_dense_replace": None}),
        ("deepseek_v3", {"n_group": 0}),
        ("deepseek_v3", {"n_group": 3}),
        ("deepseek_v3", {"topk_group": 5}),
        ("deepseek_v3", {"kv_lora_rank": 0}),
        ("deepseek_v3", {"v_head_dim": None}),
        ("deepseek_v3", {"q_lora_rank": -1}),
        ("deepseek_v3", {"routed_scaling_factor": float("inf")}),
        ("deepseek_v3", {"rope": {"beta_fast": float("nan")}}),
        ("deepseek_v3", {"rope": {"factor": "x"}}),
        ("deepseek_v3", {"rope": {"mscale": 10**400}}),
        ("deepseek_v3", {"qk_nope_head_dim": 2**63}),
    ],
)
def test_a_broken_number_in_a_config_is_refused(tmp_path, case, fields):
    with pytest.raises(UserError, match=case):
        load(changed_copy(tmp_path, case, fields))
