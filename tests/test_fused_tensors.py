"""Fused tensors: their parts read only their own rows, they are saved fused, and malformed ones are refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from grpo_jax import load, save
from grpo_jax.errors import UserError
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.weights.fused_tensors import join_rows, select_rows
from grpo_jax.weights.tensors import StoredTensor

GOLDEN = Path(__file__).parent / "golden"
QKV = "model.layers.1.self_attn.qkv_proj.weight"


def test_parts_read_their_own_rows_and_make_up_the_whole():
    values = np.arange(24).reshape(8, 3)
    read = []

    def record(index):
        read.append(index)
        return values[index]

    whole = StoredTensor(values.shape, values.dtype, record)
    parts = [select_rows(whole, first, (rows, 3)) for first, rows in ((0, 5), (5, 2), (7, 1))]
    np.testing.assert_array_equal(parts[1].read((slice(1, 2), slice(0, 2))), values[6:7, :2])
    assert read == [(slice(6, 7), slice(0, 2))]
    joined = join_rows(parts)
    assert joined.shape == whole.shape
    np.testing.assert_array_equal(joined.read_all(), values)


@pytest.mark.parametrize("case", ["phi3", "glm4"])
def test_a_model_that_was_sharded_is_saved_with_its_fused_tensors(tmp_path, case):
    save(tmp_path / "out", *load(GOLDEN / case, mesh=make_mesh(fsdp=2, tensor=4)))
    before, after = (load_file(folder / "model.safetensors") for folder in (GOLDEN / case, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda tensor: tensor[:-8],
            rf"{QKV} in .* must have shape \(48, 24\) .*; found \(40, 24\)",
        ),
        (lambda tensor: tensor.T.copy(), rf"{QKV} in .* must have shape \(48, 24\) .*; found \(24, 48\)"),
        (lambda tensor: None, f"found 1 missing, such as {QKV}"),
    ],
)
def test_a_fused_tensor_that_contradicts_the_config_is_refused_by_its_name(tmp_path, change, message):
    folder = Path(shutil.copytree(GOLDEN / "phi3", tmp_path / "phi3"))
    tensors = load_file(folder / "model.safetensors")
    tensors[QKV] = change(tensors[QKV])
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load(folder)
