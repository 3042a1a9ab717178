"""Checks the files of a model folder, and explains what a folder holds if it is not a model that can be read."""

import itertools
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from grpo_jax.errors import UserError
from grpo_jax.foreign import MAX_BYTES, open_regular, read_json_file

MAX_NAMES = 100_000  # entries of a folder that are listed
SHARD_INDEX = "model.safetensors.index.json"
GGUF_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
CHECKPOINT = re.compile(r"checkpoint-(\d+)")

# First bytes of files that stand in for others, what such a file is, and what to do. {folder} is the model folder.
STAND_INS = (
    (b"version https://git-lfs", "a Git LFS pointer", "Run `git lfs pull` in {folder}, or download it again."),
    (b"<!doctype html", "a web page", "Download the file itself, with `hf download`."),
    (b"<html", "a web page", "Download the file itself, with `hf download`."),
)

USABLE_PATHS = (
    "Set model.path to a Hugging Face folder with config.json, tokenizer.json and *.safetensors, to a GGUF file, to a "
    "hub id, or to 'tiny'."
)
PICKLE = "a pickle, and reading a pickle can run any code"
SCRIPT = (
    "Use a checkpoint with config.json and *.safetensors, or convert it with the script of its family in transformers"
)
# Weights in other formats, the most specific first: patterns of file names, what the files are, and what to do.
# {source} is the folder or hub id, {name} its last part, and {file} one of the files.
OTHER_WEIGHTS = (
    (
        r"(?i).*\.gguf",  # on the hub; in a folder, GGUF files are read
        "a GGUF file, which is not downloaded automatically",
        "Choose one, run `hf download {source} {file} --local-dir {name}`, and set model.path to {name}/{file}.",
    ),
    (
        r"zero_to_fp32\.py",
        "a checkpoint of DeepSpeed",
        "Merge its parts where DeepSpeed is installed: python -m deepspeed.utils.zero_to_fp32 {source} {source}-merged "
        "--safe_serialization. Then copy config.json and the tokenizer files.",
    ),
    (
        r"pytorch_model_fsdp_\d+",
        "a sharded checkpoint of PyTorch",
        "Merge its parts where accelerate is installed: accelerate merge-weights {source}/{file} {source}-merged. Then "
        "copy config.json and the tokenizer files.",
    ),
    (
        r"_(CHECKPOINT_)?METADATA",
        "a checkpoint of Orbax",
        "If a run of this package saved it, export its policy where the whole workdir of the run is: python -m "
        "grpo_jax.export --workdir=WORKDIR --out=FOLDER.",
    ),
    (r"ggml.*\.bin", "a file in the format of an early llama.cpp", "Use a GGUF file of the model."),
    (r"consolidated.*\.safetensors", "weights in Mistral's own format", f"{SCRIPT} (convert_mistral*_to_hf.py)."),
    (r"consolidated.*\.pth", f"weights in Meta's own format and {PICKLE}", f"{SCRIPT} (convert_llama*_to_hf.py)."),
    (
        r"(pytorch_)?model.*\.bin",
        PICKLE,
        'If you trust it, convert it with: python -c "from transformers import AutoModelForCausalLM as M; '
        "M.from_pretrained('{source}').save_pretrained('{source}-safetensors')\". Then copy the tokenizer files, "
        "and set model.path to {source}-safetensors.",
    ),
    (
        r".*\.(bin|pt|pth|ckpt|pkl)",
        PICKLE,
        "Save the model with `save_pretrained` of transformers, where it was trained.",
    ),
    (
        r".*\.(h5|msgpack|ot|onnx|tflite|mlmodel|mlpackage|engine)",
        "weights for another library",
        "Use a checkpoint with config.json and *.safetensors.",
    ),
)
# Files that are not the weights of the model: hidden files, the state of a trainer, and vision towers of GGUF files.
NOT_WEIGHTS = re.compile(r"\..*|(training_args|optimizer|scheduler|scaler|rng_state|random_states|mmproj).*")
NOT_MODELS = ("original", "onnx", "runs")  # prefixes of subfolders that never hold the model itself


