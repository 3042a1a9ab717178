"""The presets of configs/r1zero.py."""

import re
from pathlib import Path

import pytest

from grpo_jax import main
from grpo_jax.config import check, default
from grpo_jax.config.flags import load_config
from grpo_jax.errors import UserError

FILE = Path(__file__).parent.parent / "configs" / "r1zero.py"
NAMES = (
    "tiny",
    "smollm2",
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen2.5-3b",
    "qwen2.5-7b",
    "qwen2.5-32b",
    "qwen3-1.7b",
    "qwen3-8b",
    "qwen3-30b-a3b",
    "llama3.2-3b",
    "llama3.1-8b",
    "gemma3-4b",
    "deepseek-v3",
)


def module():
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("r1zero", FILE)
    loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_all_presets_are_there():
    assert tuple(module().PRESETS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_fits_the_devices_that_it_names(name):
    config = check(load_config(f"{FILE}:{name}"))
    text = module().PRESETS[name].__doc__
    devices = [int(number) for number in re.findall(r"(?:On|or) (\d+) (?:device|of)", text)]
    assert devices
    for count in devices:
        sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.expert, config.mesh.tensor]
        known = 1
        for size in sizes:
            known *= size if size > 0 else 1
        assert count % known == 0 and (known == count or -1 in sizes)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_how_it_is_run(name):
    text = module().PRESETS[name].__doc__
    assert (f"r1zero.py:{name} " in text or f"make {name}" in text) if name != "tiny" else "r1zero.py --workdir" in text
    real = name not in ("tiny", "smollm2")
    assert check(load_config(f"{FILE}:{name}")).model.compute_dtype == ("bfloat16" if real else "float32")


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_sets_no_key_in_vain(name):
    """The check refuses keys without effect, so the presets pass it."""
    config = load_config(f"{FILE}:{name}")
    assert check(config).model.path == config.model.path


def test_no_preset_is_tiny():
    assert load_config(str(FILE)).to_dict() == load_config(f"{FILE}:tiny").to_dict() == default().to_dict()


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="qwen2.5-7b.*found 'qwen2.5-8b'. Did you mean qwen2.5-7b"):
        load_config(f"{FILE}:qwen2.5-8b")


def test_a_hub_model_without_a_network_says_what_to_download(tmp_path):
    with pytest.raises(UserError, match="hf download Qwen/Qwen2.5-0.5B --local-dir Qwen2.5-0.5B.*model.path"):
        main.main([f"--config={FILE}:qwen2.5-0.5b", f"--workdir={tmp_path}/run"])
    assert not (tmp_path / "run").exists()
