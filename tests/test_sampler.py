"""The sampler: slots and their refill, stops, log-probs, randomness by counters. Draws are tested in test_draws.py."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import forward, load, sample
from grpo_jax.parallel.mesh import make_mesh, tree_shardings
from grpo_jax.rollout.draws import TokenFilter
from grpo_jax.rollout.sampler import (
    cache_sizes,
    generate_rollout,
    pad_prompts,
    place_for_rollout,
    rollout_placement,
    split_over_shards,
    start_rollout,
    to_rollout,
)
from grpo_jax.rollout.slots import decode_tokens, init_decode, prefill_batch_size, prefill_prompts, resize_cache
from grpo_jax.text.prompt import encode_text, format_prompt
from grpo_jax.text.stops import build_stop_table
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tokenizer import load_tokenizer
from tests.test_experts import SIGMOID, SOFTMAX
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
            logits = forward(CONFIG, weights, row)[0, len(prompt) - 1 : -1, : CONFIG.tokenizer_vocab_size] / 0.7
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
    logits = forward(CONFIG, weights, row)[0, 2:-1, : CONFIG.tokenizer_vocab_size]
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


def pieces(stop_ids, counts, limit=9, samples=4):
    """The prompts' rollout decoded a number of tokens at a time."""
    weights, prompts, table = place_for_rollout(CONFIG, params()), pad_prompts(PROMPTS), build_stop_table(48, stop_ids)
    state, work = start_rollout(
        CONFIG, weights, prompts, jax.random.key(0), np.full((3, samples), limit), slots=5, columns=41, max_tokens=limit
    )
    for count in counts:
        state = decode_tokens(
            CONFIG,
            weights,
            state,
            work,
            table,
            np.float32(1),
            np.int32(0),
            np.int32(count),
            greedy=False,
            filter=TokenFilter(),
        )
    return state, to_rollout(state, prompts, samples)


def test_decoding_in_pieces_equals_decoding_at_once():
    _, apart = pieces((7,), (1, 3, 2, 50))
    state, whole = pieces((7,), (50,))
    jax.tree.map(np.testing.assert_array_equal, apart, whole)
    early, two = pieces((), (2,))
    assert two.lengths.max() == 2 and (early.num_sampled == 2).all()  # and not a token more
    assert int(state.longest) == 0 and int(state.num_started[0]) == 12


def test_the_loop_stops_when_all_rows_are_done():
    """Every token stops and all 6 rows fit: after one step nothing is left to do, and further ones change nothing."""
    state, first = pieces(tuple(range(45)), (1,), samples=1)
    assert int(state.longest) == 0 and (first.lengths == 1).all() and not first.truncated.any()
    _, later = pieces(tuple(range(45)), (1, 50), samples=1)
    jax.tree.map(np.testing.assert_array_equal, first, later)


def test_another_rollout_of_the_same_shapes_compiles_nothing():
    weights = params()
    place = rollout_placement(CONFIG, None)
    rollout(0, weights=weights)
    compiled = init_decode._cache_size(), decode_tokens._cache_size(), place._cache_size()
    sample(CONFIG, weights, [[9] * 5, [8, 7], [1, 2]], jax.random.key(3), samples=4, max_tokens=8, temperature=0.5)
    assert rollout_placement(CONFIG, None) is place
    assert (init_decode._cache_size(), decode_tokens._cache_size(), place._cache_size()) == compiled


LIMITS = np.asarray([[1, 9, 4, 2], [7, 1, 9, 3], [5, 8, 2, 6]])


@pytest.mark.parametrize("slots", [1, 2, 5, 12, 100])
def test_slots_change_nothing_that_is_drawn(slots):
    """Sequences of unequal lengths through few slots: each has the tokens, log-probs and end that it has alone."""
    weights = params()
    whole = rollout(max_tokens=9, stop_ids=(7, 20), weights=weights)
    made = rollout(max_tokens=LIMITS, stop_ids=(7, 20), weights=weights, slots=slots)
    for b, g in np.ndindex(3, 4):
        length = min(int(whole.lengths[b, g]), LIMITS[b, g])
        assert made.lengths[b, g] == length
        assert bool(made.truncated[b, g]) == (int(made.tokens[b, g, length - 1]) not in (7, 20))
        np.testing.assert_array_equal(made.tokens[b, g], np.where(np.arange(9) < length, whole.tokens[b, g], 0))
        np.testing.assert_allclose(made.logps[b, g, :length], whole.logps[b, g, :length], atol=2e-5)
        assert not made.logps[b, g, length:].any()


