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

from grpo_jax.architecture import ModelConfig
from grpo_jax.mesh import ROWS, fit, row_of, row_shards
from grpo_jax.model import head_kernel, head_name, hidden_states, temper
from grpo_jax.types import Packed

CHUNK_TOKENS = 512  # of one shard, whose logits exist at a time,
CHUNK_IDS = 16384  # and of how many ids
LOWEST = -1e30  # below every logit, and finite


class How(NamedTuple):
    """What is known of `blocks` when it is compiled."""

    config: ModelConfig
    temperature: float
    columns: int  # of a block of tokens
    entropy: bool
    fsdp: bool  # the mesh axis splits the head's rows: they are gathered, a block of ids at a time
    tensor: bool  # the mesh axis splits its columns: each device has its own part of the vocabulary


def total(x, how: How):
    """The sum over the devices that share the vocabulary."""
    return jax.lax.psum(x, "tensor") if how.tensor else x


def cut(x, index, columns):
    """Block `index` of x[N, S, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, index * columns, columns, axis=1)


def put(x, part, index, columns):
    """x[N, S, ...] with another block `index`."""
    return jax.lax.dynamic_update_slice_in_dim(x, part, index * columns, axis=1)


def sum_last(*arrays):
    """The sums over the last dimension, in one pass over all arrays."""
    zeros, add = (jnp.float32(0),) * len(arrays), lambda a, b: tuple(x + y for x, y in zip(a, b))
    return jax.lax.reduce(arrays, zeros, add, (arrays[0].ndim - 1,))


def id_blocks(kernel) -> tuple[int, int]:
    """How many blocks of how many ids the columns of a device's kernel are."""
    ids = kernel.shape[1]
    least = -(-ids // CHUNK_IDS)
    number = next((number for number in range(least, 2 * least) if ids % number == 0), least)
    return number, -(-ids // number)


def take_ids(how: How, kernel, block, dtype):
    """The kernel's columns in a block of ids, whole, in the dtype; where they begin here and in the vocabulary.

    The last block begins early enough to be as wide as the others; what it shares with the one before is to be skipped.
    """
    number, width = id_blocks(kernel)
    start = jnp.minimum(block * width, kernel.shape[1] - width)
    skip = None if number * width == kernel.shape[1] else block * width - start
    part = jax.lax.dynamic_slice_in_dim(kernel, start, width, axis=1).astype(dtype)
    part = jax.lax.all_gather(part, "fsdp", axis=0, tiled=True) if how.fsdp else part
    return part, start, start + (jax.lax.axis_index("tensor") * kernel.shape[1] if how.tensor else 0), skip


def block_logits(how: How, part, hidden, first, skip):
    """The logits of a block of tokens and ids; -inf for the first `skip` ids, if any, which the block before had."""
    product = jnp.matmul(hidden.reshape(-1, hidden.shape[-1]), part, preferred_element_type=how.config.logit_dtype)
    logits = temper(how.config, product.reshape(*hidden.shape[:-1], -1), how.temperature, first)
    return logits if skip is None else jnp.where(jnp.arange(logits.shape[-1]) < skip, -jnp.inf, logits)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocks(how: How, kernel, hidden, targets, counts):
    """`score_hidden` on one device: of columns below counts[n]; S is a multiple of the columns of a block."""
    return blocks_forward(how, kernel, hidden, targets, counts)[0]


def blocks_forward(how: How, kernel, hidden, targets, counts):
    """The result, and what the backward pass needs."""
    number, width = id_blocks(kernel)

    def of_ids(block, found):
        part, _, first, skip = take_ids(how, kernel, block, hidden.dtype)

        def of_tokens(index, found):
            chosen, highest, mass, *mean = (cut(x, index, how.columns) for x in found)
            logits = block_logits(how, part, cut(hidden, index, how.columns), first, skip)
            local = cut(targets, index, how.columns) - first
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
            more = [x + y for x, y in zip(old, sum_last(*sums))]
            made = (chosen + jnp.where(here, target, 0.0), higher, *more)
            return tuple(put(x, y, index, how.columns) for x, y in zip(found, made))

        return jax.lax.fori_loop(0, -(-counts.max() // how.columns), of_tokens, found)

    zeros = jnp.zeros(targets.shape, jnp.float32)
    chosen, highest, mass, *mean = jax.lax.fori_loop(
        0, number, of_ids, (zeros, zeros + LOWEST, zeros, *(zeros,) * how.entropy))
    if how.tensor:
        top = jax.lax.pmax(highest, "tensor")
        shrink = jnp.exp(highest - top)
        mean = [total((x + mass * (highest - top)) * shrink, how) for x in mean]
        mass, highest, chosen = total(mass * shrink, how), top, total(chosen, how)
    mass = jnp.where(mass > 0, mass, 1.0)  # columns beyond the counts
    log_mass = highest + jnp.log(mass)
    entropies = jnp.log(mass) - mean[0] / mass if how.entropy else zeros
    return (chosen - log_mass, entropies), (kernel, hidden, targets, counts, log_mass)


def blocks_backward(how: How, saved, gradient):
    """d log pi(target) / d logits is 1 at the target, less pi; the entropy, a metric, has no gradient."""
    kernel, hidden, targets, counts, log_mass = saved
    gradient = total(gradient[0], how)  # each device of the axis was handed its share
    number, width = id_blocks(kernel)

    def of_ids(block, found):
        of_kernel, of_hidden = found
        part, start, first, skip = take_ids(how, kernel, block, hidden.dtype)
        upright = jax.lax.optimization_barrier(part.T)

        def of_tokens(index, found):
            of_part, of_hidden = found
            x = cut(hidden, index, how.columns)
            flat = x.reshape(-1, x.shape[-1])
            raw = jnp.matmul(flat, part, preferred_element_type=how.config.logit_dtype).reshape(*x.shape[:-1], -1)
            logits, pull = jax.vjp(lambda raw: temper(how.config, raw, how.temperature, first), raw)
            ids = jnp.arange(width)
            at_target = ids == (cut(targets, index, how.columns) - first)[..., None]
            probs = jnp.exp(logits - cut(log_mass, index, how.columns)[..., None])
            weight = cut(gradient, index, how.columns)[..., None]
            of_logits = weight * (at_target - probs)
            (moved,) = pull(of_logits if skip is None else jnp.where(ids < skip, 0.0, of_logits))
            moved = moved.reshape(-1, width).astype(hidden.dtype)
            # Products of matrices as they lie in memory: a CPU takes many times as long for transposed ones.
            columns = jax.lax.optimization_barrier(flat.T)
            of_part += jnp.matmul(columns, moved, preferred_element_type=jnp.float32)
            back = jnp.matmul(moved, upright, preferred_element_type=jnp.float32).reshape(x.shape)
            return of_part, put(of_hidden, cut(of_hidden, index, how.columns) + back, index, how.columns)

        of_part, of_hidden = jax.lax.fori_loop(
            0, -(-counts.max() // how.columns), of_tokens, (jnp.zeros(part.shape, jnp.float32), of_hidden))
        if how.fsdp:
            of_part = jax.lax.psum_scatter(of_part, "fsdp", scatter_dimension=0, tiled=True)
        more = jax.lax.dynamic_slice_in_dim(of_kernel, start, width, axis=1) + of_part
        return jax.lax.dynamic_update_slice_in_dim(of_kernel, more, start, axis=1), of_hidden

    zeros = jnp.zeros(kernel.shape, jnp.float32), jnp.zeros(hidden.shape, jnp.float32)
    of_kernel, of_hidden = jax.lax.fori_loop(0, number, of_ids, zeros)
    return of_kernel.astype(kernel.dtype), of_hidden.astype(hidden.dtype), None, None


blocks.defvjp(blocks_forward, blocks_backward)


def score_hidden(
    config: ModelConfig,
    params: dict,
    hidden: Float[Array, "N S D"],
    targets: Int[Array, "N S"],
    temperature: float,
    *,
    counts: Int[Array, " N"] | None = None,
    entropy: bool = True,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Float[Array, "N S"], Float[Array, "N S"]]:
    """log pi(target) and the entropy of pi at each hidden state, in nats, float32, at the sampling temperature.

    The entropy has no gradient.

    Args:
      counts: how many of a row's columns are asked for; beyond them the result is of no meaning. All by default.
      entropy: else zeros are returned in its place, and nothing is computed for it.
      chunk_tokens: of a shard of rows, how many go through the head at a time.
    """
    mesh, length, kernel = jax.sharding.get_abstract_mesh(), hidden.shape[1], head_kernel(config, params)
    rows, split = P(None), P(None, None)
    if not mesh.empty:
        rows = fit(P(ROWS), targets.shape[:1], mesh)
        _, split = row_of(head_name(config))
        split = fit(P(*reversed(split)) if config.tie_embeddings else split, kernel.shape, mesh)
    local_rows = targets.shape[0] // (row_shards(mesh) if rows[0] else 1)
    counts = jnp.full(targets.shape[:1], length) if counts is None else counts
    columns = max(1, min(length, chunk_tokens // local_rows))
    wide = lambda x: jnp.pad(x, ((0, 0), (0, -length % columns)) + ((0, 0),) * (x.ndim - 2))
    many = lambda axis: axis is not None and mesh.shape[axis] > 1
    run = partial(blocks, How(config, temperature, columns, entropy, many(split[0]), many(split[1])))
    if not mesh.empty:
        run = jax.shard_map(run, in_specs=(split, rows, rows, rows), out_specs=(rows, rows), check_vma=False)
    return tuple(x[:, :length] for x in run(kernel, wide(hidden), wide(targets), counts))


def score(
    config: ModelConfig, params: dict, batch: Packed, temperature: float, *, entropy: bool = True,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Float[Array, "P W"], Float[Array, "P W"]]:
    """log pi and entropy of the completions' tokens in packed rows; 0 or of no meaning elsewhere."""
    hidden, _ = hidden_states(config, params, batch.tokens, batch.segments)
    counted = batch.place >= 0
    order = jnp.argsort(~counted, axis=1, stable=True)  # the columns of completions first
    pick = lambda x, columns: jnp.take_along_axis(x, columns, axis=1)
    predicting = jnp.take_along_axis(hidden, pick(batch.before, order)[..., None], axis=1)
    found = score_hidden(
        config, params, predicting, pick(batch.tokens, order), temperature, counts=counted.sum(axis=1),
        entropy=entropy, chunk_tokens=chunk_tokens)
    back = jnp.argsort(order, axis=1)
    return tuple(jnp.where(counted, pick(x, back), 0.0) for x in found)
