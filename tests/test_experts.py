"""Mixtures of experts: every token gets its experts, on any mesh, and the gradient is that of the plain sum."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import sample
from grpo_jax.config.schema import LossSection
from grpo_jax.learn.update import minibatch_gradients
from grpo_jax.model.architecture import ExpertsConfig, LatentConfig, LayerConfig
from grpo_jax.model.experts import choose_experts, run_experts
from grpo_jax.parallel.mesh import make_mesh, num_row_shards, shard_rows, tree_shardings
from grpo_jax.rollout.sampler import generate_rollout, pad_prompts, place_for_rollout
from grpo_jax.text.stops import build_stop_table
from tests.tiny import CONFIG, experience, packed, params

LOSS = LossSection(kl_coef=0.05, clip_low=0.2, clip_high=0.3)
# One layer without experts and two with, the last of which sees 3 tokens; 5 experts, which no axis divides.
SOFTMAX = replace(
    CONFIG,
    layers=(LayerConfig(), LayerConfig(use_experts=True), LayerConfig(window=3, use_experts=True)),
    experts=ExpertsConfig(5, 2, 24),
    qk_norm=True,
)
SIGMOID = replace(
    CONFIG,
    layers=(LayerConfig(), LayerConfig(use_experts=True), LayerConfig(use_experts=True)),
    num_kv_heads=1,
    experts=ExpertsConfig(
        8, 3, 16, shared_intermediate_size=24, sigmoid_gate=True, routed_scale=1.7, num_groups=4, num_top_groups=2
    ),
    latent=LatentConfig(12, 16, 6, 4, 10),
)
MESHES = [dict(expert=2, fsdp=2, tensor=2), dict(expert=8)]


def layer(key=0, tokens=11, experts=5, width=12, hidden=7, per_token=2):
    """x, chosen, weights, gate, up, down at random; expert 3 is never chosen, expert 0 often."""
    keys = jax.random.split(jax.random.key(key), 6)
    logits = jax.random.normal(keys[0], (tokens, experts)).at[:, 3].set(-9).at[:, 0].add(1)
    chosen = jax.lax.top_k(logits, per_token)[1]
    normal = jax.random.normal
    return (
        normal(keys[1], (tokens, width)),
        chosen,
        jax.random.uniform(keys[2], (tokens, per_token)),
        normal(keys[3], (experts, width, hidden)),
        normal(keys[4], (experts, width, hidden)),
        normal(keys[5], (experts, hidden, width)),
    )


def plainly(x, chosen, weights, gate, up, down, first=0):
    """All experts for all tokens, then the weighted sum of those chosen among the ones given."""
    all_of = jnp.einsum(
        "xtf,xfd->xtd", jax.nn.silu(jnp.einsum("td,xdf->xtf", x, gate)) * jnp.einsum("td,xdf->xtf", x, up), down
    )
    share = (jax.nn.one_hot(chosen - first, len(gate)) * weights[..., None]).sum(axis=1)
    return jnp.einsum("tx,xtd->td", share, all_of)


@pytest.mark.parametrize("first, count", [(0, 5), (0, 2), (2, 3), (3, 1)])
def test_the_sum_over_some_experts(first, count):
    x, chosen, weights, *kernels = layer()
    kernels = [kernel[first : first + count] for kernel in kernels]
    ours = lambda x, weights, kernels: run_experts(x, chosen, weights, *kernels, first, jax.nn.silu)
    theirs = lambda x, weights, kernels: plainly(x, chosen, weights, *kernels, first)
    np.testing.assert_allclose(ours(x, weights, kernels), theirs(x, weights, kernels), atol=2e-5)
    slope = jax.random.normal(jax.random.key(9), x.shape)
    gradient = lambda f: jax.grad(lambda *args: jnp.sum(slope * f(*args)), argnums=(0, 1, 2))(x, weights, kernels)
    for ours, theirs in zip(jax.tree.leaves(gradient(ours)), jax.tree.leaves(gradient(theirs))):
        assert np.abs(ours - theirs).max() <= 2e-6 * np.abs(theirs).max()


def test_no_token_is_dropped_when_all_want_one_expert():
    x, chosen, weights, *kernels = layer(tokens=40)
    chosen = jnp.zeros_like(chosen).at[:, 1].set(4)
    np.testing.assert_allclose(
        run_experts(x, chosen, weights, *kernels, 0, jax.nn.silu), plainly(x, chosen, weights, *kernels), atol=5e-5
    )


def test_the_correction_chooses_and_does_not_weigh():
    """A bias of 10 makes expert 6 everyone's; its weight stays its own score, and the bias has no gradient."""
    experts = ExpertsConfig(
        8, 2, 16, sigmoid_gate=True, normalize_weights=False, routed_scale=2.0, num_groups=2, num_top_groups=1
    )
    logits = jax.random.normal(jax.random.key(1), (9, 8))
    bias = jnp.zeros(8).at[6].set(10.0)
    chosen, weights = choose_experts(experts, logits, bias)
    assert (chosen[:, 0] == 6).all() and (chosen[:, 1] >= 4).all()  # the other group is left out
    np.testing.assert_allclose(weights[:, 0], 2 * jax.nn.sigmoid(logits[:, 6]), rtol=1e-6)
    assert not jax.grad(lambda b: choose_experts(experts, logits, b)[1].sum())(bias).any()
    best = np.asarray(logits)[:, [4, 5, 7]]  # without the bias, groups would be chosen by their best two
    np.testing.assert_array_equal(chosen[:, 1], np.asarray([4, 5, 7])[best.argmax(axis=1)])


