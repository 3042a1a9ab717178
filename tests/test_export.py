"""Tests saving of models, for every family, and the export of a run's policy."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from grpo_jax import export, load, save
from grpo_jax.config import check, default, write_config
from grpo_jax.errors import UserError
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.run.saving import CheckpointStore
from grpo_jax.types import TrainState
from grpo_jax.weights import writing
from grpo_jax.weights.families import FAMILIES
from grpo_jax.weights.gguf_file import read_gguf_config
from grpo_jax.weights.hf_config import model_config_from_hf
from grpo_jax.weights.portable import portable_config, portable_tokenizer_config
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tensors import open_safetensors_folder
from grpo_jax.weights.tokenizer import load_tokenizer
from tests.exports.tokenizer import small_tokenizer

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
# These cases, with the two in bfloat16, cover every kind of parameter; `make test-all` saves all of them.
QUICK = ["gemma2", "llama", "llama_bias", "mixtral", "qwen2", "qwen3", "qwen3_moe"]

OLDER_FIELDS = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "num_experts")


def stored_tensors(folder: Path) -> dict:
    """Returns the dtype and the bytes of each tensor of a folder."""
    return {
        name: (tensor.dtype, tensor.read_all().tobytes()) for name, tensor in open_safetensors_folder(folder).items()
    }


def copy_in_bfloat16(case: str, parent: Path) -> Path:
    """Copies a golden model with its weights in bfloat16, except the router's correction."""
    folder = Path(shutil.copytree(GOLDEN / case, parent / case))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if not name.endswith("correction_bias"):
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
        save_file(tensors, path)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"dtype": "bfloat16"}))
    return folder


def assert_saved_unchanged(source: Path, folder: Path) -> None:
    """Loads and saves a model; compares every tensor, the ones that the decoder skips included, and config.json."""
    save(folder, *load(source))
    expected = stored_tensors(source)
    if source.name == "gemma3_vision":  # transformers 5 reads these names too, and release 4 no others
        expected = {
            name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in expected.items()
        }
    assert stored_tensors(folder) == expected
    assert_config_is_kept(source, folder)
    assert (folder / "generation_config.json").is_file()
    with safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses other formats


def assert_config_is_kept(source: Path, folder: Path) -> None:
    """Checks that an exported config.json adds nothing to the source's but the spellings of older `transformers`."""
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, folder))
    before["model_type"] = FAMILIES[before["model_type"]].read_as or before["model_type"]
    sections = [(before, after)]
    if "text_config" in before:
        sections.append((before.pop("text_config"), after.pop("text_config")))
        # Releases read this at different levels; after the export, it is at both.
        sections[1][0].setdefault("tie_word_embeddings", before["tie_word_embeddings"])
    added = [set(new) - set(old) for old, new in sections]
    assert all(new | old == new for old, new in sections)
    assert set().union(*added) <= {"torch_dtype", *OLDER_FIELDS}
    if "rope_parameters" in sections[-1][0]:
        assert "rope_theta" in added[-1]
    else:
        assert (folder / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_loading_and_saving_changes_no_bit(tmp_path, case):
    assert_saved_unchanged(GOLDEN / case, tmp_path / "out")


@pytest.mark.parametrize("case", ["deepseek_v3", "gemma3_vision"])  # a float32 tensor among bfloat16; skipped tensors
def test_loading_and_saving_bfloat16_changes_no_bit(tmp_path, case):
    assert_saved_unchanged(copy_in_bfloat16(case, tmp_path), tmp_path / "out")


def test_sharded_parameters_are_saved_the_same(tmp_path):
    source = GOLDEN / "deepseek_v3"
    save(tmp_path / "out", *load(source, mesh=make_mesh(fsdp=2, expert=2, tensor=2)))
    assert stored_tensors(tmp_path / "out") == stored_tensors(source)


def test_a_large_model_is_saved_in_shards(tmp_path, monkeypatch):
    """The index gives the file of each tensor, and the folder loads again."""
    monkeypatch.setattr(writing, "MAX_SHARD_BYTES", 30_000)
    source = GOLDEN / "qwen3"
    model_cfg, params = load(source)
    save(tmp_path, model_cfg, params)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    files_of_tensors = {}
    for file in files:
        with safe_open(tmp_path / file, framework="np") as opened:
            files_of_tensors |= dict.fromkeys(opened.keys(), file)
    assert index["weight_map"] == files_of_tensors
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[1], params)


