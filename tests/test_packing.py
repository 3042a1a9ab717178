"""Packing, checked by code that reads the packed arrays without knowing how they were made."""

import jax
import jax.extend
import numpy as np
import pytest

from grpo_jax.config.schema import Config, GroupsSection, LossSection, RolloutSection, TrainSection
from grpo_jax.learn.grpo import token_weights
from grpo_jax.learn.packing import PackedShape, assign_rows, pack_completions, packed_shape, unpack_completions
from grpo_jax.learn.update import minibatch_rows, pack_minibatch, take_micro_batch, take_rows
from grpo_jax.model.mask import attention_mask
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.run.stages import pack_rows, plan_minibatches
from grpo_jax.types import Segments
from tests.tiny import experience

MAX_WIDTH = 128  # width that rows are padded to below, so that the mask is compiled once
ATTENTION_MASK = jax.jit(lambda segments: attention_mask(segments, segments))


def row_mask(segments, row):
    """Returns the attention mask [query, key] of one row."""
    width = segments.position.shape[1]
    padded = (np.pad(x[row : row + 1], ((0, 0), (0, MAX_WIDTH - width))) for x in segments)
    return np.asarray(ATTENTION_MASK(Segments(*padded)))[0, :width, :width]


def assert_packed(batch, weights, packed, shards):
    """Checks everything that is documented about PackedBatch, token by token."""
    num_completions, max_length = batch.mask.shape
    groups = sorted(set(batch.prompt_ids.tolist()))
    segments, flat_index = packed.segments, packed.flat_index
    np.testing.assert_array_equal(np.sort(flat_index[flat_index >= 0]), np.flatnonzero(batch.mask))  # each token once
    filled = np.zeros(flat_index.shape, bool)
    prompts = set()
    for row in np.flatnonzero((flat_index >= 0).any(axis=1)):
        mask = row_mask(segments, row)
        for n in np.unique(flat_index[row][flat_index[row] >= 0] // max_length):
            prompt_length, length = batch.prompt_lengths[n], batch.mask[n].sum()
            (first,) = np.flatnonzero(flat_index[row] == n * max_length)
            columns = np.arange(first, first + length)
            prompt, completion = segments.prompt[row, first], segments.completion[row, first]
            assert flat_index[row, columns].tolist() == (n * max_length + np.arange(length)).tolist()
            assert np.flatnonzero(segments.completion[row] == completion).tolist() == columns.tolist()
            assert len(np.unique(segments.prompt[row, columns])) == 1 <= completion
            own_prompt = (segments.prompt[row] == prompt) & (segments.completion[row] == 0)
            sequence = np.concatenate([np.flatnonzero(own_prompt), columns])  # one copy of the prompt, in order
            assert packed.tokens[row, sequence].tolist() == batch.tokens[n, : prompt_length + length].tolist()
            assert segments.position[row, sequence].tolist() == list(range(prompt_length + length))
            assert packed.predict_from[row, columns].tolist() == sequence[prompt_length - 1 : -1].tolist()
            for index, column in enumerate(sequence):
                assert np.flatnonzero(mask[column]).tolist() == sorted(sequence[: index + 1])
            np.testing.assert_array_equal(packed.sampler_logps[row, columns], batch.sampler_logps[n, :length])
            np.testing.assert_array_equal(packed.ref_logps[row, columns], batch.ref_logps[n, :length])
            np.testing.assert_array_equal(packed.advantages[row, columns], batch.advantages[n])
            np.testing.assert_array_equal(packed.weights[row, columns], weights[n, :length])
            np.testing.assert_array_equal(packed.sequence[row, columns], n)
            np.testing.assert_array_equal(packed.group[row, columns], groups.index(batch.prompt_ids[n]))
            filled[row, sequence] = True
            prompts.add((row, batch.prompt_ids[n], prompt))
    assert len(prompts) == len({prompt[:2] for prompt in prompts})  # a row holds a prompt once
    for x in (packed.tokens, *segments):
        assert not x[~filled].any()
    for x in (packed.weights, packed.advantages, packed.sampler_logps, packed.ref_logps, segments.completion):
        assert not x[flat_index < 0].any()
    for x in (packed.sequence, packed.group):
        assert (x[flat_index < 0] == -1).all() and x.dtype == np.int32
    assert packed.num_sequences == num_completions
    # Micro-batch m is row m of every shard. The first micro-batches are full, and those after the last hold nothing.
    used = filled.any(axis=1).reshape(shards, -1)
    dealt = used.T.ravel().tolist()
    assert dealt == sorted(dealt, reverse=True) and packed.num_micro_batches == used.any(axis=0).sum()
    for x in (packed.tokens, *segments, packed.predict_from, flat_index, packed.num_micro_batches):
        assert x.dtype == np.int32
    for x in (packed.weights, packed.sampler_logps, packed.ref_logps, packed.advantages):
        assert x.dtype == np.float32 and x.shape == flat_index.shape
    unpacked = unpack_completions(packed.sampler_logps, flat_index, batch.mask.shape)
    np.testing.assert_array_equal(unpacked, batch.sampler_logps * batch.mask)


@pytest.mark.parametrize("seed", range(30))
def test_packed_arrays_match_their_documentation(seed):
    """Parts of rollouts that cut groups, in any order; rows of one sequence up to all of them; 1 to 8 shards."""
    draw = np.random.default_rng(seed)
    samples, longest_prompt, longest_completion, shards = (int(draw.integers(1, high)) for high in (7, 16, 16, 9))
    count = int(draw.integers(1, 25))
    whole = experience(count + samples, longest_prompt + 1, longest_completion, seed, samples=samples)
    start = int(draw.integers(samples + 1))
    indices = draw.permutation(np.arange(start, start + count))
    batch = jax.tree.map(lambda x: x[indices], whole)
    if seed % 3 == 0:  # prompts of one token, and completions that all have the maximum length
        batch = batch.replace(prompt_lengths=np.ones_like(batch.prompt_lengths), mask=np.ones_like(batch.mask))
    micro_tokens = int(draw.choice([1, 20, 40, 90, MAX_WIDTH]))
    shape = packed_shape(count, samples, longest_prompt + 1, longest_completion, micro_tokens, shards)
    assert shape.width <= MAX_WIDTH
    weights = draw.random(batch.mask.shape).astype(np.float32)
    packed = pack_completions(batch, weights, shape, shards)
    assert packed.tokens.shape == shape
    assert_packed(batch, weights, packed, shards)
    jax.tree.map(np.testing.assert_array_equal, pack_completions(batch, weights, shape, shards), packed)


def test_packing_uses_no_operation_of_jax(monkeypatch):
    """The devices would run it after the update in flight, and packing would have to wait for both."""

    def refuse(primitive, *args, **params):
        raise AssertionError(primitive)

    batch, shape = experience(), packed_shape(8, 2, 5, 6, 40, 2)
    expected = pack_minibatch(batch, LossSection(), shape, 2)
    monkeypatch.setattr(jax.extend.core.Primitive, "bind", refuse)
    jax.tree.map(np.testing.assert_array_equal, pack_minibatch(batch, LossSection(), shape, 2), expected)


def test_minibatches_are_packed_as_separate_batches():
    """12 completions come from 3 or 4 of 8 groups. Weights are those of 12, and each token is in one minibatch."""
    whole = experience(36, 6, 7, samples=5).replace(advantages=np.arange(36, dtype=np.float32))
    packed_advantages = []
    for rows in minibatch_rows(whole.prompt_ids, jax.random.key(3), 3):
        part = take_rows(whole, rows)
        packed = pack_minibatch(part, LossSection(), packed_shape(12, 5, 6, 7, 40, 2), 2)
        assert_packed(part, token_weights(part.mask), packed, 2)
        packed_advantages += packed.advantages[packed.flat_index >= 0].tolist()
    assert sorted(packed_advantages) == np.repeat(np.arange(36), whole.mask.sum(axis=1)).tolist()


def test_micro_batch_is_one_row_of_every_shard():
    batch = experience(20, 5, 6, samples=2)
    packed = pack_minibatch(batch, LossSection(), PackedShape(16, 16), 4)
    rows = assign_rows(batch.prompt_ids, batch.prompt_lengths, batch.mask.sum(axis=1), 16)
    assert packed.num_micro_batches == -(-len(rows) // 4) == 2 and len(rows) % 4
    with jax.set_mesh(make_mesh(1, 4, 2)):
        for index in range(4):
            part = take_micro_batch(jax.tree.map(np.asarray, packed), index)
            np.testing.assert_array_equal(part.tokens, packed.tokens[[index, 4 + index, 8 + index, 12 + index]])
            for shard in range(4):
                groups = rows[4 * index + shard] if 4 * index + shard < len(rows) else []
                flat_index = np.asarray(part.flat_index[shard])
                order = dict.fromkeys((flat_index[flat_index >= 0] // 6).tolist())
                assert list(order) == [n for group in groups for n in group]


def draw_lengths(draw, kind, count, samples, longest_prompt, longest_completion, width):
    """Returns (prompt ids, prompt lengths, completion lengths) of completions that may start within a group."""
    group = (draw.integers(samples) * (count % samples > 0) + np.arange(count)) // samples
    if kind == "longest":
        return group, np.full(count, longest_prompt), np.full(count, longest_completion)
    prompts = draw.integers(1, longest_prompt + 1, count)[group]
    if kind == "any":
        return group, prompts, draw.integers(1, longest_completion + 1, count)
    if kind == "long and short":
        return group, prompts, draw.choice([1, longest_completion], count)
    if kind == "skewed":
        return group, prompts, np.maximum(1, (longest_completion * draw.random(count) ** 4).astype(int))
    per_row = draw.integers(1, 6)  # this many would fit in a row if each were one token shorter
    length = np.clip(width // per_row - longest_prompt + 1, 1, longest_completion)
    return group, np.full(count, longest_prompt), np.full(count, length)


KINDS = ("longest", "any", "long and short", "skewed", "one token too long")


@pytest.mark.parametrize("kind", KINDS)
def test_any_batch_fits_in_its_packed_shape(kind):
    draw = np.random.default_rng(KINDS.index(kind))
    for _ in range(150):
        count, samples, shards = int(draw.integers(1, 60)), int(draw.integers(1, 17)), int(draw.integers(1, 9))
        longest_prompt, longest_completion = (int(2 ** draw.uniform(0, 6)) for _ in range(2))
        micro_tokens = int(2 ** draw.uniform(0, 11))
        shape = packed_shape(count, samples, longest_prompt, longest_completion, micro_tokens, shards)
        prompt_ids, prompts, lengths = draw_lengths(
            draw, kind, count, samples, longest_prompt, longest_completion, shape.width
        )
        rows = assign_rows(prompt_ids, prompts, lengths, shape.width)
        assert len(rows) <= shape.rows
        assert sorted(n for row in rows for group in row for n in group) == list(range(count))
        for row in rows:
            assert row and all(row)
            assert all(len(np.unique(prompt_ids[group])) == 1 for group in row)
            assert len({prompt_ids[group[0]] for group in row}) == len(row)  # each prompt once
            assert sum(prompts[group[0]] + lengths[group].sum() for group in row) <= shape.width


@pytest.mark.parametrize("kept", ["whole groups", "any"])
def test_minibatches_of_kept_completions_fit_in_the_shape_for_groups_of_one(kept, monkeypatch):
    """The completions that are kept are divided into minibatches whose sizes differ by at most 1.

    A minibatch can have more prompts than one of complete groups, at most one for each completion.
    """
    draw, more_prompts, cut_at_both_ends, empty = np.random.default_rng(0), 0, 0, 0
    monkeypatch.setattr(jax.random, "permutation", lambda key, count: draw.permutation(count))  # compiles nothing
    for _ in range(400):
        prompts, samples, shards = int(draw.integers(1, 9)), int(draw.integers(2, 7)), int(draw.choice([1, 1, 2, 8]))
        completions = prompts * samples
        count = int(draw.choice([x for x in range(2, completions + 1) if completions % x == 0]))
        longest_prompt, longest_completion, micro_tokens = (int(2 ** draw.uniform(0, high)) for high in (7, 5, 13))
        ids = np.repeat(np.arange(prompts), samples)
        chance = draw.random()
        is_kept = (draw.random(prompts) < chance)[ids] if kept == "whole groups" else draw.random(len(ids)) < chance
        ids = ids[is_kept]
        minibatches = minibatch_rows(ids, None, count)
        sizes = [len(rows) for rows in minibatches]
        assert len(sizes) == count and sum(sizes) == len(ids) and max(sizes) - min(sizes) <= 1
        assert max(sizes) <= completions // count
        parts = sum(len(np.unique(ids[rows])) for rows in minibatches)
        assert parts < max(1, len(np.unique(ids))) + count  # a cut splits at most one group
        limits = longest_prompt, longest_completion, micro_tokens, shards
        shape, complete = (packed_shape(completions // count, size, *limits) for size in (1, samples))
        for rows in minibatches:
            if not len(rows):
                empty += 1
                continue
            members = ids[rows]
            lengths = np.full(len(rows), longest_prompt), np.full(len(rows), longest_completion)
            assert len(assign_rows(members, *lengths, shape.width)) <= shape.rows
            more_prompts += len(assign_rows(members, *lengths, complete.width)) > complete.rows
            partial = [np.sum(members == group) < np.sum(ids == group) for group in members[[0, -1]]]
            cut_at_both_ends += all(partial) and members[0] != members[-1]
    assert more_prompts and cut_at_both_ends and empty


@pytest.mark.parametrize("thinned_by", ["groups.equal=drop", "rollout.overlong=mask"])
def test_a_run_packs_minibatches_that_have_more_prompts_than_complete_groups(thinned_by):
    """A row for 2 groups of 4 has 2 * 60 + 8 * 5 = 160 tokens; a minibatch of 3 prompts needs 3 * 60 at least.

    Of 4 groups, 3 keep a single completion: in any order, one of two minibatches has 3 prompts or more. Of 6 groups, 5
    are kept whole: the second of three minibatches has the last one of a group, a whole group, and two of another.
    """
    masks = thinned_by == "rollout.overlong=mask"
    kept = np.asarray([1, 0, 0, 0] * 3 + [1] * 4 if masks else [1] * 20 + [0] * 4, bool)
    batch = experience(len(kept), 60, 5, samples=4).replace(kept=kept)
    batch = batch.replace(prompt_lengths=np.full(len(kept), 60), mask=np.ones((len(kept), 5), bool))
    sizes = dict(prompts=len(kept) // 4, samples=4, max_prompt_tokens=60, max_tokens=5)
    cfg = Config(
        rollout=RolloutSection(**sizes, overlong="mask" if masks else "keep"),
        groups=GroupsSection(equal="keep" if masks else "drop"),
        train=TrainSection(minibatches=2 if masks else 3, micro_tokens=1000),
    )
    assert packed_shape(8, 4, 60, 5, 1000, 1) == (1, 160)
    mesh, plan = make_mesh(devices=jax.devices()[:1]), plan_minibatches(cfg, batch, jax.random.key(0), 0)
    assert sorted(np.concatenate(plan)) == np.flatnonzero(kept).tolist()
    assert max(len(np.unique(batch.prompt_ids[part])) for part in plan) > 2
    rows = [pack_rows(cfg, mesh, take_rows(batch, part), 8) for part in plan]
    assert len({x.tokens.shape for x in rows}) == 1 and {x.num_sequences for x in rows} == {8}  # compiled once


@pytest.mark.parametrize("longest_prompt, longest_completion", [(1, 30), (31, 1), (9, 22), (300, 700)])
def test_packed_shape_is_no_larger_than_the_longest_sequences_need(longest_prompt, longest_completion):
    """Checked where each completion has its own prompt."""
    longest = longest_prompt + longest_completion
    for count in (1, 2, 7, 8, 64):
        for micro_tokens in (1, longest, 2 * longest, 5 * longest, 100 * longest):
            for shards in (1, 4):
                shape = packed_shape(count, 1, longest_prompt, longest_completion, micro_tokens, shards)
                multiple = 128 if shape.width > 256 else 8
                assert shape.rows % shards == shape.width % multiple == 0
                assert longest <= shape.width < max(longest, micro_tokens) + multiple
                assert shape.width < max(longest, -(-count * longest // shards)) + multiple
                assert shape.width >= min(micro_tokens, count * longest / shards) / 2  # tokens are divided evenly
                prompts, lengths = np.full(count, longest_prompt), np.full(count, longest_completion)
                rows = len(assign_rows(np.arange(count), prompts, lengths, shape.width))
                assert shape.rows == -(-rows // shards) * shards


def test_one_row_is_wide_enough_for_groups_that_are_cut():
    """5 completions from groups of 4 have at most 2 prompts and 6 have 3: a row is that wide and no wider."""
    for count, prompts in ((1, 1), (2, 2), (4, 1), (5, 2), (6, 3), (8, 2), (9, 3), (10, 4)):
        shape = packed_shape(count, 4, 80, 8, 10_000, 1)
        assert shape.rows == 1
        assert 0 <= shape.width - (80 * prompts + 8 * count) < (128 if shape.width > 256 else 8)
        for start in range(0, 4, 4 if count % 4 == 0 else 1):
            group = (start + np.arange(count)) // 4
            assert len(assign_rows(group, np.full(count, 80), np.full(count, 8), shape.width)) == 1


def test_packing_does_not_depend_on_the_order_of_completions():
    def contents(prompt_ids, prompt_lengths, lengths):
        rows = assign_rows(prompt_ids, prompt_lengths, lengths, 40)
        return [[(prompt_ids[group[0]], sorted(lengths[group])) for group in row] for row in rows]

    draw = np.random.default_rng(0)
    for _ in range(30):
        prompt_ids = np.repeat(np.arange(6), 5)
        arrays = prompt_ids, draw.integers(1, 9, 6)[prompt_ids], draw.integers(1, 20, 30)
        order = draw.permutation(30)
        assert contents(*(x[order] for x in arrays)) == contents(*arrays)


def test_small_batches_are_assigned_to_the_expected_rows():
    """Small cases, worked out by hand."""
    group, prompts = np.repeat([0, 1, 2], 2), np.full(6, 3)
    lengths = np.asarray([9, 8, 5, 4, 3, 2])  # groups of 20, 12 and 8 tokens
    assert assign_rows(group, prompts, lengths, 20) == [[[0, 1]], [[2, 3], [4, 5]]]
    assert assign_rows(group, prompts, lengths, 32) == [[[0, 1], [2, 3]], [[4, 5]]]
    assert assign_rows(group, prompts, lengths, 40) == [[[0, 1], [2, 3], [4, 5]]]
    # A group goes to the fullest row with room for it; if there is none, its longest completion goes to the emptiest.
    assert assign_rows(np.arange(3), np.ones(3, int), np.asarray([15, 11, 3]), 20) == [[[0], [2]], [[1]]]
    assert assign_rows(np.asarray([0, 1, 2, 2]), np.ones(4, int), np.asarray([14, 13, 3, 3]), 20) == [
        [[0], [3]],
        [[1], [2]],
    ]
    # The group of 12 tokens comes before that of 6.
    assert assign_rows(np.arange(2), np.asarray([1, 10]), np.asarray([5, 2]), 20) == [[[1], [0]]]
    # What must fit is the rest of the group: 3 of its 9 tokens when the second completion is placed.
    assert assign_rows(np.asarray([0, 1, 2, 3, 3]), np.ones(5, int), np.asarray([14, 12, 11, 6, 3]), 20) == [
        [[0], [4]],
        [[1]],
        [[2], [3]],
    ]
    # A completion joins its group rather than a fuller row without the prompt, in the fullest of the group's rows.
    assert assign_rows(np.asarray([0, 1, 1]), np.full(3, 2), np.asarray([12, 9, 1]), 20) == [[[0]], [[1, 2]]]
    assert assign_rows(np.repeat([0, 1], 3), np.full(6, 2), np.asarray([9, 9, 2, 9, 9, 1]), 20) == [
        [[0, 1]],
        [[2], [3, 5]],
        [[4]],
    ]


@pytest.mark.parametrize("sequences, padding, repeats", [(1, 0.08, 4), (2, 0.05, 2.3), (8, 0.07, 1.4)])
def test_rows_have_little_padding_and_few_prompt_copies(sequences, padding, repeats):
    """Log-normal lengths, as models sample them, in rows that hold this many sequences of the maximum length."""
    empty, copies = [], []
    for seed in range(4):
        draw = np.random.default_rng(seed)
        prompt_ids = np.repeat(np.arange(64), 8)
        prompts = draw.integers(64, 257, 64)[prompt_ids]
        spread = 0.4 * draw.standard_normal(64)[prompt_ids] + 0.5 * draw.standard_normal(512)
        lengths = np.clip(300 * np.exp(spread), 1, 1024).astype(int)
        width = packed_shape(512, 8, 256, 1024, sequences * 1280, 1).width
        rows = assign_rows(prompt_ids, prompts, lengths, width)
        copies.append(sum(map(len, rows)) / 64)
        tokens = sum(prompts[group[0]] + lengths[group].sum() for row in rows for group in row)
        empty.append(1 - tokens / (width * len(rows)))
    assert max(empty) < padding and max(copies) < repeats


def test_completions_that_do_not_fit_are_an_error():
    batch = experience(8, 5, 6)
    shape = packed_shape(8, 2, 5, 6, 1, 1)
    needed = pack_minibatch(batch, LossSection(), shape, 1).num_micro_batches
    assert pack_minibatch(batch, LossSection(), PackedShape(int(needed), shape.width), 1).num_micro_batches == needed
    with pytest.raises(
        ValueError, match=f"fit in {needed - 1} packed rows of {shape.width} tokens; found that it needs {needed}"
    ):
        pack_minibatch(batch, LossSection(), PackedShape(int(needed) - 1, shape.width), 1)


@pytest.mark.parametrize("aggregate", ["sequence", "token", "prompt", "constant"])
def test_a_minibatch_without_completions_is_packed_into_rows_without_tokens(aggregate):
    loss, shape = LossSection(aggregate=aggregate, constant_length=6), packed_shape(8, 2, 5, 6, 30, 2)
    empty = take_rows(experience(), np.arange(0))
    packed = pack_minibatch(empty, loss, shape, 2)
    full = pack_minibatch(experience(), loss, shape, 2)
    for x, other in zip(jax.tree.leaves(packed), jax.tree.leaves(full), strict=True):
        assert x.shape == other.shape and x.dtype == other.dtype  # so that the update does not compile again
    for x in (packed.tokens, *packed.segments, packed.weights, packed.sampler_logps, packed.ref_logps):
        assert not x.any()
    for x in (packed.flat_index, packed.sequence, packed.group):
        assert (x == -1).all()
    assert not packed.advantages.any()


def test_unpacking_returns_values_by_completion():
    batch = experience(9, 5, 6, samples=3)
    packed = pack_minibatch(batch, LossSection(), packed_shape(9, 3, 5, 6, 30, 2), 2)
    values = np.random.default_rng(0).random(packed.flat_index.shape).astype(np.float32)
    unpacked = unpack_completions(values, packed.flat_index, batch.mask.shape)
    assert unpacked.dtype == np.float32
    for n, t in np.ndindex(*batch.mask.shape):
        matches = values[packed.flat_index == n * 6 + t]
        assert len(matches) == batch.mask[n, t]
        assert unpacked[n, t] == (matches[0] if len(matches) else 0)
