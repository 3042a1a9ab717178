"""Hugging Face folders in and out, and broken ones refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax import forward, load, save
from grpo_jax.errors import UserError
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.weights.source import find_model, read_model_config

GOLDEN = Path(__file__).parent / "golden" / "llama"


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden model, to be broken."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "model"))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_weights_round_trip_bitwise(tmp_path):
    model_cfg, params = load(GOLDEN)
    save(tmp_path / "out", model_cfg, params)
    before, after = load_file(GOLDEN / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        np.testing.assert_array_equal(before[name], after[name])
    assert (tmp_path / "out" / "config.json").read_text() == (GOLDEN / "config.json").read_text()


def test_a_config_written_from_nothing_reads_back_the_same(tmp_path):
    from tests.tiny import CONFIG, params

    save(tmp_path, CONFIG, params())
    model_cfg, weights = load(tmp_path)
    expected = {"source": str(tmp_path), "tokenizer_vocab_size": 0}
    assert vars(model_cfg) == vars(CONFIG) | expected
    jax.tree.map(np.testing.assert_array_equal, weights, params())


def test_the_packaged_base_loads_with_its_tokenizer():
    model_cfg, params = load(find_model("tiny"))
    assert model_cfg.tokenizer_vocab_size <= model_cfg.vocab_size
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, param_shapes(model_cfg))
    files = list(find_model("tiny").iterdir())
    assert sum(file.stat().st_size for file in files) < 6_000_000


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_loading_onto_a_mesh_gives_the_same_values(sizes):
    """6 heads and 2 KV heads on a tensor axis of 8: those dimensions are not split."""
    _, plain = load(GOLDEN)
    _, placed = load(GOLDEN, mesh=make_mesh(*sizes))
    jax.tree.map(np.testing.assert_array_equal, placed, plain)
    split = [leaf for leaf in jax.tree.leaves(placed) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 3


def test_param_dtype():
    _, params = load(GOLDEN, param_dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_a_config_is_hashable_and_remembers_its_source():
    model_cfg = read_model_config(GOLDEN)
    assert hash(model_cfg) == hash(read_model_config(GOLDEN))
    assert model_cfg.source == str(GOLDEN) and model_cfg.dtype == "float32" and model_cfg.eos_ids == (2, 5)


def test_missing_tensor(folder):
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"1 missing.*model.layers.1.mlp.up_proj.weight"):
        load(folder)


def test_unknown_tensor(folder):
    rewrite(folder, lambda t: t.update({"model.extra.weight": np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match=r"unknown.*model.extra.weight"):
        load(folder)


def test_misshaped_tensor(folder):
    """Transposed: as many numbers, in the wrong places."""
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(folder, lambda t: t.update({name: np.ascontiguousarray(t[name].T)}))
    with pytest.raises(UserError, match=r"k_proj.weight.*\(24, 48\).*found \(48, 24\)"):
        load(folder)


def test_tensor_twice(folder):
    shutil.copyfile(folder / "model.safetensors", folder / "again.safetensors")
    with pytest.raises(UserError, match="in two files"):
        load(folder)


def test_cut_off_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="complete safetensors file"):
        load(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type.*one of llama, mistral.*deepseek_v3; found 'gpt2'"),
        ({"model_type": None}, "model_type"),
        ({"attention_bias": True}, "missing, such as .*bias"),
        ({"hidden_act": "relu"}, "hidden_act.*silu.*relu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}}, "rope_type.*llama3, yarn"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "whole heads"),
        ({"hidden_size": None}, "hidden size .4096"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.*fp8.*gptq"),
    ],
)
def test_decoders_we_do_not_have_are_refused(folder, change, message):
    raw = json.loads((folder / "config.json").read_text()) | change
    raw = {key: value for key, value in raw.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        load(folder)


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model(folder, gone):
    (folder / gone).unlink()
    with pytest.raises(UserError, match="safetensors" if "model" in gone else "config.json"):
        find_model(str(folder))
    with pytest.raises(UserError, match="No model folder found at nowhere"):
        find_model("nowhere")


def test_a_pickle_is_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"\*.safetensors"):
        find_model(str(folder))


def test_tied_embeddings_have_no_head(tmp_path):
    from dataclasses import replace

    from tests.tiny import CONFIG, params

    tied = replace(CONFIG, tie_embeddings=True)
    weights = params(tied)
    assert "head" not in weights
    save(tmp_path, tied, weights)
    model_cfg, again = load(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    tokens = jax.numpy.arange(5)[None]
    np.testing.assert_array_equal(forward(model_cfg, again, tokens), forward(tied, weights, tokens))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": "96"}, "vocab_size.*int"),
        ({"vocab_size": 0}, "vocab_size.*at least 1"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
        ({"head_dim": 11}, "even.*head_dim"),
        ({"eos_token_id": [2, 600]}, "eos_token_id must be less than vocab_size"),
        ({"eos_token_id": "x"}, "eos_token_id .* list of integers"),
        ({"rms_norm_eps": 1e-5, "hidden_size": []}, "hidden_size.*int"),
    ],
)
def test_sizes_that_cannot_be_are_refused(folder, change, message):
    raw = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        read_model_config(folder)


def test_a_config_that_is_no_object(folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="JSON object"):
        read_model_config(folder)


def test_a_tokenizer_with_more_ids_than_rows_is_refused(folder):
    """96 rows; the tiny base's tokenizer has over 400 ids, whose lookups would silently be clamped."""
    shutil.copyfile(find_model("tiny") / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"96 rows and 4.. ids"):
        read_model_config(folder)


