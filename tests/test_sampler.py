"""The sampler: draws, stops, log-probs, randomness by counters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import forward, sample
from grpo_jax.draws import Filter, draw
from grpo_jax.sampler import begin, decode, finish, pad_prompts, place_for_rollout, placer, start
from grpo_jax.stops import stop_table
from tests.tiny import CONFIG, params

PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11], [12]]


def rollout(key=0, weights=None, **changes):
    options = dict(samples=4, max_tokens=8) | changes
    return sample(CONFIG, weights or params(), PROMPTS, jax.random.key(key), **options)


def test_shapes_and_defaults():
    made = rollout()
    assert made.tokens.shape == made.logps.shape == (3, 4, 8)
    assert made.lengths.shape == made.truncated.shape == (3, 4)
    np.testing.assert_array_equal(made.prompt_ids, [0, 1, 2])
    assert (made.lengths == 8).all() and made.truncated.all()  # no stop ids, no stop


def test_logps_are_those_of_a_full_forward_at_the_temperature():
    weights = params()
    made = rollout(temperature=0.7, weights=weights)
    for b, prompt in enumerate(PROMPTS):
        for g in range(4):
            row = jnp.asarray(prompt + made.tokens[b, g].tolist())[None]
            logits = forward(CONFIG, weights, row)[0, len(prompt) - 1 : -1, : CONFIG.token_count] / 0.7
            expected = jax.nn.log_softmax(logits)[jnp.arange(8), made.tokens[b, g]]
            np.testing.assert_allclose(made.logps[b, g], expected, atol=2e-5)


def test_group_samples_differ_and_seeds_repeat():
    """12 rows of 8 tokens from 45 nearly equal ones: two equal rows have probability about 1e-12."""
    first = np.asarray(rollout(0).tokens).reshape(12, 8)
    assert len({tuple(row) for row in first}) == 12
    np.testing.assert_array_equal(first, np.asarray(rollout(0).tokens).reshape(12, 8))
    assert (first != np.asarray(rollout(1).tokens).reshape(12, 8)).any(axis=1).all()


def test_a_completion_depends_on_its_ids_alone():
    """Other prompts beside it, another place in the batch, another number of samples: the same tokens."""
    weights, whole = params(), rollout()
    alone = sample(CONFIG, weights, [PROMPTS[1]], jax.random.key(0), samples=2, max_tokens=8, prompt_ids=[1])
    np.testing.assert_array_equal(alone.tokens[0], whole.tokens[1, :2])
    swapped = sample(CONFIG, weights, PROMPTS[::-1], jax.random.key(0), samples=4, max_tokens=8, prompt_ids=[2, 1, 0])
    np.testing.assert_array_equal(swapped.tokens[::-1], whole.tokens)
    renamed = sample(CONFIG, weights, [PROMPTS[1]], jax.random.key(0), samples=2, max_tokens=8, prompt_ids=[7])
    assert (renamed.tokens[0] != whole.tokens[1, :2]).any(axis=1).all()


def test_positions_do_not_share_a_key():
    """With logits that are all equal, a row that reused one key at every position would repeat one token."""
    flat = jax.tree.map(jnp.zeros_like, params())
    tokens = np.asarray(rollout(weights=flat, samples=16).tokens).reshape(48, 8)
    assert (np.asarray([len(set(row)) for row in tokens]) > 1).all()


def test_greedy_ignores_the_key_and_scores_at_temperature_1():
    weights = params()
    one, two = rollout(0, temperature=0, weights=weights), rollout(5, temperature=0, weights=weights)
    np.testing.assert_array_equal(one.tokens, two.tokens)
    assert (one.tokens == one.tokens[:, :1]).all()
    row = jnp.asarray(PROMPTS[0] + one.tokens[0, 0].tolist())[None]
    logits = forward(CONFIG, weights, row)[0, 2:-1, : CONFIG.token_count]
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), one.tokens[0, 0])
    np.testing.assert_allclose(one.logps[0, 0], jax.nn.log_softmax(logits).max(axis=-1), atol=2e-5)


def test_stop_is_kept_and_nothing_follows_it():
    free = rollout(max_tokens=12)
    stops = (7, 20, 33)
    stopped = rollout(max_tokens=12, stop_ids=stops)
    assert not stopped.truncated.all() and stopped.truncated.any()
    for b, g in np.ndindex(3, 4):
        drawn = free.tokens[b, g].tolist()
        first = next((t for t, token in enumerate(drawn) if token in stops), None)
        length = 12 if first is None else first + 1
        assert stopped.lengths[b, g] == length
        assert bool(stopped.truncated[b, g]) == (first is None)
        assert stopped.tokens[b, g].tolist() == drawn[:length] + [0] * (12 - length)
        assert (stopped.logps[b, g, length:] == 0).all() and (stopped.logps[b, g, :length] < 0).all()


def test_stop_on_the_last_token_is_no_truncation():
    free = rollout(max_tokens=3)
    stop = int(free.tokens[0, 0, 2])
    stopped = rollout(max_tokens=3, stop_ids=[stop])
    assert stopped.lengths[0, 0] <= 3 and not stopped.truncated[0, 0]


def test_rows_beyond_the_tokenizer_are_never_drawn():
    """Ids 45 to 47 have the largest logits by far, and no token."""
    weights = params()
    weights["head"]["kernel"] = weights["head"]["kernel"] * 0.01
    bias = weights["final_norm"]["scale"]
    weights["head"]["kernel"] = weights["head"]["kernel"].at[:, 45:].set(jnp.sign(bias)[:, None] * 5)
    made = rollout(weights=weights, samples=16)
    assert made.tokens.max() < 45
    assert np.isfinite(made.logps).all()
    assert rollout(weights=weights, temperature=0).tokens.max() < 45


@pytest.mark.parametrize("vocab", [45, 3 * 256 + 17])
def test_draws_follow_the_exact_probabilities(vocab):
    """Chi-square of 20,000 draws against softmax, for a vocabulary of one block and of several; p-value over 1e-4."""
    logits = 2 * jax.random.normal(jax.random.key(3), (vocab,))
    count = 20_000
    keys = jax.random.split(jax.random.key(4), count)
    tokens, logps = draw(keys, jnp.broadcast_to(logits, (count, vocab)))
    expected = np.asarray(jax.nn.softmax(logits), np.float64) * count
    seen = np.bincount(tokens, minlength=vocab)
    big = expected >= 5
    chi = ((seen - expected)[big] ** 2 / expected[big]).sum() + (seen[~big].sum() - expected[~big].sum()) ** 2 / max(
        expected[~big].sum(), 1)
    freedom = big.sum()
    # Wilson-Hilferty: (chi/k)^(1/3) is about normal; 3.72 standard deviations are a p-value of 1e-4.
    z = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert z < 3.72
    np.testing.assert_allclose(logps, jax.nn.log_softmax(logits)[tokens], atol=1e-5)


def pieces(stop_ids, counts, limit=9, samples=4):
    """The prompts' rollout decoded a number of tokens at a time."""
    weights, prompts, table = place_for_rollout(CONFIG, params()), pad_prompts(PROMPTS), stop_table(48, stop_ids)
    state, work = begin(CONFIG, weights, prompts, jax.random.key(0), np.full((3, samples), limit), slots=5, columns=41)
    for count in counts:
        state = decode(CONFIG, weights, state, work, table, np.float32(1), np.int32(0), np.int32(count), greedy=False,
                       filter=Filter())
    return state, finish(state, prompts, samples)


