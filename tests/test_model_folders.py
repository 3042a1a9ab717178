"""Model folders as people have them: each of tests/model_folders.py is read, or refused for its true cause."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_jax import load, save
from grpo_jax.errors import UserError
from grpo_jax.weights.reading import open_model_tensors
from grpo_jax.weights.source import find_model, read_model_config
from tests.model_folders import FOLDERS, GOLDEN


def read(path):
    source = find_model(path)
    return open_model_tensors(source, read_model_config(source))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_or_refused_for_its_true_cause(tmp_path, name):
    make, says = FOLDERS[name]
    make(tmp_path / "model")
    if not says:
        assert read(tmp_path / "model").stored
        return
    with pytest.raises(UserError, match=says) as raised:
        load(tmp_path / "model")
    assert "\n" not in str(raised.value) and not re.search(r"\{[a-z]+\}", str(raised.value))


def test_a_config_without_weights_is_refused_for_its_family_first(tmp_path):
    """A plan reads nothing else."""
    FOLDERS["family before all"][0](tmp_path / "model")
    with pytest.raises(UserError, match="found 'gpt_oss'"):
        read_model_config(tmp_path / "model")


@pytest.mark.parametrize("name", [pytest.param("PEFT", marks=pytest.mark.slow), "two wrappers"])
def test_the_command_that_renames_tensors_makes_the_folder_readable(tmp_path, name):
    FOLDERS[name][0](tmp_path / "model")
    with pytest.raises(UserError) as raised:
        read(tmp_path / "model")
    command = shlex.split(str(raised.value).split("Rename them with: ")[1])
    subprocess.run([sys.executable, *command[1:]], check=True)
    FOLDERS["as saved"][0](tmp_path / "plain")
    changed, plain = (load_file(tmp_path / folder / "model.safetensors") for folder in ("model", "plain"))
    assert changed.keys() == plain.keys()
    assert all(np.array_equal(changed[tensor], plain[tensor]) for tensor in plain)
    assert read(tmp_path / "model").stored


@pytest.mark.parametrize("path", ["{}/", "{}//", "{}/.", "~/model/"])
def test_a_slash_at_the_end_of_a_path_does_not_matter(tmp_path, monkeypatch, path):
    monkeypatch.setenv("HOME", str(tmp_path))
    FOLDERS["as saved"][0](tmp_path / "model")
    assert find_model(path.format(tmp_path / "model")) == tmp_path / "model"


@pytest.mark.parametrize(
    "path, says",
    [
        ("checkpoints", "found a checkpoint in the workdir of a run.*--workdir=[^ ]*/model --out"),
        ("checkpoints/100", "found a checkpoint in the workdir of a run.*--workdir=[^ ]*/model --step=100 --out"),
        ("checkpoints/100/policy", "--workdir=[^ ]*/model --step=100 --out"),
    ],
)
def test_a_checkpoint_of_a_run_is_refused_with_the_command_that_exports_it(tmp_path, path, says):
    FOLDERS["workdir of a run"][0](tmp_path / "model")
    with pytest.raises(UserError, match=says):
        find_model(tmp_path / "model" / path)


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("model.safetensors", "{}", "found the file .*model.safetensors. Set model.path to"),
        ("q4-00002-of-00003.gguf", "GGUF", "one of 3 parts"),
        ("model.gguf", "", "found an empty file"),
        ("pytorch_model.bin", "x", "found the file .*pytorch_model.bin"),
    ],
)
def test_a_file_that_is_not_a_whole_gguf_file_is_refused(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        find_model(tmp_path / name)


def test_a_gguf_file_is_read_whatever_its_name(tmp_path):
    shutil.copyfile(GOLDEN / "gguf" / "qwen2.gguf", tmp_path / "sha256-0123")
    assert read(tmp_path / "sha256-0123").stored


@pytest.mark.parametrize(
    "name", ["dtype of torch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dtype auto", "dtype half"))]
)
def test_an_export_states_the_dtype_of_its_tensors_by_its_plain_name(tmp_path, name):
    FOLDERS[name][0](tmp_path / "model")
    save(tmp_path / "out", *load(tmp_path / "model"))
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    stated = {fields[key] for key in ("dtype", "torch_dtype") if key in fields}
    assert stated == {str(value.dtype) for value in load_file(tmp_path / "out" / "model.safetensors").values()}


def test_a_file_beside_a_config_is_refused_with_its_folder(tmp_path):
    FOLDERS["as saved"][0](tmp_path / "model")
    with pytest.raises(UserError, match=r"found the file .*config.json\. Set model.path to .*/model\.$"):
        find_model(tmp_path / "model" / "config.json")


@pytest.mark.parametrize(
    "function, says", [("os.scandir", "a readable folder"), ("os.open", "config.json must be a readable file")]
)
def test_what_may_not_be_read_is_refused(tmp_path, monkeypatch, function, says):
    FOLDERS["as saved"][0](tmp_path / "model")

    def deny(path, *rest):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=f"{says}.* Permission denied"):
        patch.setattr(function, deny)
        find_model(tmp_path / "model")