def test_a_cache_that_grows_and_shrinks_changes_nothing(monkeypatch):
    """Sizes 128, 192 and 232 instead of 232 alone: completions that leave them and come back are those of one large cache."""
    weights, prompts = place_for_rollout(CONFIG, params()), pad_prompts(PROMPTS)
    limits = np.asarray([[1, 9, 4, 200], [7, 1, 150, 3], [5, 8, 2, 6]])
    model_cfg = dataclasses.replace(CONFIG, max_positions=512)
    how = dict(samples=4, max_tokens=200, temperature=1.0, stop_table=build_stop_table(48, ()), limits=limits)
    assert cache_sizes(32, 232) == [128, 192, 232]
    made = []

    def spied(kv, columns):
        made.append(columns)
        return resize_cache(kv, columns)

    monkeypatch.setattr("grpo_jax.rollout.sampler.resize_cache", spied)
    grown = generate_rollout(model_cfg, weights, prompts, jax.random.key(0), **how, slots=1)
    # One slot, two layers: up for the sequence of 200, down after it, up for that of 150, down again.
    assert made[::2] == made[1::2] == [192, 232, 192, 128, 192, 128]
    state, work = start_rollout(
        model_cfg, weights, prompts, jax.random.key(0), limits, slots=12, columns=232, max_tokens=200
    )
    state = decode_tokens(
        model_cfg,
        weights,
        state,
        work,
        build_stop_table(48, ()),
        np.float32(1),
        np.int32(0),
        np.int32(1000),
        greedy=False,
        filter=TokenFilter(),
    )
    whole = to_rollout(state, prompts, 4)
    np.testing.assert_array_equal(grown.tokens, whole.tokens)
    np.testing.assert_allclose(grown.logps, whole.logps, atol=2e-5)


def test_the_loop_is_left_to_grow_and_to_shrink():
    weights, prompts = place_for_rollout(CONFIG, params()), pad_prompts([[1, 2, 3]])
    limits = np.asarray([[60, 2, 2]])
    state, work = start_rollout(CONFIG, weights, prompts, jax.random.key(0), limits, slots=1, columns=40, max_tokens=60)
    go = lambda state, floor: decode_tokens(
        CONFIG,
        weights,
        state,
        work,
        build_stop_table(48, ()),
        np.float32(1),
        np.int32(floor),
        np.int32(1000),
        greedy=False,
        filter=TokenFilter(),
    )
    full = go(state, 0)
    assert state.kv_cache[0].k.is_deleted() and state.tokens.is_deleted()  # what is replaced is given up
    assert int(full.longest) == 41 and int(full.num_sampled[0]) == 38  # the token drawn last has no column any more
    larger = full.replace(kv_cache=tuple(resize_cache(kv, 64) for kv in full.kv_cache))
    assert larger.kv_cache[0].k.shape[-1] == larger.kv_cache[0].v.shape[-2] == 64
    left = go(larger, 20)
    assert int(left.longest) == 3 and int(left.lengths[0]) == 60  # the long one has ended; the next is at its prompt
    smaller = left.replace(kv_cache=tuple(resize_cache(kv, 32) for kv in left.kv_cache))
    assert int(go(smaller, 0).longest) == 0


