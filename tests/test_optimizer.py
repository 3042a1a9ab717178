"""The optimizer: update rules against their formulas, skipped updates, float32 state and its sharding."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from grpo_jax.config.schema import OptimSection
from grpo_jax.learn.optimizer import (
    apply_gradients,
    init_train_state,
    make_optimizer,
    make_schedule,
    moment_spec,
    muon_dimensions,
    new_train_state,
    to_float32,
    train_state_shapes,
    train_state_shardings,
)
from grpo_jax.model.architecture import ExpertsConfig, LatentConfig, LayerConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import make_mesh, path_name
from tests.tiny import CONFIG

RULES = ("adamw", "adafactor", "lion", "muon")
ADAMW_FIRST = ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in RULES if name != "adamw")]
MIXTURE = replace(  # has every kind of parameter
    CONFIG,
    layers=(LayerConfig(), LayerConfig(use_experts=True), LayerConfig(use_experts=True)),
    num_kv_heads=4,
    experts=ExpertsConfig(8, 2, 24, shared_intermediate_size=16, sigmoid_gate=True),
    latent=LatentConfig(16, 8, 8, 4, 8),
)
BIASED = replace(CONFIG, qkv_bias=True, mlp_bias=True, qk_norm=True, tie_embeddings=True)


@cache
def compiled(optim):
    """Returns the optimizer of an `optim` section and its jitted update."""
    optimizer = make_optimizer(optim)
    return optimizer, jax.jit(partial(apply_gradients, optimizer=optimizer, schedule=make_schedule(optim)))


def run_updates(optim, params, *gradients):
    """Returns the states before and after each update, and the metrics of the last one."""
    optimizer, update = compiled(optim)
    states, metrics = [new_train_state(params, optimizer)], None
    for grads in gradients:
        state, metrics = update(states[-1], grads)
        states.append(state)
    return states, metrics


def one_layer(kernel, bias):
    """Returns a tree whose paths are those of a model's parameters."""
    return {"layers": ({"mlp": {"gate": {"kernel": kernel, "bias": bias}}},)}


def small(seed=0, dtype=jnp.float32):
    """Draws a matrix, stacked for two layers, and its bias."""
    draw = np.random.default_rng(seed)
    return one_layer(*(jnp.asarray(draw.standard_normal(shape), dtype) for shape in ((2, 8, 24), (2, 24))))


def kernel_and_bias(tree):
    gate = tree["layers"][0]["mlp"]["gate"]
    return gate["kernel"], gate["bias"]


def step_taken(after, before):
    """Returns how the kernel and the bias changed between two states."""
    return kernel_and_bias(jax.tree.map(jnp.subtract, after.params, before.params))


