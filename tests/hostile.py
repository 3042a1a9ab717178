"""Files that try to hang a program, fill its memory or run code, for tests/test_hostile.py."""

import gzip
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from grpo_jax.config import check, default
from grpo_jax.config.workdir import write_config
from grpo_jax.weights.source import find_model
from tests.test_gguf import write_file

DEEP = 100_000
LONG = "n" * 5000
ROW = '{"question": "1 + 1?", "answer": "2"}\n'

Case = tuple[Callable[[Path], Path | str], str]  # makes the input in a new folder; what its error says, "" if none


def sparse(path: Path, start: bytes = b"", size: int = 1 << 40) -> None:
    """Writes a file of `size` bytes, which takes no room on the disk: after `start` it holds zeros."""
    path.write_bytes(start)
    os.truncate(path, size)


def link(path: Path, target: str) -> None:
    """Replaces a file with a link."""
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def fifo(path: Path) -> None:
    """Replaces a file with a named pipe that nobody writes to."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def copy_of_tiny(folder: Path) -> Path:
    """Copies the tiny base model, with code that leaves a file `ran` in the parent folder when it is imported."""
    model = Path(shutil.copytree(find_model("tiny"), folder / "model"))
    (model / "custom.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\nTokenizer = Config = object\n")
    return model


class RunsCode:
    """Leaves a file `ran` when it is unpickled."""

    def __init__(self, path: Path):
        """Takes the path of the file."""
        self.path = path

    def __reduce__(self):
        """Returns the call that unpickling makes."""
        return open, (str(self.path), "w")


def folder_with(name: str, change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """Returns a function that copies the tiny base model and changes one of its files."""

    def make(folder: Path) -> Path:
        model = copy_of_tiny(folder)
        change(model / name)
        return model

    return make


def written(content: str | bytes) -> Callable[[Path], object]:
    """Returns a change that replaces a file's content."""
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def config_with(**fields) -> Callable[[Path], Path]:
    """Returns a function that copies the tiny base model and sets fields of its config.json."""

    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return folder_with("config.json", change)


def tensors_with(change: Callable[[dict], object]) -> Callable[[Path], Path]:
    """Returns a function that copies the tiny base model and changes its tensors."""

    def rewrite(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return folder_with("model.safetensors", rewrite)


def header_with(**entries) -> Callable[[Path], Path]:
    """Returns a function that copies the tiny base model and gives its weights file a header with these entries."""
    header = json.dumps(entries).encode()
    return folder_with("model.safetensors", written(struct.pack("<Q", len(header)) + header + bytes(64)))


def set_value(name: str, value: float, dtype: type = np.float32) -> Callable[[dict], object]:
    """Returns a change of one value of a tensor."""

    def change(tensors: dict) -> None:
        tensors[name] = tensors[name].astype(dtype)
        tensors[name].flat[7] = value

    return change


TENSOR = "model.layers.1.mlp.up_proj.weight"
ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
DEEP_LISTS, DEEP_DICTS = "[" * DEEP + "]" * DEEP, '{"a":' * 500 + "1" + "}" * 500
INDEX, SMALL = "model.safetensors.index.json", "tokenizer_config.json"


def index_of(*names: str) -> Callable[[Path], Path]:
    """Returns a function that copies the tiny base model and adds an index that names these files."""
    return folder_with(INDEX, written(json.dumps({"weight_map": dict(enumerate(names))})))


def pickled(folder: Path) -> Path:
    """Makes a model whose weights are a pickle that runs code."""
    model = copy_of_tiny(folder)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(folder.parent / "ran")))
    return model


