"""Tests every setting of the loss against values and gradients derived by hand and an independent computation.

tests/test_grpo.py has the hand values for the defaults: ratio="token", kl="k3" and aggregate="sequence".
"""

from inspect import Parameter, signature, unwrap
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import grpo_loss
from tests.outside import losses

RATIOS = ("token", "sequence", "sequence_token", "detached", "difference")
AGGREGATES = ("sequence", "token", "prompt", "constant")
KLS = ("k1", "k2", "k3")
NEEDED = {"constant": dict(constant_length=5), "prompt": dict(groups=np.zeros(1, int))}  # by these, for one completion


def value_grad_metrics(logps, old_logps, ref_logps, advantages, mask, **settings):
    """Returns the loss, its gradient in `logps` and the metrics, computed from float32 arrays."""
    logps, old_logps, advantages = (jnp.asarray(x, jnp.float32) for x in (logps, old_logps, advantages))
    ref_logps = None if ref_logps is None else jnp.asarray(ref_logps, jnp.float32)
    settings = settings | (dict(groups=jnp.asarray(settings["groups"])) if "groups" in settings else {})

    def loss(x):
        return grpo_loss(x, old_logps, ref_logps, advantages, jnp.asarray(mask), **settings)

    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(logps)
    np.testing.assert_array_equal(metrics["loss/total"], value)
    return value, grad, metrics


def one_completion(ratios, advantage, *, logp=-2.0, ref_ratios=None, **settings):
    """Returns the same for one completion whose tokens have these pi / pi_old and pi_ref / pi.

    All arrays have the same few shapes in this module, because JAX compiles each operation once per shape.
    """
    ones = np.ones(3 - len(ratios))
    logps, mask = np.full((1, 3), logp), np.asarray([[1] * len(ratios) + [0] * len(ones)])
    old_logps = logps - np.log([[*ratios, *ones]])
    ref_logps = None if ref_ratios is None else logps + np.log([[*ref_ratios, *ones]])
    value, grad, metrics = value_grad_metrics(
        logps, old_logps, ref_logps, [advantage], mask, **(dict(kl_coef=0.0) | settings)
    )
    return value, grad[:, : len(ratios)], metrics