def by_path(tree):
    """Returns {path: leaf}."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_adamw_follows_its_formula():
    """Two warm-up updates, gradients above and below the clipping norm, and weight decay of the kernel only."""
    optim = OptimSection(lr=0.1, warmup_steps=2, b1=0.8, b2=0.95, weight_decay=0.3, grad_clip=2.0)
    gradients = [optax.tree.scale(scale, small(seed)) for seed, scale in ((1, 5.0), (2, 0.01), (3, 1.0))]
    states, metrics = run_updates(optim, small(), *gradients)
    value = {name: np.asarray(x, np.float64) for name, x in by_path(small()).items()}
    first, second = ({name: 0.0 for name in value} for _ in range(2))
    for update, grads in enumerate(gradients, 1):
        grads = {name: np.asarray(x, np.float64) for name, x in by_path(grads).items()}
        norm = np.sqrt(sum((x**2).sum() for x in grads.values()))
        for name, grad in grads.items():
            grad = grad * min(1, 2.0 / norm)
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            change = first[name] / (1 - 0.8**update) / (np.sqrt(second[name] / (1 - 0.95**update)) + 1e-8)
            decay = 0.3 * value[name] if name.endswith("kernel") else 0
            value[name] = value[name] - 0.1 * min(1, update / 2) * (change + decay)
            np.testing.assert_allclose(by_path(states[update].params)[name], value[name], atol=2e-6)
    assert metrics["optim/lr"] == np.float32(0.1) and metrics["optim/skipped"] == 0 and states[-1].step == 3
    np.testing.assert_allclose(metrics["optim/grad_norm"], norm, rtol=1e-6)  # before the clip


@pytest.mark.parametrize("name", RULES)
def test_first_step_descends_and_its_size_is_the_learning_rate(name):
    """Every entry moves by lr, however large the gradient; the step of a matrix under Muon has an RMS of 0.2 lr."""
    grads = optax.tree.scale(1e3, small(1))
    (before, after), _ = run_updates(OptimSection(name=name, lr=0.01), small(), grads)
    steps = dict(
        zip(("kernel", "bias"), zip(step_taken(after, before), kernel_and_bias(grads), strict=True), strict=True)
    )
    if name == "muon":
        change, grad = steps.pop("kernel")
        rms = np.sqrt((np.asarray(change) ** 2).mean())
        assert 0.15 * 0.01 < rms < 0.25 * 0.01 and (change * grad).sum() < 0
    for change, grad in steps.values():
        np.testing.assert_allclose(change, -0.01 * jnp.sign(grad), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_updates_minimize_a_quadratic(name):
    """The quadratic is the sum of squares, whose gradient is 2x."""
    optimizer, update = compiled(OptimSection(name=name, lr=0.1, b2=0.99))
    state = new_train_state(small(), optimizer)
    for _ in range(20):
        state, _ = update(state, jax.tree.map(lambda x: 2 * x, state.params))
    for value, start in zip(kernel_and_bias(state.params), kernel_and_bias(small()), strict=True):
        assert (value**2).sum() < 0.5 * (start**2).sum()


@pytest.mark.parametrize("name", ADAMW_FIRST)
def test_weight_decay_subtracts_a_fraction_of_the_kernel(name):
    """With a gradient of 0 nothing else changes the kernel, and nothing at all the bias."""
    (before, after), _ = run_updates(
        OptimSection(name=name, lr=0.02, weight_decay=0.5), small(), jax.tree.map(jnp.zeros_like, small())
    )
    kernel, bias = step_taken(after, before)
    np.testing.assert_allclose(kernel, -0.02 * 0.5 * kernel_and_bias(small())[0], atol=1e-6)
    assert not bias.any()


def test_lion_follows_its_formula():
    """The step averages gradients with b1, the moment with b2."""
    first, second = ({name: np.asarray(x) for name, x in by_path(small(seed)).items()} for seed in (1, 2))
    states, _ = run_updates(
        OptimSection(name="lion", lr=0.1, b1=0.5, b2=0.9, grad_clip=1e9), small(), small(1), small(2)
    )
    for name, start in by_path(small()).items():
        want = start - 0.1 * np.sign(first[name]) - 0.1 * np.sign(0.5 * 0.1 * first[name] + 0.5 * second[name])
        np.testing.assert_allclose(by_path(states[2].params)[name], want, atol=1e-6)
        moment = next(leaf for path, leaf in by_path(states[2].opt_state).items() if path.endswith("/mu/" + name))
        np.testing.assert_allclose(moment, 0.9 * 0.1 * first[name] + 0.1 * second[name], atol=1e-6)


def test_muon_keeps_one_moment_of_a_matrix_and_two_of_a_bias():
    """A matrix has the first moment, which decays with b1; a bias has those of Adam."""
    states, _ = run_updates(OptimSection(name="muon", b1=0.5, b2=0.9, grad_clip=1e9), small(), small(1))
    kernel, bias = kernel_and_bias(small(1))
    moments = {}
    for path, leaf in by_path(states[1].opt_state).items():
        if leaf.ndim > 1:
            moment, *_, name = path.split("/")[-6:]  # mu/layers/0/mlp/gate/kernel
            moments[moment, name] = leaf
    assert moments.keys() == {("mu", "kernel"), ("mu", "bias"), ("nu", "bias")}
    np.testing.assert_allclose(moments["mu", "kernel"], 0.5 * kernel, atol=1e-6)
    np.testing.assert_allclose(moments["mu", "bias"], 0.5 * bias, atol=1e-6)
    np.testing.assert_allclose(moments["nu", "bias"], 0.1 * bias**2, atol=1e-6)


def test_adafactor_keeps_a_row_and_a_column_moment():
    """They represent squared gradients that are an outer product exactly, so the step is the sign, as if unfactored."""
    draw = np.random.default_rng(0)
    rows, columns = np.exp(draw.standard_normal((2, 128, 1))), np.exp(draw.standard_normal((2, 1, 130)))
    grad = jnp.asarray(rows * columns * draw.choice([-1, 1], (2, 128, 130)), jnp.float32)
    params, grads = one_layer(jnp.ones((2, 128, 130)), jnp.zeros((2, 130))), one_layer(grad, jnp.zeros((2, 130)))
    (before, after), _ = run_updates(OptimSection(name="adafactor", lr=0.5), params, grads)
    np.testing.assert_allclose(step_taken(after, before)[0], -0.5 * jnp.sign(grad), rtol=1e-3)
    sizes = [leaf.size for leaf in jax.tree.leaves(after.opt_state)]
    assert sum(sizes) < grad.size / 10


def test_adafactor_clips_the_step_of_a_leaf():
    """A gradient 10 times the last one would make a step with an RMS of about 1.5, which is clipped to 1."""
    grads, optim = small(1), OptimSection(name="adafactor", lr=0.1, grad_clip=1e9)
    states, _ = run_updates(optim, small(), grads, jax.tree.map(lambda x: 10 * x, grads))
    change = np.asarray(step_taken(states[2], states[1])[0])
    np.testing.assert_allclose(np.sqrt((change**2).mean()), 0.1, rtol=1e-3)


STACKS = {  # path -> shape of the stacked parameter, and of each of its matrices
    "mlp/gate/kernel": ((2, 8, 24), (8, 24)),
    "attention/q/kernel": ((2, 8, 4, 5), (8, 20)),
    "attention/o/kernel": ((2, 4, 5, 8), (20, 8)),
    "attention/kv_b": ((2, 6, 4, 5), (6, 20)),
    "attention/q_a/kernel": ((2, 20, 8), (20, 8)),
    "moe/experts_down": ((2, 3, 24, 8), (24, 8)),
    "moe/router/kernel": ((2, 24, 8), (24, 8)),
}


def orthogonal(matrix):
    """Takes Muon's five Newton-Schulz steps (Jordan 2024): nearly U V^T of the singular value decomposition."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muon_orthogonalizes_each_matrix_of_a_stack():
    """Gradients of very unequal size in two layers both become matrices whose singular values are near 1."""
    draw = np.random.default_rng(0)
    grads = {}
    for path, (shape, _) in STACKS.items():
        scales = np.array([1, 50]).reshape(2, *[1] * (len(shape) - 1))
        grads[path] = (draw.standard_normal(shape) * scales).astype(np.float32)
    # A flat tree whose keys are paths looks up the same rows as a nested tree.
    (_, after), _ = run_updates(
        OptimSection(name="muon", lr=1.0, grad_clip=1e9), jax.tree.map(jnp.zeros_like, grads), grads
    )
    for path, (_, matrix) in STACKS.items():
        steps = -np.asarray(after.params[path]).reshape(-1, *matrix) / (0.2 * np.sqrt(max(matrix)))
        for step, grad in zip(steps, grads[path].reshape(-1, *matrix), strict=True):
            np.testing.assert_allclose(step, orthogonal(grad), atol=1e-4, err_msg=path)
            values = np.linalg.svd(step, compute_uv=False)
            assert values.min() > 0.6 and values.max() < 1.3, path