def named(name: str, change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """Returns a function that makes a single file."""

    def make(folder: Path) -> Path:
        change(folder / name)
        return folder / name

    return make


MODELS: dict[str, Case] = {
    # config.json
    "config nested in lists": (folder_with("config.json", written(DEEP_LISTS)), "more than 100 levels"),
    "config nested in objects": (folder_with("config.json", written(DEEP_DICTS)), "more than 100 levels"),
    "config cut": (folder_with("config.json", written('{"model_type": "lla')), "Unterminated string"),
    "config empty": (folder_with("config.json", written("")), "found an empty file"),
    "config a list": (folder_with("config.json", written("[1]")), "must hold a JSON object"),
    "config not UTF-8": (folder_with("config.json", written(b'{"a": "\xff"}')), "'utf-8' codec"),
    "config of zeros": (folder_with("config.json", sparse), "at most 67,108,864 bytes"),
    "config of many values": (folder_with("config.json", written("[" + "[]," * 2_000_000 + "1]")), "2,000,000 values"),
    "config with a long number": (folder_with("config.json", written('{"a": ' + "1" * 5000 + "}")), "4300 digits"),
    "config is /dev/zero": (folder_with("config.json", lambda path: link(path, "/dev/zero")), "link to /dev/zero"),
    "config is a pipe": (folder_with("config.json", fifo), "must be a regular file"),
    "config is elsewhere": (folder_with("config.json", lambda path: link(path, "/etc/passwd")), "link to /etc/passwd"),
    "config links to itself": (folder_with("config.json", lambda path: link(path, "config.json")), "a regular file"),
    "many layers": (config_with(num_hidden_layers=10**9), "num_hidden_layers .* at most 1024"),
    "large vocabulary": (config_with(vocab_size=2**40), r"less than 2\*\*31"),
    "wide layers": (config_with(hidden_size=10**300), r"less than 2\*\*31"),
    "NaN in the config": (config_with(rms_norm_eps=float("nan")), "found nan for norm_eps"),
    "infinity in the config": (
        config_with(rope_parameters={"rope_theta": float("inf"), "rope_type": "default"}),
        "inf",
    ),
    "long name of a family": (config_with(model_type=LONG), "model_type in .* must be one of"),
    "family is a list": (config_with(model_type=["llama"]), "model_type in .* must be one of"),
    "large stop id": (config_with(eos_token_id=10**30), r"less than 2\*\*31"),
    "code as dtype": (config_with(dtype="__import__('os').abort()", torch_dtype=None), "dtype"),
    "unknown quantization": (config_with(quantization_config={"quant_method": LONG}), "quantization_config"),
    "code for the config": (config_with(auto_map={"AutoConfig": "custom.Config"}), ""),
    "generation config nested": (folder_with("generation_config.json", written(DEEP_LISTS)), "more than 100 levels"),
    # The tokenizer
    "tokenizer nested": (folder_with("tokenizer.json", written(DEEP_LISTS)), "tokenizer.json in .* readable"),
    "tokenizer cut": (folder_with("tokenizer.json", written('{"version": "1.0", ')), "tokenizer.json in .* readable"),
    "tokenizer of zeros": (folder_with("tokenizer.json", sparse), "at most 67,108,864 bytes"),
    "tokenizer is /dev/zero": (
        folder_with("tokenizer.json", lambda path: link(path, "/dev/zero")),
        "link to /dev/zero",
    ),
    "tokenizer config nested": (folder_with(SMALL, written(DEEP_LISTS)), "must hold a readable tokenizer"),
    "tokenizer elsewhere": (
        folder_with(SMALL, written('{"tokenizer_file": "/dev/zero", "vocab_file": "/dev/zero"}')),
        "",
    ),
    "special tokens are a pipe": (folder_with("special_tokens_map.json", fifo), "must be a regular file"),
    "added tokens are endless": (folder_with("added_tokens.json", lambda path: link(path, "/dev/zero")), "link to"),
    "chat template elsewhere": (folder_with("chat_template.jinja", lambda path: link(path, "/etc/passwd")), "link to"),
    # The weights
    "weights empty": (folder_with("model.safetensors", written("")), "found an empty file"),
    "header of 2**63 bytes": (folder_with("model.safetensors", written(struct.pack("<Q", 2**63))), "header of 9,223"),
    "header of 1 TB": (folder_with("model.safetensors", lambda p: sparse(p, struct.pack("<Q", 1 << 39))), "header of"),
    "header of zeros": (folder_with("model.safetensors", lambda p: sparse(p, struct.pack("<Q", 1 << 26))), "Expecting"),
    "header nested": (header_with(a=json.loads("[" * 300 + "]" * 300)), "more than 100 levels"),
    "header not JSON": (folder_with("model.safetensors", written(struct.pack("<Q", 8) + b"{'a': 1}")), "Expecting"),
    "tensors overlap": (header_with(a=ENTRY, b=ENTRY), "complete safetensors file"),
    "tensor after the end": (header_with(a=ENTRY | {"data_offsets": [0, 2**40]}), "complete safetensors file"),
    "unknown dtype": (header_with(a=ENTRY | {"dtype": "PICKLE"}), "complete safetensors file"),
    "shape of 2**62": (header_with(a=ENTRY | {"shape": [2**62, 2**62]}), "complete safetensors file"),
    "long tensor name": (tensors_with(lambda t: t.update({LONG: np.ones(1, np.float32)})), "1 unknown, such as nnn"),
    "tensor name for a terminal": (
        tensors_with(lambda t: t.update({"\x1b[2J\n": np.ones(1, np.float32)})),
        "1 unknown",
    ),
    "weights elsewhere": (folder_with("model.safetensors", lambda path: link(path, "/etc/passwd")), "link to /etc"),
    "weights are a pipe": (folder_with("model.safetensors", fifo), "must be a regular file"),
    "weights are endless": (
        folder_with("model.safetensors", lambda path: link(path, "/dev/zero")),
        "link to /dev/zero",
    ),
    "NaN weight": (tensors_with(set_value(TENSOR, np.nan)), f"{TENSOR} in .* found NaN or infinity"),
    "infinite weight": (
        tensors_with(set_value("model.norm.weight", np.inf)),
        "model.norm.weight in .* NaN or infinity",
    ),
    "weight beyond float32": (tensors_with(set_value(TENSOR, 1e300, np.float64)), f"{TENSOR} in .* NaN or infinity"),
    "pickled weights": (pickled, "a pickle"),
    "pickle as safetensors": (
        folder_with("model.safetensors", written(pickle.dumps(RunsCode(Path("ran"))))),
        "complete",
    ),
    # The index of shards
    "shard above the folder": (index_of("../../etc/passwd"), "must name files in its folder"),
    "shard at a path": (index_of("/etc/passwd"), "must name files in its folder"),
    "long shard name": (index_of(LONG), "1 missing"),
    "shard name with a zero byte": (index_of("a\0b"), "1 missing"),
    "index nested": (folder_with(INDEX, written(DEEP_LISTS)), "more than 100 levels"),
    "index of a list": (folder_with(INDEX, written('{"weight_map": []}')), "weight_map"),
    # The path
    "long path": (lambda folder: LONG, "File name too long"),
    "path with a zero byte": (lambda folder: "a\0b", "null byte"),
    "path is /dev/zero": (lambda folder: "/dev/zero", "No model folder found at /dev/zero"),
    "path is a pipe": (named("model.gguf", fifo), "No model folder found"),
}


def string(text: bytes) -> bytes:
    """Encodes a string of a GGUF header."""
    return struct.pack("<Q", len(text)) + text


def raw_gguf(*parts: bytes, tensors: int = 0, fields: int = 1, size: int = 0) -> Callable[[Path], Path]:
    """Returns a function that writes a GGUF file with the given header, and zeros up to `size` bytes."""
    header = b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + b"".join(parts)
    return named("model.gguf", lambda path: sparse(path, header, max(size, len(header))))


def gguf_with(fields: dict | None = None, tensors: dict | None = None) -> Callable[[Path], Path]:
    """Returns a function that writes a small GGUF file with further fields and tensors."""
    return named("model.gguf", lambda path: write_file(path, fields=fields, tensors=tensors))


TOKENS = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.tokens": ["a", "b", "ab"]}
ARCHITECTURE = string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama")
ARRAY_OF = string(b"a") + struct.pack("<I", 9)

GGUFS: dict[str, Case] = {
    "empty": (named("model.gguf", written("")), "found an empty file"),
    "magic alone": (named("model.gguf", written("GGUF")), "beyond the end of the file"),
    "zeros": (named("model.gguf", sparse), "it begins with b'.x00"),
    "is /dev/zero": (lambda folder: link(folder / "m.gguf", "/dev/zero") or folder, "link to /dev/zero"),
    "string of 2**63 bytes": (raw_gguf(struct.pack("<Q", 2**63)), "a string of 9,223"),
    "string of 1 GB": (raw_gguf(struct.pack("<Q", 1 << 30), size=1 << 40), "a string of 1,073"),
    "array of 2**62 elements": (raw_gguf(ARRAY_OF, struct.pack("<IQ", 0, 2**62)), "an array of 4,611"),
    "array of 2**62 strings": (raw_gguf(ARRAY_OF, struct.pack("<IQ", 8, 2**62)), "an array of 4,611"),
    "array of arrays": (raw_gguf(ARRAY_OF, struct.pack("<IQ", 9, 10) * 10_000), "complete GGUF file"),
    "unknown type": (raw_gguf(string(b"a"), struct.pack("<I", 99)), "complete GGUF file"),
    "2**60 fields": (raw_gguf(fields=2**60), "1,152,[0-9,]* fields"),
    "long header": (
        raw_gguf(string(b"a"), struct.pack("<IQ", 8, 1 << 25), size=1 << 40),
        "beyond the end of 33,554,432 bytes",
    ),
    "2**60 tensors": (raw_gguf(fields=0, tensors=2**60), "1,152,[0-9,]* tensors"),
    "2**31 dimensions": (
        raw_gguf(ARCHITECTURE, string(b"a"), struct.pack("<I", 2**31), tensors=1),
        "beyond the end of",
    ),
    "tensor of 2**60 numbers": (
        raw_gguf(ARCHITECTURE, string(b"a"), struct.pack("<IQQIQ", 2, 2**30, 2**30, 0, 0), tensors=1),
        "while a ends at byte",
    ),
    "tensor at 2**63": (
        raw_gguf(ARCHITECTURE, string(b"a"), struct.pack("<IQIQ", 1, 4, 0, 2**63), tensors=1),
        "ends at",
    ),
    "unknown quantization": (
        raw_gguf(ARCHITECTURE, string(b"a"), struct.pack("<IQIQ", 1, 4, 999, 0), tensors=1),
        "999",
    ),
    "alignment of 0": (gguf_with({"general.alignment": 0}), "general.alignment 0"),
    "alignment is a text": (gguf_with({"general.alignment": "a"}), "general.alignment 'a'"),
    "architecture is a list": (gguf_with({"general.architecture": ["llama"]}), "general.architecture in"),
    "split is a text": (gguf_with({"split.count": LONG}), "must hold the whole model"),
    "long token": (gguf_with(TOKENS | {"tokenizer.ggml.tokens": ["t" * 100_000]}), "a string of 100,000 bytes"),
    "many layers": (gguf_with({"llama.block_count": 10**9}), "must hold the tensor blk.999999999"),
    "heads are a text": (gguf_with({"llama.attention.head_count_kv": "2"}), "head_count_kv in .* must be one number"),
    "NaN as a size": (gguf_with({"llama.embedding_length": float("nan")}), "embedding_length in .* one number above 0"),
    "theta is a text": (gguf_with({"llama.rope.freq_base": "x"}), "freq_base in .* must be one number"),
    "scaling is a number": (gguf_with({"llama.rope.scaling.type": 1}), "scaling.type in .* must be a string"),
    "stop ids are a list of texts": (gguf_with({"tokenizer.ggml.eos_token_id": ["a"]}), "eos_token_id in .* integer"),
    "frequencies of another size": (
        gguf_with(tensors={"rope_freqs.weight": np.full(10**6, np.nan, np.float32)}),
        "rope_freqs.weight in",
    ),
    "NaN frequencies": (
        gguf_with(tensors={"rope_freqs.weight": np.full(2, np.nan, np.float32)}),
        "rope_freqs.weight in",
    ),
    "empty frequencies": (
        gguf_with({"llama.attention.key_length": 0}, {"rope_freqs.weight": np.ones(2, np.float32)}),
        "rope_freqs.weight in",
    ),
}


def parquet_bomb(path: Path) -> None:
    """Writes a small parquet file with 4,000 rows that all hold the same 10,000 characters."""
    pq.write_table(pa.table({"question": ["q" * 10_000] * 4000}), path, compression="zstd")


PROBLEMS: dict[str, Case] = {
    "nested row": (named("q.jsonl", written(ROW + DEEP_LISTS)), "line 2 is not valid JSON: more than 100 levels"),
    "nested field": (named("q.jsonl", written(ROW + '{"question": ' + DEEP_DICTS + "}")), "more than 100 levels"),
    "nested document": (named("q.json", written(DEEP_DICTS)), "more than 100 levels"),
    "endless line": (named("q.jsonl", lambda p: sparse(p, (ROW + '{"a": "' + LONG).encode())), "line 2 has more than"),
    "zeros": (named("q.jsonl", sparse), "line 1 has more than"),
    "is /dev/zero": (lambda folder: "/dev/zero", "Not a regular file"),
    "is a pipe": (named("q.jsonl", fifo), "Not a regular file"),
    "links to /dev/zero": (named("q.jsonl", lambda path: link(path, "/dev/zero")), "Not a regular file"),
    "gzipped zeros": (named("q.gz", lambda p: p.write_bytes(gzip.compress(bytes(1 << 28), 1))), "100 times as large"),
    "gzipped rows": (named("q.gz", lambda p: p.write_bytes(gzip.compress(ROW.encode() * 10**6, 1))), "100 times as"),
    "gzipped twice": (
        named("q.gz", lambda p: p.write_bytes(gzip.compress(gzip.compress(ROW.encode())))),
        "neither|UTF",
    ),
    "gzip cut": (named("q.gz", lambda p: p.write_bytes(gzip.compress(ROW.encode())[:-9])), "end-of-stream"),
    "parquet of equal rows": (named("q.parquet", parquet_bomb), "100 times as large"),
    "parquet cut": (named("q.parquet", written(b"PAR1" + bytes(5000) + b"PAR1")), "could not be read"),
    "row of many values": (named("q.jsonl", written(ROW + "[" + "{}," * 2_000_000 + "1]")), "2,000,000 values"),
    "long number": (named("q.jsonl", written(ROW + '{"answer": ' + "1" * 5000 + "}")), "4300 digits"),
    "key twice": (named("q.jsonl", written('{"question": "a", "question": "b"}')), "the key 'question' twice"),
    "long names": (named("q.jsonl", written(json.dumps({f"{n}{LONG}": 1 for n in range(50)}))), "the fields are 0nnn"),
    "rows of other kinds": (named("q.jsonl", written("1\n2\n")), "must be an object"),
    "many unreadable rows": (named("q.jsonl", written("{}\n" * 20_000)), "20,000 of 20,000 rows"),
    "many different reasons": (
        named("q.jsonl", written("".join(f'{{"f{n}": {n}}}\n' for n in range(5000)))),
        "5,000 of 5,000 rows",
    ),
    "lone surrogate": (named("q.jsonl", written('{"question": "\\ud800", "answer": "1"}')), "surrogate"),
    "answer without an end": (named("q.jsonl", written('{"question": "q", "answer": "9^{9^{9^{9^{9}}}}"}')), ""),
    "many keys, one twice": (
        named("q.jsonl", written("{" + "".join(f'"{n}": 1, ' for n in range(200_000)) + '"7": 1}')),
        "the key '7' twice",
    ),
    "nested answer": (
        named("q.jsonl", written('{"question": "q", "answer": "' + "(" * 50_000 + '"}')),
        "no completion could match",
    ),
    "nested text": (
        named("q.jsonl", written(json.dumps({"question": "q", "answer": '["' + '["' * 50_000}))),
        "no completion could",
    ),
    "CSV without a closing quote": (
        named("q.csv", lambda p: sparse(p, b'question,answer\n"' + b"a" * 5000, 1 << 40)),
        "line 2 has more than",
    ),
    "CSV of many columns": (named("q.csv", written("a," * 10**6 + "a\n1,2\n")), "the column 'a' twice"),
    "long path": (lambda folder: f"{LONG}.jsonl", "File name too long"),
    "path with a zero byte": (lambda folder: "a\0b.jsonl", "null byte|null character"),
}

CONFIGS = {
    "infinite learning rate": ('cfg.optim.lr = float("inf")', "optim.lr must be finite"),
    "learning rate is NaN": ('cfg.optim.lr = float("nan")', "optim.lr must be .*; found nan"),
    "infinite bound": ('cfg.loss.clip_high = float("inf")', "loss.clip_high must be finite"),
    "infinite weight": ('cfg.reward.weights = (1.0, float("inf"))', "reward.weights must be finite numbers"),
    "10**12 questions": ("cfg.eval.questions = 10**12", "eval.questions must be .* at most 1000000"),
    "10**5000 questions": ("cfg.eval.questions = 10**5000", r"eval.questions must be less than 2\*\*31"),
    "10**12 updates": ("cfg.total_steps = 10**12", r"total_steps must be less than 2\*\*31"),
    "10**9 prompts": ("cfg.rollout.prompts = 10**9", "A rollout may have at most 1,048,576 sequences"),
    "10**9 samples": ("cfg.rollout.samples = 10**9", "A rollout may have at most 1,048,576 sequences"),
    "10**9 tokens": ("cfg.rollout.max_tokens = 10**9", "A rollout may have at most .* tokens; found"),
    "10**9 examples": ("cfg.task.shots = 10**9", "task.shots must be .* at most 1000"),
    "long path": ('cfg.model.path = "n" * 5000', r"model.path must be a path; found .*File name too long"),
    "path with a zero byte": (r'cfg.model.path = "a\0b"', "model.path must be a path; found .*null byte"),
    "exits": ("raise SystemExit(0)", "raised SystemExit"),
}


def config_file(line: str) -> str:
    """Returns a config file that changes the default config with a line of Python."""
    lines = ["from grpo_jax import config", "def get_config():", "    cfg = config.default()", f"    {line}"]
    return "\n".join([*lines, "    return cfg"])


def workdir_with(name: str, change: Callable[[Path], object]) -> Callable[[Path], Path]:
    """Returns a function that makes the workdir of a run of the default config, and changes one of its files."""

    def make(folder: Path) -> Path:
        workdir = folder / "run"
        (workdir / "samples").mkdir(parents=True)
        write_config(workdir, check(default()))
        (workdir / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 1.0}\n')
        change(workdir / name)
        return workdir

    return make


def run_config_with(**values) -> Callable[[Path], Path]:
    """Returns a function that makes a workdir with these values in its config.json, by name."""
    return workdir_with("config.json", lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values)))


