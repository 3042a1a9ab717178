"""Tests every setting of the advantages against hand values and an independent computation.

tests/test_grpo.py has the properties of the defaults.
"""

from inspect import Parameter, signature, unwrap
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import advantages
from tests.outside import losses

MEANS = ("group", "batch", "leave_one_out")
STDS = ("group", "batch", "none")
SETTINGS = [
    dict(mean=mean, std=std, ddof=ddof, eps=eps)
    for mean, std, ddof, eps in product(MEANS, STDS, (0, 1), (0.0, 1e-8, 0.1))
]
ONE_OF_EIGHT = jnp.asarray([[1.0, 0, 0, 0, 0, 0, 0, 0]])


def test_the_arguments_and_their_defaults_are_those_of_the_documentation():
    parameters = signature(unwrap(advantages)).parameters
    assert next(iter(parameters)) == "rewards"
    defaults = {name: p.default for name, p in parameters.items() if p.kind == Parameter.KEYWORD_ONLY}
    assert defaults == dict(mean="group", std="group", ddof=0, eps=0.0)


# One right answer of eight: the mean is 1/8. The squares add up to 7/8, so the variance is 7/64 with ddof=0 and 1/8
# with ddof=1, and the right answer has 7/8 / sqrt(7/64) = sqrt(7) = 2.646, or 7/8 / sqrt(1/8) = 2.475.
@pytest.mark.parametrize("ddof, right, wrong", [(0, 7**0.5, -(7**-0.5)), (1, 2.4748737, -0.3535534)])
def test_ddof_selects_the_standard_deviation(ddof, right, wrong):
    np.testing.assert_allclose(advantages(ONE_OF_EIGHT, ddof=ddof), [[right] + [wrong] * 7], rtol=1e-6)


def test_leave_one_out_subtracts_the_mean_of_the_others():
    """RLOO (arXiv 2402.14740). Rewards 3, 0, 0: 3 - 0 and 0 - 3/2. The group's mean would give 2, -1 and -1."""
    rewards = jnp.asarray([[3.0, 0, 0]])
    np.testing.assert_allclose(advantages(rewards, mean="leave_one_out", std="none"), [[3, -1.5, -1.5]], rtol=1e-6)
    # The standard deviation is still that of all three, sqrt(2), whose mean is 1.
    np.testing.assert_allclose(advantages(rewards, mean="leave_one_out"), np.asarray([[3, -1.5, -1.5]]) / 2**0.5)


def test_std_none_does_not_divide():
    """Dr. GRPO (arXiv 2503.20783); ddof and eps have no effect."""
    expected = [[7 / 8] + [-1 / 8] * 7]
    np.testing.assert_allclose(advantages(ONE_OF_EIGHT, std="none"), expected, rtol=1e-6)
    np.testing.assert_array_equal(advantages(ONE_OF_EIGHT, std="none", ddof=1, eps=0.5), np.float32(expected))


def test_the_standard_deviation_of_a_batch_is_that_of_its_raw_rewards():
    """ScaleRL (arXiv 2510.13786). Two groups, of rewards 0, 2 and 10, 14.

    The batch has the mean 6.5 and the squares 42.25 + 20.25 + 12.25 + 56.25 = 131. The rewards minus their group's mean
    would have a standard deviation of sqrt((1 + 1 + 4 + 4) / 4) = 1.58 instead of sqrt(131 / 4) = 5.72.
    """
    rewards = jnp.asarray([[0.0, 2], [10, 14]])
    centered = np.asarray([[-1, 1], [-2, 2]])
    np.testing.assert_allclose(advantages(rewards, std="batch"), centered / (131 / 4) ** 0.5, rtol=1e-6)
    np.testing.assert_allclose(advantages(rewards, std="batch", ddof=1), centered / (131 / 3) ** 0.5, rtol=1e-6)
    expected = np.asarray([[-6.5, -4.5], [3.5, 7.5]])
    np.testing.assert_allclose(advantages(rewards, mean="batch", std="none"), expected, rtol=1e-6)
    np.testing.assert_allclose(advantages(rewards, mean="batch", std="batch"), expected / (131 / 4) ** 0.5, rtol=1e-6)
    np.testing.assert_allclose(advantages(rewards, mean="batch"), expected / [[1], [2]], rtol=1e-6)


