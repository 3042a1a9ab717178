"""Reading config.json: the spellings of different releases of `transformers`, and families that are refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax.errors import UserError
from grpo_jax.weights.families import FAMILIES, UNSUPPORTED_FEATURES, check_family
from grpo_jax.weights.hf_config import model_config_from_hf
from grpo_jax.weights.portable import portable_config
from grpo_jax.weights.reading import open_model_tensors
from grpo_jax.weights.source import read_model_config
from grpo_jax.weights.tensor_names import skipped_tensors

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}


def golden_config(case):
    return json.loads((GOLDEN / case / "config.json").read_text())


def with_text(raw, **fields):
    """Sets fields of the decoder's config; None removes one."""
    text = raw.get("text_config", raw) | fields
    changed = {name: value for name, value in text.items() if value is not None or name not in fields}
    return raw | {"text_config": changed} if "text_config" in raw else changed


def read(raw):
    return model_config_from_hf(raw, "here")


# Spellings


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
@pytest.mark.parametrize("case", CASES)
def test_the_older_spelling_of_a_config_reads_the_same(case, type_key):
    raw = golden_config(case)
    older = portable_config(raw, case)
    section = older.get("text_config", older)
    scaling = dict(section.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", scaling.pop("type", None))
    older = with_text(
        older, rope_parameters=None, rope_scaling={**scaling, type_key: kind} if kind else None, dtype=None
    )
    expected = read(raw)
    # An export has the name of the family whose class in `transformers` reads it.
    assert read(older) == replace(expected, family=FAMILIES[expected.family].read_as or expected.family)


def test_a_qwen2_5_vl_whose_text_is_described_at_the_top_reads_the_same():
    raw = golden_config("qwen2_5_vl")
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    flat = text | raw | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    assert read(flat) == read(golden_config("qwen2_5_vl"))


@pytest.mark.parametrize("case", ["qwen2_5_vl", "qwen3_vl"])
def test_text_has_one_position_so_its_sections_do_not_matter(case):
    raw = golden_config(case)
    rope = raw["text_config"]["rope_parameters"]
    assert "mrope_section" in rope
    plain = {name: rope[name] for name in ("rope_type", "rope_theta")}
    assert read(with_text(raw, rope_parameters=plain)) == read(raw)


def test_a_vision_language_model_may_have_the_model_type_of_its_text_at_the_top():
    raw = golden_config("mistral3")
    assert read(raw | {"model_type": "mistral"}) == read(raw)
    text = golden_config("ministral3")
    nested = read(raw | {"model_type": "ministral3", "text_config": text})
    assert nested == replace(read(text), family="mistral3")


@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_switching_yarn_on_stretches_the_positions_without_another_key(type_key):
    raw = with_text(golden_config("qwen3"), rope_parameters=None, rope_theta=50.0)
    model_cfg = read(raw | {"rope_scaling": YARN | {type_key: "yarn"}})
    rope = model_cfg.layers[0].rope
    assert (rope.scaling, rope.factor, rope.original_max_positions, rope.theta) == ("yarn", 4.0, 32, 50.0)
    assert (read(raw).max_positions, model_cfg.max_positions) == (64, 128)


@pytest.mark.parametrize("positions", [1024, 64])
def test_yarn_does_not_lower_the_positions(positions):
    raw = golden_config("deepseek_v3") | {"max_position_embeddings": positions}
    assert read(raw).max_positions == positions


@pytest.mark.parametrize("scaling", [{}, None])
def test_empty_rope_scaling_is_no_scaling(scaling):
    raw = with_text(golden_config("qwen2"), rope_parameters=None)
    assert read(raw | {"rope_theta": 50.0, "rope_scaling": scaling}) == read(golden_config("qwen2"))


@pytest.mark.parametrize(
    "case, model, text, expected",
    [
        ("gemma3_vision", None, None, True),
        ("gemma3_vision", None, False, False),
        ("mistral3", None, None, False),
        ("mistral3", False, True, True),
        ("mistral3", True, False, True),
        ("qwen3_vl", True, None, True),
        ("qwen3_vl", None, True, True),
        ("qwen3_vl", None, None, False),
        ("qwen2_5_vl", False, False, False),
    ],
)
def test_a_tied_head_is_stated_at_either_level_and_exported_at_both(case, model, text, expected):
    raw = with_text(golden_config(case), tie_word_embeddings=text)
    raw = {name: value for name, value in (raw | {"tie_word_embeddings": model}).items() if value is not None}
    assert read(raw).tie_embeddings == expected
    exported = portable_config(raw, case)
    assert exported["tie_word_embeddings"] == exported["text_config"]["tie_word_embeddings"] == expected


# Names of tensors

PREFIXES = {
    "qwen2_5_vl": {"model.": "model.language_model.", "visual.": "model.visual."},
    "qwen3_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "mistral3": {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
}


@pytest.mark.parametrize("case", PREFIXES)
def test_a_vision_language_model_loads_with_the_prefixes_of_either_release(tmp_path, case):
    def rename(name):
        prefix = next((prefix for prefix in PREFIXES[case] if name.startswith(prefix)), "")
        return PREFIXES[case].get(prefix, "") + name[len(prefix) :]

    tensors = load_file(GOLDEN / case / "model.safetensors")
    save_file({rename(name): value for name, value in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(golden_config(case)))
    expected, renamed = (open_model_tensors(folder, read_model_config(folder)) for folder in (GOLDEN / case, tmp_path))
    for path, parameter in expected.parameters.items():
        assert [*renamed.parameters[path].names.flat] == [rename(name) for name in parameter.names.flat]
    assert renamed.skipped.keys() == {rename(name) for name in expected.skipped} != expected.skipped.keys()


def test_a_tied_head_may_be_stored_beside_the_decoder_of_a_vision_language_model():
    head = {"language_model.lm_head.weight"}
    assert skipped_tensors(read(golden_config("gemma3_vision")), "language_model.model.", head) == head


# Refusals


@pytest.mark.parametrize(
    "family, message",
    [
        ("gpt_oss", "found 'gpt_oss', which has attention sinks. Choose a model of a supported family."),
        ("gemma4", "found 'gemma4', which has attention heads of two widths. .*, such as gemma3"),
        ("qwen3_5", "found 'qwen3_5', which has layers with linear attention. .*, such as qwen3"),
        ("qwen3_next", "layers with linear attention"),
        ("glm4_moe", "experts with a sigmoid gate but no latent attention. .*, such as glm4_moe_lite"),
        ("deepseek_v32", "an indexer that selects the keys to attend to. .*, such as deepseek_v3"),
        ("qwen2_moe", "a gated shared expert"),
        ("qwen3_vl_moe", "experts stored in one tensor"),
        ("kimi_k25", "INT4 experts. .*, such as kimi_k2"),
        ("gemma3n", "per-layer embeddings"),
        ("mamba", "state-space layers"),
        ("bert", "an encoder. Choose a model of a supported family.$"),
        ("gpt2", "layer norms instead of RMS norms"),
        ("qwen4", "found 'qwen4'. Choose a model of a supported family, such as qwen"),
        ("a_new_thing", "found 'a_new_thing'. Choose a model of a supported family.$"),
        (None, "found None. Choose"),
        ({}, "found {}. Choose"),
    ],
)
def test_an_unsupported_family_is_refused_with_what_it_has_and_the_nearest(family, message):
    with pytest.raises(UserError, match=message) as error:
        check_family({"model_type": family}, "here")
    assert f"model_type in here must be one of {', '.join(FAMILIES)}; found" in str(error.value)


def test_a_family_is_supported_or_has_one_reason_why_not():
    names = [name for names in UNSUPPORTED_FEATURES.values() for name in names]
    assert len(names) == len(set(names)) and not FAMILIES.keys() & set(names)


def test_a_text_config_of_another_family_is_refused():
    with pytest.raises(
        UserError, match=r"model_type of text_config .* mistral, ministral3 in a model of mistral3; .*phi"
    ):
        read(with_text(golden_config("mistral3"), model_type="phi3"))


def test_a_family_without_windows_refuses_layers_with_one():
    with pytest.raises(UserError, match="layer_types in here must be full_attention in every layer"):
        read(golden_config("llama") | {"layer_types": ["sliding_attention", "full_attention"]})


# Fields of single families


@pytest.mark.parametrize(
    "case, fields, message",
    [
        ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers in here must have a number for each of 4 layers"),
        ("granite", {"logits_scaling": 0.0}, "logits_scaling must exceed 0"),
        ("granite", {"attention_multiplier": 0.0}, "a value that cannot be used"),
        ("glm4", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.1}}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "cover whole heads"),
        ("olmo3", {"layer_types": ["sliding_attention"] * 3}, "layer_types|num_hidden_layers"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, r"mlp_layer_types \['dense'\], without layer 1"),
    ],
)
def test_a_value_that_the_decoder_does_not_support_is_refused_by_its_field(case, fields, message):
    with pytest.raises(UserError, match=message):
        read(golden_config(case) | fields)


