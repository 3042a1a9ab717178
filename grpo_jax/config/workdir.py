"""Writes the config of a run to its workdir, compares it when the run is resumed, and reads it for other commands."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_jax.config.keys import flatten, format_as_flag, key_specs
from grpo_jax.config.pretrain_schema import PretrainConfig
from grpo_jax.config.rules import with_floats
from grpo_jax.config.schema import Config, default
from grpo_jax.errors import UserError
from grpo_jax.foreign import read_json_file

if TYPE_CHECKING:
    from ml_collections import ConfigDict


# Files that a run may leave if it ends before it writes config.json.
FIRST_FILES = {"run.lock", "files.json", "files.json.partial", "config.json.partial"}


def has_checkpoint(workdir: Path) -> bool:
    """Returns whether a run has saved a checkpoint, even a damaged one. Until then, its config may still change."""
    return any(re.fullmatch(r"(damaged-)?\d+(-\d+)?", path.name) for path in (workdir / "checkpoints").glob("*"))


def check_workdir(workdir: Path, cfg: Config) -> None:
    """Checks that a workdir is new or empty, or belongs to a run that `cfg` may resume or start over.

    Raises:
        UserError: The workdir holds other files, or a run with a checkpoint whose config differs in keys that are not
            `resumable`.
    """
    has_config = (workdir / "config.json").is_file()
    if has_checkpoint(workdir):  # without config.json, the config in the checkpoint is compared when it is restored
        if has_config:
            compare_configs(workdir, flatten(read_config(workdir).to_dict()), flatten(dataclasses.asdict(cfg)))
    elif not has_config and workdir.exists():
        if not workdir.is_dir() or {path.name for path in workdir.iterdir()} - FIRST_FILES:
            raise UserError(
                f"--workdir must be a new folder or that of an earlier run; {workdir} holds other files. "
                "Choose another --workdir."
            )


def compare_configs(workdir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises a UserError that lists all the keys for which a run cannot be resumed; both dicts are by dotted name."""
    wrong = [f"lacks {name}" for name, spec in key_specs(Config).items() if name not in before and not spec.resumable]
    wrong += [f"has the unknown {name}" for name in before if name not in now]
    if wrong:
        raise UserError(
            f"The run in {workdir} must have the keys of this version of grpo_jax to be resumed, but it "
            f"{', '.join(wrong)}. Choose another --workdir."
        )
    if changed := changed_keys(before, now):
        fix = " ".join(format_as_flag(name, before[name]) for name in changed)
        if {"task.name", "reward.parts", "reward.weights"} & set(changed):
            fix += ", or the same problems and rewards if grpo_jax.train was called with some"
        raise UserError(
            f"The run in {workdir} was started with {list_values(before, changed)} and cannot be resumed with "
            f"{list_values(now, changed)}. Choose another --workdir, leave out --config to resume it as it is, or pass "
            f"{fix}."
        )


def list_values(values: dict[str, Any], names: Collection[str]) -> str:
    """Formats keys with their values for a message."""
    return ", ".join(f"{name}={values[name]!r}" for name in names)


