"""The table of published architectures: complete for all presets, and read only if the model is not on the machine."""

import json
import math
import shutil
from pathlib import Path

import jax
import pytest

from grpo_jax.config import check, default
from grpo_jax.config.flags import load_config
from grpo_jax.errors import UserError
from grpo_jax.model.decoder import param_shapes
from grpo_jax.planning.models import PUBLISHED, plan_model, read_architecture
from grpo_jax.weights.source import find_model, read_model_config
from tests.test_presets import CONFIGS, HUB_PRESETS

TABLE = json.loads(PUBLISHED.read_text(encoding="utf-8"))
GOLDEN = Path(__file__).parent / "golden"

# Parameters in millions, as the model cards give them (without the vision tower of Gemma 3).
PARAMETERS = {
    "Qwen/Qwen2.5-0.5B": 494.0,
    "Qwen/Qwen2.5-1.5B": 1543.7,
    "Qwen/Qwen2.5-3B": 3085.9,
    "Qwen/Qwen2.5-7B": 7615.6,
    "Qwen/Qwen2.5-32B": 32763.9,
    "Qwen/Qwen2.5-Math-7B": 7615.6,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1777.1,
    "Qwen/Qwen3-1.7B-Base": 1720.6,
    "Qwen/Qwen3-8B-Base": 8190.7,
    "Qwen/Qwen3-30B-A3B-Base": 30532.1,
    "meta-llama/Llama-3.2-3B": 3212.7,
    "meta-llama/Llama-3.1-8B": 8030.3,
    "huggyllama/llama-7b": 6738.4,
    "deepseek-ai/deepseek-math-7b-instruct": 6910.4,
    "mistralai/Mistral-Small-24B-Instruct-2501": 23572.4,
    "google/gemma-3-4b-pt": 3880.3,
    "deepseek-ai/DeepSeek-V3-Base": 671026.4,
}


def config_for(path, **model):
    cfg = default()
    cfg.model.path = str(path)
    for name, value in model.items():
        cfg.model[name] = value
    return check(cfg)


def test_the_table_has_the_models_of_all_presets_and_no_others():
    used = {load_config(f"{CONFIGS / recipe}.py:{name}").model.path for recipe, name in HUB_PRESETS}
    assert used == set(TABLE) == set(PARAMETERS)


@pytest.mark.parametrize("name", TABLE)
def test_an_architecture_has_as_many_parameters_as_its_model_card_says(name):
    shapes = param_shapes(read_architecture(name))
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert round(total / 1e6, 1) == PARAMETERS[name]


@pytest.mark.parametrize("name", TABLE)
def test_every_architecture_states_what_transformers_would_otherwise_fill_in(name):
    fields = TABLE[name]["config"]
    fields = fields.get("text_config", fields)
    stated = {"vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "num_key_value_heads"}
    assert stated <= set(fields)
    assert 0 < TABLE[name]["tokenizer_ids"] <= fields["vocab_size"]
    assert read_architecture(name).tokenizer_vocab_size == TABLE[name]["tokenizer_ids"]


def test_rope_and_windows_are_those_that_were_published():
    llama, gemma, deepseek = (
        read_architecture(name)
        for name in ("meta-llama/Llama-3.1-8B", "google/gemma-3-4b-pt", "deepseek-ai/DeepSeek-V3-Base")
    )
    assert (llama.layers[0].rope.scaling, llama.layers[0].rope.factor) == ("llama3", 8)
    assert [layer.window for layer in gemma.layers[:7]] == [1024] * 5 + [0, 1024]
    assert [layer.rope.theta for layer in gemma.layers[4:6]] == [1e4, 1e6]
    assert (deepseek.layers[0].rope.scaling, deepseek.layers[0].rope.factor) == ("yarn", 40)
    assert [layer.use_experts for layer in deepseek.layers[:4]] == [False] * 3 + [True]


def test_a_plan_has_the_options_of_the_run():
    cfg = config_for("Qwen/Qwen2.5-0.5B", compute_dtype="bfloat16", attention="blocks")
    model_cfg = plan_model(cfg)
    assert (model_cfg.compute_dtype, model_cfg.logit_dtype) == ("bfloat16", "float32")
    assert (model_cfg.attention, model_cfg.remat) == ("blocks", "layers")


def test_the_tiny_model_is_that_of_a_run():
    assert read_architecture("tiny") == read_model_config(find_model("tiny"))


def test_a_folder_needs_no_weights(tmp_path):
    shutil.copy(GOLDEN / "qwen2" / "config.json", tmp_path)
    model_cfg = read_architecture(str(tmp_path))
    assert model_cfg.num_layers == read_model_config(GOLDEN / "qwen2").num_layers


def test_the_cache_of_the_hub_comes_before_the_table(tmp_path, monkeypatch):
    from huggingface_hub import constants

    folder = tmp_path / "models--Qwen--Qwen2.5-0.5B"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    shutil.copy(GOLDEN / "qwen2" / "config.json", folder / "snapshots" / "abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert read_architecture("Qwen/Qwen2.5-0.5B").hidden_size == read_model_config(GOLDEN / "qwen2").hidden_size
    assert read_architecture("Qwen/Qwen2.5-1.5B").hidden_size == 1536


@pytest.mark.parametrize("path", ["someone/some-model", "/no/such/folder"])
def test_an_unknown_model_is_refused_with_what_to_download(path):
    with pytest.raises(UserError, match=rf"found no folder {path}, .* Run `hf download {path} config.json"):
        read_architecture(path)