def test_biases_of_the_mlp_of_a_code_world_model_are_read():
    assert [read(golden_config("cwm") | {"mlp_bias": bias}).mlp_bias for bias in (True, False)] == [True, False]


def test_families_that_share_a_decoder_have_fields_of_their_own():
    models = {case: read(golden_config(case)) for case in ("cwm", "mistral3", "seed_oss", "glm4_moe_lite", "kimi_k2")}
    assert [layer.window for layer in models["cwm"].layers] == [0, 5, 5, 5, 0]
    assert [layer.window for layer in models["mistral3"].layers] == [6, 6]
    assert [layer.use_experts for layer in models["glm4_moe_lite"].layers] == [False, True, False]
    biased = read(golden_config("seed_oss") | {"attention_bias": False, "attention_out_bias": True})
    for model_cfg, expected in ((models["seed_oss"], (True, False, False)), (biased, (False, True, False))):
        assert (model_cfg.qkv_bias, model_cfg.out_bias, model_cfg.mlp_bias) == expected
    for case in ("glm4_moe_lite", "kimi_k2"):  # multi-token prediction layers
        count = models[case].num_layers
        names = {f"model.layers.{layer}.eh_proj.weight" for layer in (count - 1, count)}
        assert skipped_tensors(models[case], "model.", names) == {f"model.layers.{count}.eh_proj.weight"}