@pytest.mark.parametrize("model_cfg", [CONFIG, MIXTURE, BIASED])
def test_muon_updates_the_matrices_of_the_layers_and_adam_the_rest(model_cfg):
    """The axes of a matrix are all axes of the parameter except those that stack layers and experts."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(model_cfg)):
        name, numbers = path_name(path), muon_dimensions(path)
        vector = name.split("/")[-1] in ("scale", "bias", "correction")
        assert (numbers is None) == (vector or not name.startswith("layers")), name
        if numbers:
            axes = [axis % leaf.ndim for axis in (*numbers.reduction_axis, *numbers.output_axis)]
            assert axes == list(range(2 if "experts_" in name else 1, leaf.ndim)), name


@pytest.mark.parametrize(
    "values, rates",
    [
        (dict(), {0: 2, 9: 2}),
        (dict(warmup_steps=4), {0: 0.5, 1: 1, 3: 2, 9: 2}),  # the first update has an effect
        (dict(warmup_steps=4, end_lr_fraction=0.3, decay_steps=5), {0: 0.5, 3: 2, 9: 2}),
        (dict(schedule="linear", decay_steps=10), {0: 2, 5: 1, 9: 0.2, 10: 0, 99: 0}),
        (
            dict(schedule="linear", warmup_steps=4, decay_steps=12, end_lr_fraction=0.5),
            {0: 0.5, 3: 2, 4: 2, 8: 1.5, 12: 1, 99: 1},
        ),
        (dict(schedule="cosine", decay_steps=9), {0: 2, 3: 1.5, 6: 0.5, 9: 0, 99: 0}),
        (
            dict(schedule="cosine", warmup_steps=2, decay_steps=14, end_lr_fraction=0.1),
            {0: 1, 1: 2, 2: 2, 6: 1.55, 8: 1.1, 14: 0.2, 99: 0.2},
        ),
    ],
)
def test_schedules_give_the_expected_learning_rates(values, rates):
    schedule = make_schedule(OptimSection(lr=2.0, **values))
    np.testing.assert_allclose([schedule(jnp.int32(step)) for step in rates], list(rates.values()), atol=1e-6)


@pytest.mark.parametrize("name", ADAMW_FIRST)
@pytest.mark.parametrize("bad", [np.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (np.inf, 1e30))])
def test_update_with_a_non_finite_gradient_is_skipped(name, bad):
    """It leaves no trace in parameters, optimizer state and schedule, bit by bit. The norm of 1e30 overflows."""
    optim = OptimSection(name=name, lr=0.01, warmup_steps=4, weight_decay=0.1)
    first, second = small(1), small(2)
    broken = jax.tree.map(lambda x: x.at[0, 3].set(bad), second)
    states, metrics = run_updates(optim, small(), first, broken)
    assert metrics["optim/skipped"] == 1 and not np.isfinite(metrics["optim/grad_norm"])
    assert (states[2].step, states[2].skipped, states[1].skipped) == (2, 1, 0)
    for old, new in zip(*(jax.tree.leaves((s.params, s.opt_state)) for s in states[1:]), strict=True):
        np.testing.assert_array_equal(old, new)
    states, metrics = run_updates(optim, small(), first, broken, second)
    expected, without = run_updates(optim, small(), first, second)
    assert (states[3].step, states[3].skipped, metrics["optim/skipped"]) == (3, 1, 0)
    assert metrics["optim/lr"] == without["optim/lr"] == np.float32(0.005)  # the second of four warm-up updates
    for have, want in zip(*(jax.tree.leaves((s.params, s.opt_state)) for s in (states[3], expected[2])), strict=True):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("name", ADAMW_FIRST)
def test_update_with_a_damaged_moment_is_skipped(name):
    """The gradient is finite, but a parameter would become NaN."""
    optim = OptimSection(name=name, lr=0.01)
    _, update = compiled(optim)
    state = run_updates(optim, small(), small(1))[0][1]
    leaves, tree = jax.tree.flatten(state.opt_state)
    moment = next(n for n, leaf in enumerate(leaves) if leaf.ndim and leaf.size > 1)
    leaves[moment] = leaves[moment].at[(0,) * leaves[moment].ndim].set(jnp.nan)
    damaged = state.replace(opt_state=jax.tree.unflatten(tree, leaves))
    after, metrics = update(damaged, small(2), has_signal=jnp.bool_(True))
    assert (metrics["optim/skipped"], metrics["optim/no_signal"], after.skipped) == (1, 0, 1)
    assert np.isfinite(metrics["optim/grad_norm"]) and metrics["optim/changed_frac"] == 0
    for have, want in zip(trace(after), trace(damaged), strict=True):
        np.testing.assert_array_equal(have, want)


def trace(state):
    """Returns all arrays that an update without a signal must not change."""
    return jax.tree.leaves((state.params, state.opt_state))


@pytest.mark.parametrize("name", ADAMW_FIRST)
def test_an_update_without_a_signal_only_advances_the_schedule(name):
    """Adam would scale a gradient of 5e-10, the rounding error of a gradient of 0, up to steps of full size.

    With momentum and weight decay, even a gradient of exactly 0 would change the parameters. The schedule warms up over
    8 updates, of which the second and the third have no signal: the fourth has a learning rate of 0.08 * 4 / 8.
    """
    optim = OptimSection(name=name, lr=0.08, warmup_steps=8, weight_decay=0.1)
    optimizer, update = compiled(optim)
    states, rates = [new_train_state(small(), optimizer)], []
    rounding, zero = optax.tree.scale(5e-10, small(3)), jax.tree.map(jnp.zeros_like, small())
    for grads, has_signal in ((small(1), True), (rounding, False), (zero, False), (small(2), True)):
        state, metrics = update(states[-1], grads, has_signal=jnp.bool_(has_signal))
        states.append(state)
        rates.append(float(metrics["optim/lr"]))
        assert (metrics["optim/no_signal"], metrics["optim/skipped"]) == (not has_signal, 0)
    np.testing.assert_allclose(rates, [0.01, 0.02, 0.03, 0.04], rtol=1e-6)
    assert [(int(state.step), int(state.skipped)) for state in states] == [(n, 0) for n in range(5)]
    for state in states[2:4]:
        for have, want in zip(trace(state), trace(states[1]), strict=True):
            np.testing.assert_array_equal(have, want)
    # The last update is the second one of moments and bias correction, at the learning rate of the fourth.
    expected = update(states[1].replace(step=jnp.int32(3)), small(2), has_signal=jnp.bool_(True))[0]
    for have, want in zip(trace(states[4]), trace(expected), strict=True):
        np.testing.assert_array_equal(have, want)
    moved = states[4].params, states[3].params
    assert all(np.any(have != want) for have, want in zip(*map(kernel_and_bias, moved), strict=True))


def test_a_non_finite_gradient_counts_as_skipped_whether_or_not_there_is_a_signal():
    """The schedule repeats the learning rate after a skipped update, but not after one without a signal."""
    _, update = compiled(OptimSection(lr=0.08, warmup_steps=8))
    state, broken, rates = run_updates(OptimSection(lr=0.08, warmup_steps=8), small())[0][0], small(1), []
    broken = jax.tree.map(lambda x: x.at[0, 3].set(jnp.inf), broken)
    for grads, has_signal, no_signal, skipped in (
        (broken, False, 0, 1),
        (small(1), False, 1, 0),
        (broken, True, 0, 1),
        (small(1), True, 0, 0),
    ):
        state, metrics = update(state, grads, has_signal=jnp.bool_(has_signal))
        assert (metrics["optim/no_signal"], metrics["optim/skipped"]) == (no_signal, skipped)
        rates.append(float(metrics["optim/lr"]))
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.02, 0.02], rtol=1e-6)
    assert (state.step, state.skipped) == (4, 2)


def test_the_policy_is_the_reference_until_an_update_is_applied():
    """Skipped updates and updates without a signal are not applied."""
    _, update = compiled(OptimSection())
    state = new_train_state(small(), compiled(OptimSection())[0])
    broken, flags = jax.tree.map(lambda x: x * jnp.nan, small(1)), [bool(state.is_reference)]
    for grads, has_signal in ((small(1), False), (broken, True), (small(1), True), (small(1), False), (broken, True)):
        state, _ = update(state, grads, has_signal=jnp.bool_(has_signal))
        flags.append(bool(state.is_reference))
    assert flags == [True, True, True, False, False, False]
    state, _ = update(state.replace(is_reference=jnp.bool_(True)), small(1), has_signal=jnp.bool_(False))
    assert state.is_reference  # of a reference that was replaced by the policy


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_eps_is_added_to_the_root_of_the_second_moment(name):
    """The first step of Adam is -lr * g / (|g| + eps): for g = 3 and eps = 1 that is 3/4 of lr.

    Inside the root, eps would make it 3 / sqrt(10) of lr. Muon uses Adam for the bias.
    """
    grads = jax.tree.map(lambda x: jnp.full_like(x, 3.0), small())
    for eps, fraction in ((1.0, 3 / 4), (6.0, 1 / 3), (1e-15, 1.0)):
        optim = OptimSection(name=name, lr=0.5, eps=eps, grad_clip=1e9)
        (before, after), _ = run_updates(optim, jax.tree.map(jnp.zeros_like, small()), grads)
        kernel, bias = step_taken(after, before)
        np.testing.assert_allclose(bias, -0.5 * fraction, rtol=1e-4)
        if name == "adamw":
            np.testing.assert_allclose(kernel, -0.5 * fraction, rtol=1e-4)
    # With eps = 1e-2, a gradient that is 1,000 times smaller does not give a full step: 3e-3 / (3e-3 + 1e-2).
    optim = OptimSection(name=name, lr=0.5, eps=1e-2)
    (before, after), _ = run_updates(optim, small(), optax.tree.scale(1e-3, grads))
    np.testing.assert_allclose(step_taken(after, before)[1], -0.5 * 0.003 / 0.013, rtol=1e-4)


def test_learning_rate_metric_is_the_one_that_was_applied():
    """Each entry of a Lion step is the learning rate."""
    optim = OptimSection(name="lion", lr=0.5, schedule="linear", decay_steps=5)
    broken = optax.tree.scale(np.nan, small(2))
    states, metrics = run_updates(optim, small(), small(1), broken, broken, small(1))
    change = step_taken(states[-1], states[-2])[0]
    np.testing.assert_allclose(jnp.abs(change), metrics["optim/lr"], rtol=1e-5)
    np.testing.assert_allclose(metrics["optim/lr"], 0.4, rtol=1e-6)


@pytest.mark.parametrize("name", ADAMW_FIRST)
def test_state_of_bfloat16_parameters_is_float32(name):
    """With bfloat16 gradients too. The state is that of the same values in float32; only the parameters are rounded."""
    params, grads = small(dtype=jnp.bfloat16), small(1, dtype=jnp.bfloat16)
    optim = OptimSection(name=name, lr=0.1, weight_decay=0.1)
    (_, rounded), metrics = run_updates(optim, params, grads)
    (_, full), expected = run_updates(optim, to_float32(params), to_float32(grads))
    shapes, full_shapes = (
        train_state_shapes(tree, make_optimizer(optim)).opt_state for tree in (params, to_float32(params))
    )
    assert shapes == full_shapes
    for have, want in zip(jax.tree.leaves(rounded.opt_state), jax.tree.leaves(full.opt_state), strict=True):
        assert have.dtype == want.dtype and have.dtype in (jnp.float32, jnp.int32)
        np.testing.assert_allclose(have, want, rtol=1e-6)
    for have, want in zip(kernel_and_bias(rounded.params), kernel_and_bias(full.params), strict=True):
        assert have.dtype == jnp.bfloat16
        np.testing.assert_allclose(have.astype(jnp.float32), want, rtol=2**-7, atol=1e-6)
    np.testing.assert_allclose(metrics["optim/grad_norm"], expected["optim/grad_norm"], rtol=1e-6)


def test_second_moment_of_bfloat16_parameters_is_not_rounded():
    """It moves by 1/1,000 per update, too little to change a bfloat16 that is near the squared gradient."""
    params = small(dtype=jnp.bfloat16)
    ones = jax.tree.map(jnp.ones_like, params)
    states, _ = run_updates(OptimSection(grad_clip=1e9), params, ones, ones, ones)
    moments = {name: leaf for name, leaf in by_path(states[-1].opt_state).items() if "/nu/" in name}
    assert len(moments) == 2
    for leaf in moments.values():
        np.testing.assert_allclose(leaf, 1 - 0.999**3, rtol=1e-5)


@pytest.mark.parametrize("name, count", [("adamw", 2), ("lion", 2), ("muon", 2), ("adafactor", 0)])
def test_mu_dtype_is_the_dtype_of_the_first_moment_only(name, count):
    """Holds before and after an update."""
    optim = OptimSection(name=name, mu_dtype="bfloat16", b2=0.99)
    for state in run_updates(optim, small(), small(1))[0]:
        rounded = [path for path, leaf in by_path(state.opt_state).items() if leaf.dtype == jnp.bfloat16]
        assert len(rounded) == count and all("/mu/" in path for path in rounded)


WIDE = replace(CONFIG, hidden_size=256, intermediate_size=384, head_dim=128)  # wide enough that Adafactor factors


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("model_cfg", [CONFIG, *(pytest.param(x, marks=pytest.mark.slow) for x in (WIDE, MIXTURE))])
def test_optimizer_state_is_sharded_like_the_parameters(name, model_cfg):
    """On 1 x 4 x 2 devices, no matrix of the state is replicated if its parameter is sharded."""
    mesh, shapes, optimizer = make_mesh(1, 4, 2), param_shapes(model_cfg), make_optimizer(OptimSection(name=name))
    shardings, state = train_state_shardings(mesh, shapes, optimizer), train_state_shapes(shapes, optimizer)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    assert shardings.params == tree_shardings(mesh, shapes)
    params, specs = by_path(shapes), {path: x.spec for path, x in by_path(shardings.params).items()}
    leaves, matched = by_path(state.opt_state), 0
    for path, sharding in by_path(shardings.opt_state).items():
        leaf, owner = leaves[path], next((param for param in params if path.endswith("/" + param)), None)
        sharding.shard_shape(leaf.shape)  # raises if an axis does not divide its dimension
        if owner is None:
            assert leaf.size <= 3 and sharding.spec == P()
        elif leaf.shape == params[owner].shape:
            assert sharding.spec == specs[owner]
            matched += 1
        elif leaf.ndim > 1 and any(specs[owner]):
            assert any(sharding.spec), path
            matched += 1
    assert matched >= len(params)


def test_adafactor_moments_are_sharded_like_the_dimension_they_keep():
    """Where the two largest dimensions are equal, optax's own update shows which of them a moment keeps."""
    spec = P(None, "fsdp", "tensor")
    assert moment_spec("v_row", (2, 8), (2, 8, 16), spec) == P(None, "fsdp")
    assert moment_spec("v_col", (2, 16), (2, 8, 16), spec) == P(None, "tensor")
    assert moment_spec("v_row", (2, 8), (2, 16, 8), spec) == P(None, "tensor")
    assert moment_spec("v_col", (2, 16), (2, 16, 8), spec) == P(None, "fsdp")
    assert moment_spec("v", (1,), (2, 8, 16), spec) == moment_spec("v_row", (1,), (8, 16), P("fsdp", "tensor")) == P()
    assert moment_spec("v_row", (2, 128), (2, 128, 128), spec) == P(None, "fsdp")
    assert moment_spec("v_col", (2, 128), (2, 128, 128), spec) == P(None, "tensor")
    grad = jnp.broadcast_to(jnp.arange(128.0)[:, None], (2, 128, 128))
    (_, after), _ = run_updates(
        OptimSection(name="adafactor", grad_clip=1e9),
        one_layer(jnp.ones((2, 128, 128)), jnp.zeros((2, 128))),
        one_layer(grad, jnp.zeros((2, 128))),
    )
    moments = by_path(after.opt_state)
    row, column = (
        next(leaf for path, leaf in moments.items() if kind in path and path.endswith("kernel"))
        for kind in ("v_row", "v_col")
    )
    assert np.ptp(row[0]) > 1 and np.ptp(column[0]) == 0  # v_row keeps the first of the two, which fsdp splits


