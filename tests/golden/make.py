"""Makes the folders next to it: small random models saved by `transformers`, and what it computes with them.

    python tests/golden/make.py [case ...]            makes the models and their references
    python tests/golden/make.py --check [case ...]    compares the references with the installed `transformers`

Needs PyTorch; the tests need only the files. The arrays of a case's reference.npz are:

    tokens, logits           two rows of tokens and their logits
    mask, padded_logits      the same rows with the first tokens masked as padding; logits count where the mask is 1
    greedy, greedy_logits    the rows continued by 32 greedy tokens (none stops them), and every fourth of the logits

A seed is skipped until the greedy choices are clear and rounding errors do not change the logits noticeably. `--check`
also exports each model with `grpo_jax.save` and continues the rows with `transformers` from the exported folder.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
LENGTH, NEW = 14, 32
SMALL = dict(max_position_embeddings=64, initializer_range=0.2, eos_token_id=2, pad_token_id=None, bos_token_id=None)
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
SHORT_ROPE = {"rope_type": "default", "rope_theta": 50.0}
LINEAR_ROPE = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 0.5,
    "beta_slow": 0.05,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
GEMMA3 = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=12,
    query_pre_attn_scalar=17,
    sliding_window=4,
    rms_norm_eps=1e-5,
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": LINEAR_ROPE,
    },
)
TEXT = SMALL | dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    num_attention_heads=4,
    num_key_value_heads=2,
)
QWEN_VISION = dict(
    depth=1, hidden_size=8, intermediate_size=8, num_heads=2, patch_size=2, spatial_merge_size=1, out_hidden_size=32
)
QWEN_TOKENS = dict(image_token_id=92, video_token_id=93, vision_start_token_id=94, vision_end_token_id=95)
DEEPSEEK = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=12,
    num_attention_heads=4,
    num_key_value_heads=4,
    qk_nope_head_dim=10,
    qk_rope_head_dim=8,
    v_head_dim=6,
    kv_lora_rank=20,
    n_routed_experts=8,
)
NARROW = dict(
    vocab_size=96,
    hidden_size=24,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
)

# Case -> prefix of the class names in transformers, and fields of the config.
CASES = {
    "llama": (
        "Llama",
        dict(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=12,
            rms_norm_eps=1e-5,
            rope_parameters=DEFAULT_ROPE,
            eos_token_id=[2, 5],
            bos_token_id=1,
        ),
    ),
    "llama31": (
        "Llama",
        dict(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rms_norm_eps=1e-5,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            # Of the 8 frequencies, 1 is above the interpolated band, 2 are in it and 5 below.
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
    ),
    "llama_bias": (
        "Llama",
        dict(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0},
        ),
    ),
    "mistral": (
        "Mistral",
        dict(
            vocab_size=331,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=10,
            sliding_window=5,
            rope_parameters=SHORT_ROPE,
        ),
    ),
    "qwen2": (
        "Qwen2",
        dict(
            vocab_size=96,
            hidden_size=48,
            intermediate_size=56,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=1,
            tie_word_embeddings=True,
            rope_parameters=SHORT_ROPE,
        ),
    ),
    "qwen3": (
        "Qwen3",
        dict(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            rope_parameters=SHORT_ROPE,
        ),
    ),
    "gemma2": (
        "Gemma2",
        dict(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            query_pre_attn_scalar=17,
            sliding_window=5,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=2.0,
            initializer_range=0.13,
            rms_norm_eps=1e-5,
            rope_parameters=SHORT_ROPE,
        ),
    ),
    "gemma3": (
        "Gemma3",
        GEMMA3 | dict(num_hidden_layers=4, layer_types=["sliding_attention"] * 3 + ["full_attention"]),
    ),
    "gemma3_vision": (
        "Gemma3",
        dict(
            text_config=SMALL
            | GEMMA3
            | dict(num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
            vision_config=dict(
                model_type="siglip_vision_model",
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=4,
                patch_size=2,
            ),
            mm_tokens_per_image=4,
            boi_token_index=93,
            eoi_token_index=94,
            image_token_index=95,
        ),
    ),
    "mixtral": (
        "Mixtral",
        dict(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=5,
            num_experts_per_tok=2,
            rope_parameters=SHORT_ROPE,
        ),
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        dict(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=40,
            moe_intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            num_experts=5,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            mlp_only_layers=[1],
            norm_topk_prob=True,
            rope_parameters=SHORT_ROPE,
        ),
    ),
    "qwen3_moe_plain": (
        "Qwen3Moe",
        dict(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=40,
            moe_intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=8,
            num_experts_per_tok=3,
            decoder_sparse_step=2,
            norm_topk_prob=False,
            rope_parameters=SHORT_ROPE,
        ),
    ),
    "ministral3": (
        "Ministral3",
        TEXT
        | dict(
            num_hidden_layers=2,
            head_dim=12,
            sliding_window=7,
            # The queries grow with their position at 8, 16 and so on.
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 8.0,
                "original_max_position_embeddings": 8,
                "beta_fast": 0.5,
                "beta_slow": 0.05,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.3,
            },
        ),
    ),
    "mistral3": (
        "Mistral3",
        dict(
            text_config=TEXT
            | dict(
                model_type="mistral", num_hidden_layers=2, head_dim=10, sliding_window=6, rope_parameters=SHORT_ROPE
            ),
            vision_config=dict(
                model_type="pixtral",
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                head_dim=4,
                image_size=4,
                patch_size=2,
            ),
            image_token_index=95,
            tie_word_embeddings=False,
        ),
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        dict(
            text_config=TEXT
            | dict(
                num_hidden_layers=3,
                use_sliding_window=True,
                sliding_window=6,
                max_window_layers=1,
                rope_parameters=SHORT_ROPE | {"mrope_section": [1, 1, 2]},
            ),
            vision_config=QWEN_VISION | dict(fullatt_block_indexes=[0], window_size=4),
            tie_word_embeddings=True,
        )
        | QWEN_TOKENS,
    ),
    "qwen3_vl": (
        "Qwen3VL",
        dict(
            text_config=TEXT
            | dict(
                num_hidden_layers=2,
                head_dim=12,
                rope_parameters=SHORT_ROPE | {"mrope_section": [2, 2, 2], "mrope_interleaved": True},
            ),
            vision_config=QWEN_VISION | dict(deepstack_visual_indexes=[0], num_position_embeddings=4),
            tie_word_embeddings=False,
        )
        | QWEN_TOKENS,
    ),
    "seed_oss": (
        "SeedOss",
        TEXT
        | dict(
            num_hidden_layers=2,
            head_dim=12,
            attention_bias=True,
            attention_out_bias=False,
            rope_parameters=SHORT_ROPE,
        ),
    ),
    "cwm": (
        "Cwm",
        TEXT
        | dict(
            num_hidden_layers=5,
            head_dim=12,
            sliding_window=5,
            bos_token_id=1,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        DEEPSEEK
        | dict(
            num_hidden_layers=3,
            q_lora_rank=12,
            num_experts_per_tok=3,
            n_shared_experts=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.8,
            mlp_layer_types=["dense", "sparse", "dense"],
            rope_parameters=SHORT_ROPE,
        ),
    ),
    "kimi_k2": (
        "DeepseekV3",
        DEEPSEEK
        | dict(
            num_hidden_layers=2,
            q_lora_rank=12,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            n_shared_experts=1,
            norm_topk_prob=True,
            routed_scaling_factor=2.8,
            rope_parameters=YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "mscale_all_dim": 1.0},
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        DEEPSEEK
        | dict(
            num_hidden_layers=3,
            q_lora_rank=12,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=3,
            n_shared_experts=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.7,
            rope_parameters=YARN,
        ),
    ),
    "deepseek_v3_plain": (
        "DeepseekV3",
        DEEPSEEK
        | dict(
            num_hidden_layers=2,
            q_lora_rank=None,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            n_shared_experts=2,
            norm_topk_prob=False,
            routed_scaling_factor=1.0,
            attention_bias=True,
            rope_parameters=SHORT_ROPE,
        ),
    ),
    "smollm3": (
        "SmolLM3",
        NARROW
        | dict(
            num_hidden_layers=4,
            no_rope_layers=[1, 0, 1, 0],
            use_sliding_window=True,
            sliding_window=5,
            layer_types=["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            rope_parameters=SHORT_ROPE,
        ),
    ),
    "olmo2": (
        "Olmo2",
        NARROW | dict(num_hidden_layers=2, attention_bias=True, initializer_range=0.5, rope_parameters=SHORT_ROPE),
    ),
    "olmo3": (
        "Olmo3",
        NARROW
        | dict(
            num_hidden_layers=4,
            sliding_window=5,
            initializer_range=0.5,
            layer_types=["sliding_attention"] * 3 + ["full_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 100.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                    "beta_fast": 0.5,
                    "beta_slow": 0.05,
                    "attention_factor": 1.2,
                },
            },
        ),
    ),
    "phi3": ("Phi3", NARROW | dict(num_hidden_layers=2, sliding_window=6, rope_parameters=SHORT_ROPE)),
    "phi3_longrope": (
        "Phi3",
        NARROW
        | dict(
            num_hidden_layers=2,
            hidden_size=32,
            max_position_embeddings=256,
            original_max_position_embeddings=64,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.3, 2.5],
                "long_factor": [1.5, 3.0, 9.0],
            },
        ),
    ),
    "granite": (
        "Granite",
        NARROW
        | dict(
            num_hidden_layers=3,
            embedding_multiplier=0.3,
            residual_multiplier=0.7,
            attention_multiplier=0.3,
            logits_scaling=4.0,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            rope_parameters=SHORT_ROPE,
        ),
    ),
    "glm4": (
        "Glm4",
        NARROW
        | dict(
            num_hidden_layers=2,
            head_dim=12,
            attention_bias=True,
            rope_parameters=SHORT_ROPE | {"partial_rotary_factor": 0.5},
        ),
    ),
}
SHARD_SIZE = {"qwen3": "60KB"}
NOISE = {"gemma2": 1.0, "gemma3": 1.0, "gemma3_vision": 1.0}  # 0.2 otherwise; with less, these repeat one token


def build_model(case: str, seed: int):
    """Builds a random model whose norms and biases are not all 1 or 0, so that a mistake in them shows."""
    torch.manual_seed(seed)
    prefix, fields = CASES[case]
    if "text_config" in fields:
        cfg = getattr(transformers, f"{prefix}Config")(**fields)
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(cfg)
    else:
        text = "Text" if prefix == "Gemma3" else ""
        cfg = getattr(transformers, f"{prefix}{text}Config")(**SMALL | fields)
        model = getattr(transformers, f"{prefix}ForCausalLM")(cfg)
    model = model.float().eval()
    biases = (buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))
    for weight in itertools.chain(model.parameters(), biases):
        if weight.ndim == 1:
            weight.data.add_(NOISE.get(case, 0.2) * torch.randn_like(weight))
    return model


def save_model(case: str, model, folder: Path) -> None:
    """Saves a model; the config of `llama_bias` is written as before version 5 of `transformers`.

    `transformers` does not know the name of `kimi_k2`.
    """
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE.get(case, "1GB"))
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    if case == "kimi_k2":
        path.write_text(json.dumps(raw | {"model_type": case}, indent=2, sort_keys=True) + "\n")
    if case == "llama_bias":
        rope = raw.pop("rope_parameters")
        raw |= {
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "linear", "factor": rope["factor"]},
            "torch_dtype": raw.pop("dtype"),
        }
        path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def load_model(case: str, folder: Path):
    """Loads a saved model in float32, with the attention that `transformers` defines in Python."""
    auto = transformers.AutoModelForCausalLM
    if "text_config" in CASES[case][1]:
        auto = transformers.AutoModelForImageTextToText
    options = {}
    if case == "kimi_k2":  # a DeepSeek-V3 of a name that `transformers` does not know
        raw = json.loads((folder / "config.json").read_text())
        options["config"] = transformers.DeepseekV3Config.from_dict(raw | {"model_type": "deepseek_v3"})
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **options).eval()


def compute_logits(model, tokens, **inputs):
    """Runs a model on rows of tokens."""
    return model(input_ids=tokens, **inputs).logits


def continue_greedily(model, tokens):
    """Appends greedy tokens, with one forward pass for each and no cache."""
    for _ in range(NEW):
        tokens = torch.cat([tokens, compute_logits(model, tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens


def compute_reference(model, tokens) -> dict[str, np.ndarray]:
    """Computes the arrays of reference.npz for rows of tokens."""
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    mask[1, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    greedy = continue_greedily(model, tokens)
    arrays = dict(
        tokens=tokens,
        logits=compute_logits(model, tokens),
        mask=mask,
        padded_logits=compute_logits(model, tokens, attention_mask=mask, position_ids=positions),
        greedy=greedy,
        greedy_logits=compute_logits(model, greedy)[..., ::4],
    )
    return {name: array.numpy().astype(np.float32 if "logits" in name else np.int32) for name, array in arrays.items()}


def is_clear(case: str, model, greedy) -> bool:
    """Tells whether the greedy tokens vary and are far from ties, and a change as small as rounding stays small."""
    greedy = torch.tensor(greedy, dtype=torch.long)
    logits = compute_logits(model, greedy)
    top = logits[:, LENGTH - 1 : -1].topk(2).values
    margin = (top[..., 0] - top[..., 1]).min() / logits.abs().max()
    distinct = min(len(set(row[LENGTH:].tolist())) for row in greedy)
    for weight in model.parameters():
        weight.mul_(1 + 1e-6 * torch.randn_like(weight))
    change = (compute_logits(model, greedy) - logits).abs().max() / logits.abs().max()
    print(f"{case}: margin {margin:.1e}, change {change:.1e}, {distinct} distinct tokens")
    return margin > 2e-3 and change < 5e-5 and distinct >= 6


def make_case(case: str) -> None:
    """Makes the folder of a case."""
    folder = HERE / case
    for seed in itertools.count():
        model = build_model(case, 0 if case == "llama" else seed)  # only the tokens of this case depend on the seed
        save_model(case, model, folder)
        loaded = load_model(case, folder)
        vocab_size = model.config.get_text_config().vocab_size
        tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, vocab_size, (2, LENGTH)))
        arrays = compute_reference(loaded, tokens)
        if is_clear(case, loaded, arrays["greedy"]):
            break
    np.savez_compressed(folder / "reference.npz", **arrays)


def check_case(case: str) -> None:
    """Checks that the installed `transformers` reproduces a case, and continues its rows from an exported folder.

    Raises:
        AssertionError: It does not.
    """
    import grpo_jax

    with np.load(HERE / case / "reference.npz") as arrays:
        expected = dict(arrays)
    tokens = torch.tensor(expected["tokens"], dtype=torch.long)
    for name, array in compute_reference(load_model(case, HERE / case), tokens).items():
        np.testing.assert_allclose(
            array, expected[name], rtol=0, atol=1e-5 * np.abs(expected[name]).max(), err_msg=name
        )
    with tempfile.TemporaryDirectory() as folder:
        grpo_jax.save(folder, *grpo_jax.load(HERE / case))
        exported = load_model(case, Path(folder))
        np.testing.assert_array_equal(continue_greedily(exported, tokens).numpy(), expected["greedy"])
    print(f"{case}: as expected")


def main() -> None:
    """Makes or checks the cases named on the command line, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("cases", nargs="*", default=[*CASES])
    options = parser.parse_args()
    with torch.no_grad():
        for case in options.cases:
            (check_case if options.check else make_case)(case)


if __name__ == "__main__":
    main()