@pytest.mark.parametrize("count, samples, shards", [(3, 4, 1), (4, 2, 8), (1, 8, 8), (3, 3, 4), (5, 3, 8), (16, 8, 4)])
def test_a_queue_gives_every_sequence_to_one_shard(count, samples, shards):
    prompts = pad_prompts([[i + 1] * (i + 1) for i in range(count)], [10 + i for i in range(count)])
    limits = np.arange(1, count * samples + 1).reshape(count, samples)
    of_shards, prompt, limit, ids = split_over_shards(prompts, limits, shards)
    each, per = len(limit) // shards, len(of_shards.ids) // shards
    real = np.flatnonzero(limit)
    np.testing.assert_array_equal(limit[real], limits.reshape(-1))
    for n in real:
        found = (n // each) * per + prompt[n]  # in the shard's own part of the prompts
        assert of_shards.ids[found] == ids[n, 0] == 10 + n // samples and ids[n, 1] == n % samples
        assert of_shards.lengths[found] == n // samples + 1 and of_shards.tokens[found, 0] == n // samples + 1
    assert per == max(1, count // shards) or count % shards  # every distinct prompt once where that is possible


def test_prompts_prefilled_in_pieces_are_the_same(monkeypatch):
    weights, prompts = place_for_rollout(CONFIG, params()), pad_prompts([[i + 1, 5, i + 2] for i in range(7)])
    prompts = jax.tree.map(jnp.asarray, prompts)
    whole = prefill_prompts(CONFIG, weights, prompts)
    monkeypatch.setattr("grpo_jax.rollout.slots.PREFILL_TOKENS", 64)
    assert prefill_batch_size(CONFIG, 32) == 2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), prefill_prompts(CONFIG, weights, prompts), whole
    )


def test_prompts_of_other_lengths_compile_nothing():
    weights = params()
    rollout(weights=weights)
    compiled = init_decode._cache_size(), decode_tokens._cache_size()
    sample(CONFIG, weights, [[1] * 31, [8], [1, 2]], jax.random.key(3), samples=4, max_tokens=8)
    assert (init_decode._cache_size(), decode_tokens._cache_size()) == compiled


def test_stop_strings_end_a_completion_however_they_are_cut():
    """The tiny tokenizer's own text: a row ends with the token that completes the string, and only then."""
    model_cfg, weights = load(find_model("tiny"))
    tokenizer = load_tokenizer(find_model("tiny"))
    prompt = encode_text(tokenizer, format_prompt("What is 1 + 2?"))
    free = sample(model_cfg, weights, [prompt], jax.random.key(0), samples=8, max_tokens=24)
    made = sample(
        model_cfg,
        weights,
        [prompt],
        jax.random.key(0),
        samples=8,
        max_tokens=24,
        stop_strings=["</think> <answer>", "hink> I", "carry 1. "],
    )
    stopped = 0
    for g in range(8):
        texts = [tokenizer.decode(free.tokens[0, g, : t + 1]) for t in range(24)]
        ends = [
            t
            for t, text in enumerate(texts)
            if any(string in text for string in ("</think> <answer>", "hink> I", "carry 1. "))
        ]
        length = ends[0] + 1 if ends else 24
        stopped += bool(ends)
        assert made.lengths[0, g] == length and bool(made.truncated[0, g]) == (not ends)
        np.testing.assert_array_equal(made.tokens[0, g, :length], free.tokens[0, g, :length])
    assert stopped > 2


@pytest.mark.parametrize("slots", [2, 48])
def test_stops_that_span_tokens(slots):
    """A row ends with a token of 15 to 29 that follows one below 15: the state is kept from token to token, and not from
    a slot's sequence to its next."""
    token = np.arange(48)
    table = np.where(token < 15, 1, [[0], [0]])
    table[1, 15:30] = -1
    weights, prompts = place_for_rollout(CONFIG, params()), pad_prompts(PROMPTS)
    how = dict(samples=16, max_tokens=4, temperature=1.0)
    free = generate_rollout(CONFIG, weights, prompts, jax.random.key(0), stop_table=build_stop_table(48, ()), **how)
    made = generate_rollout(
        CONFIG, weights, prompts, jax.random.key(0), stop_table=table.astype(np.int16), slots=slots, **how
    )
    for b, g in np.ndindex(3, 16):
        drawn = free.tokens[b, g].tolist()
        ends = [t + 1 for t in range(1, 4) if drawn[t - 1] < 15 <= drawn[t] < 30]
        assert made.lengths[b, g] == (ends[0] if ends else 4) and bool(made.truncated[b, g]) == (not ends)
    assert 10 < made.truncated.sum() < 40


