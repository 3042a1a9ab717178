"""Writes the config of a run to its workdir, compares it when the run is resumed, and reads it for other commands."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_jax.config.keys import flatten, format_as_flag, key_specs
from grpo_jax.config.schema import Config, default
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
        for name in changed_keys(before, now):
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
        UserError: A key differs that is not `resumable`.
    """
    before, now = with_tuples(trained), flatten(dataclasses.asdict(cfg))
    for name in changed_keys(before, now):
        raise UserError(
            f"{workdir / 'config.json'} must hold the config of the run's checkpoint of step {step}, which was trained "
            f"with {name}={before[name]!r}; found {now[name]!r}. Undo the edit, or choose another --workdir."
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
    before = json.loads(path.read_text()) if path.is_file() else digests
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
                partial = workdir / f"{name}.partial"
                partial.write_text(json.dumps(content, indent=2) + "\n")
                partial.replace(workdir / name)  # atomic
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
        if not isinstance(values, dict) or "job" not in values:
            raise ValueError(f"config.json holds {str(values)[:40]!r} instead of the config of a run")
    except (OSError, ValueError) as error:
        found = "found none" if isinstance(error, FileNotFoundError) else error
        raise UserError(
            f"{workdir} must be the workdir of a training run, with a config.json: {found}. Pass another --workdir, or "
            "start a run there with --config=FILE.py."
        ) from None
    return ConfigDict(values)


def with_tuples(section: dict[str, Any]) -> dict[str, Any]:
    """Returns a section of parsed JSON with its lists as tuples, as a config has them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