def test_decoding_in_pieces_equals_decoding_at_once():
    _, apart = pieces((7,), (1, 3, 2, 50))
    state, whole = pieces((7,), (50,))
    jax.tree.map(np.testing.assert_array_equal, apart, whole)
    assert int(state.longest) == 0 and int(state.taken[0]) == 12


def test_the_loop_stops_when_all_rows_are_done():
    """Every token stops and all 6 rows fit: after one step nothing is left to do, and further ones change nothing."""
    state, first = pieces(tuple(range(45)), (1,), samples=1)
    assert int(state.longest) == 0 and (first.lengths == 1).all() and not first.truncated.any()
    _, later = pieces(tuple(range(45)), (1, 50), samples=1)
    jax.tree.map(np.testing.assert_array_equal, first, later)


def test_another_rollout_of_the_same_shapes_compiles_nothing():
    weights = params()
    place = placer(CONFIG, None)
    rollout(0, weights=weights)
    compiled = start._cache_size(), decode._cache_size(), place._cache_size()
    sample(CONFIG, weights, [[9] * 5, [8, 7], [1, 2]], jax.random.key(3), samples=4, max_tokens=8, temperature=0.5)
    assert placer(CONFIG, None) is place
    assert (start._cache_size(), decode._cache_size(), place._cache_size()) == compiled


def test_a_larger_batch_over_eight_devices_gives_the_same_completions():
    from grpo_jax.mesh import make_mesh, shardings

    weights = params()
    one = rollout(weights=weights, samples=8)
    for sizes in ((8, 1, 1), (1, 4, 2), (2, 2, 2)):
        mesh = make_mesh(*sizes)
        with jax.set_mesh(mesh):
            placed = place_for_rollout(CONFIG, jax.device_put(weights, shardings(mesh, weights)), mesh)
            many = sample(CONFIG, placed, PROMPTS, jax.random.key(0), samples=8, max_tokens=8)
        np.testing.assert_array_equal(many.tokens, one.tokens)
        np.testing.assert_allclose(many.logps, one.logps, atol=2e-5)


@pytest.mark.parametrize("changes, message", [
    (dict(samples=0), "samples"), (dict(max_tokens=0), "max_tokens"), (dict(temperature=-1), "temperature"),
    (dict(max_tokens=60), "64 positions")])
def test_impossible_requests_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        rollout(**changes)


def test_wrong_prompts_are_refused():
    for prompts, message in (([[]], "one token"), ([[99]], "token ids"), ([], "one token")):
        with pytest.raises(ValueError, match=message):
            sample(CONFIG, params(), prompts, jax.random.key(0), samples=2, max_tokens=2)