def list_names(folder: Path) -> list[str]:
    """Returns the names in a folder, sorted and without hidden ones such as macOS's `._model.safetensors`.

    Raises:
        UserError: The folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in itertools.islice(entries, MAX_NAMES)]
    except OSError as error:
        raise UserError(f"{folder} must be a readable folder; found: {error.strerror}. Make it readable.") from None
    return sorted(name for name in names if not name.startswith("."))


def safetensors_names(names: Iterable[str]) -> list[str]:
    """Returns the names of the files with a model's weights, leaving out adapters and Mistral's own format."""
    others = ("consolidated", "adapter_", ".")
    return [name for name in names if name.endswith(".safetensors") and not name.startswith(others)]


def read_json_object(path: Path) -> dict:
    """Reads a JSON file that holds an object.

    Raises:
        UserError: The file cannot be read, is not JSON, or holds something else.
    """
    try:
        value = read_json_file(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path.name} in {path.parent} must be a readable JSON file; found: {error}. Download it again."
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object; found {str(value)[:40]!r}. Download it again.")
    return value


def check_model_files(folder: Path, paths: Iterable[Path], *, are_small: bool) -> None:
    """Checks that files of a model folder are regular files that lie in it and hold what their names promise.

    The Hugging Face Hub's cache keeps the content of its folders in `blobs`, to which they link.

    Args:
        folder: The model folder.
        paths: The files.
        are_small: Whether the files are read into memory whole, and must therefore have at most `MAX_BYTES` bytes.

    Raises:
        UserError: A file is a link to another folder, not a regular file, or too large; or see `check_content`.
    """
    root = Path(os.path.realpath(folder))
    roots = (root, root.parents[1] / "blobs") if root.parent.name == "snapshots" else (root,)
    for path in paths:
        if path.name.startswith("._"):  # macOS's notes about a file
            continue
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(allowed) for allowed in roots):
            exists = target.exists()
            advice = "Copy that file there." if exists else "Download the model again."
            raise UserError(
                f"{path} must lie in the model folder; found a link to {target}"
                f"{'' if exists else ', which does not exist'}. {advice}"
            )
        if not target.is_file() or (are_small and target.stat().st_size > MAX_BYTES):
            limit = f" of at most {MAX_BYTES:,} bytes" * are_small
            raise UserError(f"{path} must be a regular file{limit}; found something else. Download the model again.")
        check_content(path)


def check_content(path: Path) -> None:
    """Checks that a file is not empty and does not stand in for another one.

    Raises:
        UserError: The file cannot be read, is empty, or is a Git LFS pointer or a web page.
    """
    try:
        with open_regular(path) as file:
            start = file.read(64)
    except OSError as error:
        raise UserError(f"{path} must be a readable file; found: {error.strerror}. Make it readable.") from None
    if not start:
        raise UserError(f"{path} must hold a part of the model; found an empty file. Download it again.")
    for begins, what, cure in STAND_INS:
        if start.lower().startswith(begins):
            raise UserError(
                f"{path} must hold a part of the model; found {what}. {cure.format(folder=path.parent)}"
            ) from None


def check_shard_index(folder: Path) -> None:
    """Checks that every file named in the index of a sharded checkpoint exists.

    Raises:
        UserError: The index cannot be read, or a file is missing.
    """
    path = folder / SHARD_INDEX
    if not path.is_file():
        return
    try:
        names = {str(name) for name in read_json_file(path)["weight_map"].values()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path} must hold a weight_map; found: {error}. Download it again.") from None
    outside = sorted(name for name in names if Path(name).name != name)
    if outside:
        raise UserError(f"{path} must name files in its folder; found {outside[0]!r:.80}. Download the model again.")
    missing = sorted(names - {file.name for file in folder.iterdir()})
    if missing:
        raise UserError(
            f"All {len(names)} files named in {path} must exist; found {len(missing)} missing, such as {missing[0]}. "
            "Download them."
        )


def refuse_gguf_part(path: Path, count: object) -> None:
    """Raises a UserError for a GGUF file that is one of `count` parts; the message has the command that merges them."""
    match = GGUF_PART.fullmatch(path.name)
    start, last = match.group(1, 3) if match else ("NAME", f"{count:05}" if isinstance(count, int) else "N")
    first, merged = (path.with_name(name) for name in (f"{start}-00001-of-{last}.gguf", f"{start}.gguf"))
    raise UserError(
        f"{path} must hold the whole model; found one of {count!s:.20} parts. Merge them with llama.cpp's "
        f"`llama-gguf-split --merge {first} {merged}` and set model.path to {merged}."
    )


def choose_gguf(folder: Path) -> Path | None:
    """Returns the only GGUF file of a folder, or None if it has none. Vision towers (mmproj*) do not count.

    Raises:
        UserError: There are several, or only parts of one.
    """
    names = [name for name in list_names(folder) if name.lower().endswith(".gguf") and not name.startswith("mmproj")]
    parts = {name: match[3] for name in names if (match := GGUF_PART.fullmatch(name)) and int(match[3]) > 1}
    whole = [name for name in names if name not in parts]
    if len(whole) > 1:
        raise UserError(
            f"{folder} must hold a single GGUF file; found {', '.join(whole[:8])}"
            f"{f' and {len(whole) - 8} more' * (len(whole) > 8)}. Set model.path to one of them."
        )
    if parts and not whole:
        refuse_gguf_part(folder / min(parts), int(parts[min(parts)]))
    return folder / whole[0] if whole else None


def refuse_adapter(folder: Path, weights: Collection[str]) -> None:
    """Raises a UserError for a folder that holds an adapter, such as LoRA's, instead of a model or beside one.

    Args:
        folder: The folder.
        weights: The files beside the adapter that hold the weights of a whole model.
    """
    path = folder / "adapter_config.json"
    base = read_json_object(path).get("base_model_name_or_path") if path.is_file() else None
    adapter = f"an adapter for {base:.100}" if isinstance(base, str) else "an adapter"
    if weights:
        raise UserError(
            f"{folder} must hold either a model or an adapter; found both {min(weights)} and {adapter}. Move the "
            "adapter_* files elsewhere to use the model without the adapter."
        )
    raise UserError(
        f"{folder} must hold a whole model; found {adapter}. Merge it into its base model where peft is installed: "
        'python -c "from peft import AutoPeftModelForCausalLM as M; '
        f"M.from_pretrained('{folder}').merge_and_unload().save_pretrained('{folder}-merged')\". Then copy the "
        f"tokenizer files there, and set model.path to {folder}-merged."
    )


def refuse_other_weights(source: str | Path, names: Collection[str]) -> None:
    """Raises a UserError if a folder or hub repository holds weights in another format.

    Args:
        source: The folder, or the id of a repository.
        names: The names in it.
    """
    names = sorted(name for name in names if not NOT_WEIGHTS.fullmatch(name))
    for pattern, what, cure in OTHER_WEIGHTS:
        if file := next((name for name in names if re.fullmatch(pattern, name)), None):
            advice = cure.format(source=source, name=Path(source).name, file=file)
            raise UserError(f"{source} must hold *.safetensors; found {file}, {what}. {advice}")


def refuse_run(folder: Path, hf_config: dict | None = None) -> None:
    """Raises a UserError if a folder is the workdir of a run of this package, or one of its checkpoints.

    Args:
        folder: The folder.
        hf_config: The contents of its config.json, if it has one.
    """
    for workdir in (folder, *folder.absolute().parents[:3]):
        below = folder.absolute().relative_to(workdir.absolute()).parts
        path = workdir / "config.json"
        if below[:1] not in ((), ("checkpoints",)) or not path.is_file():
            continue
        run_config = hf_config if hf_config and not below else read_json_object(path)
        if not {"model", "rollout", "optim"} <= run_config.keys():
            continue
        step = f" --step={below[1]}" if len(below) > 1 and below[1].isdecimal() else ""
        raise UserError(
            f"{folder} must be a model folder; found {'a checkpoint in ' * bool(below)}the workdir of a run. Export "
            f"its policy with: python -m grpo_jax.export --workdir={workdir}{step} --out=FOLDER, and set model.path "
            "to FOLDER."
        )


def check_is_model(hf_config: dict, folder: Path) -> None:
    """Checks that a config.json describes a model of `transformers`.

    Raises:
        UserError: It has no `model_type`, because it belongs to a run of this package, a data set or something else.
    """
    if "model_type" in hf_config:
        return
    refuse_run(folder, hf_config)
    found = ", ".join(f"{key:.40}" for key in [*hf_config][:5]) or "an empty object"
    raise UserError(
        f"config.json in {folder} must be that of a language model, with a model_type; found {found}. {USABLE_PATHS}"
    )


def refuse_folder_above(folder: Path) -> None:
    """Raises a UserError if subfolders hold models; the message suggests one, the newest if they are checkpoints."""
    below = [path for name in ("*", "snapshots/*") for path in itertools.islice(folder.glob(name), MAX_NAMES // 10)]
    models = sorted(
        path for path in below if path.is_dir() and not path.name.startswith((".", *NOT_MODELS)) and holds_model(path)
    )
    if not models:
        return
    steps = {path: int(match[1]) for path in models if (match := CHECKPOINT.fullmatch(path.name))}
    found = ", ".join(path.name for path in models[:4]) + f" and {len(models) - 4} more" * (len(models) > 4)
    choice = f"{max(steps, key=steps.get)}, the newest" if steps else models[0] if len(models) == 1 else "one of them"
    what = "a model folder" if len(models) == 1 else "model folders"
    raise UserError(
        f"{folder} must itself be a model folder; found {what} inside it: {found}. Set model.path to {choice}."
    )


def holds_model(folder: Path) -> bool:
    """Returns whether a folder holds a model, an adapter or a GGUF file, judging by the names of its files."""
    try:
        names = list_names(folder)
    except UserError:
        return False
    has_config = "config.json" in names or "adapter_config.json" in names
    return any(
        name.lower().endswith(".gguf") or (has_config and name.endswith((".safetensors", ".bin"))) for name in names
    )
