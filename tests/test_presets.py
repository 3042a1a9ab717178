"""Tests the presets of configs/r1zero.py, and the memory and devices that all presets state."""

import math
import re
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from grpo_jax import main
from grpo_jax.config import Config, check, default
from grpo_jax.config.flags import load_config
from grpo_jax.errors import UserError
from grpo_jax.learn.optimizer import make_optimizer, train_state_shapes, train_state_shardings
from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import MESH_AXES
from grpo_jax.planning.models import plan_model
from grpo_jax.planning.topology import CHIPS, parse_topology
from grpo_jax.rollout.memory import bytes_per_device

CONFIGS = Path(__file__).parent.parent / "configs"
FILE = CONFIGS / "r1zero.py"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem not in ("own", "pretrain_tiny"))
NAMES = (
    "tiny",
    "smollm2",
    "gemma3-270m",
    "qwen2.5-0.5b",
    "qwen2.5-1.5b",
    "qwen2.5-1.5b-24gb",
    "qwen2.5-1.5b-kaggle",
    "qwen2.5-3b",
    "qwen2.5-3b-80gb",
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


def presets_of(recipe: str) -> dict:
    """Returns the functions that build the presets of a config file, by name."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location(recipe, CONFIGS / f"{recipe}.py")
    loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded.PRESETS


PRESETS = {recipe: presets_of(recipe) for recipe in RECIPES}
EVERY_PRESET = [(recipe, name) for recipe in RECIPES for name in PRESETS[recipe]]
HUB_PRESETS = [(recipe, name) for recipe, name in EVERY_PRESET if name not in ("tiny", "smollm2", "gemma3-270m")]


def checked(recipe: str, name: str) -> Config:
    """Returns the checked config of a preset."""
    return check(load_config(f"{CONFIGS / recipe}.py:{name}"))


def test_all_presets_exist():
    assert tuple(PRESETS["r1zero"]) == NAMES
    assert len(RECIPES) == 11
    assert [recipe for recipe in RECIPES if len(PRESETS[recipe]) < 2 or next(iter(PRESETS[recipe])) != "tiny"] == []


def planned_machines(text: str) -> list[tuple[int, float]]:
    """Returns the number of chips, and the memory of one in GB, of every topology that a docstring names."""
    parsed = [parse_topology(name) for name in re.findall(r"^ *On (\w+:[\dx]+):", text, flags=re.M)]
    return [(math.prod(sizes), CHIPS[kind].memory_bytes / 1e9) for kind, sizes in parsed]


@pytest.mark.parametrize(("recipe", "name"), EVERY_PRESET)
def test_a_preset_fits_the_devices_that_it_names(recipe, name):
    config = checked(recipe, name)
    text = PRESETS[recipe][name].__doc__
    devices = [int(number) for number in re.findall(r"(?:On|or) (\d+) (?:device|of)", text)]
    devices += [count for count, _ in planned_machines(text)]
    assert devices
    for count in devices:
        sizes = [config.mesh.data, config.mesh.fsdp, config.mesh.expert, config.mesh.tensor]
        known = 1
        for size in sizes:
            known *= size if size > 0 else 1
        assert count % known == 0 and (known == count or -1 in sizes)


def model_of(name: str, recipe: str = "r1zero") -> ModelConfig:
    """Returns the architecture of a preset's model, from the table that plans use."""
    return plan_model(checked(recipe, name))


def state_bytes(cfg: Config, params: dict, sizes: tuple[int, ...]) -> int:
    """Returns the bytes per device of policy, gradient, optimizer state and reference on a mesh of these sizes.

    Args:
        cfg: the preset's config; without a KL penalty there is no reference.
        params: shapes of the policy's parameters.
        sizes: sizes of the mesh axes.
    """
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    reference = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, cfg.model.reference_dtype), params)
    optimizer = make_optimizer(cfg.optim)
    moments = train_state_shapes(params, optimizer).opt_state
    shardings = train_state_shardings(mesh, params, optimizer)
    return (
        2 * bytes_per_device(params, shardings.params)
        + bytes_per_device(moments, shardings.opt_state)
        + (bytes_per_device(reference, shardings.params) if cfg.loss.kl_coef else 0)
    )


@pytest.mark.parametrize(("recipe", "name"), HUB_PRESETS)
def test_the_state_of_a_preset_is_as_large_as_it_says_and_fits(recipe, name):
    """At most two thirds of a device's memory, which leaves the rest for activations and the KV cache."""
    cfg = checked(recipe, name)
    params = param_shapes(plan_model(cfg), cfg.model.param_dtype)
    text = PRESETS[recipe][name].__doc__
    stated, unit = re.search(r"([\d.]+) (GB|TB) of state", text).groups()
    total = state_bytes(cfg, params, (1, 1, 1, 1))
    assert total == pytest.approx(float(stated) * {"GB": 1e9, "TB": 1e12}[unit], rel=0.03)
    machines = [(int(count), int(size)) for count, size in re.findall(r"(\d+) (?:devices? )?of (\d+) GB", text)]
    machines += planned_machines(text)
    assert machines
    for devices, memory in machines:
        fixed = cfg.mesh.expert * cfg.mesh.tensor
        sizes = (cfg.mesh.data, devices // fixed, cfg.mesh.expert, cfg.mesh.tensor)
        assert state_bytes(cfg, params, sizes) < memory * 1e9 * 2 / 3


@pytest.mark.parametrize(("recipe", "name"), EVERY_PRESET)
def test_a_preset_says_how_it_is_run(recipe, name):
    text = PRESETS[recipe][name].__doc__
    spec = f"configs/{recipe}.py" if name == "tiny" else f"configs/{recipe}.py:{name}"
    assert f"python -m grpo_jax.main --config={spec} --workdir=" in text or f"make {name}" in text
    real = (recipe, name) in HUB_PRESETS
    assert checked(recipe, name).model.compute_dtype == ("bfloat16" if real else "float32")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_default_preset_is_tiny(recipe):
    assert load_config(f"{CONFIGS / recipe}.py").to_dict() == load_config(f"{CONFIGS / recipe}.py:tiny").to_dict()


def test_the_tiny_preset_of_r1zero_is_the_default_config():
    assert load_config(str(FILE)).to_dict() == default().to_dict()


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match=r"qwen2.5-7b.*found 'qwen2.5-8b'. Did you mean qwen2.5-7b"):
        load_config(f"{FILE}:qwen2.5-8b")


def test_a_hub_model_without_a_network_says_what_to_download(tmp_path):
    problems = tmp_path / "questions.jsonl"
    problems.write_text("".join(f'{{"question": "1 + {n}?", "answer": {n + 1}}}\n' for n in range(10)))
    with pytest.raises(UserError, match=r"hf download Qwen/Qwen2.5-0.5B --local-dir Qwen2.5-0.5B.*model.path"):
        main.main([f"--config={FILE}:qwen2.5-0.5b", f"--config.task.path={problems}", f"--workdir={tmp_path}/run"])
    assert not (tmp_path / "run").exists()