RUN_CONFIGS: dict[str, Case] = {
    "config nested in lists": (workdir_with("config.json", written(DEEP_LISTS)), "more than 100 levels"),
    "config nested in objects": (workdir_with("config.json", written(DEEP_DICTS)), "more than 100 levels"),
    "config of zeros": (workdir_with("config.json", sparse), "more than 67,108,864 bytes"),
    "config is a pipe": (workdir_with("config.json", fifo), "Not a regular file"),
    "config is /dev/zero": (workdir_with("config.json", lambda path: link(path, "/dev/zero")), "Not a regular file"),
    "section is a number": (run_config_with(rollout=5), "rollout is of type int instead of dict"),
    "key is a section": (run_config_with(seed={"a": 1}), "seed"),
    "value of another type": (run_config_with(train={"minibatches": "x"}), "train.minibatches is of type str"),
    "name of a method": (run_config_with(__class__=1), "__class__"),
    "name with a dot": (run_config_with(**{"a.b": 1}), "dots"),
}

RECORD = {"prompt_id": 0, "sample_id": 0, "question": "q", "prompt": "p", "completion": "c", "expected": "1"}
BAD_FIELDS = (
    *(
        {name: {"a": []}}
        for name in ("prompt_id", "length", "prompt", "expected", "tokens", "logps", "reward", "pieces")
    ),
    {"rewards": [1]},
    {"rewards": {"accuracy": "x"}},
    {"length": -1},
    {"length": 2**40},
    {"question": {"a": 1}},
    {"logps": ["x"]},
    {"pieces": [1]},
)
BAD_LINES = (
    DEEP_LISTS,
    '{"step": 1' + "0" * 4400 + "}",
    '{"step": "2", "reward/mean": 1}',
    '{"step": -1, "reward/mean": 1}',
    '{"step": true, "reward/mean": 1}',
    '{"step": 2, "reward/mean": 1e999, "eval/accuracy": -1e308, "time/step_s": 1e308}',
    '{"step": 3, "reward/mean": 1e308, "eval/accuracy": 1e308, "time/step_s": 1e308}',
    '{"step": 4, "reward/mean": ' + "1" * 4000 + ', "time/step_s": []}',
    '{"step": 5, "eval/sampling/top_k": "x", "eval/length_mean": {}, "eval/accuracy": null}',
    '{"step": 6, "eval/sampling/top_k": null, "eval/length_mean": NaN}',
    '{"step": 7, "text": {"a": 1e999}, "name": [1e999]}',
    '{"step": 8, "text": "<script>", "name": [1e999]}',
    "\xff\xfe",
    "[]",
    "null",
)


