"""The mathematics of GRPO, against closed forms, values worked out by hand and an independent implementation."""

from functools import partial
from inspect import unwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax.learn.grpo
from grpo_jax import advantages, grpo_loss
from grpo_jax.config.schema import LossSection
from grpo_jax.learn.grpo import SampledTokens, estimate_kl, inclusive_clip, token_weights, weighted_loss


def test_advantages_of_a_hand_made_group():
    """Rewards 0, 0, 2, 2 have mean 1 and a population std of 1; the sample std, which divides by G - 1, is 1.155."""
    np.testing.assert_allclose(advantages(jnp.asarray([[0.0, 0, 2, 2]])), [[-1, -1, 1, 1]], rtol=1e-6)
    # Rewards 0, 1, 2 have mean 1 and std sqrt(2/3), and (2 - 1) / std = sqrt(1.5).
    np.testing.assert_allclose(advantages(jnp.asarray([[0.0, 1, 2]])), [[-(1.5**0.5), 0, 1.5**0.5]], rtol=1e-6)


def test_advantages_have_mean_0_and_std_1_in_each_group():
    rewards = jax.random.normal(jax.random.key(0), (5, 8)) * jnp.asarray([[1e-3], [1], [1e3], [5], [7]])
    result = np.asarray(jax.jit(advantages)(rewards), np.float64)
    np.testing.assert_allclose(result.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(result.std(axis=1), 1, rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 2.0, 1e6])
@pytest.mark.parametrize("group", [2, 3, 7])
def test_equal_rewards_give_zero_not_nan(value, group):
    """The mean of three times 0.1 is not exactly 0.1; dividing by the tiny std would give noise of size 1."""
    assert (np.asarray(jax.jit(advantages)(np.full((2, group), value, np.float32))) == 0).all()


def test_advantages_require_two_axes():
    with pytest.raises(ValueError, match=r"shape \[B, G\]; found \(4,\)"):
        unwrap(advantages)(jnp.ones(4))  # `unwrap` removes the shape check of the tests


# Ratios above, inside and below the clip range [0.8, 1.2], with both signs of A. Each row is one token.
# min(rho A, clip(rho) A):  A=+1: 1.5 -> 1.2 (clipped)   1.1 -> 1.1   0.5 -> 0.5
#                           A=-1: 1.5 -> -1.5            1.1 -> -1.1  0.5 -> -0.8 (clipped)
QUADRANTS = [
    (1.5, 1, 1.2, 0.0),
    (1.1, 1, 1.1, 1.1),
    (0.5, 1, 0.5, 0.5),
    (1.5, -1, -1.5, -1.5),
    (1.1, -1, -1.1, -1.1),
    (0.5, -1, -0.8, 0.0),
]


