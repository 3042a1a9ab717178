"""Packing, on the host: completions of unequal length fill rows of a fixed number of tokens, after prompts they share.

A completion attends to its prompt and to itself, so a group's prompt is computed once for all of its completions that
lie in one row. A group that does not fit in a row is split, and its prompt then stands in several.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from grpo_jax.types import Experience, PackedBatch, Segments


class PackedShape(NamedTuple):
    """The shape of packed arrays: the same for every rollout of a run, so that the update is compiled once."""

    rows: int  # P, the most that can be needed; a multiple of the shards
    width: int  # W


def packed_shape(
    completions: int, samples: int, longest_prompt: int, longest_completion: int, micro_tokens: int, shards: int
) -> PackedShape:
    """Rows of about `micro_tokens` tokens that the largest batch would fill evenly.

    Args:
      completions: N of the batch.
      samples: G; the completions of a prompt follow one another.
      micro_tokens: what a shard of rows should compute on at a time; a row is as long as the longest sequence at least.
    """
    longest = longest_prompt + longest_completion
    prompts = -(-(completions - 1) // samples) + 1  # a group may be cut at either end
    if completions % samples == 0:
        prompts = completions // samples
    most = prompts * longest_prompt + completions * longest_completion
    parts = -(-most // (shards * micro_tokens))
    width = max(longest, -(-most // (shards * parts)))
    step = 128 if width > 256 else 8  # what kernels of accelerators ask for
    width = -(-width // step) * step
    # A row is begun only when each of the others holds width // longest completions, or they would leave room for one.
    rows = 1 if most <= width else -(-completions // (width // longest))
    return PackedShape(-(-rows // shards) * shards, width)


def assign_rows(
    group: Int[np.ndarray, " N"], prompt_lengths: Int[np.ndarray, " N"], lengths: Int[np.ndarray, " N"], width: int
) -> list[list[list[int]]]:
    """Rows as lists of groups, which are lists of completions; together at most `width` tokens.

    Best fit by decreasing size: a completion goes to the fullest row that has its prompt and room for it; or to the
    fullest that takes all that is left of its group; or to the emptiest that takes it; or to a new one.
    """
    order = np.lexsort((-lengths, group))
    groups = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    size = lambda members: prompt_lengths[members[0]] + lengths[members].sum()
    rows, free = [], np.zeros(0, np.int64)
    for members in sorted(groups, key=size, reverse=True):
        prompt, left = prompt_lengths[members[0]], lengths[members].sum()
        mine = {}  # row -> this group's completions in it
        for n in members.tolist():
            length = lengths[n]
            row = max((row for row in mine if free[row] >= length), key=lambda row: -free[row], default=-1)
            if row < 0:
                takes_all = np.flatnonzero(free >= prompt + left)
                takes_one = np.flatnonzero(free >= prompt + length)
                if len(takes_all):
                    row = takes_all[np.argmin(free[takes_all])]
                elif len(takes_one):
                    row = takes_one[np.argmax(free[takes_one])]
                else:
                    row, free = len(rows), np.append(free, width)
                    rows.append([])
                row = int(row)
                mine[row] = []
                rows[row].append(mine[row])
                free[row] -= prompt
            mine[row].append(n)
            free[row] -= length
            left -= length
    return rows


def pack_completions(experience: Experience, shape: PackedShape, shards: int) -> PackedBatch:
    """The completions of a batch, packed; weighted as parts of that batch.

    Rows are dealt to the shards in turn, so that the first micro-batches are full and the last ones empty.

    Raises:
      ValueError: they do not fit in the shape.
    """
    data = {
        name: np.asarray(getattr(experience, name))
        for name in ("tokens", "prompt_lengths", "mask", "sampler_logps", "ref_logps", "advantages", "prompt_ids")
    }
    lengths, sampled = data["mask"].sum(axis=1), data["mask"].shape[1]
    rows = assign_rows(data["prompt_ids"], data["prompt_lengths"], lengths, shape.width)
    if len(rows) > shape.rows:
        raise ValueError(f"expected at most {shape.rows} rows of {shape.width} tokens; found {len(rows)}")
    each = shape.rows // shards
    zeros = lambda dtype: np.zeros((shape.rows, shape.width), dtype)  # rows that stay empty take no memory of the host
    tokens, position, prompt, answer, before = (zeros(np.int32) for _ in range(5))
    weights, sampler_logps, ref_logps, advantages = (zeros(np.float32) for _ in range(4))
    place = np.full((shape.rows, shape.width), -1, np.int32)
    for index, row in enumerate(rows):
        at, column, answers = index % shards * each + index // shards, 0, 0
        for number, members in enumerate(row, 1):
            length = data["prompt_lengths"][members[0]]
            here = slice(column, column + length)
            tokens[at, here], position[at, here] = data["tokens"][members[0], :length], np.arange(length)
            prompt[at, here], last = number, column + length - 1
            column += length
            for n in members:
                answers += 1
                steps = np.arange(lengths[n])
                here = slice(column, column + lengths[n])
                tokens[at, here] = data["tokens"][n, length : length + lengths[n]]
                position[at, here], prompt[at, here], answer[at, here] = length + steps, number, answers
                before[at, here] = np.where(steps == 0, last, column + steps - 1)
                place[at, here] = n * sampled + steps
                weights[at, here] = 1 / (len(lengths) * lengths[n])  # grpo.token_weights
                sampler_logps[at, here] = data["sampler_logps"][n, : lengths[n]]
                ref_logps[at, here] = data["ref_logps"][n, : lengths[n]]
                advantages[at, here] = data["advantages"][n]
                column += lengths[n]
    return PackedBatch(
        tokens=tokens,
        segments=Segments(position, prompt, answer),
        predict_from=before,
        flat_index=place,
        weights=weights,
        sampler_logps=sampler_logps,
        ref_logps=ref_logps,
        advantages=advantages,
        micro_batches=np.int32(-(-len(rows) // shards)),
    )


def unpack_completions(
    values: Float[np.ndarray, "P W"], place: Int[np.ndarray, "P W"], shape: tuple[int, int]
) -> np.ndarray:
    """Values of packed tokens by completion, [N, S]; 0 where there is none."""
    out = np.zeros(shape, np.float32)
    out.reshape(-1)[place[place >= 0]] = values[place >= 0]
    return out
