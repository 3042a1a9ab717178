"""Helpers for config files: finding them, choosing a preset by name, and settings that do not depend on the recipe."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.config.functions import import_file, suggest
from grpo_jax.config.keys import flatten
from grpo_jax.errors import UserError


def shipped_configs() -> Path:
    """Returns the folder of the config files that come with the package: in a wheel, or next to it in a checkout."""
    package = Path(__file__).parent.parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def find_config(file: str) -> Path | None:
    """Finds a config file: a local one, or otherwise one that comes with the package.

    Args:
        file: A path. `configs/NAME.py`, or `NAME` for short, also stands for the file that comes with the package.

    Returns:
        The file's absolute path; None if there is no such file.
    """
    path = Path(file)
    if path.name == file and not path.suffix:
        path = Path("configs", f"{file}.py")
    shipped = [shipped_configs() / path.name] if path.parent == Path("configs") else []
    files = [candidate.resolve() for candidate in (path, *shipped) if candidate.is_file()]
    return files[0] if path.suffix == ".py" and files else None


def choose_preset(presets: Mapping[str, Callable[[], ConfigDict]], name: str, file: str) -> ConfigDict:
    """Returns the config of the preset `name`.

    Args:
        presets: The functions that build the presets, by name.
        name: What follows the colon in --config=FILE.py:PRESET.
        file: The config file, for the error.

    Raises:
        UserError: There is no such preset.
    """
    if name not in presets:
        hint = suggest(name, presets, "{}") or "Choose one of them."
        raise UserError(f"The preset of {file} must be one of {', '.join(presets)}; found {name!r}. {hint}")
    return presets[name]()


def nearest_preset(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Finds the preset among those of the package from which a config differs in the fewest keys.

    Args:
        config: The config by dotted name.

    Returns:
        (spec, values): The preset as in --config=NAME:PRESET, and its config by dotted name.
    """
    candidates = {}
    for file in sorted(shipped_configs().glob("*.py"), key=lambda file: (file.stem != "r1zero", file.stem)):
        module = import_file(file)
        for preset, make in getattr(module, "PRESETS", {}).items():
            candidates[f"{file.stem}:{preset}"] = flatten(make().to_dict())

    def differences(spec: str) -> int:
        return sum(config.get(key) != value for key, value in candidates[spec].items())

    spec = min(candidates, key=differences)
    return spec, candidates[spec]


def tiny_model(cfg: ConfigDict) -> ConfigDict:
    """Sets the keys that the tiny presets of recipes have in common, and returns `cfg`.

    The run makes 25 rollouts with 4 updates each, and the learning rate decays linearly to a tenth. With a constant
    learning rate, some recipes learn the task and then unlearn it.
    """
    cfg.rollout.prompts, cfg.train.minibatches = 32, 4
    cfg.total_steps = cfg.optim.decay_steps = 100
    cfg.optim.schedule, cfg.optim.end_lr_fraction = "linear", 0.1
    return cfg


def hub_model(
    cfg: ConfigDict,
    path: str,
    *,
    prompts: int = 32,
    samples: int = 16,
    max_prompt_tokens: int = 512,
    max_tokens: int,
    lr: float,
    minibatches: int = 1,
    steps: int = 1000,
    fsdp: int = -1,
    tensor: int = 1,
    expert: int = 1,
) -> ConfigDict:
    """Sets the keys that presets for models on the Hugging Face hub have in common, and returns `cfg`.

    Apply the recipe to `cfg` before calling this function, which sets the dtype of the reference only if `loss.kl_coef`
    is not 0. Override individual keys afterwards.

    Args:
        cfg: The config to change.
        path: The hub id of the base model.
        prompts: Number of prompts per rollout.
        samples: Number of completions per prompt.
        max_prompt_tokens: Longest prompt in tokens.
        max_tokens: Longest completion in tokens.
        lr: Learning rate.
        minibatches: Number of updates per rollout.
        steps: Number of updates.
        fsdp: Size of the mesh axis `fsdp`; -1 for the devices that the other axes leave.
        tensor: Size of the mesh axis `tensor`.
        expert: Size of the mesh axis `expert`.
    """
    cfg.model.path, cfg.model.compute_dtype = path, "bfloat16"
    if cfg.loss.kl_coef:
        cfg.model.reference_dtype = "bfloat16"
    cfg.task.name, cfg.task.path = "file", "questions.jsonl"
    cfg.rollout.prompts, cfg.rollout.samples = prompts, samples
    cfg.rollout.max_prompt_tokens, cfg.rollout.max_tokens = max_prompt_tokens, max_tokens
    cfg.train.minibatches, cfg.train.micro_tokens = minibatches, 4096
    cfg.train.chunk_tokens = 2048  # smaller chunks make accelerators read the head's gradient more often
    cfg.optim.lr, cfg.total_steps = lr, steps
    cfg.optim.b2 = 0.95  # usual in the pretraining of large models; recovers from a spike sooner than 0.999
    cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor, cfg.mesh.expert = 1, fsdp, tensor, expert
    cfg.eval.every_steps = cfg.checkpoint.every_steps = 50
    return cfg