def test_clipped_loss_matches_hand_values():
    """The loss is -objective. Its gradient in log pi is 0 where clipped, and -rho A elsewhere."""
    ratios, advantages, objectives, slopes = map(jnp.asarray, zip(*QUADRANTS, strict=True))

    def loss(logps, advantage):
        logps, advantage = logps[None, None], advantage[None]
        return grpo_loss(logps, jnp.full((1, 1), -2.0), None, advantage, jnp.ones((1, 1)), kl_coef=0)[0]

    losses, grads = jax.jit(jax.vmap(jax.value_and_grad(loss)))(-2.0 + jnp.log(ratios), advantages.astype(float))
    np.testing.assert_allclose(losses, -objectives, rtol=1e-6)
    np.testing.assert_allclose(grads, -slopes, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("clip_low, clip_high", [(0.0, 0.2), (0.2, 0.0)])
def test_gradient_on_policy_is_whole_where_a_clip_bound_is_zero(clip_low, clip_high, advantage):
    """Both arguments of the minimum are equal there, and each passes on half; jnp.clip would pass on a quarter."""
    logps = jnp.asarray([[-2.0]])

    def loss(x):
        return grpo_loss(
            x,
            logps,
            None,
            jnp.asarray([advantage]),
            jnp.ones((1, 1)),
            clip_low=clip_low,
            clip_high=clip_high,
            kl_coef=0,
        )[0]

    assert jax.grad(loss)(logps)[0, 0] == -advantage


def test_clip_bounds_are_one_minus_low_and_one_plus_high():
    """With clip_low 0.1 and clip_high 0.5, a ratio of 1.4 is kept, and one of 0.8 with A=-1 becomes 0.9."""
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
    assert (estimate_kl(logps, logps) == 0).all()
    assert (estimate_kl(logps, logps[::-1])[jnp.arange(11) != 5] > 0).all()
    # pi_ref / pi = 2: 2 - log 2 - 1.
    np.testing.assert_allclose(estimate_kl(jnp.asarray(-3.0), jnp.asarray(-3.0 + np.log(2))), 1 - np.log(2), rtol=1e-6)


def test_k3_estimates_the_kl_divergence_and_its_gradient():
    """Over a small vocabulary, sum pi k3 is KL(pi || ref), and sum pi dk3/dtheta is dKL(ref || pi)/dtheta.

    The on-policy gradient is that of the reverse direction, a known property of the estimator that GRPO publishes.
    """
    theta, ref_theta = jax.random.normal(jax.random.key(0), (2, 6))
    logps, ref_logps = jax.nn.log_softmax(theta), jax.nn.log_softmax(ref_theta)
    kl = jnp.sum(jnp.exp(logps) * (logps - ref_logps))
    np.testing.assert_allclose(jnp.sum(jnp.exp(logps) * estimate_kl(logps, ref_logps)), kl, rtol=1e-5)
    k3_grad = jax.grad(lambda t: jnp.sum(jnp.exp(logps) * estimate_kl(jax.nn.log_softmax(t), ref_logps)))(theta)
    reverse_kl_grad = jax.grad(lambda t: jnp.sum(jnp.exp(ref_logps) * (ref_logps - jax.nn.log_softmax(t))))(theta)
    np.testing.assert_allclose(k3_grad, reverse_kl_grad, atol=1e-6)


def independent_loss(logps, old_logps, ref_logps, advantages, mask, clip_low, clip_high, kl_coef, denominator):
    """Computes DeepSeekMath's equation 3 in float64, one token at a time."""
    total = 0.0
    for i, t in np.argwhere(mask):
        ratio = np.exp(logps[i, t] - old_logps[i, t])
        clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
        ref_ratio = np.exp(ref_logps[i, t] - logps[i, t])
        kl = ref_ratio - np.log(ref_ratio) - 1
        total += (min(ratio * advantages[i], clipped * advantages[i]) - kl_coef * kl) / mask[i].sum()
    return -total / denominator


@pytest.mark.parametrize("denominator", [None, 32])
def test_loss_and_gradient_match_an_independent_computation(denominator):
    """Unequal lengths, one empty completion, off-policy ratios; central differences in float64 give the gradient."""
    draw = np.random.default_rng(0)
    logps, old_logps, ref_logps = -1 - draw.random((3, 4, 7))
    advantages, mask = draw.standard_normal(4), np.arange(7) < np.array([[7], [3], [1], [0]])
    arrays = [jnp.asarray(x) for x in (old_logps, ref_logps, advantages, mask)]

    @jax.jit
    @jax.value_and_grad
    def loss(x):
        return grpo_loss(x, *arrays, clip_low=0.1, clip_high=0.3, kl_coef=0.05, denominator=denominator)[0]

    def expected(x):
        return independent_loss(x, old_logps, ref_logps, advantages, mask, 0.1, 0.3, 0.05, denominator or 4)

    value, grad = loss(jnp.asarray(logps, jnp.float32))
    np.testing.assert_allclose(value, expected(logps), rtol=1e-5)
    for i, t in np.ndindex(4, 7):
        step = np.zeros((4, 7))
        step[i, t] = 1e-6
        slope = (expected(logps + step) - expected(logps - step)) / 2e-6
        np.testing.assert_allclose(grad[i, t], slope, rtol=1e-3, atol=1e-6)


def test_inclusive_clip_passes_the_gradient_at_its_limits_but_not_outside():
    x = jnp.asarray([-3.0, -1.0, 0.0, 2.0, 3.0, jnp.inf, jnp.nan])
    values, slopes = jax.vmap(jax.value_and_grad(lambda x: inclusive_clip(x, -1.0, 2.0)))(x)
    np.testing.assert_array_equal(values, [-1, -1, 0, 2, 2, 2, np.nan])
    np.testing.assert_array_equal(slopes, [0, 1, 1, 1, 0, 0, 1])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [20.5, 89.0, 1e4, -20.5, -89.0, -1e4])
