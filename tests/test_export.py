"""Models out again: every family bitwise, a trained policy as a folder that loads, mistakes refused."""

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

from grpo_jax import export, forward, load, save
from grpo_jax.config import check, default, write_config
from grpo_jax.errors import UserError
from grpo_jax.run import checkpoint
from grpo_jax.weights import model_io
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tensors import open_safetensors_folder

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/reference.npz") if path.parent.name != "gguf")


def numbers(folder: Path) -> dict:
    """Tensor name -> (dtype, bytes) of a folder."""
    return {name: (tensor.dtype, tensor.read_all().tobytes()) for name, tensor in open_safetensors_folder(folder).items()}


def in_dtype(case: str, folder: Path, dtype) -> Path:
    """A copy of a golden model with its weights in another dtype, but for the router's correction."""
    shutil.copytree(GOLDEN / case, folder)
    for path in folder.glob("*.safetensors"):
        save_file(
            {
                name: value if name.endswith("correction_bias") else value.astype(dtype)
                for name, value in load_file(path).items()
            },
            path,
        )
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"dtype": np.dtype(dtype).name}))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", FAMILIES)
def test_load_and_save_is_bitwise(tmp_path, case, dtype):
    """Tensors that the decoder skips are carried along; config.json stays as it is."""
    source = GOLDEN / case if dtype == "float32" else in_dtype(case, tmp_path / "in", ml_dtypes.bfloat16)
    save(tmp_path / "out", *load(source))
    assert numbers(tmp_path / "out") == numbers(source)
    assert (tmp_path / "out/config.json").read_text() == (source / "config.json").read_text()
    assert (tmp_path / "out/generation_config.json").is_file()


def test_parameters_on_a_mesh_are_saved_the_same(tmp_path):
    from grpo_jax.parallel.mesh import make_mesh

    source = GOLDEN / "deepseek_v3"
    save(tmp_path / "out", *load(source, mesh=make_mesh(fsdp=2, expert=2, tensor=2)))
    assert numbers(tmp_path / "out") == numbers(source)


def test_a_large_model_is_written_as_shards(tmp_path, monkeypatch):
    """At 30 kB a file here; the index names the file of each tensor, and the folder loads again."""
    monkeypatch.setattr(model_io, "MAX_SHARD_BYTES", 30_000)
    source = GOLDEN / "qwen3"
    model_cfg, params = load(source)
    save(tmp_path, model_cfg, params)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    held = {}
    for file in files:
        with safe_open(tmp_path / file, framework="np") as opened:
            held |= dict.fromkeys(opened.keys(), file)
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path)[1], params)


def test_fp8_weights_are_dequantized_and_go_out_as_bfloat16(tmp_path):
    """Blocks of 5 x 7, which no size here is a multiple of."""
    source = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "in"))
    tensors, expected = {}, {}
    draw = np.random.default_rng(0)
    for name, value in load_file(source / "model.safetensors").items():
        if "proj" in name:
            tensors[name] = value.astype(ml_dtypes.float8_e4m3fn)
            scales = draw.uniform(0.5, 2, (-(-value.shape[0] // 5), -(-value.shape[1] // 7))).astype(np.float32)
            tensors[f"{name}_scale_inv"] = scales
            spread = scales.repeat(5, axis=0).repeat(7, axis=1)[: value.shape[0], : value.shape[1]]
            expected[name] = (tensors[name].astype(np.float32) * spread).astype(ml_dtypes.bfloat16)
        else:
            tensors[name] = expected[name] = value.astype(ml_dtypes.bfloat16)
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"  # skipped, and carried along
    tensors[rotary] = expected[rotary] = np.ones(6, ml_dtypes.bfloat16)
    write_raw(source / "model.safetensors", tensors)
    raw = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    quantized = raw | {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [5, 7]}}
    (source / "config.json").write_text(json.dumps(quantized))

    model_cfg, params = load(source)
    save(tmp_path / "out", model_cfg, params)
    got = open_safetensors_folder(tmp_path / "out")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(got[name].read_all(), value)
    assert json.loads((tmp_path / "out/config.json").read_text()) == raw
    tokens = jnp.arange(6)[None]
    np.testing.assert_array_equal(forward(model_cfg, params, tokens), forward(*load(tmp_path / "out"), tokens))

    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"] = np.ones((2, 2), np.float32)
    write_raw(source / "model.safetensors", tensors)
    with pytest.raises(UserError, match=r"must have shape .12, 7., .*found .2, 2."):
        load(source)


def write_raw(path: Path, tensors: dict) -> None:
    """A safetensors file with FP8 in it, which the library's numpy side does not write."""
    kinds = {"float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16", "float32": "F32"}
    header, data = {}, b""
    for name, value in tensors.items():
        header[name] = {
            "dtype": kinds[value.dtype.name],
            "shape": value.shape,
            "data_offsets": [len(data), len(data) + value.nbytes],
        }
        data += value.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_the_layer_that_predicts_further_ahead_is_skipped_and_carried(tmp_path, caplog):
    """DeepSeek-V3's layer 61: the layer whose number is the number of layers."""
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
    assert len([message for message in caplog.messages if "skipped 3 tensors" in message]) == 1
    save(tmp_path / "out", model_cfg, params)
    assert numbers(tmp_path / "out") == numbers(source)


def test_a_model_is_not_mixed_with_another(tmp_path):
    shutil.copytree(GOLDEN / "qwen3", tmp_path / "out")
    before = numbers(tmp_path / "out")
    with pytest.raises(UserError, match=r"must not hold another model; found model-00001-of"):
        save(tmp_path / "out", *load(GOLDEN / "llama"))
    assert numbers(tmp_path / "out") == before
    for _ in range(2):  # its own files are replaced
        save(tmp_path / "again", *load(GOLDEN / "llama"))


def test_saving_over_the_source_is_refused(tmp_path):
    source = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "in"))
    with pytest.raises(UserError, match="must be saved to a new folder"):
        save(source, *load(source))