def test_fp8_weights_are_dequantized_and_saved_as_bfloat16(tmp_path):
    """The blocks are 5 x 7, which divide no dimension here."""
    source = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "in"))
    tensors, expected = {}, {}
    draw = np.random.default_rng(0)
    for name, value in load_file(source / "model.safetensors").items():
        if "proj" in name:
            tensors[name] = value.astype(ml_dtypes.float8_e4m3fn)
            scales = draw.uniform(0.5, 2, (-(-value.shape[0] // 5), -(-value.shape[1] // 7))).astype(np.float32)
            tensors[f"{name}_scale_inv"] = scales
            scale = scales.repeat(5, axis=0).repeat(7, axis=1)[: value.shape[0], : value.shape[1]]
            expected[name] = (tensors[name].astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
        else:
            tensors[name] = expected[name] = value.astype(ml_dtypes.bfloat16)
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"  # not used by the decoder, and copied
    tensors[rotary] = expected[rotary] = np.ones(6, ml_dtypes.bfloat16)
    write_fp8_file(source / "model.safetensors", tensors)
    raw = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    quantized = raw | {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [5, 7]}}
    (source / "config.json").write_text(json.dumps(quantized))

    model_cfg, params = load(source)
    save(tmp_path / "out", model_cfg, params)
    assert stored_tensors(tmp_path / "out") == {
        name: (value.dtype, value.tobytes()) for name, value in expected.items()
    }
    (source / "config.json").write_text(json.dumps(raw))
    assert_config_is_kept(source, tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out")[1], params)

    (source / "config.json").write_text(json.dumps(quantized))
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = np.ones((2, 2), np.float32)
    write_fp8_file(source / "model.safetensors", tensors)
    with pytest.raises(UserError, match=r"must have shape .12, 7., .*found .2, 2."):
        load(source)


def write_fp8_file(path: Path, tensors: dict) -> None:
    """Writes a safetensors file with FP8 tensors, which the library does not write from NumPy arrays."""
    dtypes = {"float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16", "float32": "F32"}
    header, data = {}, b""
    for name, value in tensors.items():
        header[name] = {
            "dtype": dtypes[value.dtype.name],
            "shape": value.shape,
            "data_offsets": [len(data), len(data) + value.nbytes],
        }
        data += value.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_tensors_that_the_decoder_does_not_use_are_skipped_and_copied(tmp_path, caplog):
    """DeepSeek-V3's layer for multi-token prediction follows its last layer."""
    source = Path(shutil.copytree(GOLDEN / "deepseek_v3", tmp_path / "in"))
    tensors = load_file(source / "model.safetensors")
    extra = {
        "model.layers.3.eh_proj.weight": np.ones((4, 8), np.float32),
        "model.layers.3.enorm.weight": np.ones(4, np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
    }
    assert "model.layers.2.input_layernorm.weight" in tensors and not any("layers.3." in name for name in tensors)
    save_file(tensors | extra, source / "model.safetensors")
    before = load(GOLDEN / "deepseek_v3")[1]
    model_cfg, params = load(source)
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert ["skipped 3 tensors" in message for message in caplog.messages] == [True]
    save(tmp_path / "out", model_cfg, params)
    assert stored_tensors(tmp_path / "out") == stored_tensors(source)
    assert len(caplog.messages) == 1  # saving does not repeat the warning


@pytest.mark.parametrize(
    "case, older",
    [
        ("llama", {"rope_theta": 500000.0}),
        (
            "llama31",
            {
                "rope_theta": 500000.0,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
        ),
        (
            "gemma3",
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 10000.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
    ],
)
def test_the_config_of_a_gguf_file_is_exported_in_both_spellings(case, older):
    read = read_gguf_config(GOLDEN / "gguf" / f"{case}.gguf")
    config = portable_config(read, "here")
    assert {name: config[name] for name in OLDER_FIELDS if name in config} == older
    assert config["rope_parameters"] == read["rope_parameters"]
    assert config["torch_dtype"] == config["dtype"]


@pytest.mark.parametrize(
    "case, older",
    [
        ("qwen3_moe", {"rope_theta": 50.0, "num_experts": 5}),
        ("glm4", {"rope_theta": 50.0, "partial_rotary_factor": 0.5}),
        # Without its sections, transformers 4 cannot compute the rotary embedding.
        ("qwen2_5_vl", {"rope_theta": 50.0, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}),
        (
            "phi3_longrope",
            {
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.75,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.3, 2.5], "long_factor": [1.5, 3.0, 9.0]},
            },
        ),
    ],
)
def test_a_config_of_transformers_5_is_exported_in_both_spellings(case, older):
    raw = json.loads((GOLDEN / case / "config.json").read_text())
    exported = portable_config(raw, "here")
    section = exported.get("text_config", exported)
    assert {name: section[name] for name in OLDER_FIELDS if name in section} == older


def test_an_export_of_a_vision_language_model_has_the_eos_of_its_text_config_and_no_quantization(tmp_path):
    source = Path(shutil.copytree(GOLDEN / "gemma3_vision", tmp_path / "in"))
    (source / "generation_config.json").unlink()
    raw = json.loads((source / "config.json").read_text())
    raw["text_config"]["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (source / "config.json").write_text(json.dumps(raw))
    save(tmp_path / "out", *load(source))
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"eos_token_id": 2}
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()


def test_special_tokens_are_exported_under_the_names_that_all_releases_read():
    fields = {"extra_special_tokens": ["<a>"], "model_specific_special_tokens": {"image_token": "<b>"}}
    assert portable_tokenizer_config(fields) == {
        "additional_special_tokens": ["<a>"],
        "extra_special_tokens": {"image_token": "<b>"},
    }


def test_files_that_all_releases_read_are_copied_byte_for_byte(tmp_path):
    """Also a config.json that has only the older spelling, and files that a first export rewrote."""
    raw = json.loads((GOLDEN / "llama/config.json").read_text())
    theta = raw.pop("rope_parameters")["rope_theta"]
    source = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "in"))
    (source / "config.json").write_text(json.dumps(raw | {"rope_theta": theta}))
    save(tmp_path / "older", *load(source))
    assert (tmp_path / "older/config.json").read_bytes() == (source / "config.json").read_bytes()
    save(tmp_path / "once", *load(GOLDEN / "gguf/qwen3.gguf"))
    save(tmp_path / "twice", *load(tmp_path / "once"))
    for path in (tmp_path / "once").iterdir():
        assert (tmp_path / "twice" / path.name).read_bytes() == path.read_bytes(), path.name
        assert path.stat().st_mode & 0o444 == 0o444
    tokenizer_config = json.loads((tmp_path / "once/tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize(
    "fields, expected",
    [
        # The spelling that transformers 5 prefers is the one that was trained with.
        ({"rope_theta": 7.0}, {"rope_theta": 5000.0}),
        (
            {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_parameters": {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
            },
        ),
        ({"rope_scaling": {}}, {"rope_scaling": None}),
        ({"auto_map": {"AutoConfig": "custom.Config"}}, {"auto_map": None}),
    ],
)
def test_an_exported_config_means_what_was_trained(fields, expected):
    raw = json.loads((GOLDEN / "llama/config.json").read_text())
    portable = portable_config(raw | fields, "here")
    assert {name: portable.get(name) for name in expected} == expected
    rest = dict(tokenizer_vocab_size=0, eos_ids=(), source="", dtype="float32")
    before, after = (model_config_from_hf(config, "here", **rest) for config in (raw | fields, portable))
    assert before == after


@pytest.mark.parametrize("stated", [{}, {"rope_scaling": None}])
def test_the_text_of_qwen3_vl_is_exported_with_the_rope_scaling_that_older_releases_need(stated):
    raw = json.loads((GOLDEN / "qwen3_vl/config.json").read_text())
    theta = raw["text_config"].pop("rope_parameters")["rope_theta"]
    raw["text_config"] |= {"rope_theta": theta} | stated
    portable = portable_config(raw, "here")
    assert portable["text_config"]["rope_scaling"] == {"rope_type": "default"}
    before, after = (model_config_from_hf(config, "here") for config in (raw, portable))
    assert before == after and before.layers[0].rope.theta == theta


def test_an_export_has_what_its_tokenizer_needs_and_no_code(tmp_path):
    source = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "in"))
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(source)
    assert '"TokenizersBackend"' in (source / "tokenizer_config.json").read_text()
    raw = json.loads((source / "tokenizer_config.json").read_text())
    auto_map = {"auto_map": {"AutoTokenizer": ["custom.Tokenizer", None]}}
    (source / "tokenizer_config.json").write_text(json.dumps(raw | auto_map))
    templates = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")
    vocabularies = ("tekken.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
    others = ("added_tokens.json", "special_tokens_map.json", "chat_template.json")
    processors = ("preprocessor_config.json", "video_preprocessor_config.json")
    (source / "processor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "custom.Processor"}}))
    for name in (*vocabularies, *others, *processors, "custom.py", "notes.txt"):
        (source / name).write_text("{}")
    save(tmp_path / "out", *load(source))
    for name in (*templates, *vocabularies, *others, *processors, "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    assert not any((tmp_path / "out" / name).exists() for name in ("custom.py", "notes.txt"))
    assert json.loads((tmp_path / "out/processor_config.json").read_text()) == {}
    exported = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert exported["tokenizer_class"] == "PreTrainedTokenizerFast" and "auto_map" not in exported
    assert exported["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert "extra_special_tokens" not in exported  # transformers 4 reads an object here, and fails on a list
    again = load_tokenizer(tmp_path / "out")
    assert again("a</s>")["input_ids"] == tokenizer("a</s>")["input_ids"]
    assert again.chat_template == tokenizer.chat_template


def test_a_tokenizer_that_releases_read_in_different_ways_is_written_as_tokenizer_json(tmp_path):
    source = Path(shutil.copytree(GOLDEN / "qwen3", tmp_path / "in"))
    (source / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}))
    (source / "merges.txt").write_text("#version: 0.2\na b\n")
    save(tmp_path / "out", *load(source))
    exported = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert exported["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_tokenizer(tmp_path / "out")("abb")["input_ids"] == load_tokenizer(source)("abb")["input_ids"] == [3, 2]


def test_a_folder_with_another_model_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "qwen3", tmp_path / "out")
    before = stored_tensors(tmp_path / "out")
    with pytest.raises(UserError, match=r"must not hold another model; found model-00001-of"):
        save(tmp_path / "out", *load(GOLDEN / "llama"))
    assert stored_tensors(tmp_path / "out") == before
    for _ in range(2):  # files of the same names are replaced
        save(tmp_path / "again", *load(GOLDEN / "llama"))


def test_saving_over_the_source_is_refused(tmp_path):
    source = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "in"))
    with pytest.raises(UserError, match="must be saved to a new folder"):
        save(source, *load(source))


@pytest.fixture
def run(tmp_path):
    """Makes a run of the tiny model with checkpoints of steps 3 and 7, whose embeddings are all 3 and all 7."""
    cfg = check(default())
    write_config(tmp_path / "run", cfg)
    _, params = load("tiny")
    for step in (3, 7):
        marked = params | {"embed": {"embedding": jnp.full_like(params["embed"]["embedding"], step)}}
        state = TrainState(jnp.int32(step), marked, {"count": jnp.int32(0)}, jnp.int32(0), jnp.bool_(False))
        store = CheckpointStore(tmp_path / "run", 2, "", 0)
        store.save(state, {"step": step}, None, None, is_replaced=False)
        store.close()
    return tmp_path / "run"


@pytest.mark.parametrize("argv, value", [([], 7), (["--step=3"], 3), (["--base"], None)])
def test_an_export_is_the_policy_of_the_step_or_the_base_model(run, tmp_path, argv, value, capsys, monkeypatch):
    shown = []
    monkeypatch.setattr("grpo_jax.run.export.set_bytes", lambda done, total: shown.append(done / total))
    export.main([f"--workdir={run}", f"--out={tmp_path}/out", *argv])
    assert shown[-1:] == [1] * (value is None)  # only the weights of the base model are loaded
    assert "policy after step" in capsys.readouterr().out or value is None
    model_cfg, params = load(tmp_path / "out")
    base_cfg, base_params = load("tiny")
    table, base_table = params["embed"]["embedding"], base_params["embed"]["embedding"]
    np.testing.assert_array_equal(table, base_table if value is None else np.full_like(table, value))
    assert_config_is_kept(find_model("tiny"), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (find_model("tiny") / name).read_bytes()
    assert model_cfg.eos_ids == base_cfg.eos_ids
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--step=5"], r"kept in .* \(3, 7\); found 5"),
        (["--base", "--step=3"], "--base and --step may be given; found both"),
        (["--out="], "Pass --out=DIR"),
        (["--step=x"], "invalid int"),
    ],
)
def test_a_mistake_in_the_arguments_writes_nothing(run, tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        export.main([f"--workdir={run}", f"--out={tmp_path}/out", *argv])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_cannot_be_written_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"can be written; .*Choose another --out"):
        export.main([f"--workdir={run}", f"--out={tmp_path}/file/out"])


def test_an_export_does_not_overwrite_files(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(UserError, match="a new or empty folder"):
        export.main([f"--workdir={run}", f"--out={tmp_path}/out"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