def bad_logs(workdir: Path) -> None:
    """Writes logs and samples none of whose lines is as a run writes it."""
    for name in ("metrics.jsonl", "warnings.jsonl"):
        (workdir / name).write_bytes("\n".join(BAD_LINES).encode("latin-1"))
    lines = [json.dumps(RECORD | fields) for fields in BAD_FIELDS]
    lines += [json.dumps(RECORD | {"logps": [0.5]}).replace("0.5", "1e999"), *BAD_LINES]
    for name in ("train-000001", "train-000002", "eval-000000", "eval-000001", "train-x", "train-" + "9" * 200):
        (workdir / "samples" / f"{name}.jsonl").write_bytes("\n".join(lines).encode("latin-1"))


LOGS: dict[str, Case] = {
    "lines that no run writes": (lambda folder: bad_logs(run := workdir_with("x", id)(folder)) or run, ""),
    "metrics without an end of line": (
        workdir_with("metrics.jsonl", lambda p: sparse(p, b"", 1 << 26)),
        "line 1 has more",
    ),
    "metrics of 1 TB": (workdir_with("metrics.jsonl", sparse), "134,217,728 bytes"),
    "metrics are a pipe": (workdir_with("metrics.jsonl", fifo), ""),
    "samples without an end of line": (workdir_with("samples/train-000001.jsonl", sparse), "line 1 has more"),
    "samples are a pipe": (workdir_with("samples/train-000001.jsonl", fifo), ""),
    "samples are endless": (workdir_with("samples/eval-000001.jsonl", lambda path: link(path, "/dev/zero")), ""),
    "files.json nested": (workdir_with("files.json", written(DEEP_LISTS)), ""),
}
