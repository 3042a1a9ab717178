"""Log-probabilities and entropies of given tokens: the one scoring function of training.

Only tokens of completions go through the head, a chunk of them at a time: forward and backward, no array of [tokens,
vocabulary] is larger than a chunk's. The chunks are counted when the program runs, so padding costs nothing.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.architecture import ModelConfig
from grpo_jax.mesh import ROWS, fit, path_name, row_shards, spec_of
from grpo_jax.model import head_kernel, head_of, head_product, hidden_states, temper
from grpo_jax.types import Packed

CHUNK_TOKENS = 1024  # of one shard, whose logits exist at a time


def vocabulary_axis(config: ModelConfig) -> str | None:
    """The mesh axis that splits the head's columns inside `score_hidden`, if one does."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or config.vocab_size % mesh.shape["tensor"] else "tensor"


def first_id(axis, head, config: ModelConfig):
    """The first id of this device's part of the vocabulary."""
    return jax.lax.axis_index(axis) * head_kernel(config, head).shape[1] if axis else 0


def total(x, axis):
    """The sum over the devices that share the vocabulary."""
    return jax.lax.psum(x, axis) if axis else x


def cut(x, index, columns):
    """Chunk `index` of x[N, S, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, index * columns, columns, axis=1)


def put(x, part, index, columns):
    """x[N, S, ...] with another chunk `index`."""
    return jax.lax.dynamic_update_slice_in_dim(x, part, index * columns, axis=1)


def sum_last(*arrays):
    """The sums over the last dimension, in one pass over all arrays."""
    zeros, add = (jnp.float32(0),) * len(arrays), lambda a, b: tuple(x + y for x, y in zip(a, b))
    return jax.lax.reduce(arrays, zeros, add, (arrays[0].ndim - 1,))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def chunked(config: ModelConfig, temperature, axis, columns, entropy, head, hidden, targets, counts):
    """`score_hidden` on one device: of columns below counts[n]; S is a multiple of the columns of a chunk."""
    return chunked_forward(config, temperature, axis, columns, entropy, head, hidden, targets, counts)[0]


def chunked_forward(config, temperature, axis, columns, entropy, head, hidden, targets, counts):
    """The result, and what the backward pass needs."""

    first = first_id(axis, head, config)

    def body(index, found):
        logits = temper(config, head_product(config, head, cut(hidden, index, columns)), temperature, first)
        highest = jnp.max(logits, axis=-1)
        highest = jax.lax.pmax(highest, axis) if axis else highest
        below = logits - highest[..., None]
        powers = jnp.exp(below)
        sums = [powers]
        if entropy:  # -inf logits belong to rows that are no token: they have probability 0 and add 0
            sums.append(powers * jnp.where(powers > 0, below, 0.0))
        mass, *mean = (total(x, axis) for x in sum_last(*sums))
        log_mass = highest + jnp.log(mass)
        local = cut(targets, index, columns) - first
        here = (local >= 0) & (local < logits.shape[-1])
        chosen = jnp.take_along_axis(logits, jnp.clip(local, 0, logits.shape[-1] - 1)[..., None], axis=-1)[..., 0]
        parts = [total(jnp.where(here, chosen, 0.0), axis) - log_mass, log_mass]
        parts += [jnp.log(mass) - x / mass for x in mean]
        return tuple(put(x, part, index, columns) for x, part in zip(found, parts))

    zeros = jnp.zeros(targets.shape, jnp.float32)
    logps, log_mass, *rest = jax.lax.fori_loop(0, -(-counts.max() // columns), body, (zeros,) * (2 + entropy))
    return (logps, rest[0] if entropy else zeros), (head, hidden, targets, counts, log_mass)


def chunked_backward(config, temperature, axis, columns, entropy, saved, gradient):
    """d log pi(target) / d logits is 1 at the target, less pi; the entropy, a metric, has no gradient."""
    head, hidden, targets, counts, log_mass = saved
    gradient = total(gradient[0], axis)  # each device of the axis was handed its share

    first, kernel = first_id(axis, head, config), head_kernel(config, head)

    def body(index, found):
        of_kernel, of_hidden = found
        part = cut(hidden, index, columns)
        logits, pull = jax.vjp(
            lambda product: temper(config, product, temperature, first), head_product(config, head, part))
        at_target = jnp.arange(logits.shape[-1]) == (cut(targets, index, columns) - first)[..., None]
        probs = jnp.exp(logits - cut(log_mass, index, columns)[..., None])
        (of_product,) = pull(cut(gradient, index, columns)[..., None] * (at_target - probs))
        # Both products as matrices lie in memory: the transposed forms are up to fifteen times slower on a CPU.
        flat = of_product.reshape(-1, logits.shape[-1]).astype(hidden.dtype)
        upright = jax.lax.optimization_barrier(part.reshape(-1, part.shape[-1]).T)
        more = jnp.matmul(upright, flat, preferred_element_type=jnp.float32)
        back = jnp.matmul(flat, kernel.T.astype(hidden.dtype)).reshape(part.shape)
        return of_kernel + more, put(of_hidden, back, index, columns)

    zeros = jnp.zeros(kernel.shape, jnp.float32), jnp.zeros_like(hidden)
    of_kernel, of_hidden = jax.lax.fori_loop(0, -(-counts.max() // columns), body, zeros)
    of_kernel = of_kernel.T if config.tie_embeddings else of_kernel
    return jax.tree.map(lambda x: of_kernel.astype(x.dtype), head), of_hidden, None, None


chunked.defvjp(chunked_forward, chunked_backward)


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
    mesh, axis = jax.sharding.get_abstract_mesh(), vocabulary_axis(config)
    length = hidden.shape[1]
    rows = P(None) if mesh.empty else fit(P(ROWS), targets.shape[:1], mesh)
    local_rows = targets.shape[0] // (row_shards(mesh) if rows[0] else 1)
    counts = jnp.full(targets.shape[:1], length) if counts is None else counts
    columns = max(1, min(length, chunk_tokens // local_rows))
    pad = -length % columns
    wide = lambda x: jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    run = partial(chunked, config, temperature, axis, columns, entropy)
    head = head_of(config, params)
    if not mesh.empty:
        of_head = jax.tree_util.tree_map_with_path(
            lambda path, leaf: fit(spec_of(path_name(path), gathered=True), leaf.shape, mesh), head)
        run = jax.shard_map(run, in_specs=(of_head, rows, rows, rows), out_specs=(rows, rows), check_vma=False)
    return tuple(x[:, :length] for x in run(head, wide(hidden), wide(targets), counts))


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
