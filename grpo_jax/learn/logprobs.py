"""Log-probabilities and entropies of given tokens: the one scoring function of training.

Only tokens of completions go through the head, some tokens and some of the vocabulary at a time: forward and backward,
no logits but those of such a block exist, and on a mesh no more than that part of the head is gathered. Blocks of tokens
are counted when the program runs, so padding costs nothing.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.model.architecture import ModelConfig
from grpo_jax.model.decoder import head_kernel, head_path, hidden_states, temperature_logits
from grpo_jax.parallel.mesh import ROW_AXES, drop_indivisible_axes, num_row_shards, spec_for
from grpo_jax.types import PackedBatch

DEFAULT_CHUNK_TOKENS = 512  # of one shard, whose logits exist at a time,
MAX_VOCAB_BLOCK = 16384  # and of how many ids
MIN_LOGIT = -1e30  # below every logit, and finite


class ScoreSpec(NamedTuple):
    """What is known of `blocks` when it is compiled."""

    model_cfg: ModelConfig
    temperature: float
    columns: int  # of a block of tokens
    entropy: bool
    fsdp: bool  # the mesh axis splits the head's rows: they are gathered, a block of ids at a time
    tensor: bool  # the mesh axis splits its columns: each device has its own part of the vocabulary


def sum_over_tensor(x, how: ScoreSpec):
    """The sum over the devices that share the vocabulary."""
    return jax.lax.psum(x, "tensor") if how.tensor else x


def slice_columns(x, index, columns):
    """Block `index` of x[N, S, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, index * columns, columns, axis=1)


def update_columns(x, part, index, columns):
    """x[N, S, ...] with another block `index`."""
    return jax.lax.dynamic_update_slice_in_dim(x, part, index * columns, axis=1)


def fused_sum_last(*arrays):
    """The sums over the last dimension, in one pass over all arrays."""
    zeros, add = (jnp.float32(0),) * len(arrays), lambda a, b: tuple(x + y for x, y in zip(a, b))
    return jax.lax.reduce(arrays, zeros, add, (arrays[0].ndim - 1,))


