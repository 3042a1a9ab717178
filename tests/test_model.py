"""The decoder: causality, caching, padding. tests/test_families.py compares it with `transformers`."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import forward
from grpo_jax.model.attention import KV, choose_kernel
from grpo_jax.model.decoder import hidden_states, logits_from_hidden, unstack_layers
from grpo_jax.model.mask import single_sequence
from tests.tiny import CONFIG, params


def test_future_tokens_have_no_gradient():
    """Position 3's logits depend on the embeddings of tokens 0 to 3, and on those only."""
    weights = params()
    tokens = jnp.arange(1, 8)[None]

    def logit(table):
        changed = weights | {"embed": {"embedding": table}}
        return forward(CONFIG, changed, tokens)[0, 3].sum()

    grads = jnp.abs(jax.grad(logit)(weights["embed"]["embedding"])).sum(axis=1)
    assert (grads[tokens[0, :4]] > 0).all()
    assert (grads[tokens[0, 4:]] == 0).all()


@pytest.mark.parametrize("unrolled", [False, True])
def test_cached_decode_matches_full_forward(unrolled):
    """Prefill of 4 tokens, then one at a time from the cache, equals one pass over all 9, in float32."""
    weights = unstack_layers(params()) if unrolled else params()
    tokens = jax.random.randint(jax.random.key(1), (3, 9), 1, 45)
    full = forward(CONFIG, weights, tokens)

    positions = jnp.broadcast_to(jnp.arange(4), (3, 4))
    hidden, kv = hidden_states(CONFIG, weights, tokens[:, :4], single_sequence(positions))

    def grow(x, axis):
        return jnp.pad(x, [(0, 5 if i == axis else 0) for i in range(5)])

    kv = tuple(KV(grow(layer.k, 4), grow(layer.v, 3)) for layer in kv)
    np.testing.assert_allclose(logits_from_hidden(CONFIG, weights, hidden), full[:, :4], atol=2e-5)
    for at in range(4, 9):
        hidden, kv = hidden_states(CONFIG, weights, tokens[:, at : at + 1], single_sequence(jnp.full((3, 1), at)), kv)
        np.testing.assert_allclose(logits_from_hidden(CONFIG, weights, hidden)[:, 0], full[:, at], atol=2e-5)
    assert len(kv) == (2 if unrolled else 1) and isinstance(kv[0], KV)


def test_padding_on_either_side_changes_nothing():
    weights = params()
    tokens = jax.random.randint(jax.random.key(2), (1, 6), 1, 45)
    expected = forward(CONFIG, weights, tokens)
    left = jnp.concatenate([jnp.full((1, 3), 7), tokens], axis=1)
    right = jnp.concatenate([tokens, jnp.full((1, 3), 7)], axis=1)
    on_left = forward(CONFIG, weights, left, mask=jnp.asarray([[0] * 3 + [1] * 6]))
    on_right = forward(CONFIG, weights, right, mask=jnp.asarray([[1] * 6 + [0] * 3]))
    np.testing.assert_allclose(on_left[:, 3:], expected, atol=2e-5)
    np.testing.assert_allclose(on_right[:, :6], expected, atol=2e-5)
    assert np.isfinite(on_left).all()


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
def test_attention_is_computed_in_the_way_that_suits_platform_and_rows(
    monkeypatch, platform, length, changed, expected
):
    monkeypatch.setattr("grpo_jax.model.attention.mesh_platform", lambda: platform)
    model_cfg = replace(CONFIG, **changed)
    assert choose_kernel(model_cfg, length, cached=False) == expected
    assert choose_kernel(model_cfg, length, cached=True) == "plain"
