"""Mixtures of experts: the chosen experts, their weighted sum and its gradient, on one device and on a mesh."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import sample
from grpo_jax.config.schema import LossSection
from grpo_jax.learn.update import minibatch_gradients
from grpo_jax.model.architecture import ExpertsConfig, LatentConfig, LayerConfig, ModelConfig
from grpo_jax.model.experts import MixtureOfExperts, choose_experts, run_experts
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import make_mesh, num_data_shards, shard_rows
from grpo_jax.rollout.sampler import generate_rollout, pad_prompts, place_for_rollout
from grpo_jax.text.stops import build_stop_table
from tests.tiny import CONFIG, all_gather_shapes, experience, packed, params

LOSS = LossSection(kl_coef=0.05, clip_low=0.2, clip_high=0.3)
# One dense layer and two with experts, the last with a window of 3 tokens. No mesh axis divides the 5 experts.
SOFTMAX = replace(
    CONFIG,
    layers=(LayerConfig(), LayerConfig(use_experts=True), LayerConfig(window=3, use_experts=True)),
    experts=ExpertsConfig(5, 2, 24),
    qk_norm=True,
)
SIGMOID = replace(
    CONFIG,
    layers=(LayerConfig(), LayerConfig(use_experts=True)),
    num_kv_heads=1,
    experts=ExpertsConfig(
        8, 3, 16, shared_intermediate_size=24, sigmoid_gate=True, routed_scale=1.7, num_groups=4, num_top_groups=2
    ),
    latent=LatentConfig(12, 16, 6, 4, 10),
)
SCANNED_SIGMOID = replace(SIGMOID, layers=(*SIGMOID.layers, LayerConfig(use_experts=True)))
ALL_AXES, EXPERT_ONLY = dict(expert=2, fsdp=2, tensor=2), dict(expert=8)


def random_inputs(key=0, tokens=11, experts=5, width=12, hidden=7, per_token=2):
    """Random x, chosen, weights, gate, up and down; expert 3 is never chosen, expert 0 often."""
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


def reference_experts(x, chosen, weights, gate, up, down, first=0):
    """Applies every expert to every token, then sums those that the token chose."""
    hidden = jax.nn.silu(jnp.einsum("td,xdf->xtf", x, gate)) * jnp.einsum("td,xdf->xtf", x, up)
    share = (jax.nn.one_hot(chosen - first, len(gate)) * weights[..., None]).sum(axis=1)
    return jnp.einsum("tx,xtd->td", share, jnp.einsum("xtf,xfd->xtd", hidden, down))


# All experts; some, with others before and after them; one that no token chose.
@pytest.mark.parametrize("first, count", [(0, 5), (1, 3), (3, 1)])
def test_a_range_of_experts_has_the_sum_and_gradient_of_the_reference(first, count):
    x, chosen, weights, *kernels = random_inputs()
    kernels = [kernel[first : first + count] for kernel in kernels]
    d_out = jax.random.normal(jax.random.key(9), x.shape)

    def output_and_gradient(function):
        out, vjp = jax.vjp(
            lambda x, weights, kernels: function(x, chosen, weights, *kernels, first), x, weights, kernels
        )
        return out, jax.tree.leaves(vjp(d_out))

    def run(*args):
        return run_experts(*args, jax.nn.silu)

    out, grads = jax.jit(lambda: output_and_gradient(run))()
    expected, expected_grads = jax.jit(lambda: output_and_gradient(reference_experts))()
    np.testing.assert_allclose(out, expected, atol=2e-5)
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert np.abs(grad - expected).max() <= 2e-6 * np.abs(expected).max()


def test_no_token_is_dropped_when_all_choose_one_expert():
    x, chosen, weights, *kernels = random_inputs(tokens=40)
    chosen = jnp.zeros_like(chosen).at[:, 1].set(4)
    out = jax.jit(run_experts, static_argnums=7)(x, chosen, weights, *kernels, 0, jax.nn.silu)
    np.testing.assert_allclose(out, reference_experts(x, chosen, weights, *kernels), atol=5e-5)


def test_the_correction_affects_the_choice_but_not_the_weights():
    """With a bias of 10 every token chooses expert 6. Its weight stays its own score; the bias has no gradient."""
    experts = ExpertsConfig(
        8, 2, 16, sigmoid_gate=True, normalize_weights=False, routed_scale=2.0, num_groups=2, num_top_groups=1
    )
    logits = jax.random.normal(jax.random.key(1), (9, 8))
    bias = jnp.zeros(8).at[6].set(10.0)
    chosen, weights = choose_experts(experts, logits, bias)
    assert (chosen[:, 0] == 6).all() and (chosen[:, 1] >= 4).all()  # only the second group is eligible
    np.testing.assert_allclose(weights[:, 0], 2 * jax.nn.sigmoid(logits[:, 6]), rtol=1e-6)
    assert not jax.grad(lambda b: choose_experts(experts, logits, b)[1].sum())(bias).any()
    second = np.asarray(logits)[:, [4, 5, 7]]
    np.testing.assert_array_equal(chosen[:, 1], np.asarray([4, 5, 7])[second.argmax(axis=1)])


class MixtureAlone(nn.Module):
    """A layer with nothing but a mixture of experts, whose parameters have the same paths as in a decoder layer."""

    model_cfg: ModelConfig

    @nn.compact
    def __call__(self, x):
        return MixtureOfExperts(self.model_cfg, name="moe")(x)


def assert_gradients_close(grads, expected):
    for (path, want), grad in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(grads), strict=True):
        error = np.abs(np.asarray(grad) - np.asarray(want)).max()
        assert error <= 1e-5 * np.abs(want).max(), (path, error)


@pytest.mark.parametrize("model_cfg", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_a_mixture_has_the_same_gradient_on_every_mesh(model_cfg):
    x, d_out = (jax.random.normal(jax.random.key(seed), (8, 3, model_cfg.hidden_size)) for seed in range(2))
    mixture = MixtureAlone(model_cfg)
    weights = jax.jit(mixture.init)(jax.random.key(2), x)["params"]
    run = jax.jit(jax.grad(lambda weights, x: jnp.sum(d_out * mixture.apply({"params": weights}, x)), argnums=(0, 1)))
    expected = run(weights, x)
    for sizes in (ALL_AXES, EXPERT_ONLY):
        mesh = make_mesh(**sizes)
        with jax.set_mesh(mesh):
            shardings = tree_shardings(mesh, weights)
            grads = run(jax.device_put(weights, shardings), shard_rows(mesh, x))
        assert_gradients_close(grads, expected)


@pytest.mark.parametrize(
    "model_cfg, sizes",
    [
        pytest.param(SIGMOID, ALL_AXES, id="sigmoid-all_axes"),
        pytest.param(SCANNED_SIGMOID, EXPERT_ONLY, id="scanned_sigmoid-expert", marks=pytest.mark.slow),
        pytest.param(SCANNED_SIGMOID, ALL_AXES, id="scanned_sigmoid-all_axes", marks=pytest.mark.slow),
        pytest.param(SOFTMAX, EXPERT_ONLY, id="softmax-expert", marks=pytest.mark.slow),
        pytest.param(SOFTMAX, ALL_AXES, id="softmax-all_axes", marks=pytest.mark.slow),
    ],
)
def test_a_model_has_the_same_gradient_on_every_mesh_and_no_device_gathers_all_experts(model_cfg, sizes):
    weights, batch = params(model_cfg), experience(prompt=9, sampled=9, model_cfg=model_cfg)
    mesh = make_mesh(**sizes)
    run = jax.jit(lambda p, b: minibatch_gradients(model_cfg, p, b, temperature=0.9, loss=LOSS))
    expected, expected_metrics = run(weights, packed(batch))
    with jax.set_mesh(mesh):
        rows = shard_rows(mesh, packed(batch, 24, num_data_shards(mesh)))
        shardings = tree_shardings(mesh, weights)
        placed = jax.device_put(weights, shardings)
        compiled = run.lower(placed, rows).compile()
        grads, metrics = compiled(placed, rows)
    assert_gradients_close(grads, expected)
    np.testing.assert_allclose(metrics["loss/total"], expected_metrics["loss/total"], rtol=2e-5)
    if model_cfg.experts.num_experts % mesh.shape["expert"] == 0:
        assert shardings["layers"][1]["moe"]["experts_gate"].spec == jax.P(None, "expert", "fsdp", "tensor")
        shapes = all_gather_shapes(compiled.as_text())
        widths = {32, 16, 8}  # of the model and of an expert, whole or split in two; rows are 24 wide
        assert shapes and not [shape for shape in shapes if shape[-3:-2] == (8,) and set(shape[-2:]) <= widths]


@pytest.mark.parametrize(
    "model_cfg", [pytest.param(SOFTMAX, id="softmax", marks=pytest.mark.slow), pytest.param(SIGMOID, id="sigmoid")]
)
def test_a_mesh_does_not_change_the_completions(model_cfg):
    weights, prompts = params(model_cfg), [[5, 6, 7], [9, 8, 7, 6, 5, 4], [3], [11, 12]]
    expected = sample(model_cfg, weights, prompts, jax.random.key(3), samples=2, max_tokens=8)
    mesh = make_mesh(**ALL_AXES)
    with jax.set_mesh(mesh):
        rollout = generate_rollout(
            model_cfg,
            place_for_rollout(model_cfg, jax.device_put(weights, tree_shardings(mesh, weights)), mesh),
            pad_prompts(prompts),
            jax.random.key(3),
            temperature=1.0,
            stop_table=build_stop_table(model_cfg.vocab_size, ()),
            samples=2,
            max_tokens=8,
        )
    np.testing.assert_array_equal(rollout.tokens, expected.tokens)