def test_filters_of_sample():
    weights = params()
    likeliest = rollout(weights=weights, temperature=0)
    np.testing.assert_array_equal(rollout(weights=weights, top_k=1).tokens, likeliest.tokens)
    np.testing.assert_array_equal(rollout(weights=weights, top_p=1e-6).tokens, likeliest.tokens)
    np.testing.assert_array_equal(rollout(weights=weights, min_p=1.0).tokens, likeliest.tokens)
    np.testing.assert_allclose(rollout(weights=weights, top_k=1).logps, likeliest.logps, atol=2e-5)


@pytest.mark.parametrize(
    "shape, model_cfg",
    [
        ((8, 1, 1), CONFIG),
        ((1, 8, 1), CONFIG),
        ((2, 2, 2), CONFIG),
        pytest.param((8, 1, 1), SOFTMAX, marks=pytest.mark.slow),
        pytest.param((4, 2, 1), SIGMOID, marks=pytest.mark.slow),
    ],
)
def test_shards_exchange_one_number_a_token(shape, model_cfg):
    """The compiled loop: no row, cache or weight leaves its shard. The sums over `tensor` are those of its matrices."""
    mesh, weights = make_mesh(*shape), params(model_cfg)
    with jax.set_mesh(mesh):
        placed = place_for_rollout(model_cfg, jax.device_put(weights, tree_shardings(mesh, weights)), mesh)
        state, work = start_rollout(
            model_cfg,
            placed,
            pad_prompts(PROMPTS),
            jax.random.key(0),
            np.full((3, 8), 8),
            slots=16,
            columns=40,
            max_tokens=8,
        )
        leaves, tree = jax.tree.flatten((state, work))
        run = lambda *leaves: jax.tree.leaves(
            decode_tokens(
                model_cfg,
                placed,
                *jax.tree.unflatten(tree, leaves),
                build_stop_table(model_cfg.vocab_size, ()),
                np.float32(1),
                np.int32(0),
                np.int32(9),
                greedy=False,
                filter=TokenFilter(),
            )
        )
        compiled = jax.jit(run).lower(*leaves).compile().as_text()
    moved = re.findall(r"= (\S+?)(?:\{\S*)? (all-[\w-]+?|collective-permute|reduce-scatter)(?:-start)?\(", compiled)
    between_rows = [move for move in moved if shape[2] == 1 or not move[0].startswith("f32")]
    assert between_rows == [("s32[]", "all-reduce")]
    per_shard = 16 // (shape[0] * shape[1])
    assert all(re.match(rf"f32\[{per_shard},", kind) for kind, _ in moved if kind != "s32[]")


def test_a_larger_batch_over_eight_devices_gives_the_same_completions():
    weights = params()
    one = rollout(weights=weights, samples=8)
    for shape in ((8, 1, 1), (1, 4, 2), (2, 2, 2)):
        mesh = make_mesh(*shape)
        with jax.set_mesh(mesh):
            placed = place_for_rollout(CONFIG, jax.device_put(weights, tree_shardings(mesh, weights)), mesh)
            many = sample(CONFIG, placed, PROMPTS, jax.random.key(0), samples=8, max_tokens=8, slots=11)
        np.testing.assert_array_equal(many.tokens, one.tokens)
        np.testing.assert_allclose(many.logps, one.logps, atol=2e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(samples=0), "samples"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(temperature=-1), "temperature"),
        (dict(max_tokens=59), "64 positions"),
        (dict(slots=-1), "slots"),
        (dict(top_p=0.0), "top_p"),
        (dict(min_p=1.5), "min_p"),
        (dict(top_k=-1), "top_k"),
        (dict(stop_ids=[48]), "Stop ids"),
        (dict(stop_strings="</answer>"), "a list"),
        (dict(max_tokens=np.zeros((3, 4), int)), "max_tokens"),
    ],
)
def test_impossible_requests_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        rollout(**changes)


def test_wrong_prompts_are_refused():
    with pytest.raises(ValueError, match="different prompt ids"):
        rollout(prompt_ids=[1, 2, 1])
    for prompts, message in (([[]], "one token"), ([[99]], "token ids"), ([], "one token")):
        with pytest.raises(ValueError, match=message):
            sample(CONFIG, params(), prompts, jax.random.key(0), samples=2, max_tokens=2)