def vocab_blocks(kernel) -> tuple[int, int]:
    """How many blocks of how many ids the columns of a device's kernel are."""
    ids = kernel.shape[1]
    least = -(-ids // MAX_VOCAB_BLOCK)
    number = next((number for number in range(least, 2 * least) if ids % number == 0), least)
    return number, -(-ids // number)


def take_vocab_block(how: ScoreSpec, kernel, block, dtype):
    """The kernel's columns in a block of ids, whole, in the dtype; where they begin here and in the vocabulary.

    The last block begins early enough to be as wide as the others; what it shares with the one before is to be skipped.
    """
    number, width = vocab_blocks(kernel)
    start = jnp.minimum(block * width, kernel.shape[1] - width)
    skip = None if number * width == kernel.shape[1] else block * width - start
    part = jax.lax.dynamic_slice_in_dim(kernel, start, width, axis=1).astype(dtype)
    part = jax.lax.all_gather(part, "fsdp", axis=0, tiled=True) if how.fsdp else part
    return part, start, start + (jax.lax.axis_index("tensor") * kernel.shape[1] if how.tensor else 0), skip


def block_logits(how: ScoreSpec, part, hidden, first, skip):
    """The logits of a block of tokens and ids; -inf for the first `skip` ids, if any, which the block before had."""
    product = jnp.matmul(hidden.reshape(-1, hidden.shape[-1]), part, preferred_element_type=how.model_cfg.logit_dtype)
    logits = temperature_logits(how.model_cfg, product.reshape(*hidden.shape[:-1], -1), how.temperature, first)
    return logits if skip is None else jnp.where(jnp.arange(logits.shape[-1]) < skip, -jnp.inf, logits)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_logprobs(how: ScoreSpec, kernel, hidden, targets, counts):
    """`score_hidden` on one device: of columns below counts[n]; S is a multiple of the columns of a block."""
    return chunked_logprobs_fwd(how, kernel, hidden, targets, counts)[0]


def chunked_logprobs_fwd(how: ScoreSpec, kernel, hidden, targets, counts):
    """The result, and what the backward pass needs."""
    number, width = vocab_blocks(kernel)

    def of_ids(block, found):
        part, _, first, skip = take_vocab_block(how, kernel, block, hidden.dtype)

        def of_tokens(index, found):
            chosen, highest, mass, *mean = (slice_columns(x, index, how.columns) for x in found)
            logits = block_logits(how, part, slice_columns(hidden, index, how.columns), first, skip)
            local = slice_columns(targets, index, how.columns) - first
            here = (local >= (0 if skip is None else skip)) & (local < width)
            target = jnp.take_along_axis(logits, jnp.clip(local, 0, width - 1)[..., None], axis=-1)[..., 0]
            higher = jnp.maximum(highest, jnp.max(logits, axis=-1))
            below = logits - higher[..., None]
            powers = jnp.exp(below)
            sums = [powers]
            shrink = jnp.exp(highest - higher)
            old = [mass * shrink]
            if how.entropy:  # the mean of logits less the highest; what has no probability adds 0
                sums.append(powers * jnp.where(powers > 0, below, 0.0))
                old.append((mean[0] + mass * (highest - higher)) * shrink)
            more = [x + y for x, y in zip(old, fused_sum_last(*sums))]
            made = (chosen + jnp.where(here, target, 0.0), higher, *more)
            return tuple(update_columns(x, y, index, how.columns) for x, y in zip(found, made))

        return jax.lax.fori_loop(0, -(-counts.max() // how.columns), of_tokens, found)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    chosen, highest, mass, *mean = jax.lax.fori_loop(
        0, number, of_ids, (zeros, zeros + MIN_LOGIT, zeros, *(zeros,) * how.entropy)
    )
    if how.tensor:
        top = jax.lax.pmax(highest, "tensor")
        shrink = jnp.exp(highest - top)
        mean = [sum_over_tensor((x + mass * (highest - top)) * shrink, how) for x in mean]
        mass, highest, chosen = sum_over_tensor(mass * shrink, how), top, sum_over_tensor(chosen, how)
    mass = jnp.where(mass > 0, mass, 1.0)  # columns beyond the counts
    log_mass = highest + jnp.log(mass)
    entropies = jnp.log(mass) - mean[0] / mass if how.entropy else zeros
    return (chosen - log_mass, entropies), (kernel, hidden, targets, counts, log_mass)


def chunked_logprobs_bwd(how: ScoreSpec, saved, gradient):
    """d log pi(target) / d logits is 1 at the target, less pi; the entropy, a metric, has no gradient."""
    kernel, hidden, targets, counts, log_mass = saved
    gradient = sum_over_tensor(gradient[0], how)  # each device of the axis was handed its share
    number, width = vocab_blocks(kernel)

    def of_ids(block, found):
        of_kernel, of_hidden = found
        part, start, first, skip = take_vocab_block(how, kernel, block, hidden.dtype)
        upright = jax.lax.optimization_barrier(part.T)

        def of_tokens(index, found):
            of_part, of_hidden = found
            x = slice_columns(hidden, index, how.columns)
            flat = x.reshape(-1, x.shape[-1])
            raw = jnp.matmul(flat, part, preferred_element_type=how.model_cfg.logit_dtype).reshape(*x.shape[:-1], -1)
            logits, pull = jax.vjp(lambda raw: temperature_logits(how.model_cfg, raw, how.temperature, first), raw)
            ids = jnp.arange(width)
            at_target = ids == (slice_columns(targets, index, how.columns) - first)[..., None]
            probs = jnp.exp(logits - slice_columns(log_mass, index, how.columns)[..., None])
            weight = slice_columns(gradient, index, how.columns)[..., None]
            of_logits = weight * (at_target - probs)
            (moved,) = pull(of_logits if skip is None else jnp.where(ids < skip, 0.0, of_logits))
            moved = moved.reshape(-1, width).astype(hidden.dtype)
            # Products of matrices as they lie in memory: a CPU takes many times as long for transposed ones.
            columns = jax.lax.optimization_barrier(flat.T)
            of_part += jnp.matmul(columns, moved, preferred_element_type=jnp.float32)
            back = jnp.matmul(moved, upright, preferred_element_type=jnp.float32).reshape(x.shape)
            return of_part, update_columns(
                of_hidden, slice_columns(of_hidden, index, how.columns) + back, index, how.columns
            )

        of_part, of_hidden = jax.lax.fori_loop(
            0, -(-counts.max() // how.columns), of_tokens, (jnp.zeros(part.shape, jnp.float32), of_hidden)
        )
        if how.fsdp:
            of_part = jax.lax.psum_scatter(of_part, "fsdp", scatter_dimension=0, tiled=True)
        more = jax.lax.dynamic_slice_in_dim(of_kernel, start, width, axis=1) + of_part
        return jax.lax.dynamic_update_slice_in_dim(of_kernel, more, start, axis=1), of_hidden

    zeros = jnp.zeros(kernel.shape, jnp.float32), jnp.zeros(hidden.shape, jnp.float32)
    of_kernel, of_hidden = jax.lax.fori_loop(0, number, of_ids, zeros)
    return of_kernel.astype(kernel.dtype), of_hidden.astype(hidden.dtype), None, None


chunked_logprobs.defvjp(chunked_logprobs_fwd, chunked_logprobs_bwd)


def logprobs_from_hidden(
    model_cfg: ModelConfig,
    params: dict,
    hidden: Float[Array, "N S D"],
    targets: Int[Array, "N S"],
    temperature: float,
    *,
    counts: Int[Array, " N"] | None = None,
    entropy: bool = True,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> tuple[Float[Array, "N S"], Float[Array, "N S"]]:
    """log pi(target) and the entropy of pi at each hidden state, in nats, float32, at the sampling temperature.

    The entropy has no gradient.

    Args:
      counts: how many of a row's columns are asked for; beyond them the result is of no meaning. All by default.
      entropy: else zeros are returned in its place, and nothing is computed for it.
      chunk_tokens: of a shard of rows, how many go through the head at a time.
    """
    mesh, length, kernel = jax.sharding.get_abstract_mesh(), hidden.shape[1], head_kernel(model_cfg, params)
    rows, split = P(None), P(None, None)
    if not mesh.empty:
        rows = drop_indivisible_axes(P(ROW_AXES), targets.shape[:1], mesh)
        _, split = spec_for(head_path(model_cfg))
        split = drop_indivisible_axes(P(*reversed(split)) if model_cfg.tie_embeddings else split, kernel.shape, mesh)
    local_rows = targets.shape[0] // (num_row_shards(mesh) if rows[0] else 1)
    counts = jnp.full(targets.shape[:1], length) if counts is None else counts
    columns = max(1, min(length, chunk_tokens // local_rows))
    wide = lambda x: jnp.pad(x, ((0, 0), (0, -length % columns)) + ((0, 0),) * (x.ndim - 2))
    many = lambda axis: axis is not None and mesh.shape[axis] > 1
    run = partial(chunked_logprobs, ScoreSpec(model_cfg, temperature, columns, entropy, many(split[0]), many(split[1])))
    if not mesh.empty:
        run = jax.shard_map(run, in_specs=(split, rows, rows, rows), out_specs=(rows, rows), check_vma=False)
    return tuple(x[:, :length] for x in run(kernel, wide(hidden), wide(targets), counts))


def packed_logprobs(
    model_cfg: ModelConfig,
    params: dict,
    batch: PackedBatch,
    temperature: float,
    *,
    entropy: bool = True,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
) -> tuple[Float[Array, "P W"], Float[Array, "P W"]]:
    """log pi and entropy of the completions' tokens in packed rows; 0 or of no meaning elsewhere."""
    hidden, _ = hidden_states(model_cfg, params, batch.tokens, batch.segments)
    counted = batch.flat_index >= 0
    order = jnp.argsort(~counted, axis=1, stable=True)  # the columns of completions first
    pick = lambda x, columns: jnp.take_along_axis(x, columns, axis=1)
    predicting = jnp.take_along_axis(hidden, pick(batch.predict_from, order)[..., None], axis=1)
    found = logprobs_from_hidden(
        model_cfg,
        params,
        predicting,
        pick(batch.tokens, order),
        temperature,
        counts=counted.sum(axis=1),
        entropy=entropy,
        chunk_tokens=chunk_tokens,
    )
    back = jnp.argsort(order, axis=1)
    return tuple(jnp.where(counted, pick(x, back), 0.0) for x in found)