def changed_keys(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns the keys that a resumed run must keep but whose values differ; both dicts are by dotted name."""
    changed = [name for name in key_specs(Config) if name in before and before[name] != now[name]]
    bound = [name for name in changed if not key_specs(Config)[name].resumable]
    # Without evaluation, a run also trains on the problems that it would otherwise hold out.
    if "eval.questions" in changed and 0 in (before["eval.questions"], now["eval.questions"]):
        bound += ["eval.questions"] if now["task.name"] != "addition" else []
    return bound


def check_trained_config(workdir: Path, cfg: Config, step: int, trained: dict[str, Any]) -> None:
    """Checks that a run resumes with the config of its checkpoint, because config.json may have been edited.

    Args:
        workdir: The run.
        cfg: The config with which it resumes.
        step: The step of the checkpoint.
        trained: The values of its config by dotted name, read from JSON.

    Raises:
        UserError: Keys differ that are not `resumable`.
    """
    before, now = with_tuples(trained), flatten(dataclasses.asdict(cfg))
    if changed := changed_keys(before, now):
        raise UserError(
            f"{workdir / 'config.json'} must hold the config of the run's checkpoint of step {step}, which was trained "
            f"with {list_values(before, changed)}; found {list_values(now, changed)}. Undo the edit, or choose another "
            "--workdir."
        )


def keys_that_are_set(raw: "ConfigDict", given: Collection[str]) -> set[str]:
    """Returns the keys in `given`, and those whose values differ from the default config's."""
    defaults = flatten(default().to_dict())
    return {*given, *(name for name, value in flatten(raw.to_dict()).items() if value != defaults.get(name))}


def continue_derived(raw: "ConfigDict", given: Collection[str], workdir: Path) -> "ConfigDict":
    """Returns the config with which a run resumes, if its config derives keys.

    Args:
        raw: A config, not checked yet.
        given: The keys that the command line sets.
        workdir: The folder of the run.

    Returns:
        If `derive` is on and the run was started before, the run's own config with the keys that `raw` sets.
        Otherwise `raw`.

    Raises:
        UserError: The workdir's config.json cannot be read.
    """
    if not getattr(raw, "derive", False) or not (workdir / "config.json").is_file():
        return raw
    values, before = flatten(raw.to_dict()), read_config(workdir)
    names = keys_that_are_set(raw, given) - {"derive"}
    # configs/own.py names no model, so the run's own stays if the command line does not name it again.
    before.update_from_flattened_dict({name: values[name] for name in names if name in given or values[name] != ""})
    return before


def digest_files(path: str) -> dict[str, str]:
    """Returns the SHA-256 of a file, or of each file in a folder, by absolute path; empty if `path` is neither."""
    files = sorted(Path(path).rglob("*")) if os.path.isdir(path) else [Path(path)]
    digests = {}
    for file in filter(os.path.isfile, files):
        with file.open("rb") as opened:
            digests[str(file.absolute())] = hashlib.file_digest(opened, "sha256").hexdigest()
    return digests


def run_digests(task: Any, template: str) -> dict[str, str]:
    """Returns the digests of the files that a run reads: those of its task, and that of `prompt.template`."""
    return getattr(task, "digests", {}) | (digest_files(template) if os.path.isfile(template) else {})


def changed_files(workdir: Path, digests: dict[str, str]) -> list[str]:
    """Returns the files whose digests are not those with which a run was last started; none if it stored none."""
    path = workdir / "files.json"
    try:
        before = read_json_file(path) if path.exists() else digests
        if not isinstance(before, dict) or not all(isinstance(digest, str) for digest in before.values()):
            raise ValueError
    except (OSError, ValueError):  # damaged, so nothing is known about the files
        before = {}
    return sorted({name for name, _ in before.items() ^ digests.items()})


def check_files(workdir: Path, digests: dict[str, str], *, accept: bool = False) -> None:
    """Checks that the files that a run reads have not changed since it was started.

    Args:
        workdir: The folder of the run.
        digests: SHA-256 by absolute path, as `digest_files` returns it.
        accept: Whether changed files are accepted.

    Raises:
        UserError: Files have changed.
    """
    changed = changed_files(workdir, digests)
    if changed and not accept:
        has, it = ("has", "it") if len(changed) == 1 else (f"(and {len(changed) - 1} more) have", "them")
        raise UserError(
            f"The files that a run reads must not change; {changed[0]} {has} changed since the run in {workdir} was "
            f"started. Restore {it}, choose another --workdir, or pass --accept-changed-files."
        )


def write_config(workdir: Path, cfg: Config, digests: dict[str, str] | None = None) -> None:
    """Writes config.json, the config with which the run continues, and files.json, the digests of the files it reads.

    Raises:
        UserError: The folder is not writable.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for name, content in (("files.json", digests), ("config.json", dataclasses.asdict(cfg))):
            if content:
                replace_file(workdir / name, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"--workdir must be a writable folder, but {error}. Choose another --workdir.") from None


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file atomically: whenever the process or the machine stops, it has either its old or its new content.

    Raises:
        OSError: The file could not be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # it would take up space on a full disk
        raise


def read_config(workdir: Path) -> "ConfigDict":
    """Reads the config of a run; it is not checked yet.

    Raises:
        UserError: The folder has no readable config.json.
    """
    from ml_collections import ConfigDict

    try:
        values = read_json_file(Path(workdir) / "config.json", object_hook=with_tuples)
        if not isinstance(values, dict) or "job" not in values:
            raise ValueError(f"config.json holds {str(values)[:40]!r} instead of the config of a run")
        check_types(values)
        return ConfigDict(values)
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: a name that a ConfigDict cannot have
        found = "found none" if isinstance(error, FileNotFoundError) else error
        raise UserError(
            f"{workdir} must be the workdir of a training run, with a config.json: {found}. Pass another --workdir, or "
            "start a run there with --config=FILE.py."
        ) from None


def check_types(values: dict[str, Any]) -> None:
    """Raises a ValueError if a key of a run's config, which another version may have written, has the wrong type."""
    specs = key_specs(PretrainConfig if values["job"] == "pretrain" else Config)
    sections = {name.rpartition(".")[0] for name in specs}
    for name, value in flatten(values).items():
        kind = dict if name in sections else type(specs[name].default) if name in specs else None
        if kind and type(value if kind is dict else with_floats(value, specs[name].default)) is not kind:
            raise ValueError(f"{name} is of type {type(value).__name__} instead of {kind.__name__}")


def with_tuples(section: dict[str, Any]) -> dict[str, Any]:
    """Returns a section of parsed JSON with its lists as tuples, as a config has them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