def test_a_ratio_beyond_the_limit_has_a_finite_loss_and_no_gradient(log_ratio, advantage):
    """exp(89) overflows float32. The reference is as far away, so the KL term has no gradient either."""

    def loss(x):
        advantages, mask = jnp.asarray([advantage]), jnp.ones((1, 1))
        return grpo_loss(x, jnp.full((1, 1), -log_ratio), jnp.full((1, 1), log_ratio), advantages, mask, kl_coef=0.1)

    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(jnp.zeros((1, 1)))
    assert np.isfinite(value) and grad[0, 0] == 0
    np.testing.assert_allclose(metrics["policy/ratio_max"], np.exp(np.copysign(20, log_ratio)), rtol=1e-5)
    assert metrics["policy/kl_ref"] <= np.exp(20)


def test_nan_in_a_token_with_weight_is_not_hidden():
    """If it were, a broken update would not be skipped."""
    clean = jnp.full((2, 3), -1.0)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(logps, old, ref, advantages):
        return grpo_loss(logps, old, ref, advantages, jnp.ones((2, 3)))

    nan = clean.at[0, 1].set(jnp.nan)
    for changed in ({"logps": nan}, {"old": nan}, {"ref": nan}, {"advantages": nan[0, :2]}):
        arguments = {"logps": clean, "old": clean, "ref": clean, "advantages": jnp.asarray([1.0, -1.0])} | changed
        (value, _), grad = loss(*arguments.values())
        assert np.isnan(value) and np.isnan(grad).any(), changed


@pytest.mark.parametrize("junk", [500.0, -500.0, jnp.inf, -jnp.inf, jnp.nan])
def test_masked_tokens_change_neither_loss_nor_gradient(junk):
    """Their values may be anything. The third completion has no token, so its advantage has no effect either."""
    clean, mask = jnp.full((3, 3), -1.0), jnp.asarray([[1, 1, 0], [1, 1, 0], [0, 0, 0]])
    dirty, opposite = (jnp.where(mask == 1, clean, x) for x in (junk, -junk))

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(logps, old, ref, advantage):
        return grpo_loss(logps, old, ref, jnp.stack([1.0, -1.0, advantage]), mask)

    (expected, expected_metrics), _ = loss(clean, clean, clean, 0.0)
    for arguments in ((dirty, clean, clean), (clean, dirty, clean), (clean, clean, dirty), (dirty, opposite, dirty)):
        (value, metrics), grad = loss(*arguments, jnp.asarray(junk))
        assert value == expected and metrics == expected_metrics
        assert np.isfinite(grad).all() and (grad[mask == 0] == 0).all()


def test_the_loss_knows_which_completion_a_token_belongs_to(monkeypatch):
    """Masked tokens have index -1, which sums over completions drop."""
    seen = []
    monkeypatch.setattr(
        grpo_jax.learn.grpo, "weighted_loss", lambda logps, entropies, tokens, loss: (0, seen.append(tokens))
    )
    monkeypatch.setattr(grpo_jax.learn.grpo, "finish_metrics", lambda sums: sums)
    mask = jnp.asarray([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    unwrap(grpo_loss)(jnp.zeros((4, 3)), jnp.zeros((4, 3)), None, jnp.ones(4), mask, kl_coef=0)
    (tokens,) = seen
    assert tokens.sequence.tolist() == [[0, 0, -1], [1, -1, -1], [2, 2, 2], [-1, -1, -1]]
    sums = jax.ops.segment_sum(jnp.arange(12), tokens.sequence.ravel(), tokens.num_sequences)
    assert sums.tolist() == [0 + 1, 3, 6 + 7 + 8, 0]


def test_token_weights_sum_to_one_over_the_batch():
    mask = jnp.arange(5) < jnp.asarray([[1], [3], [5]])
    np.testing.assert_allclose(token_weights(mask).sum(axis=1), 1 / 3, rtol=1e-6)


def test_missing_reference_and_mismatched_shapes_are_errors():
    one = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match="ref_logps must be given, because kl_coef is"):
        grpo_loss(one, one, None, jnp.zeros(1), jnp.ones((1, 1)))
    with pytest.raises(ValueError, match=r"logps and mask must have one shape \[N, S\]"):
        unwrap(grpo_loss)(one, one, one, jnp.zeros(1), jnp.ones((1, 2)))
    tokens = SampledTokens(jnp.zeros((1, 2)), one, one, one, one, None, 1)
    with pytest.raises(ValueError, match=r"must have one shape; found \[\(1, 1\), \(1, 2\), \(1, 1\)"):
        unwrap(weighted_loss)(one, None, tokens, LossSection())
    with pytest.raises(ValueError, match=r"mask must have shape \[N, S\]"):
        unwrap(token_weights)(jnp.ones((1, 2, 3)))