def assert_is(found, value, grad, clip_frac=None):
    """Checks the result of `value_grad_metrics` for one completion against hand values."""
    np.testing.assert_allclose(found[0], value, rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(found[1], np.reshape(grad, (1, -1)), rtol=2e-6, atol=1e-7)
    if clip_frac is not None:
        np.testing.assert_allclose(found[2]["policy/clip_frac"], clip_frac)


def test_the_arguments_have_the_documented_names_and_defaults():
    parameters = signature(unwrap(grpo_loss)).parameters
    assert list(parameters)[:5] == ["logps", "old_logps", "ref_logps", "advantages", "mask"]
    assert {name: p.default for name, p in parameters.items() if p.kind == Parameter.KEYWORD_ONLY} == dict(
        clip_low=0.2,
        clip_high=0.2,
        clip_dual=None,
        kl_coef=0.001,
        kl="k3",
        kl_corrected=False,
        ratio="token",
        clip_difference=0.2,
        aggregate="sequence",
        constant_length=None,
        groups=None,
        denominator=None,
    )


# --- Ratios -----------------------------------------------------------------------------------------------------------

# Two tokens whose ratios have a geometric mean above, inside and below [0.8, 1.3]; loss, gradient of each token, and
# whether they are clipped. The loss is -min(s A, clip(s) A), and each token moves log s by 1/2. Known bugs would give:
#   the product for s:                       1.8 * 1.25 = 2.25   2.5 * 0.625 = 1.56 (clipped, no gradient)   0.36
#   the bounds the other way round:          0.7 and 1.2: the second pair would be clipped, with a loss of -2.4
#   max instead of min where A < 0:          2.6, gradient 0 (first pair); 1.2, gradient 0.6 (last pair)
#   no 1/2, or no stop_gradient on the mean in sequence_token (1/2 + 1): gradients of 3.0 and 4.5 for the second row
GEOMETRIC = [
    ((1.8, 1.25), 2, -2.6, 0.0, 1),
    ((1.8, 1.25), -2, 3.0, 1.5, 0),
    ((2.5, 0.625), 2, -2.5, -1.25, 0),
    ((2.5, 0.625), -2, 2.5, 1.25, 0),
    ((0.5, 0.72), 2, -1.2, -0.6, 0),
    ((0.5, 0.72), -2, 1.6, 0.0, 1),
]


@pytest.mark.parametrize("ratio", ["sequence", "sequence_token"])
def test_the_ratio_of_a_sequence_is_a_geometric_mean(ratio):
    """Both have this gradient if all tokens of a completion have the same weight and advantage (GSPO, section 4)."""
    for ratios, advantage, loss, slope, clipped in GEOMETRIC:
        found = one_completion(ratios, advantage, ratio=ratio, clip_low=0.2, clip_high=0.3)
        assert_is(found, loss, [slope, slope], clipped)


def test_the_mean_log_ratio_is_over_the_tokens_of_a_completion():
    """Completions of 1 and 2 tokens: s is 1.1 and sqrt(1.44 * 0.64) = 0.96. Over 3 tokens the last would be 0.973."""
    mask = np.asarray([[1, 0, 0], [1, 1, 0]])
    old_logps = -1 - np.log([[1.1, 50.0, 1.0], [1.44, 0.64, 1.0]])
    logps = np.full((2, 3), -1.0)
    value, grad, _ = value_grad_metrics(logps, old_logps, None, [1.0, 2.0], mask, ratio="sequence", kl_coef=0)
    np.testing.assert_allclose(value, -(1.1 + 2 * 0.96) / 2, rtol=1e-6)
    np.testing.assert_allclose(grad, [[-1.1 / 2, 0, 0], [-2 * 0.96 / 4, -2 * 0.96 / 4, 0]], rtol=1e-6)


# pi / pi_old above, inside and below the bound of 1.3, with log pi = -2: loss = -min(rho, 1.3) * A * log pi, whose
# gradient is -min(rho, 1.3) * A. There is no lower bound, and the sign of A plays no part. Known bugs would give:
#   no stop_gradient on the weight:  -rho A (1 + log pi), +2.2 instead of -2.2 in the third row
#   clip_high as a ratio:            a weight of 0.3, and gradients of -+0.6 in all rows
#   min(w A, clip(w) A):             3.0 instead of 2.6 in the second row
#   a lower bound of 0.8:            -1.6 instead of -1.0 in the fifth row
#   log pi left out:                 a loss of -2.6 in the first row and no gradient
DETACHED = [
    (1.5, 2, 5.2, -2.6, 1),
    (1.5, -2, -5.2, 2.6, 1),
    (1.1, 2, 4.4, -2.2, 0),
    (1.1, -2, -4.4, 2.2, 0),
    (0.5, 2, 2.0, -1.0, 0),
    (0.5, -2, -2.0, 1.0, 0),
]


def test_a_detached_ratio_weights_the_log_prob_and_has_only_an_upper_bound():
    """CISPO (arXiv 2506.13585, equation 4)."""
    for ratio, advantage, loss, slope, bounded in DETACHED:
        found = one_completion([ratio], advantage, ratio="detached", clip_low=0.2, clip_high=0.3)
        assert_is(found, loss, [slope], bounded)


# pi, pi_old, A, loss, gradient, left out; a token is left out where it has gone more than 0.2 in the direction of A.
# The bound is on pi - pi_old: ratios of 2 and 0.5 are kept in the last rows. Known bugs would give:
#   the wrong side:               the first row -5.0 and the second 0
#   a clip at 1.2:                the first row -2.4, and the fifth too
#   rho - 1 against the bound:    the fifth and the sixth row 0
DIFFERENCE = [
    (0.5, 0.2, 2, 0.0, 0.0, 1),
    (0.5, 0.2, -2, 5.0, 5.0, 0),
    (0.2, 0.5, 2, -0.8, -0.8, 0),
    (0.2, 0.5, -2, 0.0, 0.0, 1),
    (0.3, 0.15, 2, -4.0, -4.0, 0),
    (0.15, 0.3, -2, 1.0, 1.0, 0),
]


def test_tokens_beyond_the_difference_of_probabilities_are_left_out():
    """DPPO (arXiv 2602.04879)."""
    for new, old, advantage, loss, slope, left_out in DIFFERENCE:
        settings = dict(ratio="difference", clip_difference=0.2, logp=np.log(new))
        assert_is(one_completion([new / old], advantage, **settings), loss, [slope], left_out)
    settings = dict(ratio="difference", clip_difference=0.12, logp=np.log(0.3))
    assert_is(one_completion([2.0], 2.0, **settings), 0.0, [0.0], 1)  # a rise of 0.15 is more than 0.12


def test_a_token_that_is_left_out_still_counts_in_the_denominator_and_the_kl_term():
    """Two tokens with pi = 0.5, A = 2: the first rose by 0.3 and is left out, the second did not change.

    The surrogate is (0 + 2) / 2 = 1, and 2 if the token were not counted. Its KL term, with pi_ref = 2 pi, is
    2 - log 2 - 1, and the gradient of that -(2 - 1).
    """
    settings = dict(ratio="difference", logp=np.log(0.5), ref_ratios=[2.0, 1.0], kl_coef=0.1)
    found = one_completion([2.5, 1.0], 2.0, **settings)
    assert_is(found, -1 + 0.1 * (1 - np.log(2)) / 2, [-0.1 / 2, -1.0], 0.5)


# Ratios, A, and for the dual clip at 3: loss, gradients and share of tokens that are cut. The objective of a token is
# at least 3 A where A < 0. Without a dual clip, the first row of each ratio has a loss of 10 or 8. A dual clip for both
# signs of A would give -6 in the second rows, and one that passes its gradient on -8 / 2 in the first.
DUAL = {
    "token": [
        ((8.0, 2.0), -2, (6 + 4) / 2, [0.0, 2.0], 0.5),
        ((8.0, 2.0), 2, -2.6, [0.0, 0.0], 1),
        ((2.9, 0.5), -2, (5.8 + 1.6) / 2, [2.9, 0.0], 0.5),
    ],
    "sequence": [  # geometric means of 4, 4, 2.5 and 0.5
        ((8.0, 2.0), -2, 6.0, [0.0, 0.0], 1),
        ((8.0, 2.0), 2, -2.6, [0.0, 0.0], 1),
        ((5.0, 1.25), -2, 5.0, [2.5, 2.5], 0),
        ((1.0, 0.25), -2, 1.6, [0.0, 0.0], 1),
    ],
}


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_token"])
def test_the_dual_clip_bounds_the_objective_where_the_advantage_is_negative(ratio):
    """The bound is a ratio, not an offset (arXiv 1912.09729)."""
    for ratios, advantage, loss, slopes, clipped in DUAL[ratio.removesuffix("_token")]:
        found = one_completion(ratios, advantage, ratio=ratio, clip_low=0.2, clip_high=0.3, clip_dual=3.0)
        assert_is(found, loss, slopes, clipped)


def test_log_ratios_are_limited_to_20_for_every_ratio():
    """log rho is limited to 20 before it is used, and tokens beyond the limit have no gradient through it."""
    ratios = np.exp([30, -10])

    def result(ratio):
        return one_completion(ratios, -1.0, ratio=ratio, logp=-1.0, clip_high=1e9)

    # The mean is (20 - 10) / 2 = 5; it would be 10 without the cut.
    assert_is(result("sequence"), np.exp(5), [0, np.exp(5) / 2], 0)
    np.testing.assert_allclose(result("sequence_token")[0], np.exp(5), rtol=1e-5)
    # pi = e^-1 < pi_old of the second token, so it is left out with A = -1.
    assert_is(result("difference"), np.exp(20) / 2, [0, 0], 0.5)
    # min(rho, 1 + clip_high) * A * log pi = e^20 * 1 and e^-10 * 1.
    np.testing.assert_allclose(result("detached")[0], -(np.exp(20) + np.exp(-10)) / 2, rtol=1e-5)


# --- KL estimators ----------------------------------------------------------------------------------------------------

# The estimators with q = log pi_ref - log pi = +-log 2: k1 = -q, k2 = q^2 / 2, k3 = e^q - q - 1, and their gradients in
# log pi, 1, -q and 1 - e^q. Known bugs would give:
#   q with the wrong sign:  k3 = 0.193 instead of 0.307 in the fifth row
#   k2 without its half:    0.480 instead of 0.240
LN2 = np.log(2)
ESTIMATES = [
    ("k1", 2.0, -LN2, 1.0),
    ("k1", 0.5, LN2, 1.0),
    ("k2", 2.0, LN2**2 / 2, -LN2),
    ("k2", 0.5, LN2**2 / 2, LN2),
    ("k3", 2.0, 1 - LN2, -1.0),
    ("k3", 0.5, LN2 - 0.5, 0.5),
]


@pytest.mark.parametrize("kl, ref_ratio, estimate, slope", ESTIMATES)
def test_kl_estimators_match_hand_values(kl, ref_ratio, estimate, slope):
    """The corrected estimator is rho k, and its gradient rho (k + dk): each factor has one.

    The ratio, 3, is beyond every clip bound, because the correction is not clipped. Without a gradient through the
    ratio, as in a KL term that is merely weighted, the gradient would be 3 dk.
    """
    settings = dict(kl=kl, kl_coef=0.1, ref_ratios=[ref_ratio])
    plain = one_completion([3.0], 0.0, **settings)
    assert_is(plain, 0.1 * estimate, [0.1 * slope])
    corrected = one_completion([3.0], 0.0, kl_corrected=True, **settings)
    assert_is(corrected, 0.1 * 3 * estimate, [0.1 * 3 * (estimate + slope)])
    for _, _, metrics in (plain, corrected):  # the metric is k3 whatever is trained on, without coefficient and ratio
        np.testing.assert_allclose(metrics["policy/kl_ref"], ref_ratio - np.log(ref_ratio) - 1, rtol=2e-6)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_kl_correction_uses_the_token_ratio_whatever_the_loss_uses(ratio):
    """Two tokens with ratios 4 and 0.25, whose geometric mean is 1, and k1 = -log 2 and log 2."""
    settings = dict(kl="k1", kl_corrected=True, kl_coef=1.0, ref_ratios=[2.0, 0.5])
    found = one_completion([4.0, 0.25], 0.0, ratio=ratio, **settings)
    assert_is(found, (-4 + 0.25) * LN2 / 2, [4 * (1 - LN2) / 2, 0.25 * (1 + LN2) / 2])


@pytest.mark.parametrize(
    "kl, distance, estimate",
    [("k1", 30, -20), ("k1", -30, 20), ("k2", 30, 200), ("k2", -30, 200), ("k3", 30, np.exp(20) - 21), ("k3", -30, 19)],
)
def test_the_log_ratio_to_the_reference_is_limited_to_20_nats(kl, distance, estimate):
    """Corrected, the gradient through the ratio remains. k2 would be 450 without the cut, and k3 1.1e13."""
    settings = dict(kl=kl, kl_coef=1.0, ref_ratios=[np.exp(distance)])
    assert_is(one_completion([2.0], 0.0, **settings), estimate, [0.0])
    assert_is(one_completion([2.0], 0.0, kl_corrected=True, **settings), 2 * estimate, [2 * estimate])


def test_the_kl_correction_is_limited_to_20_nats_and_then_has_no_gradient():
    """rho = e^20, k2 = log(2)^2 / 2 and dk2 = -log 2: the gradient is rho dk2, without rho k2."""
    found = one_completion([np.exp(25)], 0.0, kl="k2", kl_coef=1e-6, kl_corrected=True, ref_ratios=[2.0])
    assert_is(found, 1e-6 * np.exp(20) * LN2**2 / 2, [-1e-6 * np.exp(20) * LN2])


THETA, REF_THETA, OLD_THETA = np.random.default_rng(3).standard_normal((3, 6))  # logits of a vocabulary of six tokens


def log_softmax(theta):
    return theta - np.log(np.sum(np.exp(theta)))


def kl_divergence(p_theta, q_theta):
    p, q = log_softmax(p_theta), log_softmax(q_theta)
    return np.sum(np.exp(p) * (p - q))


def half_mean_square(theta):
    """Returns E_pi[q^2] / 2, the expected value of k2."""
    logps = log_softmax(theta)
    return np.sum(np.exp(logps) * (log_softmax(REF_THETA) - logps) ** 2) / 2


def gradient_at_theta(function):
    """Returns the gradient by central differences in float64."""
    return np.asarray([function(THETA + step) - function(THETA - step) for step in 1e-5 * np.eye(6)]) / 2e-5


FORWARD = gradient_at_theta(lambda theta: kl_divergence(theta, REF_THETA))  # what a penalty is meant to follow
REVERSE = gradient_at_theta(lambda theta: kl_divergence(REF_THETA, theta))
SQUARE = gradient_at_theta(half_mean_square)


def expected_gradient(advantages, old_theta=THETA, **settings):
    """Returns the expected gradient in theta over completions of one token, which are drawn from pi_old."""
    logps, old_logps, ref_logps = (log_softmax(x)[:, None] for x in (THETA, old_theta, REF_THETA))
    settings |= dict(aggregate="constant", constant_length=1, denominator=1)  # the sum over the six tokens
    _, slopes, _ = value_grad_metrics(logps, old_logps, ref_logps, advantages, np.ones((6, 1)), **settings)
    slopes = np.exp(old_logps) * np.asarray(slopes, np.float64)
    return (slopes - np.exp(logps) * slopes.sum())[:, 0]  # by dlog pi(v) / dtheta(u) = [u == v] - pi(u)


# With E[dlog pi] = 0 and dq = -dlog pi, and in expectation over pi_old = pi,
#   plain      k1: E[dlog pi] = 0                                            k2: E[-q dlog pi] = dKL(pi || ref)
#              k3: E[(1 - e^q) dlog pi] = -sum ref dlog pi = dKL(ref || pi)
#   corrected  E[k dlog pi + dk], the gradient of E_pi[k], which is KL(pi || ref) for k1 and k3
EXPECTED_GRADIENTS = [
    ("k1", False, np.zeros(6)),
    ("k2", False, FORWARD),
    ("k3", False, REVERSE),
    ("k1", True, FORWARD),
    ("k2", True, SQUARE),
    ("k3", True, FORWARD),
]


@pytest.mark.parametrize("kl, kl_corrected, gradient", EXPECTED_GRADIENTS)
def test_expected_gradient_of_a_kl_term_in_the_loss(kl, kl_corrected, gradient):
    settings = dict(kl=kl, kl_corrected=kl_corrected, kl_coef=1.0)
    np.testing.assert_allclose(expected_gradient(np.zeros(6), **settings), gradient, atol=1e-6)
    off_policy = expected_gradient(np.zeros(6), OLD_THETA, **settings)
    # Only the correction makes the gradient the same for tokens of another policy.
    assert np.allclose(off_policy, gradient, atol=2e-6) == kl_corrected


@pytest.mark.parametrize(
    "kl, gradient", [("k1", FORWARD), ("k2", SQUARE - FORWARD), ("k3", FORWARD - REVERSE)], ids=KLS
)
def test_expected_gradient_of_a_kl_estimate_in_the_reward(kl, gradient):
    """A reward of -k makes the expected gradient of the loss E[k dlog pi], without the E[dk] of a term in the loss.

    So it is the gradient of the corrected term minus that of the plain one. Of the three, only k1 gives the gradient of
    KL(pi || ref). That of k3 vanishes to first order at the reference, where both directions agree.
    """
    settings = dict(kl=kl, kl_coef=1.0)
    ref_ratios = np.exp(log_softmax(REF_THETA) - log_softmax(THETA))
    estimates = [one_completion([1.0], 0.0, ref_ratios=[x], **settings)[0] for x in ref_ratios]
    found = expected_gradient(-np.asarray(estimates), kl_coef=0.0)
    np.testing.assert_allclose(found, gradient, atol=1e-6)
    terms = [expected_gradient(np.zeros(6), kl_corrected=corrected, **settings) for corrected in (True, False)]
    np.testing.assert_allclose(found, terms[0] - terms[1], atol=1e-6)


# --- Aggregation ------------------------------------------------------------------------------------------------------

# Completions of 1, 2 and 3 tokens with A = 1, 2 and 4; the first and the last are of one group, so that the sums over
# tokens are 1, 4 and 12, and over groups 13 and 4. The loss and the weight of each completion's tokens:
MASK = np.arange(3) < np.asarray([[1], [2], [3]])
GROUPS = np.asarray([70, -2, 70])
AGGREGATED = [
    ("sequence", {}, (1 + 2 + 4) / 3, [1 / 3, 1 / 6, 1 / 9]),
    ("token", {}, (1 + 4 + 12) / 6, [1 / 6, 1 / 6, 1 / 6]),
    # (13/4 + 4/2) / 2 = 2.625; a mean over the group's completions instead of its tokens would give 2.25.
    ("prompt", dict(groups=GROUPS), (13 / 4 + 4 / 2) / 2, [1 / 8, 1 / 4, 1 / 8]),
    # Dividing by the longest completion or by the mask's width would give 17/9.
    ("constant", dict(constant_length=4), 17 / 12, [1 / 12, 1 / 12, 1 / 12]),
]
ON_POLICY = np.full((3, 3), -1.0), np.full((3, 3), -1.0), None, [1.0, 2.0, 4.0], MASK


@pytest.mark.parametrize("aggregate, settings, objective, weights", AGGREGATED)
def test_each_aggregate_matches_hand_values(aggregate, settings, objective, weights):
    A = np.asarray([[1.0], [2.0], [4.0]])
    value, grad, _ = value_grad_metrics(*ON_POLICY, aggregate=aggregate, kl_coef=0, **settings)
    np.testing.assert_allclose(value, -objective, rtol=1e-6)
    np.testing.assert_allclose(grad, -A * np.reshape(weights, (3, 1)) * MASK, rtol=1e-6)


@pytest.mark.parametrize("aggregate, count", [("sequence", 3), ("token", 6), ("prompt", 2), ("constant", 3)])
def test_losses_of_two_parts_of_a_batch_add_up_with_the_denominator_of_the_whole(aggregate, count):
    """`denominator` is the number of completions, tokens or groups. The middle completion is the first part.

    Without it, means would be taken within each part: for tokens, the mean of both is (4/2 + 13/4) / 2 = 2.625 and not
    17/6 = 2.833.
    """
    settings = dict(aggregate=aggregate, kl_coef=0) | (dict(constant_length=4) if aggregate == "constant" else {})

    def part(rows, **denominator):
        arrays = [x if x is None else np.asarray(x)[rows] for x in ON_POLICY]
        value, grad, _ = value_grad_metrics(*arrays, groups=GROUPS[rows], **settings, **denominator)
        return value, grad

    whole_value, whole_grad = part([1, 0, 2])
    values, grads = zip(*(part(rows, denominator=count) for rows in ([1], [0, 2])), strict=True)
    np.testing.assert_allclose(sum(values), whole_value, rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(grads), whole_grad, rtol=1e-6)


# --- Metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_the_first_update_is_the_policy_gradient_for_every_ratio(ratio, aggregate):
    """With the trainer's own old log-probs, all ratios are exactly 1, so the gradient is -A, even with bounds of 0."""
    logps = -5 * np.random.default_rng(1).random((2, 3))
    settings = dict(clip_low=0.0, clip_high=0.0, clip_difference=0.0, kl_coef=0, groups=np.asarray([3, 4]))
    settings |= dict(ratio=ratio, aggregate=aggregate) | (dict(constant_length=3) if aggregate == "constant" else {})
    _, grad, metrics = value_grad_metrics(logps, logps, None, [1.5, -2.5], np.ones((2, 3)), **settings)
    assert (metrics["policy/ratio_max"], metrics["policy/ess_frac"], metrics["policy/clip_frac"]) == (1, 1, 0)
    np.testing.assert_allclose(grad, np.broadcast_to([[-1.5 / 6], [2.5 / 6]], (2, 3)), rtol=1e-6)


@pytest.mark.parametrize("ratio", RATIOS)
def test_ratio_metrics_ignore_padding(ratio):
    """Ratios 0.5 and 0.25: the largest is 0.5, and (0.75)^2 / (2 * 0.3125) = 0.9. Padding has no ratio of 1."""
    old_logps = -1 - np.log([[0.5, 0.25, 8.0]])
    mask = np.asarray([[1, 1, 0]])
    _, _, metrics = value_grad_metrics(np.full((1, 3), -1.0), old_logps, None, [1.0], mask, ratio=ratio, kl_coef=0)
    np.testing.assert_allclose(metrics["policy/ratio_max"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["policy/ess_frac"], 0.9, rtol=1e-6)


@pytest.mark.parametrize(
    "aggregate, clip_frac", [("sequence", 0.75), ("token", 2 / 3), ("prompt", 0.75), ("constant", 2 / 3)]
)
@pytest.mark.parametrize("denominator", [None, 50])
def test_fractions_of_tokens_use_the_loss_weights_divided_by_their_sum(aggregate, clip_frac, denominator):
    """Completions of 1 and 2 tokens, of which the first and one of the others are clipped; all have pi_ref = 2 pi.

    `constant` with a length of 100 and a larger denominator make the weights small, but not the fractions.
    """
    old_logps, logps = -1 - np.log([[2.0, 1.0, 1.0], [2.0, 1.0, 1.0]]), np.full((2, 3), -1.0)
    settings = dict(kl="k1", kl_coef=0.5, aggregate=aggregate, groups=np.asarray([5, 6]), denominator=denominator)
    settings |= dict(constant_length=100) if aggregate == "constant" else {}
    mask = np.asarray([[1, 0, 0], [1, 1, 0]])
    _, _, metrics = value_grad_metrics(logps, old_logps, logps + LN2, [1.0, 1.0], mask, **settings)
    np.testing.assert_allclose(metrics["policy/clip_frac"], clip_frac, rtol=1e-6)
    np.testing.assert_allclose(metrics["policy/kl_ref"], 1 - LN2, rtol=1e-5)


@pytest.mark.parametrize("ratio", RATIOS)
def test_no_ratio_hides_nan_in_a_counted_token(ratio):
    """Comparisons with NaN are false, so the token could be left out of the sum and the broken update be applied."""
    clean, nan = np.full((2, 3), -1.0), np.full((2, 3), -1.0)
    nan[0, 1] = np.nan
    settings = dict(ratio=ratio, kl="k2", kl_corrected=True)
    for logps, old_logps, ref_logps, advantages in (
        (nan, clean, None, clean[:, 0]),  # without a KL term, in which NaN would show as well
        (clean, nan, None, clean[:, 0]),
        (clean, clean, nan, clean[:, 0]),
        (clean, clean, None, nan[0, :2]),
    ):
        kl_coef = 0 if ref_logps is None else 0.1
        arrays = logps, old_logps, ref_logps, advantages, np.ones((2, 3))
        value, grad, _ = value_grad_metrics(*arrays, kl_coef=kl_coef, **settings)
        assert np.isnan(value) and np.isnan(grad).any()


# --- All combinations -------------------------------------------------------------------------------------------------


def random_batch():
    """Returns an off-policy batch of twelve completions in float32, one of them empty, with junk beyond their ends.

    Some completions are shifted as a whole, to bring their geometric means to both sides of the clip and beyond the
    dual clip, with both signs of the advantage.
    """
    draw = np.random.default_rng(39)
    lengths = np.asarray([6, 1, 0, 3, 5, 2, 4, 6, 3, 2, 4, 3])
    mask = np.arange(6) < lengths[:, None]
    shift = np.asarray([0.8, 0.8, 0.0, 0.05, 0.02, -0.8, -0.8, 0.1, -0.1, -0.4, 0.4, 0.45])
    A = np.asarray(
        [2.3, -0.8, 5.0, 1.9, -1.1, 1.7, -0.6, 2.2, -0.6, 3.1, -0.4, 2.7]
    )  # more positive, so no sum is near 0
    logps = -0.1 - 2 * draw.random(mask.shape)
    old_logps = np.minimum(logps - shift[:, None] + 0.3 * draw.standard_normal(mask.shape), -0.02)
    ref_logps = np.minimum(logps + 0.5 * draw.standard_normal(mask.shape), -0.02)
    junk = [np.where(mask, x, j) for x, j in ((logps, 300.0), (old_logps, -np.inf), (ref_logps, np.nan))]
    groups = np.asarray([7, -3, 7, 1000, 7, -3, 1000, 42, 42, -3, 7, 42])
    return [x.astype(np.float32) for x in (*junk, A)] + [mask], groups


BATCH, BATCH_GROUPS = random_batch()


def combinations(ratio, aggregate):
    """Lists the settings of all KL terms with and without a dual clip; every second one has a denominator."""
    duals = (None,) if ratio in ("detached", "difference") else (None, 1.8)
    for i, (kl, kl_corrected, clip_dual) in enumerate(product(KLS, (False, True), duals)):
        yield dict(
            ratio=ratio,
            aggregate=aggregate,
            kl=kl,
            kl_corrected=kl_corrected,
            clip_dual=clip_dual,
            kl_coef=0.1,
            clip_low=0.2,
            clip_high=0.28,
            clip_difference=0.1,
            groups=BATCH_GROUPS,
            constant_length=9 if aggregate == "constant" else None,
            denominator=(None, 7)[(i + i // len(duals)) % 2],
        )


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_all_combinations_match_an_independent_computation(ratio, aggregate):
    for settings in combinations(ratio, aggregate):
        value, grad, metrics = value_grad_metrics(*BATCH, **settings)
        expected, expected_grad, expected_metrics = losses.loss(*map(np.float64, BATCH[:4]), BATCH[4], **settings)
        np.testing.assert_allclose(value, expected, rtol=1e-5, err_msg=str(settings))
        error = np.max(np.abs(grad - expected_grad)) / np.max(np.abs(expected_grad))
        assert error < 1e-5, settings
        for name, metric in expected_metrics.items():
            np.testing.assert_allclose(metrics[name], metric, rtol=1e-5, err_msg=f"{name} {settings}")


def test_the_random_batch_reaches_every_case():
    """A case that the batch does not reach would not be tested above."""
    logps, old_logps, _, A, mask = BATCH
    log_rho = np.where(mask, logps - np.where(mask, old_logps, 0), 0)
    for rho in (np.exp(log_rho), np.exp(losses.row_means(log_rho, mask))):
        signs = np.where(mask, np.sign(A)[:, None], 0)
        for sign, (low, high) in product((-1, 1), ((0, 0.8), (0.8, 1.28), (1.28, 1.8), (1.8, np.inf))):
            assert np.any((signs == sign) & (rho > low) & (rho < high)), (sign, low, high)
    step = np.exp(np.where(mask, logps, 0)) - np.exp(np.where(mask, old_logps, 0))
    for sign in (-1, 1):
        assert np.any((step > 0.1) & (signs == sign)) and np.any((step < -0.1) & (signs == sign))


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_independent_gradient_matches_finite_differences(ratio, monkeypatch):
    """Uses central differences in float64, with the values under stop_gradient held constant."""
    monkeypatch.setattr(losses, "LIMIT", 0.7)  # so that some tokens are beyond it
    arrays, mask = [np.float64(x) for x in BATCH[:4]], BATCH[4]
    arrays[:3] = [np.where(mask, x, -1.0) for x in arrays[:3]]
    for settings in combinations(ratio, "prompt"):
        _, grad, _ = losses.loss(*arrays, mask, **settings)
        for i, t in np.argwhere(mask):
            step = np.zeros(mask.shape)
            step[i, t] = 1e-6
            up, down = (
                losses.loss(arrays[0] + s, *arrays[1:], mask, held=arrays[0], **settings)[0] for s in (step, -step)
            )
            np.testing.assert_allclose(grad[i, t], (up - down) / 2e-6, rtol=1e-5, atol=1e-6, err_msg=str(settings))


def test_settings_work_under_jit_with_groups_as_an_argument():
    """The ids of groups need not be known when the function is compiled."""
    settings = next(combinations("sequence", "prompt")) | dict(clip_dual=1.8)
    del settings["groups"]
    compiled = jax.jit(lambda groups, *arrays: grpo_loss(*arrays, groups=groups, **settings)[0])
    for groups in (BATCH_GROUPS, np.arange(12) // 2):
        expected, _, _ = losses.loss(*map(np.float64, BATCH[:4]), BATCH[4], groups=groups, **settings)
        np.testing.assert_allclose(compiled(groups, *BATCH), expected, rtol=1e-5)


# --- Refusals ---------------------------------------------------------------------------------------------------------

# Each message says what was expected, what was found and what to do.
REFUSED = [
    (dict(ratio="tokens"), r"ratio .*token.*sequence.*sequence_token.*detached.*difference.*found 'tokens'.*\. [A-Z]"),
    (dict(aggregate="mean"), r"aggregate .*sequence.*token.*prompt.*constant.*found 'mean'.*\. [A-Z]"),
    (dict(kl="k4"), r"kl .*k1.*k2.*k3.*found 'k4'.*\. [A-Z]"),
    (dict(ratio="detached", clip_dual=3.0), r"clip_dual .*detached.*found 3\.0.*\. [A-Z]"),
    (dict(ratio="difference", clip_dual=3.0), r"clip_dual .*difference.*found 3\.0.*\. [A-Z]"),
    (dict(aggregate="constant"), r"constant_length .*constant.*found [Nn]one.*\. [A-Z]"),
    (dict(aggregate="prompt"), r"groups .*prompt.*found None.*\. [A-Z]"),
    (
        dict(aggregate="prompt", groups=jnp.zeros(2, int)),
        r"groups must have shape \(1,\).*found Array\(\[0, 0\].*\. [A-Z]",
    ),
    (dict(aggregate="constant", constant_length=0.5), r"constant_length must be at least 1 .*found 0\.5.*\. [A-Z]"),
    (dict(clip_dual=0.5), r"clip_dual must be more than 1; found 0\.5\. [A-Z]"),
]


@pytest.mark.parametrize("settings, message", REFUSED)
def test_invalid_settings_are_refused(settings, message):
    one = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=message):
        unwrap(grpo_loss)(one, one, one, jnp.zeros(1), jnp.ones((1, 1)), **settings)


@pytest.mark.parametrize("kl", KLS)
@pytest.mark.parametrize("kl_corrected", [False, True])
def test_a_kl_term_without_a_reference_is_refused(kl, kl_corrected):
    one = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=r"ref_logps must .*kl_coef is 0\.1; found None\. [A-Z]"):
        grpo_loss(one, one, None, jnp.zeros(1), jnp.ones((1, 1)), kl=kl, kl_coef=0.1, kl_corrected=kl_corrected)
