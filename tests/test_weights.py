"""Hugging Face folders in and out, and broken ones refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax import forward, load, save
from grpo_jax.mesh import make_mesh
from grpo_jax.model import param_shapes
from grpo_jax.source import find_model, read_model_config
from grpo_jax.types import UserError

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
    config, params = load(GOLDEN)
    save(tmp_path / "out", config, params)
    before, after = load_file(GOLDEN / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        np.testing.assert_array_equal(before[name], after[name])
    assert (tmp_path / "out" / "config.json").read_text() == (GOLDEN / "config.json").read_text()


def test_a_config_written_from_nothing_reads_back_the_same(tmp_path):
    from tests.tiny import CONFIG, params

    save(tmp_path, CONFIG, params())
    config, weights = load(tmp_path)
    expected = {"source": str(tmp_path), "token_count": 0}
    assert vars(config) == vars(CONFIG) | expected
    jax.tree.map(np.testing.assert_array_equal, weights, params())


def test_the_packaged_base_loads_with_its_tokenizer():
    config, params = load(find_model("tiny"))
    assert config.token_count <= config.vocab_size
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, param_shapes(config))
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
    config = read_model_config(GOLDEN)
    assert hash(config) == hash(read_model_config(GOLDEN))
    assert config.source == str(GOLDEN) and config.dtype == "float32" and config.eos_ids == (2, 5)


def test_missing_tensor(folder):
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match="1 missing.*model.layers.1.mlp.up_proj.weight"):
        load(folder)


def test_unknown_tensor(folder):
    rewrite(folder, lambda t: t.update({"model.extra.weight": np.zeros(3, np.float32)}))
    with pytest.raises(UserError, match="unknown.*model.extra.weight"):
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
    with pytest.raises(UserError, match="whole safetensors file"):
        load(folder)


@pytest.mark.parametrize("change, message", [
    ({"model_type": "gpt2"}, "model_type.*one of llama, mistral.*deepseek_v3; found 'gpt2'"), ({"model_type": None}, "model_type"),
    ({"attention_bias": True}, "missing, such as .*bias"), ({"hidden_act": "relu"}, "hidden_act.*silu.*relu"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}}, "rope_type.*llama3, yarn"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "whole heads"),
    ({"hidden_size": None}, "hidden size .4096"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.*fp8.*gptq")])
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
    with pytest.raises(UserError, match="expected a model folder at nowhere"):
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
    config, again = load(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    tokens = jax.numpy.arange(5)[None]
    np.testing.assert_array_equal(forward(config, again, tokens), forward(tied, weights, tokens))


@pytest.mark.parametrize("change, message", [
    ({"vocab_size": "96"}, "vocab_size.*int"), ({"vocab_size": 0}, "vocab_size.*1 or more"), ({"num_key_value_heads": 4}, "multiple of num_key_value_heads"),
    ({"head_dim": 11}, "even.*head_dim"), ({"eos_token_id": [2, 600]}, "eos_token_id below vocab_size"),
    ({"eos_token_id": "x"}, "eos_token_id to be ids"), ({"rms_norm_eps": 1e-5, "hidden_size": []}, "hidden_size.*int")])
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
    with pytest.raises(UserError, match="96 rows and 4.. ids"):
        read_model_config(folder)


def test_eos_is_also_read_from_the_generation_config(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert read_model_config(folder).eos_ids == (2, 5, 7)
