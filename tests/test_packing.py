"""Packing against a reading of the packed arrays that knows nothing of how they were made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.learn.grpo import token_weights
from grpo_jax.learn.packing import PackedShape, assign_rows, pack_completions, packed_shape, unpack_completions
from grpo_jax.learn.update import take_micro_batch, take_minibatch
from grpo_jax.model.mask import attention_mask
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.types import Segments
from tests.tiny import experience

WIDEST = 128  # columns of the rows below, so that `sees` is compiled once
VISIBLE = jax.jit(lambda segments: attention_mask(segments, segments))


def take(batch, rows):
    return jax.tree.map(lambda x: x[rows], batch)


def visible(segments, row):
    """[query, key] of a row."""
    wide = lambda x: np.pad(x[row : row + 1], ((0, 0), (0, WIDEST - x.shape[1])))
    width = segments.position.shape[1]
    return np.asarray(VISIBLE(Segments(*map(wide, segments))))[0, :width, :width]


def assert_packed(batch, packed, shards):
    """All that is said of Packed, token by token."""
    count, sampled = batch.mask.shape
    segments, place = packed.segments, packed.flat_index
    np.testing.assert_array_equal(np.sort(place[place >= 0]), np.flatnonzero(batch.mask))  # each token once
    filled = np.zeros(place.shape, bool)
    prompts = set()
    for row in np.flatnonzero((place >= 0).any(axis=1)):
        seen = visible(segments, row)
        at = lambda values, columns: values[row, columns].tolist()
        for n in np.unique(place[row][place[row] >= 0] // sampled):
            length, drawn = batch.prompt_lengths[n], batch.mask[n].sum()
            (first,) = np.flatnonzero(place[row] == n * sampled)
            columns = np.arange(first, first + drawn)
            assert at(place, columns) == (n * sampled + np.arange(drawn)).tolist()
            assert (
                np.flatnonzero(segments.completion[row] == segments.completion[row, first]).tolist() == columns.tolist()
            )
            assert len(np.unique(segments.prompt[row, columns])) == 1 <= segments.completion[row, first]
            own = (segments.prompt[row] == segments.prompt[row, first]) & (segments.completion[row] == 0)
            sequence = np.concatenate([np.flatnonzero(own), columns])  # one copy of the prompt, in order
            assert at(packed.tokens, sequence) == batch.tokens[n, : length + drawn].tolist()
            assert at(segments.position, sequence) == list(range(length + drawn))
            assert at(packed.predict_from, columns) == sequence[length - 1 : -1].tolist()
            for index, column in enumerate(sequence):
                assert np.flatnonzero(seen[column]).tolist() == sorted(sequence[: index + 1])
            np.testing.assert_array_equal(packed.sampler_logps[row, columns], batch.sampler_logps[n, :drawn])
            np.testing.assert_array_equal(packed.ref_logps[row, columns], batch.ref_logps[n, :drawn])
            np.testing.assert_array_equal(packed.advantages[row, columns], batch.advantages[n])
            np.testing.assert_allclose(packed.weights[row, columns], 1 / (count * drawn), rtol=1e-6)
            filled[row, sequence] = True
            prompts.add((row, batch.prompt_ids[n], segments.prompt[row, first]))
    assert len(prompts) == len({prompt[:2] for prompt in prompts})  # a row holds a prompt once
    nothing = lambda x, here: (x[here] == 0).all()
    for x in (packed.tokens, *segments):
        assert nothing(x, ~filled)
    for x in (packed.weights, packed.advantages, packed.sampler_logps, packed.ref_logps, segments.completion):
        assert nothing(x, place < 0)
    # Micro-batch m is row m of every shard: the first ones are full, and those after the last one hold nothing.
    used = filled.any(axis=1).reshape(shards, -1)
    order = used.T.ravel().tolist()
    assert order == sorted(order, reverse=True) and packed.num_micro_batches == used.any(axis=0).sum()
    for x in (packed.tokens, *segments, packed.predict_from, place, packed.num_micro_batches):
        assert x.dtype == np.int32
    for x in (packed.weights, packed.sampler_logps, packed.ref_logps, packed.advantages):
        assert x.dtype == np.float32 and x.shape == place.shape
    back = unpack_completions(packed.sampler_logps, place, batch.mask.shape)
    np.testing.assert_array_equal(back, batch.sampler_logps * batch.mask)


@pytest.mark.parametrize("seed", range(30))
def test_every_token_lies_where_it_should(seed):
    """Parts of rollouts whose groups are cut, in any order; rows of one sequence up to all of them; 1 to 8 shards."""
    draw = np.random.default_rng(seed)
    samples, longest_prompt, sampled, shards = (int(draw.integers(1, high)) for high in (7, 16, 16, 9))
    rows = int(draw.integers(1, 25))
    whole = experience(rows + samples, longest_prompt + 1, sampled, seed, samples=samples)
    start = int(draw.integers(samples + 1))
    batch = take(whole, draw.permutation(np.arange(start, start + rows)))
    if seed % 3 == 0:  # prompts of one token, and completions that are all of the longest
        batch = batch.replace(prompt_lengths=np.ones_like(batch.prompt_lengths), mask=np.ones_like(batch.mask))
    micro_tokens = int(draw.choice([1, 20, 40, 90, WIDEST]))
    shape = packed_shape(rows, samples, longest_prompt + 1, sampled, micro_tokens, shards)
    assert shape.width <= WIDEST
    packed = pack_completions(batch, shape, shards)
    assert packed.tokens.shape == shape
    assert_packed(batch, packed, shards)
    jax.tree.map(np.testing.assert_array_equal, pack_completions(batch, shape, shards), packed)


def test_minibatches_are_packed_as_batches_of_their_own():
    """12 completions in groups of 5 are 3 or 4 of 8: weights of 1/12, each token of the rollout in one minibatch."""
    whole = experience(36, 6, 7, samples=5).replace(advantages=np.arange(36, dtype=np.float32))
    tokens = []
    for index in range(3):
        part = take_minibatch(whole, jax.random.key(3), index, count=3)
        packed = pack_completions(part, packed_shape(12, 5, 6, 7, 40, 2), 2)
        assert_packed(part, packed, 2)
        weights = unpack_completions(packed.weights, packed.flat_index, part.mask.shape)
        np.testing.assert_allclose(weights, token_weights(jnp.asarray(part.mask)), rtol=1e-6)
        tokens += packed.advantages[packed.flat_index >= 0].tolist()
    assert sorted(tokens) == np.repeat(np.arange(36), whole.mask.sum(axis=1)).tolist()


def test_a_micro_batch_is_a_row_of_every_shard():
    batch = experience(20, 5, 6, samples=2)
    packed = pack_completions(batch, PackedShape(16, 16), 4)
    rows = assign_rows(batch.prompt_ids, batch.prompt_lengths, batch.mask.sum(axis=1), 16)
    assert packed.num_micro_batches == -(-len(rows) // 4) == 2 and len(rows) % 4
    with jax.set_mesh(make_mesh(1, 4, 2)):
        for index in range(4):
            part = take_micro_batch(jax.tree.map(np.asarray, packed), index)
            np.testing.assert_array_equal(part.tokens, packed.tokens[[index, 4 + index, 8 + index, 12 + index]])
            for shard in range(4):
                dealt = sum(rows[4 * index + shard], []) if 4 * index + shard < len(rows) else []
                place = np.asarray(part.flat_index[shard])
                assert list(dict.fromkeys((place[place >= 0] // 6).tolist())) == dealt


def lengths_of(draw, kind, count, samples, longest_prompt, longest_completion, width):
    """(group, prompt lengths, completion lengths) of `count` completions that begin somewhere in a group."""
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
    share = draw.integers(1, 6)  # rows are left with a token too little for one more
    length = np.clip(width // share - longest_prompt + 1, 1, longest_completion)
    return group, np.full(count, longest_prompt), np.full(count, length)


KINDS = ("longest", "any", "long and short", "skewed", "a token too long")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_hold_what_they_can_and_are_never_too_few(kind):
    draw = np.random.default_rng(KINDS.index(kind))
    for _ in range(150):
        count, samples, shards = int(draw.integers(1, 60)), int(draw.integers(1, 17)), int(draw.integers(1, 9))
        longest_prompt, longest_completion = (int(2 ** draw.uniform(0, 6)) for _ in range(2))
        micro_tokens = int(2 ** draw.uniform(0, 11))
        shape = packed_shape(count, samples, longest_prompt, longest_completion, micro_tokens, shards)
        group, prompts, lengths = lengths_of(
            draw, kind, count, samples, longest_prompt, longest_completion, shape.width
        )
        rows = assign_rows(group, prompts, lengths, shape.width)
        assert len(rows) <= shape.rows
        assert sorted(n for row in rows for members in row for n in members) == list(range(count))
        for row in rows:
            assert row and all(row)
            assert all(len(np.unique(group[members])) == 1 for members in row)
            assert len({group[members[0]] for members in row}) == len(row)  # a prompt once
            assert sum(prompts[members[0]] + lengths[members].sum() for members in row) <= shape.width


@pytest.mark.parametrize("longest_prompt, longest_completion", [(1, 30), (31, 1), (9, 22), (300, 700)])
def test_shapes_are_as_small_as_the_longest_completions_allow(longest_prompt, longest_completion):
    """Where each has a prompt of its own, what was asked for is what the longest of all need."""
    longest = longest_prompt + longest_completion
    for count in (1, 2, 7, 8, 64):
        for micro_tokens in (1, longest, 2 * longest, 5 * longest, 100 * longest):
            for shards in (1, 4):
                shape = packed_shape(count, 1, longest_prompt, longest_completion, micro_tokens, shards)
                step = 128 if shape.width > 256 else 8
                assert shape.rows % shards == shape.width % step == 0
                assert longest <= shape.width < max(longest, micro_tokens) + step
                assert shape.width < max(longest, -(-count * longest // shards)) + step
                assert shape.width >= min(micro_tokens, count * longest / shards) / 2  # tokens in even parts
                prompts, lengths = np.full(count, longest_prompt), np.full(count, longest_completion)
                rows = len(assign_rows(np.arange(count), prompts, lengths, shape.width))
                assert shape.rows == -(-rows // shards) * shards


def test_one_row_takes_a_batch_of_cut_groups():
    """5 completions of groups of 4 have at most 2 prompts and 6 have 3: rows are as wide as that and no wider."""
    for count, prompts in ((1, 1), (2, 2), (4, 1), (5, 2), (6, 3), (8, 2), (9, 3), (10, 4)):
        shape = packed_shape(count, 4, 80, 8, 10_000, 1)
        assert shape.rows == 1
        assert 0 <= shape.width - (80 * prompts + 8 * count) < (128 if shape.width > 256 else 8)
        for start in range(0, 4, 4 if count % 4 == 0 else 1):
            group = (start + np.arange(count)) // 4
            assert len(assign_rows(group, np.full(count, 80), np.full(count, 8), shape.width)) == 1


def test_packing_does_not_depend_on_the_order_of_completions():
    draw = np.random.default_rng(0)
    for _ in range(30):
        group = np.repeat(np.arange(6), 5)
        prompts, lengths = draw.integers(1, 9, 6)[group], draw.integers(1, 20, 30)
        name = lambda members: (group[members[0]], sorted(lengths[members]))
        order = draw.permutation(30)
        moved = assign_rows(group[order], prompts[order], lengths[order], 40)
        named = [[name(members) for members in row] for row in assign_rows(group, prompts, lengths, 40)]
        assert [[name(order[members]) for members in row] for row in moved] == named


def test_where_a_completion_goes():
    """Small cases by hand."""
    group, prompts = np.repeat([0, 1, 2], 2), np.full(6, 3)
    lengths = np.asarray([9, 8, 5, 4, 3, 2])  # groups of 20, 12 and 8 tokens
    assert assign_rows(group, prompts, lengths, 20) == [[[0, 1]], [[2, 3], [4, 5]]]
    assert assign_rows(group, prompts, lengths, 32) == [[[0, 1], [2, 3]], [[4, 5]]]
    assert assign_rows(group, prompts, lengths, 40) == [[[0, 1], [2, 3], [4, 5]]]
    # The fullest row that takes all of a group; where none does, its longest completion goes to the emptiest.
    assert assign_rows(np.arange(3), np.ones(3, int), np.asarray([15, 11, 3]), 20) == [[[0], [2]], [[1]]]
    assert assign_rows(np.asarray([0, 1, 2, 2]), np.ones(4, int), np.asarray([14, 13, 3, 3]), 20) == [
        [[0], [3]],
        [[1], [2]],
    ]
    assert assign_rows(np.arange(2), np.asarray([1, 10]), np.asarray([5, 2]), 20) == [[[1], [0]]]  # 12 tokens before 6
    # What counts is what is left of the group: 3 tokens of 9 when its second completion is laid.
    assert assign_rows(np.asarray([0, 1, 2, 3, 3]), np.ones(5, int), np.asarray([14, 12, 11, 6, 3]), 20) == [
        [[0], [4]],
        [[1]],
        [[2], [3]],
    ]
    # Beside its group rather than after another copy of the prompt in a fuller row; in the fullest of the group's rows.
    assert assign_rows(np.asarray([0, 1, 1]), np.full(3, 2), np.asarray([12, 9, 1]), 20) == [[[0]], [[1, 2]]]
    assert assign_rows(np.repeat([0, 1], 3), np.full(6, 2), np.asarray([9, 9, 2, 9, 9, 1]), 20) == [
        [[0, 1]],
        [[2], [3, 5]],
        [[4]],
    ]


@pytest.mark.parametrize("sequences, padding, repeats", [(1, 0.08, 4), (2, 0.05, 2.3), (8, 0.07, 1.4)])
def test_rows_are_well_filled(sequences, padding, repeats):
    """Lengths as models draw them, in rows of so many longest sequences: what is left empty, and copies of a prompt."""
    empty, copies = [], []
    for seed in range(4):
        draw = np.random.default_rng(seed)
        group = np.repeat(np.arange(64), 8)
        prompts = draw.integers(64, 257, 64)[group]
        spread = 0.4 * draw.standard_normal(64)[group] + 0.5 * draw.standard_normal(512)
        lengths = np.clip(300 * np.exp(spread), 1, 1024).astype(int)
        width = packed_shape(512, 8, 256, 1024, sequences * 1280, 1).width
        rows = assign_rows(group, prompts, lengths, width)
        copies.append(sum(map(len, rows)) / 64)
        laid = sum(prompts[members[0]] + lengths[members].sum() for row in rows for members in row)
        empty.append(1 - laid / (width * len(rows)))
    assert max(empty) < padding and max(copies) < repeats


def test_completions_that_do_not_fit_are_an_error():
    batch = experience(8, 5, 6)
    shape = packed_shape(8, 2, 5, 6, 1, 1)
    needed = pack_completions(batch, shape, 1).num_micro_batches
    assert pack_completions(batch, PackedShape(int(needed), shape.width), 1).num_micro_batches == needed
    with pytest.raises(ValueError, match=f"fit in {needed - 1} packed rows of {shape.width} tokens; found that it needs {needed}"):
        pack_completions(batch, PackedShape(int(needed) - 1, shape.width), 1)


def test_unpacked_values_are_by_completion():
    batch = experience(9, 5, 6, samples=3)
    packed = pack_completions(batch, packed_shape(9, 3, 5, 6, 30, 2), 2)
    values = np.random.default_rng(0).random(packed.flat_index.shape).astype(np.float32)
    made = unpack_completions(values, packed.flat_index, batch.mask.shape)
    assert made.dtype == np.float32
    for n, t in np.ndindex(*batch.mask.shape):
        at = np.argwhere(packed.flat_index == n * 6 + t)
        assert len(at) == batch.mask[n, t]
        assert made[n, t] == (values[tuple(at[0])] if len(at) else 0)