def test_eps_is_added_to_the_standard_deviation():
    """Rewards 0 and 2 have a standard deviation of 1: 1 / 1.25 = 0.8. Added to the variance, eps would give 0.894."""
    np.testing.assert_allclose(advantages(jnp.asarray([[0.0, 2]]), eps=0.25), [[-0.8, 0.8]], rtol=1e-6)


@pytest.mark.parametrize("mean", ["group", "leave_one_out"])
@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_equal_rewards_of_a_group_give_exactly_0_with_any_divisor(mean, std, eps):
    """The mean of three times 0.1 is not 0.1 in float32, and the difference over an eps of 1e-8 would be 0.7."""
    rewards = jnp.asarray([[0.1, 0.1, 0.1], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    result = np.asarray(advantages(rewards, mean=mean, std=std, eps=eps))
    assert (result[[0, 2]] == 0).all() and (result[1] != 0).all()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 7.0])
@pytest.mark.parametrize("ddof", [0, 1])
def test_a_standard_deviation_of_0_gives_0_with_the_mean_of_the_batch(value, ddof):
    """The group's mean differs from the batch's, but its standard deviation is 0; a small eps gives large values."""
    rewards = jnp.asarray([[value] * 3, [1.0, 0.0, 0.0]])
    result = np.asarray(advantages(rewards, mean="batch", ddof=ddof))
    assert (result[0] == 0).all() and (result[1] != 0).all()
    result = advantages(rewards, mean="batch", ddof=ddof, eps=0.5)
    np.testing.assert_allclose(result[0], (value - (3 * value + 1) / 6) / 0.5, rtol=1e-5)
    assert (np.asarray(advantages(jnp.full((4, 3), value), mean="batch", std="batch", ddof=ddof)) == 0).all()


@jax.jit
def all_settings(rewards):
    """Computes the advantages for each mean, std, ddof and eps in a single compilation."""
    return [unwrap(advantages)(rewards, **settings) for settings in SETTINGS]


def test_all_combinations_match_an_independent_computation():
    """The groups of 5 include one with equal rewards, one with nearly equal rewards and one with large rewards."""
    draw = np.random.default_rng(0)
    rewards = draw.standard_normal((6, 5)) * np.asarray([[1], [0.1], [1], [30], [1], [1]])
    rewards[2], rewards[4] = 0.3, [1, 0, 0, 1, 0]
    rewards = rewards.astype(np.float32)
    for settings, found in zip(SETTINGS, all_settings(rewards), strict=True):
        assert found.dtype == jnp.float32
        expected = losses.advantages(rewards, **settings)
        scale = np.maximum(np.abs(expected).max(axis=1, keepdims=True), 1e-9)
        np.testing.assert_allclose(found / scale, expected / scale, atol=2e-6, err_msg=str(settings))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 3)])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_rewards_that_are_all_equal_give_exactly_0_in_all_combinations(shape, value):
    """With ddof=1, a single completion has no standard deviation. Noise of 7e-9 would become an optimizer step."""
    for settings, result in zip(SETTINGS, all_settings(np.full(shape, value, np.float32)), strict=True):
        assert (np.asarray(result) == 0).all(), settings


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(mean="median"), r"mean .*group.*batch.*leave_one_out.*found 'median'.*\. [A-Z]"),
        (dict(std="mad"), r"std .*group.*batch.*none.*found 'mad'.*\. [A-Z]"),
        (dict(std=None), r"std .*group.*batch.*none.*found None.*\. [A-Z]"),
    ],
)
def test_unknown_names_are_refused_with_the_list(settings, message):
    with pytest.raises(ValueError, match=message):
        unwrap(advantages)(jnp.ones((1, 2)), **settings)