def test_eos_is_also_read_from_the_generation_config(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert read_model_config(folder).eos_ids == (2, 5, 7)


def changed_config(tmp_path, case, change):
    folder = Path(shutil.copytree(GOLDEN.parent / case, tmp_path / case))
    raw = json.loads((folder / "config.json").read_text())
    part = raw["text_config"] if "text_config" in raw else raw
    rope = change.pop("rope", {})
    part |= change
    part["rope_parameters"] |= rope
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    "case, change",
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
def test_numbers_that_make_no_decoder_are_refused(tmp_path, case, change):
    with pytest.raises(UserError, match=case):
        load(changed_config(tmp_path, case, dict(change)))


@pytest.mark.parametrize(
    "case, change",
    [
        ("llama", {"sliding_window": 3}),
        ("deepseek_v3", {"sliding_window": 3}),
        ("qwen2", {"mlp_bias": True}),
        ("mistral", {"attention_bias": True}),
        ("llama", {"hidden_act": "swish"}),
        ("gemma3_vision", {"final_logit_softcapping": 0.5}),
        ("mixtral", {"layer_types": ["full_attention"] * 2}),
    ],
)
def test_fields_that_a_family_does_not_read_change_nothing(tmp_path, case, change):
    tokens = jax.numpy.arange(1, 9)[None]
    logits = forward(*load(changed_config(tmp_path, case, dict(change))), tokens)
    np.testing.assert_array_equal(logits, forward(*load(GOLDEN.parent / case), tokens))


def test_a_mistral_that_says_so_has_windows_in_some_layers(tmp_path):
    types = ["sliding_attention", "full_attention"]
    model_cfg, _ = load(changed_config(tmp_path, "mistral", {"layer_types": types}))
    assert [layer.window for layer in model_cfg.layers] == [5, 0]


def test_a_tied_head_goes_out_as_the_embedding_is_now(tmp_path):
    """The copy of the head that some tied checkpoints carry must not stay behind: transformers would use it."""
    source = Path(shutil.copytree(GOLDEN.parent / "llama31", tmp_path / "in"))
    table = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(source, lambda t: t.update({"lm_head.weight": table.copy()}))
    model_cfg, params = load(source)
    save(tmp_path / "same", model_cfg, params)
    assert load_file(tmp_path / "same/model.safetensors").keys() == load_file(source / "model.safetensors").keys()
    save(tmp_path / "out", model_cfg, params | {"embed": {"embedding": params["embed"]["embedding"] + 1}})
    out = load_file(tmp_path / "out/model.safetensors")
    np.testing.assert_array_equal(out["lm_head.weight"], table + 1)
    np.testing.assert_array_equal(out["model.embed_tokens.weight"], table + 1)


def test_a_tied_head_that_differs_is_refused(folder):
    raw = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"lm_head.weight .* must equal the embedding.*tie_word_embeddings"):
        load(folder)


def test_an_index_that_names_a_file_that_is_not_there(tmp_path):
    source = Path(shutil.copytree(GOLDEN.parent / "qwen3", tmp_path / "in"))
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"1 missing, such as {shard.name}"):
        load(source)
    (source / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="weight_map"):
        load(source)


def test_a_config_nested_too_deep(folder):
    (folder / "config.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"config.json in .* must be a readable JSON file"):
        load(folder)


def test_one_gguf_of_several_is_not_guessed(tmp_path):
    (tmp_path / "mmproj-x.gguf").write_bytes(b"GGUF")
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    assert find_model(tmp_path) == tmp_path / "b.gguf"
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"single GGUF file; found a.gguf, b.gguf"):
        find_model(tmp_path)


def test_an_image_token_without_a_row_is_no_mistake(folder):
    """Gemma 3 1B: the id stands for an image; a text decoder has no row for it, and it is never drawn."""
    raw = json.loads((find_model("tiny") / "tokenizer.json").read_text())
    count = 1 + max(raw["model"]["vocab"].values())
    raw["added_tokens"].append(
        {
            "id": count,
            "content": "<image_soft_token>",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    )
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"96 rows and {count} ids"):
        read_model_config(folder)
