"""The page of mathematics against closed forms, hand values and an independent computation."""

from inspect import unwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import advantages, grpo_loss
from grpo_jax.learn.grpo import k3, token_weights


def test_advantages_of_a_hand_made_group():
    """Rewards 0, 0, 2, 2: mean 1, population sigma 1. With the sample sigma (divided by G - 1) it would be 1.155."""
    np.testing.assert_allclose(advantages(jnp.asarray([[0.0, 0, 2, 2]])), [[-1, -1, 1, 1]], rtol=1e-6)
    # 0, 1, 2: mean 1, sigma sqrt(2/3); (2 - 1) / sigma = sqrt(1.5).
    np.testing.assert_allclose(advantages(jnp.asarray([[0.0, 1, 2]])), [[-(1.5**0.5), 0, 1.5**0.5]], rtol=1e-6)


def test_advantages_have_mean_0_and_sigma_1_in_each_group():
    rewards = jax.random.normal(jax.random.key(0), (5, 8)) * jnp.asarray([[1e-3], [1], [1e3], [5], [7]])
    made = np.asarray(advantages(rewards), np.float64)
    np.testing.assert_allclose(made.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(made.std(axis=1), 1, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 2.0, 1e6])
@pytest.mark.parametrize("group", [2, 3, 7])
def test_equal_rewards_give_zero_not_nan(value, group):
    """0.1 summed thrice and divided by 3 is not 0.1: an epsilon under the sigma would turn that into noise of size 1."""
    assert (np.asarray(advantages(jnp.full((2, group), value))) == 0).all()


def test_advantages_refuse_a_flat_list():
    with pytest.raises(ValueError, match=r"shape \[B, G\]; found \(4,\)"):
        unwrap(advantages)(jnp.ones(4))  # without the tests' own check of shapes


# Ratios above, inside and below the clip range [0.8, 1.2], with both signs of A. Each row is one token.
# min(rho A, clip(rho) A):  A=+1: 1.5 -> 1.2 (cut)   1.1 -> 1.1   0.5 -> 0.5
#                           A=-1: 1.5 -> -1.5        1.1 -> -1.1  0.5 -> -0.8 (cut)
QUADRANTS = [
    (1.5, 1, 1.2, 0.0),
    (1.1, 1, 1.1, 1.1),
    (0.5, 1, 0.5, 0.5),
    (1.5, -1, -1.5, -1.5),
    (1.1, -1, -1.1, -1.1),
    (0.5, -1, -0.8, 0.0),
]


@pytest.mark.parametrize("ratio, advantage, objective, slope", QUADRANTS)
def test_clipped_loss_matches_hand_values(ratio, advantage, objective, slope):
    """The loss is -objective; its gradient in log pi is -rho A where not cut, 0 where cut."""
    old = jnp.asarray([[-2.0]])

    def loss(logps):
        return grpo_loss(logps, old, None, jnp.asarray([float(advantage)]), jnp.ones((1, 1)), kl_coef=0)[0]

    value, grad = jax.value_and_grad(loss)(old + jnp.log(ratio))
    np.testing.assert_allclose(value, -objective, rtol=1e-6)
    np.testing.assert_allclose(grad[0, 0], -slope, rtol=1e-6, atol=1e-9)


def test_clip_bounds_are_one_minus_low_and_one_plus_high():
    """clip_low 0.1, clip_high 0.5: ratio 1.4 passes, 0.8 with A=-1 becomes 0.9."""
    logps = jnp.log(jnp.asarray([[1.4], [0.8]]))
    loss, metrics = grpo_loss(
        logps,
        jnp.zeros((2, 1)),
        None,
        jnp.asarray([1.0, -1.0]),
        jnp.ones((2, 1)),
        clip_low=0.1,
        clip_high=0.5,
        kl_coef=0,
    )
    np.testing.assert_allclose(loss, -(1.4 - 0.9) / 2, rtol=1e-6)
    assert metrics["policy/clip_frac"] == 0.5
    np.testing.assert_allclose(metrics["policy/ratio_max"], 1.4, rtol=1e-6)


def test_k3_is_zero_at_equality_and_positive_elsewhere():
    logps = jnp.linspace(-5.0, 0.0, 11)
    assert (k3(logps, logps) == 0).all()
    assert (k3(logps, logps[::-1])[jnp.arange(11) != 5] > 0).all()
    # pi_ref / pi = 2: 2 - log 2 - 1.
    np.testing.assert_allclose(k3(jnp.asarray(-3.0), jnp.asarray(-3.0 + np.log(2))), 1 - np.log(2), rtol=1e-6)


