"""Packs completions of unequal length into rows with a fixed number of tokens. Runs on the host.

A completion attends only to its prompt and to itself, so a prompt is stored (and computed) once for all completions of
its group in the same row. A group that does not fit into one row is split, and each of its rows gets a copy of the
prompt.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from grpo_jax.types import Experience, PackedBatch, Segments


class PackedShape(NamedTuple):
    """The shape of packed arrays. It is the same for every rollout of a run, so the update compiles only once."""

    rows: int  # P, enough for the largest possible batch; a multiple of the number of data shards
    width: int  # W, tokens per row


def packed_shape(
    completions: int, samples: int, longest_prompt: int, longest_completion: int, micro_tokens: int, shards: int
) -> PackedShape:
    """Chooses a shape for packed rows of about `micro_tokens` tokens that divides the largest batch evenly.

    Args:
        completions: Number of completions in the batch, N.
        samples: Completions per prompt, G. All groups are complete, except possibly the first and the last.
        longest_prompt: Maximum prompt length.
        longest_completion: Maximum completion length.
        micro_tokens: Micro-batch size in tokens per data shard. Rows are longer if one sequence needs more.
        shards: Number of data shards.

    Returns:
        A shape in which any batch within these limits fits.
    """
    longest = longest_prompt + longest_completion
    # If the completions are not whole groups, a group may be cut at either end.
    max_prompts = -(-(completions - 1) // samples) + 1 if completions % samples else completions // samples
    max_tokens = max_prompts * longest_prompt + completions * longest_completion
    num_micro_batches = -(-max_tokens // (shards * micro_tokens))
    width = max(longest, -(-max_tokens // (shards * num_micro_batches)))
    multiple = 128 if width > 256 else 8  # accelerator kernels need widths that are multiples of 128
    width = -(-width // multiple) * multiple
    # Every row but the last holds at least width // longest completions; otherwise the next one would have fit.
    rows = 1 if max_tokens <= width else -(-completions // (width // longest))
    return PackedShape(-(-rows // shards) * shards, width)


def assign_rows(
    prompt_ids: Int[np.ndarray, " N"], prompt_lengths: Int[np.ndarray, " N"], lengths: Int[np.ndarray, " N"], width: int
) -> list[list[list[int]]]:
    """Assigns completions to rows by best-fit decreasing bin packing.

    Groups are placed from the largest to the smallest, and completions of a group from the longest to the shortest.
    A completion goes to the fullest row that already has its prompt and enough room; otherwise to the fullest row
    that can take the rest of its group; otherwise to the emptiest row that can take this completion and its prompt;
    otherwise to a new row.

    Args:
        prompt_ids: Completions with equal ids share the same prompt.
        prompt_lengths: Length of each completion's prompt.
        lengths: Length of each completion.
        width: Tokens per row.

    Returns:
        Rows as lists of groups, each of which is a list of completion indices. The tokens of a row, including one copy
        of the prompt per group, number at most `width`.
    """
    order = np.lexsort((-lengths, prompt_ids))
    groups = np.split(order, np.flatnonzero(np.diff(prompt_ids[order])) + 1)

    rows, free = [], np.zeros(0, np.int64)
    for group in sorted(groups, key=lambda g: prompt_lengths[g[0]] + lengths[g].sum(), reverse=True):
        prompt_length, remaining = prompt_lengths[group[0]], lengths[group].sum()
        placed = {}  # row -> completions of this group in that row
        for n in group.tolist():
            length = lengths[n]
            row = min((row for row in placed if free[row] >= length), key=lambda row: free[row], default=-1)
            if row < 0:
                fits_rest = np.flatnonzero(free >= prompt_length + remaining)
                if len(fits_rest):
                    row = int(fits_rest[np.argmin(free[fits_rest])])
                elif free.max(initial=-1) >= prompt_length + length:
                    row = int(np.argmax(free))
                else:
                    row, free = len(rows), np.append(free, width)
                    rows.append([])
                placed[row] = []
                rows[row].append(placed[row])
                free[row] -= prompt_length
            placed[row].append(n)
            free[row] -= length
            remaining -= length
    return rows


def pack_completions(
    experience: Experience, weights: Float[np.ndarray, "N S"], shape: PackedShape, shards: int
) -> PackedBatch:
    """Packs the completions of a batch into rows, each group after one copy of its prompt.

    Rows are dealt to data shards in turn, so that the first micro-batches are full and the last ones are empty.

    Args:
        experience: The completions to pack.
        weights: The weight of each token in the loss.
        shape: The shape of the packed rows, from `packed_shape`.
        shards: Number of data shards.

    Returns:
        The batch as NumPy arrays `[P, W]`.

    Raises:
        ValueError: The completions do not fit in `shape`.
    """
    lengths, (num_completions, max_length) = experience.mask.sum(axis=1), experience.mask.shape
    rows = assign_rows(experience.prompt_ids, experience.prompt_lengths, lengths, shape.width)
    if len(rows) > shape.rows:
        raise ValueError(
            f"The batch must fit in {shape.rows} packed rows of {shape.width} tokens; found that it needs {len(rows)}. "
            "Choose the shape with packed_shape."
        )

    tokens, position, prompt, completion, predict_from = (np.zeros(shape, np.int32) for _ in range(5))
    flat_index = np.full(shape, -1, np.int32)
    rows_per_shard = shape.rows // shards
    for row_index, groups in enumerate(rows):
        row = row_index % shards * rows_per_shard + row_index // shards
        column, completion_number = 0, 0
        for prompt_number, group in enumerate(groups, 1):
            prompt_length = experience.prompt_lengths[group[0]]
            span = slice(column, column + prompt_length)
            tokens[row, span] = experience.tokens[group[0], :prompt_length]
            position[row, span] = np.arange(prompt_length)
            prompt[row, span] = prompt_number
            column += prompt_length
            last_prompt_column = column - 1
            for n in group:
                completion_number += 1
                steps = np.arange(lengths[n])
                span = slice(column, column + lengths[n])
                tokens[row, span] = experience.tokens[n, prompt_length : prompt_length + lengths[n]]
                position[row, span] = prompt_length + steps
                prompt[row, span] = prompt_number
                completion[row, span] = completion_number
                predict_from[row, span] = np.where(steps == 0, last_prompt_column, column + steps - 1)
                flat_index[row, span] = n * max_length + steps
                column += lengths[n]
    sequence = flat_index // max_length  # -1 stays -1
    group_numbers = np.unique(experience.prompt_ids, return_inverse=True)[1].astype(np.int32)

    def take_tokens(values):
        return np.where(flat_index >= 0, values.ravel()[flat_index], np.float32(0))

    return PackedBatch(
        tokens=tokens,
        segments=Segments(position, prompt, completion),
        predict_from=predict_from,
        flat_index=flat_index,
        sequence=sequence,
        group=np.where(sequence >= 0, group_numbers[sequence], np.int32(-1)),
        weights=take_tokens(weights),
        sampler_logps=take_tokens(experience.sampler_logps),
        ref_logps=take_tokens(experience.ref_logps),
        advantages=np.where(sequence >= 0, experience.advantages[sequence], np.float32(0)),
        num_micro_batches=np.int32(-(-len(rows) // shards)),
        num_sequences=num_completions,
    )


def unpack_completions(
    values: Float[np.ndarray, "P W"], flat_index: Int[np.ndarray, "P W"], shape: tuple[int, int]
) -> Float[np.ndarray, "N S"]:
    """Gathers values of packed tokens by completion; the inverse of packing for one array.

    Args:
        values: One value per packed token.
        flat_index: `PackedBatch.flat_index` of the same rows.
        shape: `(N, S)` of the result.

    Returns:
        Values in float32, 0 where a completion has no token.
    """
    completions = np.zeros(shape, np.float32)
    completions.reshape(-1)[flat_index[flat_index >= 0]] = values[flat_index >= 0]
    return completions