@pytest.mark.slow
@pytest.mark.parametrize("name, model_cfg", [*((name, CONFIG) for name in RULES), ("adafactor", WIDE)])
def test_update_agrees_on_one_and_eight_devices(name, model_cfg):
    """The state is created, kept and updated in its shards, in the memory of the donated state."""
    optim = OptimSection(name=name, lr=0.1, weight_decay=0.1)
    optimizer, draw = make_optimizer(optim), np.random.default_rng(0)
    params, grads = (
        jax.tree.map(lambda leaf: jnp.asarray(draw.standard_normal(leaf.shape), jnp.float32), param_shapes(model_cfg))
        for _ in range(2)
    )
    (_, expected), _ = run_updates(optim, params, grads)
    mesh = make_mesh(1, 4, 2)
    shardings = train_state_shardings(mesh, params, optimizer)
    state = init_train_state(mesh, jax.device_put(params, shardings.params), optimizer)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    grads = jax.device_put(grads, shardings.params)
    update = jax.jit(
        partial(apply_gradients, optimizer=optimizer, schedule=make_schedule(optim)),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    update = update.lower(state, grads).compile()
    state_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    assert update.memory_analysis().alias_size_in_bytes == state_bytes
    actual = update(state, grads)[0]
    assert jax.tree.map(lambda x: x.sharding, actual) == shardings
    for have, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(have, want, atol=1e-4 * max(1, np.abs(want).max()))