def test_k3_estimates_the_kl_divergence_and_its_gradient():
    """Over all tokens of a small vocabulary, sum pi k3 is KL(pi || ref), and sum pi dk3/dtheta is dKL(ref || pi)/dtheta.

    (The gradient of the k3 loss on-policy is that of the other direction: known of the estimator, kept as published.)
    """
    theta, other = jax.random.normal(jax.random.key(0), (2, 6))
    logp, logr = jax.nn.log_softmax(theta), jax.nn.log_softmax(other)
    np.testing.assert_allclose(
        jnp.sum(jnp.exp(logp) * k3(logp, logr)), jnp.sum(jnp.exp(logp) * (logp - logr)), rtol=1e-5
    )
    through = jax.grad(lambda t: jnp.sum(jnp.exp(logp) * k3(jax.nn.log_softmax(t), logr)))(theta)
    reverse = jax.grad(lambda t: jnp.sum(jnp.exp(logr) * (logr - jax.nn.log_softmax(t))))(theta)
    np.testing.assert_allclose(through, reverse, atol=1e-6)


def independent_loss(logps, old, ref, advantages, mask, low, high, beta, denominator):
    """DeepSeekMath's equation 3 in float64, one token at a time."""
    total = 0.0
    for i in range(len(logps)):
        count = mask[i].sum()
        for t in range(len(logps[i])):
            if mask[i, t]:
                rho = np.exp(logps[i, t] - old[i, t])
                surrogate = min(rho * advantages[i], min(max(rho, 1 - low), 1 + high) * advantages[i])
                r = np.exp(ref[i, t] - logps[i, t])
                total += (surrogate - beta * (r - np.log(r) - 1)) / count
    return -total / denominator


@pytest.mark.parametrize("denominator", [None, 32])
def test_loss_and_gradient_match_an_independent_computation(denominator):
    """Unequal lengths, one empty answer, off-policy ratios; the gradient against central differences in float64."""
    draw = np.random.default_rng(0)
    logps, old, ref = -1 - draw.random((3, 4, 7))
    adv, mask = draw.standard_normal(4), np.arange(7) < np.array([[7], [3], [1], [0]])
    args = (0.1, 0.3, 0.05)
    made, grad = jax.value_and_grad(
        lambda x: grpo_loss(
            x,
            jnp.asarray(old),
            jnp.asarray(ref),
            jnp.asarray(adv),
            jnp.asarray(mask),
            clip_low=0.1,
            clip_high=0.3,
            kl_coef=0.05,
            denominator=denominator,
        )[0]
    )(jnp.asarray(logps, jnp.float32))
    expected = lambda x: independent_loss(x, old, ref, adv, mask, *args, denominator or 4)
    np.testing.assert_allclose(made, expected(logps), rtol=1e-5)
    for i, t in np.ndindex(4, 7):
        step = np.zeros((4, 7))
        step[i, t] = 1e-6
        slope = (expected(logps + step) - expected(logps - step)) / 2e-6
        np.testing.assert_allclose(grad[i, t], slope, rtol=1e-3, atol=1e-6)


def test_masked_tokens_may_hold_anything():
    """Junk behind the stop, huge enough to overflow exp, changes neither loss nor gradient."""
    clean = jnp.full((2, 3), -1.0)
    junk = clean.at[:, 2].set(jnp.asarray([500.0, -500.0]))
    mask = jnp.asarray([[1, 1, 0], [1, 1, 0]])

    def loss(logps, old):
        return grpo_loss(logps, old, -logps, jnp.asarray([1.0, -1.0]), mask)[0]

    for logps, old in ((junk, clean), (clean, junk)):
        value, grad = jax.value_and_grad(loss)(logps, old)
        assert value == loss(clean, clean)
        assert np.isfinite(grad).all() and (grad[:, 2] == 0).all()


def test_weights_sum_to_one_over_the_batch():
    mask = jnp.arange(5) < jnp.asarray([[1], [3], [5]])
    np.testing.assert_allclose(token_weights(mask).sum(axis=1), 1 / 3, rtol=1e-6)


def test_a_reference_is_asked_for_when_kl_counts():
    one = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match="ref_logps"):
        grpo_loss(one, one, None, jnp.zeros(1), jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="one shape"):
        unwrap(grpo_loss)(one, one, one, jnp.zeros(1), jnp.ones((1, 2)))