def grads_of(model_cfg, batch, weights):
    run = jax.jit(lambda p, b: minibatch_gradients(model_cfg, p, b, temperature=0.9, loss=LOSS))
    return run(weights, batch)


@pytest.mark.parametrize("model_cfg", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_gradients_are_the_same_on_every_mesh(model_cfg):
    weights, batch = params(model_cfg), experience(model_cfg=model_cfg)
    expected = grads_of(model_cfg, packed(batch), weights)
    for sizes in MESHES:
        mesh = make_mesh(**sizes)
        with jax.set_mesh(mesh):
            rows = packed(batch, 16, num_row_shards(mesh))
            made = grads_of(model_cfg, shard_rows(mesh, rows), jax.device_put(weights, tree_shardings(mesh, weights)))
        for (path, want), have in zip(jax.tree_util.tree_leaves_with_path(expected[0]), jax.tree.leaves(made[0])):
            gap = np.abs(np.asarray(have) - np.asarray(want)).max()
            assert gap <= 1e-5 * np.abs(want).max(), (sizes, path, gap)
        np.testing.assert_allclose(made[1]["loss/total"], expected[1]["loss/total"], rtol=2e-5)


@pytest.mark.parametrize("model_cfg", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_completions_are_the_same_on_every_mesh(model_cfg):
    weights, prompts = params(model_cfg), [[5, 6, 7], [9, 8, 7, 6, 5, 4], [3], [11, 12]]
    how = dict(samples=2, max_tokens=8)
    expected = sample(model_cfg, weights, prompts, jax.random.key(3), **how)
    for sizes in MESHES[:1]:
        mesh = make_mesh(**sizes)
        with jax.set_mesh(mesh):
            placed = place_for_rollout(model_cfg, jax.device_put(weights, tree_shardings(mesh, weights)), mesh)
            made = generate_rollout(
                model_cfg,
                placed,
                pad_prompts(prompts),
                jax.random.key(3),
                temperature=1.0,
                stop_table=build_stop_table(model_cfg.vocab_size, ()),
                **how,
            )
        np.testing.assert_array_equal(made.tokens, expected.tokens)


def test_experts_are_split_and_their_weights_never_gathered_over_the_expert_axis():
    mesh = make_mesh(expert=8)
    placed = tree_shardings(mesh, params(SIGMOID))["layers"][1]["moe"]
    assert placed["experts_gate"].spec == jax.P(None, "expert", "fsdp", "tensor")
    weights, batch = params(SIGMOID), packed(experience(prompt=9, sampled=9, model_cfg=SIGMOID), 24, 8)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda p, b: minibatch_gradients(SIGMOID, p, b, temperature=0.9, loss=LOSS))
        text = (
            run.lower(jax.device_put(weights, tree_shardings(mesh, weights)), shard_rows(mesh, batch))
            .compile()
            .as_text()
        )
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert gathers and not [line for line in gathers if "f32[8,32,16]" in line or "f32[8,16,32]" in line]
