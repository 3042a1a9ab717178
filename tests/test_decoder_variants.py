"""Features of the decoder that only some families have, together in one model: gradients, decoding and rollouts.

`tests/test_families.py` compares each of them with `transformers`.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import forward, sample
from grpo_jax.learn.logprobs import logprobs_from_hidden
from grpo_jax.model.architecture import LayerConfig, RopeConfig
from grpo_jax.model.decoder import hidden_states, merge_projections, unstack_layers
from grpo_jax.model.mask import single_sequence
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import make_mesh
from tests.tiny import CONFIG, params

MODEL = replace(
    CONFIG,
    # Layers with and without a rotary embedding are scanned together.
    layers=(LayerConfig(), LayerConfig(window=4, rope=None), LayerConfig(rope=None)),
    qk_norm=True,
    qk_norm_all_heads=True,
    pre_norms=False,
    post_norms=True,
    residual_scale=0.6,
    rotary_dim=4,
    rope_interleave=True,
    embed_scale=0.5,
    score_divisor=1.7,
    logit_divisor=0.4,
)
TEMPERATURE = 0.9
TOKENS = np.random.default_rng(0).integers(0, MODEL.tokenizer_vocab_size, (8, 12))
MESHES = [(2, 2, 2), (1, 8, 1), (1, 2, 4), (1, 1, 8)]


def mean_logp(weights, tokens):
    """Returns the mean log-prob of the tokens from the logits of all ids."""
    logits = forward(MODEL, weights, tokens)[:, :-1, : MODEL.tokenizer_vocab_size] / TEMPERATURE
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()


def mean_logp_of_training(weights, tokens):
    """Returns the same as an update computes it: with a chunked head and rematerialized layers."""
    model_cfg = replace(MODEL, remat="layers")
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = hidden_states(model_cfg, weights, tokens, single_sequence(position))
    return logprobs_from_hidden(model_cfg, weights, hidden[:, :-1], tokens[:, 1:], TEMPERATURE, chunk_tokens=32)[
        0
    ].mean()


def test_decoding_token_by_token_gives_the_hidden_states_of_one_forward_pass():
    """With the merged projections of a rollout, and queries that grow with their positions."""
    growing = RopeConfig(query_growth=0.3, original_max_positions=4)
    model_cfg = replace(MODEL, layers=(LayerConfig(rope=growing), LayerConfig(window=4, rope=None)))
    weights = unstack_layers(params(model_cfg))
    merged = weights | {"layers": tuple(merge_projections(layer, 1) for layer in weights["layers"])}
    run = jax.jit(hidden_states, static_argnums=0)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    expected, kv = run(model_cfg, weights, TOKENS, single_sequence(positions))
    cache = jax.tree.map(jnp.zeros_like, kv)
    for column in range(TOKENS.shape[1]):
        at = slice(column, column + 1)
        hidden, cache = run(model_cfg, merged, TOKENS[:, at], single_sequence(positions[:, at]), cache)
        np.testing.assert_allclose(hidden, expected[:, at], atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_gradients_on_a_mesh_are_those_of_all_logits_on_one_device(sizes):
    weights, mesh = params(MODEL), make_mesh(*sizes)
    want, expected = jax.jit(jax.value_and_grad(mean_logp))(weights, TOKENS)
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, tree_shardings(mesh, weights))
        got, actual = jax.jit(jax.value_and_grad(mean_logp_of_training))(placed, TOKENS)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for (path, gradient), other in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(actual), strict=True
    ):
        assert np.abs(gradient).max() > 0, path
        assert np.abs(other - gradient).max() <= 2e-5 * np.abs(gradient).max(), path


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_a_rollout_on_a_mesh_has_the_logps_of_one_forward_pass(sizes):
    mesh, weights = make_mesh(*sizes), params(MODEL)
    prompts = TOKENS[:4, :5].tolist()
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, tree_shardings(mesh, weights))
        rollout = sample(MODEL, placed, prompts, jax.random.key(1), samples=2, max_tokens=8, temperature=TEMPERATURE)
    completions = np.asarray(rollout.tokens).reshape(8, 8)
    rows = np.concatenate([np.repeat(TOKENS[:4, :5], 2, axis=0), completions], axis=1)
    logits = jax.jit(forward, static_argnums=0)(MODEL, weights, rows)[:, 4:-1, : MODEL.tokenizer_vocab_size]
    logps = jax.nn.log_softmax(logits / TEMPERATURE)
    expected = np.take_along_axis(np.asarray(logps), completions[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(np.asarray(rollout.logps).reshape(8, 8), expected, atol=3e-5)
