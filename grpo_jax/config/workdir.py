"""Writes the config of a run to its workdir, compares it when the run is resumed, and reads it for other commands."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_jax.config.keys import flatten, format_as_flag, key_specs
from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def check_workdir(workdir: Path, cfg: Config) -> None:
    """Checks that a workdir is new or empty, or belongs to a run that `cfg` may resume.

    Raises:
        UserError: The workdir holds other files, or a run whose config differs in a key that is not `resumable`.
    """
    if (workdir / "config.json").is_file():
        before, now = flatten(read_config(workdir).to_dict()), flatten(dataclasses.asdict(cfg))
        for name in sorted(before.keys() ^ now.keys()):
            change = "lacks" if name in now else "has the unknown"
            raise UserError(
                f"The run in {workdir} must have the keys of this version of grpo_jax to be resumed, but it {change} "
                f"key {name}. Choose another --workdir."
            )
        for name, spec in key_specs(Config).items():
            if before[name] != now[name] and not spec.resumable:
                fix = format_as_flag(name, before[name])
                if name in ("task.name", "reward.parts", "reward.weights"):
                    fix += ", or the same problems and rewards if grpo_jax.train was called with some"
                raise UserError(
                    f"The run in {workdir} was started with {name}={before[name]!r} and cannot be resumed with "
                    f"{name}={now[name]!r}. Choose another --workdir, or pass {fix}."
                )
    elif workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise UserError(
            f"--workdir must be a new folder or that of an earlier run; {workdir} holds other files. "
            "Choose another --workdir."
        )


def write_config(workdir: Path, cfg: Config) -> None:
    """Writes config.json atomically: the config with which the run continues.

    Raises:
        UserError: The folder is not writable.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        partial = workdir / "config.json.partial"
        partial.write_text(json.dumps(dataclasses.asdict(cfg), indent=2) + "\n")
        partial.replace(workdir / "config.json")
    except OSError as error:
        raise UserError(f"--workdir must be a writable folder, but {error}. Choose another --workdir.") from None


def read_config(workdir: Path) -> "ConfigDict":
    """Reads the config of a run; it is not checked yet.

    Raises:
        UserError: The folder has no readable config.json.
    """
    from ml_collections import ConfigDict

    try:
        values = json.loads((Path(workdir) / "config.json").read_text(), object_hook=with_tuples)
        if not isinstance(values, dict):
            raise ValueError(f"config.json holds {str(values)[:40]!r} instead of an object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{workdir} must be the workdir of a training run, with a config.json: {error}. Pass another --workdir."
        ) from None
    return ConfigDict(values)


def with_tuples(section: dict[str, Any]) -> dict[str, Any]:
    """Returns a section of parsed JSON with its lists as tuples, as a config has them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
