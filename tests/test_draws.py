"""Token sampling: draws follow the exact probabilities, and filters keep the tokens that their definitions say."""

import functools
import importlib
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.parallel.mesh import ROW_AXES, make_mesh
from grpo_jax.rollout.draws import TokenFilter, choose_tokens, draw_tokens, keep_mask, vocab_block_width

compiled_keep_mask = jax.jit(keep_mask, static_argnums=1)


def fits(counts, probs) -> bool:
    """Returns whether counts pass a chi-square test against probabilities, with a p-value above 1e-4."""
    expected = np.asarray(probs, np.float64) * counts.sum()
    large = expected >= 5
    rest = max(expected[~large].sum(), 1)
    chi = ((counts - expected)[large] ** 2 / expected[large]).sum()
    chi += (counts[~large].sum() - expected[~large].sum()) ** 2 / rest
    freedom = large.sum()
    # Wilson-Hilferty: (chi/k)^(1/3) is approximately normal; 3.72 standard deviations are a p-value of 1e-4.
    z = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    return z < 3.72


@functools.partial(jax.jit, static_argnames="filter")
def draw_many(logits, filter=TokenFilter()):  # noqa: B008  (immutable)
    """Returns the tokens and log-probs of 20,000 draws."""
    keys = jax.random.split(jax.random.key(4), 20_000)
    return choose_tokens(keys, jnp.broadcast_to(logits, (20_000, len(logits))), False, filter)


@pytest.mark.parametrize("vocab_size", [1, 2, 45, 785])
def test_draws_follow_the_exact_probabilities(vocab_size):
    """For vocabularies of one token, of one block, and of several blocks that do not divide them."""
    logits = 2 * jax.random.normal(jax.random.key(3), (vocab_size,))
    tokens, logps = draw_many(logits)
    counts = np.bincount(tokens, minlength=vocab_size)
    np.testing.assert_allclose(logps, jax.nn.log_softmax(logits)[tokens], atol=1e-5)
    if vocab_size > 2:
        assert fits(counts, jax.nn.softmax(logits))
        assert not fits(counts, jax.nn.softmax(1.1 * logits))  # the test would notice a slight difference


def test_the_two_stages_of_a_draw_are_independent():
    """One key gives the noise that selects the block and the token in it; the pair still has the exact probability."""
    logits = jnp.log(jnp.arange(1.0, 17))
    tokens, _ = draw_many(logits)
    assert vocab_block_width(16) == 4 and fits(np.bincount(tokens, minlength=16), jax.nn.softmax(logits))


def test_impossible_tokens_are_never_drawn():
    possible = np.arange(100) % 3 > 0
    tokens, logps = draw_many(jnp.where(possible, 0.0, -jnp.inf))
    assert possible[tokens].all() and np.isfinite(logps).all()
    assert fits(np.bincount(tokens, minlength=100)[possible], np.full(66, 1 / 66))


