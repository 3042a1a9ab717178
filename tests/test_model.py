"""The decoder: causality, the KV cache, padding. tests/test_families.py compares it with `transformers`."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import forward
from grpo_jax.model.architecture import LayerConfig
from grpo_jax.model.attention import KV, choose_kernel
from grpo_jax.model.decoder import compute_logits, hidden_states, unstack_layers
from grpo_jax.model.mask import single_sequence
from grpo_jax.rollout.slots import prefill_prompts
from grpo_jax.text.problem import Prompts
from tests.tiny import CONFIG, params

compiled_forward = jax.jit(forward, static_argnums=0)


def test_logits_do_not_depend_on_future_tokens():
    """The logits at position 3 have a gradient for the embeddings of tokens 0 to 3 only."""
    weights = params()
    tokens = jnp.arange(1, 8)[None]

    def summed_logits(table):
        return forward(CONFIG, weights | {"embed": {"embedding": table}}, tokens)[0, 3].sum()

    grads = jnp.abs(jax.jit(jax.grad(summed_logits))(weights["embed"]["embedding"])).sum(axis=1)
    assert (grads[tokens[0, :4]] > 0).all()
    assert (grads[tokens[0, 4:]] == 0).all()


@pytest.mark.parametrize("unstacked", [False, True])
def test_decoding_from_the_cache_matches_the_forward_pass(unstacked):
    """Prefilling 4 tokens and decoding 5 more one by one gives the logits of one pass over all 9."""
    weights = unstack_layers(params()) if unstacked else params()
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 1, 45)
    expected = compiled_forward(CONFIG, weights, tokens)

    @jax.jit
    def logits_and_kv(tokens, first_position, cache):
        positions = first_position + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, kv = hidden_states(CONFIG, weights, tokens, single_sequence(positions), cache)
        return compute_logits(CONFIG, weights, hidden), kv

    def grow(x, axis):
        return jnp.pad(x, [(0, 5 if i == axis else 0) for i in range(5)])

    logits, kv = logits_and_kv(tokens[:, :4], 0, None)
    np.testing.assert_allclose(logits, expected[:, :4], atol=2e-5)
    kv = tuple(KV(grow(stack.k, 4), grow(stack.v, 3)) for stack in kv)
    for position in range(4, 9):
        logits, kv = logits_and_kv(tokens[:, position : position + 1], position, kv)
        np.testing.assert_allclose(logits[:, 0], expected[:, position], atol=2e-5)
    assert len(kv) == (2 if unstacked else 1) and isinstance(kv[0], KV)


def test_prefill_by_splash_equals_plain_prefill_and_holds_no_mask():
    """A layer with a sliding window and one without, on two prompts; the keys of layer 2 depend on layer 1."""
    layers = LayerConfig(window=20), LayerConfig()
    weights = unstack_layers(params(replace(CONFIG, layers=layers)))
    tokens = jax.random.randint(jax.random.key(1), (2, 128), 1, 45)
    prompts = Prompts(tokens, jnp.full(2, 128), jnp.arange(2))

    def prefill(attention):
        model_cfg = replace(CONFIG, layers=layers, attention=attention, max_positions=128)
        return jax.jit(prefill_prompts, static_argnums=(0, 3)).trace(model_cfg, weights, prompts, 2, 2).lower()

    splash, plain = prefill("splash"), prefill("plain")
    mask = "tensor<2x128x128xi1>"
    assert mask in plain.as_text() and mask not in splash.as_text()
    for got, want in zip(*(jax.tree.leaves(x.compile()(weights, prompts, 2)) for x in (splash, plain)), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_padding_on_either_side_does_not_change_the_logits():
    weights = params()
    tokens = jax.random.randint(jax.random.key(2), (1, 6), 1, 45)
    padding = jnp.full((1, 3), 7)
    expected = compiled_forward(CONFIG, weights, tokens)
    left = jnp.concatenate([padding, tokens], axis=1)
    right = jnp.concatenate([tokens, padding], axis=1)
    left = compiled_forward(CONFIG, weights, left, mask=jnp.asarray([[0] * 3 + [1] * 6]))
    right = compiled_forward(CONFIG, weights, right, mask=jnp.asarray([[1] * 6 + [0] * 3]))
    np.testing.assert_allclose(left[:, 3:], expected, atol=2e-5)
    np.testing.assert_allclose(right[:, :6], expected, atol=2e-5)
    assert np.isfinite(left).all()


@pytest.mark.parametrize(
    "platform, length, changed, expected",
    [
        ("cpu", 200, {}, "plain"),
        ("cpu", 1000, {}, "blocks"),
        ("tpu", 1024, {}, "splash"),
        ("tpu", 1000, {}, "blocks"),
        ("gpu", 1000, {}, "blocks"),
        ("gpu", 1000, dict(compute_dtype="bfloat16"), "cudnn"),
        ("gpu", 1001, dict(compute_dtype="bfloat16"), "blocks"),
        ("gpu", 1000, dict(compute_dtype="bfloat16", score_softcap=50.0), "blocks"),
        ("gpu", 1000, dict(compute_dtype="bfloat16", score_softcap=50.0, attention="cudnn"), "blocks"),
        ("tpu", 1, dict(attention="splash"), "plain"),
        ("cpu", 200, dict(attention="blocks"), "blocks"),
    ],
)
def test_the_attention_kernel_fits_the_platform_and_the_row_length(monkeypatch, platform, length, changed, expected):
    monkeypatch.setattr("grpo_jax.model.attention.mesh_platform", lambda: platform)
    model_cfg = replace(CONFIG, **changed)
    assert choose_kernel(model_cfg, length, cached=False) == expected
    assert choose_kernel(model_cfg, length, cached=True) == "plain"
