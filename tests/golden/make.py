"""Makes the folders beside it: tiny random models, as `transformers` saves them, and what it computes with them.

    python tests/golden/make.py [case ...]

Needs torch. reference.npz of a case:
    tokens, logits           two rows, and their logits
    mask, padded_logits      the same rows with padding in front; the logits count where the mask is 1
    greedy                   the rows with 32 greedy tokens more, whatever ends a text
A seed is passed over until the greedy choices are clear and rounding does not sway the logits.
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

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

# A case: the prefix of the classes in transformers, and the fields of the config.
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
            # Of 8 frequencies 1 is above the band between the two factors, 2 in it and 5 below.
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
}
SHARD_SIZE = {"qwen3": "60KB"}
NOISE = {"gemma2": 1.0, "gemma3": 1.0, "gemma3_vision": 1.0}  # else 0.2; with less these repeat one token


def build(case: str, seed: int):
    """A random model whose norms and biases are not all 1 or 0, where a mistake in them would not show."""
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


def save(case: str, model, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE.get(case, "1GB"))
    if case == "llama_bias":  # as config.json was before version 5
        path = folder / "config.json"
        raw = json.loads(path.read_text())
        rope = raw.pop("rope_parameters")
        raw |= {
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "linear", "factor": rope["factor"]},
            "torch_dtype": raw.pop("dtype"),
        }
        path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def logits_of(model, tokens, **more):
    return model(input_ids=tokens, **more).logits


def reference(model, seed: int) -> dict[str, torch.Tensor]:
    """The arrays of reference.npz, from one forward pass for each new token, without a cache."""
    vocab = model.config.get_text_config().vocab_size
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, vocab, (2, LENGTH)))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    mask[1, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    greedy = tokens
    for _ in range(NEW):
        greedy = torch.cat([greedy, logits_of(model, greedy)[:, -1:].argmax(-1)], dim=1)
    return dict(
        tokens=tokens,
        logits=logits_of(model, tokens),
        mask=mask,
        greedy=greedy,
        padded_logits=logits_of(model, tokens, attention_mask=mask, position_ids=positions),
    )


def clear(case: str, model, made) -> bool:
    """Whether the greedy choices are far from ties and varied, and a change as small as rounding stays small."""
    logits = logits_of(model, made["greedy"])
    top = logits[:, LENGTH - 1 : -1].topk(2).values
    gap = (top[..., 0] - top[..., 1]).min() / logits.abs().max()
    kinds = min(len(set(row[LENGTH:].tolist())) for row in made["greedy"])
    for weight in model.parameters():
        weight.mul_(1 + 1e-6 * torch.randn_like(weight))
    moved = (logits_of(model, made["greedy"]) - logits).abs().max() / logits.abs().max()
    print(f"{case}: gap {gap:.1e}, moved {moved:.1e}, {kinds} kinds of token")
    return gap > 2e-3 and moved < 5e-5 and kinds >= 6


def make(case: str) -> None:
    folder = HERE / case
    for seed in itertools.count():
        model = build(case, 0 if case == "llama" else seed)  # that one's weights stay as they are
        save(case, model, folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        made = reference(loaded, seed)
        assert torch.allclose(logits_of(model, made["tokens"]), made["logits"], atol=1e-5)
        if clear(case, loaded, made):
            break
    arrays = {name: value.numpy().astype(np.float32 if "logits" in name else np.int32) for name, value in made.items()}
    np.savez_compressed(folder / "reference.npz", **arrays)


if __name__ == "__main__":
    with torch.no_grad():
        for case in sys.argv[1:] or CASES:
            make(case)
