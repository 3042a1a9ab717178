"""Draws: exact probabilities, filters against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.rollout.draws import TokenFilter, choose_tokens, keep_mask, vocab_block_width


def fits(seen, probs) -> bool:
    """Chi-square of counts against probabilities; True for a p-value over 1e-4."""
    expected = np.asarray(probs, np.float64) * seen.sum()
    big = expected >= 5
    rest = max(expected[~big].sum(), 1)
    chi = ((seen - expected)[big] ** 2 / expected[big]).sum() + (seen[~big].sum() - expected[~big].sum()) ** 2 / rest
    freedom = big.sum()
    # Wilson-Hilferty: (chi/k)^(1/3) is about normal; 3.72 standard deviations are a p-value of 1e-4.
    z = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    return z < 3.72


def many(logits, filter=TokenFilter(), count=20_000):
    """Tokens and log-probs of `count` draws."""
    keys = jax.random.split(jax.random.key(4), count)
    return choose_tokens(keys, jnp.broadcast_to(logits, (count, len(logits))), False, filter)


@pytest.mark.parametrize("vocab", [1, 2, 45, 785])
def test_draws_follow_the_exact_probabilities(vocab):
    """For vocabularies of one block, of one token, and of several blocks that do not divide them."""
    logits = 2 * jax.random.normal(jax.random.key(3), (vocab,))
    tokens, logps = many(logits)
    assert vocab < 3 or fits(np.bincount(tokens, minlength=vocab), jax.nn.softmax(logits))
    np.testing.assert_allclose(logps, jax.nn.log_softmax(logits)[tokens], atol=1e-5)
    assert not fits(np.bincount(tokens, minlength=vocab), jax.nn.softmax(1.1 * logits)) or vocab < 45


def test_two_draws_in_a_row_are_independent():
    """The block's noise and that inside it come from one key: the pair (block, token in it) follows the product."""
    vocab = 16
    width = vocab_block_width(vocab)
    logits = jnp.log(jnp.arange(1.0, vocab + 1))
    tokens, _ = many(logits)
    assert width == 4 and fits(np.bincount(tokens, minlength=vocab), jax.nn.softmax(logits))


def test_impossible_tokens_are_never_drawn():
    logits = jnp.where(jnp.arange(100) % 3 == 0, -jnp.inf, 0.0)
    tokens, logps = many(logits)
    assert (tokens % 3 > 0).all() and np.isfinite(logps).all()
    assert fits(np.bincount(tokens, minlength=100)[np.arange(100) % 3 > 0], np.full(66, 1 / 66))


def reference(logits, filter):
    """What a filter keeps, token by token."""
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    order = np.argsort(-probs, kind="stable")
    keep, total = set(), 0.0
    for rank, token in enumerate(order):
        enough = (
            total >= filter.top_p
            or filter.top_k
            and rank >= filter.top_k
            or probs[token] < filter.min_p * probs[order[0]]
        )
        if rank and enough:
            break
        keep.add(int(token))
        total += probs[token]
    return sorted(keep)


@pytest.mark.parametrize(
    "filter",
    [
        TokenFilter(top_k=1),
        TokenFilter(top_k=5),
        TokenFilter(top_k=1000),
        TokenFilter(top_p=1e-9),
        TokenFilter(top_p=0.3),
        TokenFilter(top_p=0.999),
        TokenFilter(min_p=1.0),
        TokenFilter(min_p=0.2),
        TokenFilter(top_k=7, top_p=0.8, min_p=0.05),
        TokenFilter(),
    ],
)
def test_filters_keep_what_their_definitions_say(filter):
    for seed in range(20):
        logits = 2 * jax.random.normal(jax.random.key(seed), (1, 60))
        assert np.flatnonzero(keep_mask(logits, filter)[0]).tolist() == reference(logits[0], filter), seed


def test_filtered_draws_follow_the_truncated_distribution_and_are_scored_by_the_whole():
    logits = jax.random.normal(jax.random.key(1), (300,))
    filter = TokenFilter(top_p=0.6)
    tokens, logps = many(logits, filter)
    probs = jnp.where(keep_mask(logits[None], filter)[0], jax.nn.softmax(logits), 0)
    assert 20 < (probs > 0).sum() < 280
    assert fits(np.bincount(tokens, minlength=300)[probs > 0], (probs / probs.sum())[probs > 0])
    assert not np.bincount(tokens, minlength=300)[probs == 0].any()
    np.testing.assert_allclose(logps, jax.nn.log_softmax(logits)[tokens], atol=1e-5)
