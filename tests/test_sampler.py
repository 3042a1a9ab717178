"""The sampler: decode slots, stopping, log-probs, counter-based randomness and sharding.

Most tests decode the same shape (3 prompts, 4 samples, 9 tokens), so that they share one compiled program.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import forward, load, sample
from grpo_jax.model.cache import KV
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.rollout import sampler, slots
from grpo_jax.rollout.draws import TokenFilter
from grpo_jax.rollout.sampler import (
    QueueRoom,
    cache_sizes,
    generate_rollout,
    needed_room,
    pad_prompts,
    place_for_rollout,
    rollout_placement,
    split_over_shards,
    start_rollout,
    to_rollout,
)
from grpo_jax.rollout.slots import (
    copy_prompts,
    decode_tokens,
    init_decode,
    prefill_prompts,
    resize_cache,
)
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import PromptFormat
from grpo_jax.text.stops import build_stop_table
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tokenizer import load_tokenizer
from tests.test_experts import SIGMOID, SOFTMAX
from tests.tiny import CONFIG, params

PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11], [12]]
GROUPS = list(np.ndindex(3, 4))
weights = functools.cache(jax.jit(params))
compiled_forward = jax.jit(forward, static_argnums=0)


def rollout(key=0, params=None, **changes):
    options = dict(samples=4, max_tokens=9) | changes
    return sample(CONFIG, weights() if params is None else params, PROMPTS, jax.random.key(key), **options)


def full_forward_logits(made):
    """Returns the logits [B, G, S, tokens] of the completions, from one forward pass over each whole sequence."""
    rows = [prompt + made.tokens[b, g].tolist() for b, prompt in enumerate(PROMPTS) for g in range(4)]
    padded = jnp.asarray([row + [0] * (15 - len(row)) for row in rows])
    logits = compiled_forward(CONFIG, weights(), padded)[..., : CONFIG.tokenizer_vocab_size].reshape(3, 4, 15, -1)
    starts = [len(prompt) - 1 for prompt in PROMPTS]
    return jnp.stack([logits[b, :, start : start + 9] for b, start in enumerate(starts)])


def test_completions_run_to_max_tokens_when_nothing_stops_them():
    made = rollout()
    assert made.tokens.shape == made.logps.shape == (3, 4, 9)
    assert made.lengths.shape == made.truncated.shape == (3, 4)
    np.testing.assert_array_equal(made.prompt_ids, [0, 1, 2])
    assert (made.lengths == 9).all() and made.truncated.all()


def test_logps_match_a_full_forward_pass_at_the_sampling_temperature():
    made = rollout(temperature=0.7)
    logps = jax.nn.log_softmax(full_forward_logits(made) / 0.7)
    np.testing.assert_allclose(made.logps, jnp.take_along_axis(logps, made.tokens[..., None], -1)[..., 0], atol=2e-5)


def test_samples_of_a_group_differ_and_equal_keys_repeat_them():
    """Two equal rows out of 12 have a probability of about 1e-12: 9 tokens from 45 nearly equally likely ones."""
    first = np.asarray(rollout(0).tokens).reshape(12, 9)
    assert len({tuple(row) for row in first}) == 12
    np.testing.assert_array_equal(first, np.asarray(rollout(0).tokens).reshape(12, 9))
    assert (first != np.asarray(rollout(1).tokens).reshape(12, 9)).any(axis=1).all()


def test_a_completion_depends_only_on_its_ids():
    """Other prompts in the batch, another index in it and another number of samples do not change its tokens."""
    whole = rollout()
    single = sample(CONFIG, weights(), [PROMPTS[1]], jax.random.key(0), samples=2, max_tokens=9, prompt_ids=[1])
    np.testing.assert_array_equal(single.tokens[0], whole.tokens[1, :2])
    swapped = sample(CONFIG, weights(), PROMPTS[::-1], jax.random.key(0), samples=4, max_tokens=9, prompt_ids=[2, 1, 0])
    np.testing.assert_array_equal(swapped.tokens[::-1], whole.tokens)
    renamed = sample(CONFIG, weights(), [PROMPTS[1]], jax.random.key(0), samples=2, max_tokens=9, prompt_ids=[7])
    assert (renamed.tokens[0] != whole.tokens[1, :2]).any(axis=1).all()


def test_positions_of_a_completion_do_not_share_a_key():
    """With equal logits everywhere, a row that reused one key at every position would repeat one token."""
    tokens = np.asarray(rollout(params=jax.tree.map(jnp.zeros_like, weights())).tokens).reshape(12, 9)
    assert all(len(set(row)) > 1 for row in tokens)


def test_greedy_decoding_ignores_the_key_and_returns_logps_at_temperature_1():
    first, second = rollout(0, temperature=0), rollout(5, temperature=0)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert (first.tokens == first.tokens[:, :1]).all()
    logits = full_forward_logits(first)
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), first.tokens)
    np.testing.assert_allclose(first.logps, jax.nn.log_softmax(logits).max(axis=-1), atol=2e-5)


def test_the_stop_token_is_kept_and_nothing_follows_it():
    free = rollout()
    stop_ids = (7, 20, 33)
    stopped = rollout(stop_ids=stop_ids)
    assert not stopped.truncated.all() and stopped.truncated.any()
    for b, g in GROUPS:
        tokens = free.tokens[b, g].tolist()
        first = next((t for t, token in enumerate(tokens) if token in stop_ids), None)
        length = 9 if first is None else first + 1
        assert stopped.lengths[b, g] == length
        assert bool(stopped.truncated[b, g]) == (first is None)
        assert stopped.tokens[b, g].tolist() == tokens[:length] + [0] * (9 - length)
        assert (stopped.logps[b, g, length:] == 0).all() and (stopped.logps[b, g, :length] < 0).all()


def test_a_stop_at_the_last_token_is_not_a_truncation():
    free = rollout().tokens
    b, g = next((b, g) for b, g in GROUPS if free[b, g, 8] not in free[b, g, :8])
    stopped = rollout(stop_ids=[int(free[b, g, 8])])
    assert stopped.lengths[b, g] == 9 and not stopped.truncated[b, g]


def test_ids_without_a_token_are_never_sampled():
    """Ids 45 to 47 have by far the largest logits, but are only padding of the vocabulary."""
    changed = jax.tree.map(lambda x: x, weights())
    kernel = changed["head"]["kernel"] * 0.01
    scale = changed["final_norm"]["scale"]
    changed["head"] = {"kernel": kernel.at[:, 45:].set(jnp.sign(scale)[:, None] * 5)}
    made = rollout(params=changed)
    assert made.tokens.max() < 45
    assert np.isfinite(made.logps).all()
    assert rollout(params=changed, temperature=0).tokens.max() < 45


def decode_in_calls(stop_ids, max_steps, slots):
    """Decodes PROMPTS in several calls of `decode_tokens`; returns the final decode state and the rollout."""
    placed, prompts = place_for_rollout(CONFIG, weights()), pad_prompts(PROMPTS)
    limits = np.full((3, 4), 9)
    state, queue = start_rollout(
        CONFIG, placed, prompts, jax.random.key(0), limits, slots=slots, columns=41, max_tokens=9
    )
    for steps in max_steps:
        before = state
        state = decode_tokens(
            CONFIG,
            placed,
            state,
            queue,
            build_stop_table(48, stop_ids),
            np.float32(1),
            np.int32(0),
            np.int32(steps),
            greedy=False,
            filter=TokenFilter(),
        )
        assert before.kv_cache[0].k.is_deleted() and before.tokens.is_deleted()  # donated
    return state, to_rollout(state, prompts, 4)


def test_decoding_in_several_calls_equals_decoding_in_one():
    _, several = decode_in_calls((7,), (1, 3, 2, 50), slots=5)
    state, whole = decode_in_calls((7,), (50,), slots=5)
    jax.tree.map(np.testing.assert_array_equal, several, whole)
    assert int(state.longest) == 0 and int(state.num_started[0]) == 12
    early, two = decode_in_calls((), (2,), slots=5)
    assert two.lengths.max() == 2 and (early.num_sampled == 2).all()  # not a token more than max_steps


def test_the_loop_ends_when_all_completions_are_done():
    """Every token stops: after one step nothing is left to do, and further calls change nothing."""
    every_token = tuple(range(45))
    state, first = decode_in_calls(every_token, (1,), slots=12)
    assert int(state.longest) == 0 and (first.lengths == 1).all() and not first.truncated.any()
    _, later = decode_in_calls(every_token, (1, 50), slots=12)
    jax.tree.map(np.testing.assert_array_equal, first, later)


def test_other_prompts_and_temperatures_of_the_same_shapes_compile_nothing():
    rollout()
    place = rollout_placement(CONFIG, None)
    compiled = init_decode._cache_size(), decode_tokens._cache_size(), place._cache_size()
    sample(CONFIG, weights(), [[9] * 31, [8], [1, 2]], jax.random.key(3), samples=4, max_tokens=9, temperature=0.5)
    assert rollout_placement(CONFIG, None) is place
    assert (init_decode._cache_size(), decode_tokens._cache_size(), place._cache_size()) == compiled


@pytest.mark.parametrize("slots", [pytest.param(1, marks=pytest.mark.slow), 5, 100])
def test_the_number_of_slots_does_not_change_completions(slots):
    """Sequences of unequal lengths in a few slots have the same tokens, log-probs and ends as with a slot each."""
    limits = np.asarray([[1, 9, 4, 2], [7, 1, 9, 3], [5, 8, 2, 6]])
    whole = rollout(stop_ids=(7, 20))
    made = rollout(max_tokens=limits, stop_ids=(7, 20), slots=slots)
    for b, g in GROUPS:
        length = min(int(whole.lengths[b, g]), limits[b, g])
        assert made.lengths[b, g] == length
        assert bool(made.truncated[b, g]) == (int(made.tokens[b, g, length - 1]) not in (7, 20))
        np.testing.assert_array_equal(made.tokens[b, g], np.where(np.arange(9) < length, whole.tokens[b, g], 0))
        np.testing.assert_allclose(made.logps[b, g, :length], whole.logps[b, g, :length], atol=2e-5)
        assert not made.logps[b, g, length:].any()


def test_a_cache_that_grows_and_shrinks_does_not_change_completions(monkeypatch):
    """One slot with caches of 128, 192 and 232 columns samples what it samples with 232 columns throughout."""
    placed, prompts = place_for_rollout(CONFIG, weights()), pad_prompts(PROMPTS)
    limits = np.asarray([[1, 9, 4, 200], [7, 1, 150, 3], [5, 8, 2, 6]])
    model_cfg = dataclasses.replace(CONFIG, max_positions=512)
    options = dict(samples=4, max_tokens=200, temperature=1.0, stop_table=build_stop_table(48, ()), limits=limits)
    assert cache_sizes(32, 232) == [128, 192, 232]
    resizes = []

    def recording_resize(kv, columns):
        resizes.append(columns)
        return resize_cache(kv, columns)

    monkeypatch.setattr(sampler, "resize_cache", recording_resize)
    resized = generate_rollout(model_cfg, placed, prompts, jax.random.key(0), **options, slots=1)
    # Two layers: the cache grows for the sequence of 200, shrinks after it, grows for that of 150, and shrinks again.
    assert resizes[::2] == resizes[1::2] == [192, 232, 192, 128, 192, 128]
    monkeypatch.setattr(sampler, "cache_sizes", lambda prompt_columns, max_columns: [max_columns])
    whole = generate_rollout(model_cfg, placed, prompts, jax.random.key(0), **options, slots=1)
    np.testing.assert_array_equal(resized.tokens, whole.tokens)
    np.testing.assert_allclose(resized.logps, whole.logps, atol=2e-5)


def test_a_cache_of_33_thousand_columns_grows_in_seven_programs():
    assert cache_sizes(512, 33280) == [768, 1024, 2048, 4096, 8192, 16384, 33280]
    assert cache_sizes(128, 1000) == [192, 256, 384, 512, 768, 1000]
    assert cache_sizes(512, 600) == [600]


def test_the_largest_cache_of_a_tpu_ends_with_a_tile(monkeypatch):
    monkeypatch.setattr(sampler, "mesh_platform", lambda: "tpu")
    assert cache_sizes(128, 1000) == [192, 256, 384, 512, 768, 1024]
    assert cache_sizes(80, 136) == [256]


@pytest.mark.parametrize("refilled", [[], [2], [0, 3, 4], range(5)])
def test_a_gpu_copies_the_prompts_of_all_refilled_slots_at_once(refilled, monkeypatch):
    """It leaves in the cache what copying one slot at a time leaves; only the loop over slots is gone."""
    rng, mask = np.random.default_rng(0), np.isin(np.arange(5), list(refilled))
    cache, prompts = (
        (KV(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, n, 2, 4, c), (1, n, 2, c, 4)))),)
        for n, c in ((5, 9), (3, 6))
    )
    args = cache, prompts, jnp.asarray(mask), jnp.asarray([2, 0, 1, 1, 2])
    one_by_one = copy_prompts(*args)
    monkeypatch.setattr(slots, "mesh_platform", lambda: "gpu")
    jax.tree.map(np.testing.assert_array_equal, copy_prompts(*args), one_by_one)
    assert [
        bool((new != old).any()) for new, old in zip(one_by_one[0].k[0], cache[0].k[0], strict=True)
    ] == mask.tolist()
    turns = jax.make_jaxpr(copy_prompts)(cache, prompts, jnp.ones(5, bool), args[3])
    assert "dynamic_update_slice" not in str(turns) and "scatter" in str(turns)


@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize(
    "count, samples, shards", [(3, 4, 1), (4, 2, 8), (1, 8, 8), (3, 3, 4), (5, 3, 8), (1, 3, 2), (16, 8, 4)]
)
def test_every_sequence_belongs_to_one_shard_which_has_its_prompt(count, samples, shards, more):
    prompts = pad_prompts([[i + 1] * (i + 1) for i in range(count)], [10 + i for i in range(count)])
    limits = np.arange(1, count * samples + 1).reshape(count, samples)
    room = needed_room(count, samples, shards)
    room = room._replace(prompts=room.prompts + more, sequences=room.sequences + 2 * more)
    shard_prompts, prompt_index, limit, ids = split_over_shards(prompts, limits, shards, room)
    sequences_per_shard, prompts_per_shard = len(limit) // shards, len(shard_prompts.ids) // shards
    real = np.flatnonzero(limit)
    np.testing.assert_array_equal(limit[real], limits.reshape(-1))
    for n, i in enumerate(real):
        row = (i // sequences_per_shard) * prompts_per_shard + prompt_index[i]
        assert shard_prompts.ids[row] == ids[i, 0] == 10 + n // samples and ids[i, 1] == n % samples
        assert shard_prompts.lengths[row] == n // samples + 1 and shard_prompts.tokens[row, 0] == n // samples + 1
    # Each distinct prompt is prefilled once where that is possible.
    assert prompt_index.max() + 1 == prompts_per_shard - more
    assert prompt_index.max() + 1 == max(1, count // shards) or count % shards


@pytest.mark.parametrize("change", [dict(prompts=2), dict(sequences=11)])
def test_too_little_room_is_refused(change):
    with pytest.raises(ValueError, match=r"room for at least \(3, 12\) prompts and sequences; found"):
        split_over_shards(pad_prompts(PROMPTS), np.full((3, 4), 9), 1, QueueRoom(3, 12, 3)._replace(**change))


def test_prefilling_in_batches_does_not_change_keys_and_values():
    placed = place_for_rollout(CONFIG, weights())
    prompts = jax.tree.map(jnp.asarray, pad_prompts([[i + 1, 5, i + 2] for i in range(7)]))
    prefill = jax.jit(functools.partial(prefill_prompts, CONFIG, placed), static_argnums=1)
    whole, batched = prefill(prompts, 7, 7), prefill(prompts, 2, 7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), batched, whole)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, :4], b[:, :4]), prefill(prompts, 2, 3), batched)
    assert not any(x[:, 4:].any() for x in jax.tree.leaves(prefill(prompts, 2, 3)))  # two batches were enough


def test_stop_strings_end_a_completion_however_they_are_tokenized():
    """A completion of the tiny base ends with the token that completes a string, and not before."""
    model_cfg, tiny_weights = load(find_model("tiny"))
    tokenizer = load_tokenizer(find_model("tiny"))
    prompt = PromptFormat(tokenizer).encode([Problem("What is 1 + 2?", "3")], [""])[0]
    strings = ["</think> <answer>", "hink> I", "carry 1. "]
    made = sample(model_cfg, tiny_weights, [prompt], jax.random.key(0), samples=8, max_tokens=24, stop_strings=strings)
    for tokens, length, truncated in zip(made.tokens[0], made.lengths[0], made.truncated[0], strict=True):
        before, text = tokenizer.decode(tokens[: length - 1]), tokenizer.decode(tokens[:length])
        assert not any(string in before for string in strings)
        assert any(string in text for string in strings) != bool(truncated)
        assert length == 24 or not truncated
    assert 2 < (~made.truncated).sum() < 8


def test_stops_that_span_tokens_do_not_carry_over_to_the_next_sequence_of_a_slot():
    """A completion ends with a token from 15 to 29 right after one below 15."""
    token = np.arange(48)
    table = np.where(token < 15, 1, [[0], [0]])
    table[1, 15:30] = -1
    placed, prompts = place_for_rollout(CONFIG, weights()), pad_prompts(PROMPTS)
    options = dict(samples=4, max_tokens=9, temperature=1.0, stop_table=table.astype(np.int16), slots=5)
    made = generate_rollout(CONFIG, placed, prompts, jax.random.key(0), **options)
    free = rollout()
    for b, g in GROUPS:
        tokens = free.tokens[b, g].tolist()
        ends = [t + 1 for t in range(1, 9) if tokens[t - 1] < 15 <= tokens[t] < 30]
        assert made.lengths[b, g] == (ends[0] if ends else 9) and bool(made.truncated[b, g]) == (not ends)
    assert 2 < made.truncated.sum() < 10


def test_sample_applies_each_filter(monkeypatch):
    likeliest, only_one = rollout(temperature=0), rollout(top_k=1)
    np.testing.assert_array_equal(only_one.tokens, likeliest.tokens)
    np.testing.assert_allclose(only_one.logps, likeliest.logps, atol=2e-5)
    filters = []

    def recording_generate(*args, filter, **options):
        filters.append(filter)
        return likeliest

    monkeypatch.setattr(sampler, "generate_rollout", recording_generate)
    for changes in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}):
        rollout(**changes)
        assert filters.pop() == TokenFilter(**changes)


@pytest.mark.parametrize(
    "shape, model_cfg",
    [
        ((2, 2, 2), CONFIG),
        pytest.param((8, 1, 1), CONFIG, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), CONFIG, marks=pytest.mark.slow),
        pytest.param((8, 1, 1), SOFTMAX, marks=pytest.mark.slow),
        pytest.param((4, 2, 1), SIGMOID, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_samples_the_same_completions_and_exchanges_one_number_per_token(shape, model_cfg):
    """In the compiled loop no row, cache or weight leaves its shard; the sums over `tensor` belong to its matmuls.

    The queues have more room than they need, and prompts are prefilled one by one.
    """
    mesh, replicated, shards = make_mesh(*shape), params(model_cfg), shape[0] * shape[1]
    prompts, limits, key = pad_prompts(PROMPTS), np.full((3, 8), 9), jax.random.key(0)
    table, structure = build_stop_table(model_cfg.vocab_size, ()), None
    single = sample(model_cfg, replicated, PROMPTS, key, samples=8, max_tokens=9)
    needed = needed_room(3, 8, shards)
    options = dict(slots=11, columns=41, max_tokens=9)
    options["room"] = QueueRoom(needed.prompts + 2, needed.sequences + 3, prefill=1)

    def decode(placed, *leaves):  # leaves, because tracing ahead of time builds states that are not arrays
        state, queue = jax.tree.unflatten(structure, leaves)
        numbers = np.float32(1), np.int32(0), sampler.UNLIMITED_STEPS
        state = decode_tokens(model_cfg, placed, state, queue, table, *numbers, greedy=False, filter=TokenFilter())
        return jax.tree.leaves(state)

    with jax.set_mesh(mesh):
        placed = place_for_rollout(model_cfg, jax.device_put(replicated, tree_shardings(mesh, replicated)), mesh)
        state, queue = start_rollout(model_cfg, placed, prompts, key, limits, **options)
        leaves, structure = jax.tree.flatten((state, queue))
        compiled = jax.jit(decode).lower(placed, *leaves).compile()
        many = to_rollout(jax.tree.unflatten(jax.tree.structure(state), compiled(placed, *leaves)), prompts, 8)
    np.testing.assert_array_equal(many.tokens, single.tokens)
    np.testing.assert_allclose(many.logps, single.logps, atol=2e-5)
    moved = re.findall(
        r"= (\S+?)(?:\{\S*)? (all-[\w-]+?|collective-permute|reduce-scatter)(?:-start)?\(", compiled.as_text()
    )
    between_rows = [move for move in moved if shape[2] == 1 or not move[0].startswith("f32")]
    assert between_rows == [("s32[]", "all-reduce")]
    slots_per_shard = -(-11 // shards)
    # What draws need of the vocabulary's parts has a dimension of parts in front.
    assert all(re.match(rf"f32\[({shape[2]},)?{slots_per_shard},", kind) for kind, _ in moved if kind != "s32[]")


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(samples=0), "samples and max_tokens must be .* at least 1; found 0 and 9"),
        (dict(max_tokens=True), "found 4 and True"),
        (dict(max_tokens=0), "found 4 and 0"),
        (dict(max_tokens=np.zeros((3, 4), int)), "samples and max_tokens"),
        (dict(temperature=-1), "temperature and slots must be 0 or more; found -1 and 0"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(slots=-1), "found 1.0 and -1"),
        (dict(max_tokens=59), "at most 64 positions together; found 65"),
        (dict(top_p=0.0), "top_p in"),
        (dict(min_p=1.5), "min_p in"),
        (dict(top_k=-1), "top_k must be 0 or more"),
        (dict(stop_ids=[48]), "Stop ids"),
        (dict(stop_strings="</answer>"), "must be a list of strings; found the string '</answer>'"),
        (dict(prompt_ids=[1, 2, 1]), "3 different integers"),
    ],
)
def test_arguments_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        rollout(**changes)


@pytest.mark.parametrize(
    "prompts, message", [([[]], "one token"), ([[99]], "Token ids must be in"), ([], "at least one prompt")]
)
def test_prompts_that_the_model_cannot_take_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        sample(CONFIG, weights(), prompts, jax.random.key(0), samples=2, max_tokens=2)
