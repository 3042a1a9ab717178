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
from grpo_jax.model import head_of, hidden_states, token_logits
from grpo_jax.types import Packed

CHUNK_TOKENS = 1024  # of one shard, whose logits exist at a time


def vocabulary_axis(config: ModelConfig) -> str | None:
    """The mesh axis that splits the head's columns inside `score_hidden`, if one does."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or config.vocab_size % mesh.shape["tensor"] else "tensor"


def chunk_logits(config: ModelConfig, temperature, axis, head, hidden):
    """The logits of a chunk, of this device's part of the vocabulary; and the part's first id."""
    width = jax.tree.leaves(head)[0].size // config.hidden_size
    first = jax.lax.axis_index(axis) * width if axis else 0
    return token_logits(config, head, hidden, temperature, first), first


def total(x, axis):
    """The sum over the devices that share the vocabulary."""
    return jax.lax.psum(x, axis) if axis else x


def cut(x, index, columns):
    """Chunk `index` of x[N, S, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, index * columns, columns, axis=1)


def put(x, part, index, columns):
    """x[N, S, ...] with another chunk `index`."""
    return jax.lax.dynamic_update_slice_in_dim(x, part, index * columns, axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def chunked(config: ModelConfig, temperature, axis, columns, entropy, head, hidden, targets, counts):
    """`score_hidden` on one device: of columns below counts[n]; S is a multiple of the columns of a chunk."""
    return chunked_forward(config, temperature, axis, columns, entropy, head, hidden, targets, counts)[0]


def chunked_forward(config, temperature, axis, columns, entropy, head, hidden, targets, counts):
    """The result, and what the backward pass needs."""

    def body(index, found):
        logits, first = chunk_logits(config, temperature, axis, head, cut(hidden, index, columns))
        highest = jnp.max(logits, axis=-1)
        highest = jax.lax.pmax(highest, axis) if axis else highest
        powers = jnp.exp(logits - highest[..., None])
        mass = total(jnp.sum(powers, axis=-1), axis)
        log_mass = highest + jnp.log(mass)
        local = cut(targets, index, columns) - first
        here = (local >= 0) & (local < logits.shape[-1])
        chosen = jnp.take_along_axis(logits, jnp.clip(local, 0, logits.shape[-1] - 1)[..., None], axis=-1)[..., 0]
        parts = [total(jnp.where(here, chosen, 0.0), axis) - log_mass, log_mass]
        if entropy:  # -inf logits belong to rows that are no token: they have probability 0 and add 0
            mean = jnp.sum(powers * jnp.where(jnp.isneginf(logits), 0.0, logits), axis=-1)
            parts.append(log_mass - total(mean, axis) / mass)
        return tuple(put(x, part, index, columns) for x, part in zip(found, parts))

    zeros = jnp.zeros(targets.shape, jnp.float32)
    logps, log_mass, *rest = jax.lax.fori_loop(0, -(-counts.max() // columns), body, (zeros,) * (2 + entropy))
    return (logps, rest[0] if entropy else zeros), (head, hidden, targets, counts, log_mass)


def chunked_backward(config, temperature, axis, columns, entropy, saved, gradient):
    """d log pi(target) / d logits is 1 at the target, less pi; the entropy, a metric, has no gradient."""
    head, hidden, targets, counts, log_mass = saved
    gradient = total(gradient[0], axis)  # each device of the axis was handed its share

    def body(index, found):
        of_head, of_hidden = found
        score = lambda head, hidden: chunk_logits(config, temperature, axis, head, hidden)
        logits, pull, first = jax.vjp(score, head, cut(hidden, index, columns), has_aux=True)
        at_target = jnp.arange(logits.shape[-1]) == (cut(targets, index, columns) - first)[..., None]
        probs = jnp.exp(logits - cut(log_mass, index, columns)[..., None])
        moved = cut(gradient, index, columns)[..., None] * (at_target - probs)
        more, part = pull(moved)
        return (jax.tree.map(lambda a, b: a + b.astype(a.dtype), of_head, more), put(of_hidden, part, index, columns))

    zeros = (jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), head), jnp.zeros_like(hidden))
    of_head, of_hidden = jax.lax.fori_loop(0, -(-counts.max() // columns), body, zeros)
    return jax.tree.map(lambda a, x: a.astype(x.dtype), of_head, head), of_hidden, None, None


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
