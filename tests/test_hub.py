"""Models on the Hugging Face Hub: what is downloaded, in which order, and repositories that hold no model for us."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from grpo_jax.errors import UserError
from grpo_jax.weights.source import find_model
from tests.model_folders import FOLDERS, config, copied, empty, gguf, wrote


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes `snapshot_download` copy from the folder `hub`, and returns the list of the names that it copied."""
    monkeypatch.chdir(tmp_path)
    downloaded = []

    def names():
        return sorted(str(path.relative_to("hub")) for path in Path("hub").rglob("*") if path.is_file())

    def snapshot_download(hub_id, **patterns):
        assert hub_id == "owner/name"
        for name in filter_repo_objects(names(), **patterns):
            downloaded.append(name)
            (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path("hub", name), tmp_path / "cache" / name)
        (tmp_path / "cache").mkdir(exist_ok=True)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, hub_id: names())
    return downloaded


@pytest.mark.parametrize("path", ["owner/name", "owner/name/"])
def test_a_model_is_downloaded_without_code_pickles_and_other_formats(tmp_path, hub, path):
    copied(
        wrote("tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"),
        wrote("tokenizer.model", "merges.txt", "onnx/config.json"),
        wrote("modeling.py", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "model.gguf"),
    )(tmp_path / "hub")
    assert find_model(path) == tmp_path / "cache"
    assert sorted(hub) == [
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]


@pytest.mark.parametrize(
    "change, says",
    [
        (config(model_type="gpt_oss"), "model_type in owner/name must be one of"),
        (config(quantization_config={"quant_method": "awq"}), "found AWQ"),
        (wrote("config.json", text="{}"), "with a model_type; found an empty object"),
    ],
)
def test_weights_are_not_downloaded_if_the_model_is_not_supported(tmp_path, hub, change, says):
    copied(change)(tmp_path / "hub")
    with pytest.raises(UserError, match=says):
        find_model("owner/name")
    assert "config.json" in hub and "model.safetensors" not in hub


@pytest.mark.parametrize(
    "make, says",
    [
        (
            empty(gguf("m.Q4_K_M.gguf", "m.Q8_0.gguf"), wrote("README.md")),
            "owner/name must hold .*found m.Q4_K_M.gguf, a GGUF file.*hf download owner/name m.Q4_K_M.gguf --local-dir "
            "name`, and set model.path to name/m.Q4_K_M.gguf",
        ),
        (FOLDERS["pickle"][0], r"found pytorch_model.bin, a pickle.*from_pretrained\('owner/name'\)"),
        (FOLDERS["only consolidated"][0], "owner/name must .*Mistral's own format"),
        (FOLDERS["adapter"][0], "an adapter for owner/base"),
        (FOLDERS["adapter as a pickle"][0], "an adapter for owner/base"),
        (empty(wrote("README.md")), "found an empty folder"),
    ],
)
def test_a_repository_without_safetensors_is_refused_for_what_it_holds(tmp_path, hub, make, says):
    make(tmp_path / "hub")
    with pytest.raises(UserError, match=says):
        find_model("owner/name")


@pytest.mark.parametrize("start", ["https://huggingface.co/", "http://hf.co/", "huggingface.co/", "hf://"])
@pytest.mark.parametrize("end", ["", "/", "/tree/main", "/resolve/main/model.gguf"])
def test_an_address_is_refused_with_the_id_in_it(hub, start, end):
    with pytest.raises(UserError, match=r"found an address\. Set model.path to owner/name\."):
        find_model(f"{start}owner/name{end}")


def test_another_address_is_refused():
    with pytest.raises(UserError, match=r"found the address s3://owner/name\. Download the model"):
        find_model("s3://owner/name")