@pytest.fixture
def run(tmp_path):
    """A workdir of the tiny model with checkpoints after steps 3 and 7, whose embeddings are all 3 and all 7."""
    cfg = check(default())
    write_config(tmp_path / "run", cfg)
    _, params = load(find_model("tiny"))
    for step in (3, 7):
        marked = params | {"embed": {"embedding": jnp.full_like(params["embed"]["embedding"], step)}}
        state = checkpoint.TrainState(jnp.int32(step), marked, {"count": jnp.int32(0)}, jnp.int32(0))
        manager = checkpoint.open_checkpoint_manager(tmp_path / "run", 2)
        checkpoint.save_checkpoint(manager, state, {"step": step}, None)
        manager.close()
    return tmp_path / "run"


@pytest.mark.parametrize("argv, value", [([], 7), (["--step=3"], 3), (["--base"], None)])
def test_a_run_is_exported(run, tmp_path, argv, value, capsys):
    export.main([f"--workdir={run}", f"--out={tmp_path}/out", *argv])
    assert "policy after step" in capsys.readouterr().out or value is None
    model_cfg, params = load(tmp_path / "out")
    table = np.asarray(params["embed"]["embedding"])
    base = np.asarray(load(find_model("tiny"))[1]["embed"]["embedding"])
    np.testing.assert_array_equal(table, base if value is None else np.full_like(table, value))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (find_model("tiny") / name).read_bytes()
    assert model_cfg.eos_ids == load(find_model("tiny"))[0].eos_ids
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--step=5"], r"kept in .* \(3, 7\); found 5"),
        (["--base", "--step=3"], "--base and --step may be given; found both"),
        (["--out="], "Pass --out=DIR"),
        (["--step=x"], "invalid int"),
    ],
)
def test_mistakes_in_exporting(run, tmp_path, argv, says):
    with pytest.raises(UserError, match=says):
        export.main([f"--workdir={run}", f"--out={tmp_path}/out", *argv])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_place_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"can be written; .*Choose another --out"):
        export.main([f"--workdir={run}", f"--out={tmp_path}/file/out"])


def test_an_export_overwrites_nothing(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(UserError, match="a new or empty folder"):
        export.main([f"--workdir={run}", f"--out={tmp_path}/out"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("case", FAMILIES)
def test_transformers_continues_an_export_as_we_do(tmp_path, case):
    """32 greedy tokens of the exported folder, where torch is installed."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    save(tmp_path, *load(GOLDEN / case))
    reference = np.load(GOLDEN / case / "reference.npz")
    auto = transformers.AutoModelForImageTextToText if case == "gemma3_vision" else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.tensor(reference["tokens"].astype(np.int64))
    with torch.no_grad():
        for _ in range(32):
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], dim=1)
    np.testing.assert_array_equal(tokens.numpy(), reference["greedy"])