def test_stated_fields_of_a_scaling_take_precedence_over_derived_ones():
    raw = with_text(golden_config("qwen3"), rope_parameters=None, rope_theta=50.0)
    stated = {"rope_type": "yarn", "attention_factor": 1.5, "beta_fast": 7, "beta_slow": 3, "truncate": False}
    rope = read(raw | {"rope_scaling": YARN | stated}).layers[0].rope
    assert (rope.attention_factor, rope.high_freq_bound, rope.low_freq_bound, rope.truncate) == (1.5, 7, 3, False)
    raw = golden_config("phi3_longrope")
    raw["rope_parameters"]["attention_factor"] = 1.25
    assert read(raw).layers[0].rope.attention_factor == 1.25
    raw = golden_config("ministral3")
    raw["rope_parameters"]["rope_type"] = "default"  # queries grow without a scaling, too
    assert read(raw).layers[0].rope.original_max_positions == 8


def test_longrope_supports_the_positions_of_pretraining_only():
    model_cfg = read(golden_config("phi3_longrope"))
    assert (model_cfg.max_positions, golden_config("phi3_longrope")["max_position_embeddings"]) == (64, 256)
    assert model_cfg.layers[0].rope.divisors == (1.0, 1.3, 2.5)
    raw = with_text(golden_config("phi3_longrope"))
    raw["rope_parameters"]["short_factor"][1] = -1.0
    with pytest.raises(UserError, match="must be at least 0"):
        read(raw)


def test_one_theta_of_an_olmo3_applies_to_all_layers():
    older = with_text(
        golden_config("olmo3"), rope_parameters=None, rope_theta=700.0, rope_scaling=YARN | {"type": "yarn"}
    )
    layers = read(older).layers
    assert {layer.rope.theta for layer in layers} == {700.0}
    assert [layer.rope.scaling for layer in layers[2:]] == ["default", "yarn"]
