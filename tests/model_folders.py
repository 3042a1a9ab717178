"""Model folders as people have them, for tests/test_model_folders.py: each is read, or refused for its true cause."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from grpo_jax.config import check, default
from grpo_jax.config.workdir import write_config
from tests.test_gguf import write_file

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"

Case = tuple[Callable[[Path], object], str]  # what makes the folder; a pattern of its error, "" if the folder is read


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of the few words that the golden models have rows for."""
    vocabulary = {"a": 0, "</s>": 2, "[UNK]": 3}
    Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def copied(*changes: Callable[[Path], object], case: str = "llama") -> Callable[[Path], object]:
    """Returns a function that copies a golden model into a folder and then applies changes to the folder."""

    def make(folder: Path) -> None:
        shutil.copytree(GOLDEN / case, folder, ignore=shutil.ignore_patterns("reference.npz"))
        write_tokenizer(folder)
        for change in changes:
            change(folder)

    return make


def empty(*changes: Callable[[Path], object]) -> Callable[[Path], object]:
    """Returns a function that makes an empty folder and then applies changes to it."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for change in changes:
            change(folder)

    return make


def wrote(*names: str, text: str = "{}") -> Callable[[Path], object]:
    """Returns a change that writes files."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    return change


def wrote_json(name: str, **fields) -> Callable[[Path], object]:
    """Returns a change that writes a JSON object."""
    return wrote(name, text=json.dumps(fields))


def moved(name: str, *targets: str) -> Callable[[Path], object]:
    """Returns a change that copies a file to each target and then removes it."""

    def change(folder: Path) -> None:
        for target in targets:
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, folder / target)
        (folder / name).unlink()

    return change


