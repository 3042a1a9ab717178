"""Makes tests/golden/llama: a tiny random Llama and the logits that `transformers` computes for it. Needs torch.

    python tests/golden/make.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=96, hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=12, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.2,
    rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, eos_token_id=[2, 5])).float().eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms start at 1, where a mistake in them would not show
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(HERE / "llama")
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 96, (2, 12)))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    np.savez(
        HERE / "llama" / "logits.npz", tokens=tokens.numpy().astype(np.int32), mask=mask.numpy().astype(np.int32),
        logits=model(tokens).logits.numpy(),
        padded_logits=model(tokens, attention_mask=mask, position_ids=positions).logits.numpy())
