"""A decode step reads merged weights as they lie, and logits stay split over devices."""

import re

from grpo_jax.planning.counts import count_program
from tests.plan.test_attention import run_compile_rollout


def test_a_gpu_concatenates_no_weights_whichever_product_kernel_it_chooses(monkeypatch):
    """XLA merges products of one input. Were the weights apart, it would concatenate them anew for every token."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    text = run_compile_rollout("h100:1", "decode 1024")
    merged = {"512,1536", "512,2048", "1536,512", "2048,512"}  # q, k and v; gate and up
    concatenated = re.findall(r"= bf16\[([\d,]+)\]\S* concatenate\(", text)
    assert "attention/qkv/dot_general" in text and not merged & set(concatenated)


def test_devices_exchange_no_logits():
    text = run_compile_rollout("v6e:2x2", "decode 1024", tensor=2)
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
    assert gathered and not any("4096" in dims for dims in gathered), gathered


def test_a_gpu_starts_ten_kernels_for_each_layer_of_a_small_model():
    """Norm, q k v, RoPE, attention, o, add and norm, gate and up, activation, down, add; and 26 for the whole step."""
    widths = dict(hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, head_dim=64)
    text = run_compile_rollout("h100:1", "decode 1024", layers=2, **widths)
    assert text.startswith("copies: () ")
    counts = count_program(text[text.index("HloModule") :], {}, {"refill": 0}, 2**20, inside="tokens")
    assert counts.kernels <= 2 * 10 + 26 and counts.unknown == ()