def test_changing_logits_by_less_than_half_the_margin_does_not_change_a_draw(monkeypatch):
    """benchmarks/layouts.py uses this margin to tell whether rounding explains a different token."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    runner_up_margin = importlib.import_module("layouts").runner_up_margin
    keys = jax.random.split(jax.random.key(5), 200)
    logits = jax.random.normal(jax.random.key(6), (200, 45))
    draw = jax.jit(lambda logits: (draw_tokens(keys, logits)[0], runner_up_margin(keys, logits)))
    tokens, margin = draw(logits)
    signs = np.random.default_rng(0).choice([-1, 1], logits.shape)
    np.testing.assert_array_equal(draw(logits + 0.49 * margin[:, None] * signs)[0], tokens)
    assert (margin > 0).all() and (margin < 1).any()


def draw_twice(vocab_size, greedy, shape=(1, 2, 4), dtype=jnp.float32):
    """Returns what one device draws from 8 rows of logits, and what a mesh draws whose `tensor` axis splits them."""
    keys = jax.random.split(jax.random.key(7), 8)
    logits = (3 * jax.random.normal(jax.random.key(8), (8, vocab_size))).astype(dtype).astype(jnp.float32)
    whole, mesh = draw_tokens(keys, logits, greedy), make_mesh(*shape)
    with jax.set_mesh(mesh):
        split = jax.device_put(logits, NamedSharding(mesh, P(ROW_AXES, "tensor")))
        program = jax.jit(lambda keys, logits: choose_tokens(keys, logits, greedy, TokenFilter()))
        return whole, program(keys, split), program.lower(keys, split).compile().as_text()


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("vocab_size, aligned", [(256, True), (1000, False), (4096, True), (5012, False), (12, False)])
def test_logits_that_are_split_over_devices_give_the_same_draws_and_are_not_gathered(vocab_size, aligned, greedy):
    """Devices hold whole blocks, or blocks that begin on one device and end on another, or less than a block each."""
    assert (vocab_size // 4 % vocab_block_width(vocab_size) == 0) == aligned
    (tokens, logps), (split_tokens, split_logps), text = draw_twice(vocab_size, greedy)
    np.testing.assert_array_equal(split_tokens, tokens)
    np.testing.assert_allclose(split_logps, logps, atol=2e-6)
    moved = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"= f32\[([\d,]+)\]\S* all-", text)]
    assert moved and max(moved) <= 4 * 4 * (vocab_size / vocab_block_width(vocab_size) + 2), moved


def test_of_tokens_that_are_equally_likely_the_greedy_choice_is_the_first_on_any_device():
    (tokens, _), (split_tokens, _), _ = draw_twice(64, greedy=True, dtype=jnp.float8_e4m3fn)
    logits = (3 * jax.random.normal(jax.random.key(8), (8, 64))).astype(jnp.float8_e4m3fn).astype(jnp.float32)
    assert (np.sum(np.asarray(logits) == np.max(logits, axis=1, keepdims=True), axis=1) > 1).any()
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=1))
    np.testing.assert_array_equal(split_tokens, tokens)


def test_the_greedy_choice_need_not_be_in_the_most_likely_block():
    """Of 64 tokens in blocks of 8, one of the first 8 is drawn more often than the most likely token."""
    logits = jnp.zeros((1, 64)).at[0, :8].set(2.0).at[0, 20].set(3.0)
    token, logp = draw_tokens(jax.random.split(jax.random.key(0), 1), logits, greedy=True)
    assert token.tolist() == [20] and logp[0] == pytest.approx(3 - math.log(55 + 8 * math.e**2 + math.e**3), abs=1e-5)


def kept_by_definition(probs, filter):
    """Returns the tokens that a filter keeps, decided one by one."""
    order = np.argsort(-probs, kind="stable")
    kept, total = set(), 0.0
    for rank, token in enumerate(order):
        too_many = filter.top_k and rank >= filter.top_k
        too_unlikely = probs[token] < filter.min_p * probs[order[0]]
        if rank and (total >= filter.top_p or too_many or too_unlikely):
            break
        kept.add(int(token))
        total += probs[token]
    return sorted(kept)


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
def test_filters_keep_the_tokens_of_their_definitions(filter):
    logits = 2 * jax.random.normal(jax.random.key(0), (20, 60))
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    kept = compiled_keep_mask(logits, filter)
    for row in range(20):
        assert np.flatnonzero(kept[row]).tolist() == kept_by_definition(probs[row], filter), row


def test_filtered_draws_follow_the_truncated_distribution_and_keep_unfiltered_logps():
    logits = jax.random.normal(jax.random.key(1), (60,))
    filter = TokenFilter(top_p=0.6)
    tokens, logps = draw_many(logits, filter)
    counts = np.bincount(tokens, minlength=60)
    probs = jnp.where(keep_mask(logits[None], filter)[0], jax.nn.softmax(logits), 0)
    assert 10 < (probs > 0).sum() < 50
    assert fits(counts[probs > 0], (probs / probs.sum())[probs > 0])
    assert not counts[probs == 0].any()
    np.testing.assert_allclose(logps, jax.nn.log_softmax(logits)[tokens], atol=1e-5)