def config(**fields) -> Callable[[Path], object]:
    """Returns a change that sets fields of config.json; None removes a field."""

    def change(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text()) | fields
        kept = {key: value for key, value in raw.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def renamed(rename: Callable[[str], str], **more: np.ndarray) -> Callable[[Path], object]:
    """Returns a change that renames the tensors and adds others; one that is renamed to "" is left out."""

    def change(folder: Path) -> None:
        tensors = {rename(name): value for name, value in load_file(folder / WEIGHTS).items()} | more
        save_file({name: value for name, value in tensors.items() if name}, folder / WEIGHTS)

    return change


def stored_as(dtype: type) -> Callable[[Path], object]:
    """Returns a change that converts all tensors to a dtype."""
    return lambda folder: save_file(
        {name: value.astype(dtype) for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS
    )


def below(name: str, *changes: Callable[[Path], object]) -> Callable[[Path], object]:
    """Returns a change that makes a copy of the golden Llama in a subfolder."""
    return lambda folder: copied(*changes)(folder / name)


def run(folder: Path) -> None:
    """Writes what the workdir of a run holds."""
    write_config(folder, check(default()))
    wrote("checkpoints/100/_CHECKPOINT_METADATA", "checkpoints/100/policy/_METADATA")(folder)


def gguf(*names: str, **fields) -> Callable[[Path], object]:
    """Returns a change that writes small GGUF files."""

    def change(folder: Path) -> None:
        for name in names:
            write_file(folder / name, fields=fields)

    return change


def golden_gguf(*names: str) -> Callable[[Path], object]:
    """Returns a change that writes copies of a golden GGUF file."""
    return lambda folder: [shutil.copyfile(GOLDEN / "gguf" / "qwen2.gguf", folder / name) for name in names]


def quantized(**fields) -> Callable[[Path], object]:
    """Returns a change that sets `quantization_config`."""
    return config(quantization_config=fields)


ONE = np.ones(1, np.float32)
NO_WEIGHTS = moved(WEIGHTS)
BASE = "adapter for owner/base\\. .*merge_and_unload"
ADAPTER = wrote_json("adapter_config.json", base_model_name_or_path="owner/base", peft_type="LORA")
SPLIT = r"one of 3 parts\. Merge them .*--merge .*q4-00001-of-00003.gguf .*q4.gguf"
PARTS = [f"q4-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
RENAMES = 'Rename them with: python -c "'

FOLDERS: dict[str, Case] = {
    # What else lies in a folder that is read
    "as saved": (copied(), ""),
    "macOS notes": (copied(wrote("._model.safetensors", "._config.json", ".DS_Store")), ""),
    "state of a trainer": (
        copied(wrote("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")),
        "",
    ),
    "cache, original, onnx": (
        copied(
            wrote(
                ".cache/huggingface/a.safetensors",
                "original/consolidated.00.pth",
                "onnx/model.onnx",
                "consolidated.safetensors",
            )
        ),
        "",
    ),
    "pickles beside safetensors": (copied(wrote("pytorch_model.bin", "model.gguf")), ""),
    "float16 under bfloat16": (copied(config(dtype="bfloat16"), stored_as(np.float16)), ""),
    "upper-case GGUF": (empty(golden_gguf("model.Q8_0.GGUF")), ""),
    "GGUF beside its parts": (empty(golden_gguf("q4.gguf"), gguf(*PARTS)), ""),
    # dtypes
    "dtype auto": (copied(config(torch_dtype="auto", dtype=None)), ""),
    "dtype of torch": (copied(config(dtype="torch.bfloat16"), stored_as(ml_dtypes.bfloat16)), ""),
    "dtype half": (copied(config(torch_dtype="half", dtype=None)), ""),
    "no dtype": (copied(config(dtype=None, torch_dtype=None)), ""),
    "dtype int8": (copied(config(dtype="int8")), "dtype in .* must be one of float32, .*; found 'int8'"),
    "dtype of a list": (copied(config(dtype=["float32"])), "dtype in .* must be one of"),
    "GPTQ without a config": (
        copied(renamed(str, **{"model.layers.0.mlp.up_proj.qweight": ONE})),
        "found weights quantized by GPTQ or AWQ, such as model.layers.0.mlp.up_proj.qweight. Use the",
    ),
    "FP8 scales without a config": (
        copied(renamed(str, **{"model.layers.0.mlp.up_proj.weight_scale": ONE})),
        "found quantized weights with scales",
    ),
    "int8 tensors": (copied(stored_as(np.int8)), "must be float; found int8. Use the unquantized checkpoint"),
    # The family comes first, then the quantization
    "family before all": (
        copied(config(model_type="gpt_oss"), quantized(quant_method="mxfp4"), ADAPTER, NO_WEIGHTS),
        "model_type in .* must be one of llama.*; found 'gpt_oss'",
    ),
    "quantization before files": (
        copied(quantized(quant_method="gptq", bits=4), NO_WEIGHTS, wrote("pytorch_model.bin")),
        r"quantization_config .*found GPTQ \(4 bits\)",
    ),
    # Quantizations
    "AWQ": (copied(quantized(quant_method="awq", bits=4)), r"found AWQ \(4 bits\). Use the unquantized checkpoint"),
    "bitsandbytes": (copied(quantized(quant_method="bitsandbytes", load_in_8bit=True)), r"bitsandbytes \(8 bits\)"),
    "compressed": (
        copied(quantized(quant_method="compressed-tensors", format="pack-quantized")),
        r"compressed-tensors \(pack-quantized\)",
    ),
    "quantized text": (
        copied(config(text_config={"quantization_config": {"quant_method": "gptq", "bits": 4}})),
        r"found GPTQ \(4 bits\)",
    ),
    "older key": (
        copied(config(compression_config={"quant_method": "compressed-tensors"})),
        "found compressed-tensors. Use",
    ),
    "MLX": (copied(config(quantization={"group_size": 64, "bits": 4})), r"found MLX \(4 bits\)"),
    "MXFP4": (copied(quantized(quant_method="mxfp4")), "found MXFP4"),
    "FP8 of tensors": (copied(quantized(quant_method="fp8")), "found FP8 without block scales"),
    "unknown method": (copied(quantized(quant_method="hqq", bits=3)), r"found hqq \(3 bits\)"),
    "no method": (copied(quantized(bits=4)), "found {'bits': 4}"),
    "NVFP4": (
        copied(wrote_json("hf_quant_config.json", quantization={"quant_algo": "NVFP4"})),
        r"hf_quant_config.json must be absent.*found ModelOpt \(NVFP4\)",
    ),
    "only the cache quantized": (
        copied(
            wrote_json("hf_quant_config.json", quantization={"quant_algo": None, "kv_cache_quant_algo": "FP8"}),
        ),
        "",
    ),
    # Configs of something else
    "data set": (
        copied(wrote_json("config.json", builder_name="parquet", features={}, splits={})),
        "with a model_type; found builder_name, features, splits",
    ),
    "encoder and decoder": (copied(config(model_type="t5", is_encoder_decoder=True)), "found 't5', which has an enc"),
    "reward model": (
        copied(renamed(lambda name: name.replace("lm_head", "score")), config(architectures=["LlamaForX"])),
        "the head of a reward model, .* such as score.weight. Use the language model",
    ),
    "value head": (copied(renamed(str, **{"v_head.summary.weight": ONE})), "reward model, .* such as v_head.summary"),
    # Adapters
    "adapter": (empty(ADAPTER, wrote("adapter_model.safetensors")), BASE),
    "adapter with a config": (copied(ADAPTER, moved(WEIGHTS, "adapter_model.safetensors")), BASE),
    "adapter as a pickle": (empty(ADAPTER, wrote("adapter_model.bin", "training_args.bin")), BASE),
    "adapter without a base": (
        empty(wrote("adapter_model.safetensors")),
        "found an adapter\\. Merge it into its base model",
    ),
    "adapter in a checkpoint": (empty(ADAPTER, below("checkpoint-5", ADAPTER, NO_WEIGHTS)), BASE),
    "adapter beside its model": (copied(ADAPTER), f"either a model or an adapter; found both {WEIGHTS} and an adapter"),
    "adapter in the tensors": (
        copied(renamed(str, **{"model.layers.0.self_attn.q_proj.lora_A.default.weight": ONE})),
        "found those of an adapter.*Merge it",
    ),
    # Wrappers
    "compiled": (copied(renamed(lambda name: f"_orig_mod.{name}")), f"such as _orig_mod.lm_head.*{RENAMES}"),
    "data parallel": (copied(renamed(lambda name: f"module.{name}")), f"such as module.lm_head.*{RENAMES}"),
    "FSDP": (
        copied(renamed(lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."))),
        f"_fsdp_wrapped_module.*{RENAMES}",
    ),
    "PEFT": (copied(renamed(lambda name: f"base_model.model.{name}")), f"such as base_model.model.lm_.*{RENAMES}"),
    "two wrappers": (
        copied(renamed(lambda name: f"module.{name}".replace("layers.1.", "layers.1._checkpoint_wrapped_module."))),
        RENAMES,
    ),
    "no prefix": (
        copied(renamed(lambda name: name.removeprefix("model."))),
        "whose names lack the prefix model., such as embed_tokens.weight",
    ),
    # Heads
    "no head": (
        copied(renamed(lambda name: "" if "lm_head" in name else name)),
        "must hold lm_head.weight, because tie_word_embeddings is false or absent",
    ),
    "a head that should not be": (copied(config(tie_word_embeddings=True)), "lm_head.weight .* must equal the embed"),
    # Weights in other formats
    "pickle": (copied(NO_WEIGHTS, wrote("pytorch_model.bin", "training_args.bin")), "pytorch_model.bin, a pickle"),
    "pickled shards": (
        copied(NO_WEIGHTS, wrote("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json")),
        r"pytorch_model-00001-of-00002.bin, a pickle.*convert it with: python -c",
    ),
    "pickle by itself": (empty(wrote("policy.pt")), "policy.pt, a pickle.*save_pretrained"),
    "only consolidated": (
        empty(wrote("consolidated.safetensors", "params.json", "tekken.json")),
        "consolidated.safetensors, weights in Mistral's own format",
    ),
    "consolidated with a config": (copied(moved(WEIGHTS, "consolidated-00001-of-00002.safetensors")), "Mistral's own"),
    "Meta's": (empty(wrote("consolidated.00.pth", "params.json")), "consolidated.00.pth, weights in Meta's own"),
    "TensorFlow": (copied(NO_WEIGHTS, wrote("tf_model.h5")), "tf_model.h5, weights for another library"),
    "DeepSpeed": (
        copied(NO_WEIGHTS, wrote("zero_to_fp32.py", "global_step5/x.pt", "training_args.bin")),
        "a checkpoint of DeepSpeed. Merge .* -m deepspeed.utils.zero_to_fp32 ",
    ),
    "FSDP shards": (
        copied(NO_WEIGHTS, wrote("pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/__0_0.distcp")),
        "a sharded checkpoint .*accelerate merge-weights .*/pytorch_model_fsdp_0",
    ),
    "Orbax": (empty(wrote("_CHECKPOINT_METADATA", "policy/_METADATA")), "a checkpoint of Orbax.*grpo_jax.export"),
    "early llama.cpp": (
        empty(wrote("ggml-model-q4_0.bin")),
        "a file in the format of an early llama.cpp. Use a GGUF file",
    ),
    # GGUF files
    "several GGUF files": (
        empty(gguf("m.Q4_K_M.gguf", "m.Q8_0.gguf", "mmproj-m.gguf")),
        "a single GGUF file; found m.Q4_K_M.gguf, m.Q8_0.gguf. Set",
    ),
    "parts": (empty(wrote(*PARTS, text="GGUF")), SPLIT),
    "some parts": (empty(wrote(*PARTS[:2], text="GGUF")), SPLIT),
    "architecture before tensors": (
        empty(
            gguf("q.gguf", **{"general.architecture": "gptoss"}), lambda folder: os.truncate(folder / "q.gguf", 1000)
        ),
        "general.architecture in .* must be one of llama.*found 'gptoss'",
    ),
    "a part by another name": (empty(gguf("q.gguf", **{"split.count": 3, "split.no": 1})), "found one of 3 parts"),
    # Folders that hold no model
    "empty": (empty(), "must be a model folder; found an empty folder"),
    "only hidden files": (empty(wrote(".cache/huggingface/x")), "found an empty folder"),
    "only a tokenizer": (empty(wrote("tokenizer.json")), "found no .*safetensors. Set model.path"),
    "above the model": (
        empty(below("final"), wrote("README.md")),
        "found a model folder inside it: final. Set model.path to .*/final",
    ),
    "above a GGUF file": (
        empty(wrote("gguf/x"), lambda folder: gguf("a.GGUF")(folder / "gguf")),
        "found a model folder inside it: gguf. Set",
    ),
    "above several": (
        empty(below("a"), below("b"), below("original")),
        "found model folders inside it: a, b. Set model.path to one of",
    ),
    "checkpoints of a trainer": (
        empty(*map(below, ("checkpoint-9", "checkpoint-1000", "checkpoint-500")), wrote("training_args.bin")),
        "Set model.path to .*/checkpoint-1000, the newest",
    ),
    "checkpoints with a config": (copied(NO_WEIGHTS, below("checkpoint-7")), ".*/checkpoint-7, the newest"),
    "cache of the hub": (
        empty(wrote("refs/main", "blobs/x"), below("snapshots/0123abc")),
        "found a model folder inside it: 0123abc. Set model.path to .*/snapshots/0123abc",
    ),
    "workdir of a run": (empty(run), r"found the workdir of a run.*grpo_jax.export --workdir=[^ ]*/model --out"),
    "unfinished download": (
        copied(NO_WEIGHTS, wrote_json("model.safetensors.index.json", weight_map={"a": "m-1.safetensors"})),
        "1 missing, such as m-1.safetensors",
    ),
    "missing shard": (
        copied(wrote_json("model.safetensors.index.json", weight_map={"a": WEIGHTS, "b": "m-2.safetensors"})),
        "All 2 files .* 1 missing, such as m-2.safetensors",
    ),
    # Files that stand in for others
    "pointers": (copied(wrote(WEIGHTS, text=POINTER)), f"{WEIGHTS} .*found a Git LFS pointer. Run `git lfs pull`"),
    "pointer of the tokenizer": (copied(wrote("tokenizer.json", text=POINTER)), "tokenizer.json .*Git LFS"),
    "pointer as GGUF": (empty(wrote("a.gguf", text=POINTER)), "a.gguf .*Git LFS"),
    "no bytes": (copied(wrote(WEIGHTS, text="")), f"{WEIGHTS} must hold .*found an empty file"),
    "config without bytes": (copied(wrote("config.json", text="")), "config.json .*found an empty file"),
    "web page": (copied(wrote(WEIGHTS, text="<!DOCTYPE html>\n<html>")), "found a web page"),
}
