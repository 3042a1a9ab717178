"""Digests of arrays, computed with a few integer operations per element on the devices or the host that hold them.

The bits of each element are mixed with its position in the array, and the results are summed modulo 2**32. The order of
a sum does not matter, so a digest does not depend on how an array is split over devices, blocks or processes. The mix
is a bijection for each position, so changing a single element always changes the digest. A digest has two such sums;
the probability that a larger change affects neither is about 2**-64.

Digests detect that storage or memory has changed an array. They do not protect against somebody who computes new ones.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# Odd, so that a multiplication by one of them modulo 2**32 is a bijection.
POSITION_FACTOR, FIRST_FACTOR, SECOND_FACTOR = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
HOST_WORDS = DEVICE_WORDS = 1 << 16  # words that are mixed at a time, so that they stay in the cache
OFFSETS = np.arange(HOST_WORDS, dtype=np.uint32) * np.uint32(POSITION_FACTOR)
SMALL = 1 << 20  # elements up to which an array is digested on the host, because compiling a program takes longer


def mix_words(words, offsets):
    """Mixes uint32 words with `offsets`, their positions times POSITION_FACTOR, in two ways. NumPy or JAX arrays."""
    mixed = words + offsets
    mixed = (mixed ^ (mixed >> np.uint32(16))) * np.uint32(FIRST_FACTOR)
    first = mixed ^ (mixed >> np.uint32(15))
    second = first * np.uint32(SECOND_FACTOR)
    return first, second ^ (second >> np.uint32(16))


def position_offsets(shape: tuple[int, ...], whole: tuple[int, ...], starts: list) -> jax.Array:
    """Returns the row-major positions of a part of an array, times POSITION_FACTOR.

    Args:
        shape: The shape of the part.
        whole: The shape of the whole array.
        starts: Where the part starts along each axis, as integers or uint32 scalars.
    """
    offsets, stride = jnp.zeros(shape, jnp.uint32), POSITION_FACTOR
    for axis in reversed(range(len(shape))):
        along = lax.broadcasted_iota(jnp.uint32, shape, axis) + starts[axis]
        offsets, stride = offsets + along * np.uint32(stride), stride * whole[axis] % 2**32
    return offsets


def sum_part(x: jax.Array, spec: P, shape: tuple[int, ...]) -> jax.Array:
    """Returns the digest of an array; this device holds its part `x`. Runs in `jax.shard_map`.

    Args:
        x: The part.
        spec: How the array is partitioned.
        shape: The shape of the array.
    """
    axes = [*spec, *[None] * (x.ndim - len(spec))]
    starts = [
        lax.axis_index(names).astype(jnp.uint32) * np.uint32(size) if names else np.uint32(0)
        for names, size in zip(axes, x.shape, strict=True)
    ]
    # The offset of an element is the sum of those of its row and its column, so few of them have to be computed.
    of_rows = position_offsets((*x.shape[:-1], 1), shape, [*starts[:-1], np.uint32(0)]).reshape(-1, 1)
    of_columns = position_offsets((1,) * (x.ndim - 1) + x.shape[-1:], shape, [*[0] * (x.ndim - 1), starts[-1]]).reshape(
        1, -1
    )
    matrix = x.reshape(-1, x.shape[-1])

    def mix_rows(start, count):
        # One block is reinterpreted at a time, because on a CPU XLA copies everything that it reinterprets.
        block = lax.dynamic_slice_in_dim(matrix, start, count)
        bits = block if x.dtype == bool else lax.bitcast_convert_type(block, f"uint{8 * x.dtype.itemsize}")
        return mix_words(bits.astype(jnp.uint32), lax.dynamic_slice_in_dim(of_rows, start, count) + of_columns)

    # Small blocks are summed elementwise, because XLA reduces a whole array slowly on a CPU.
    rows = min(len(matrix), max(1, DEVICE_WORDS // matrix.shape[1]))
    blocks, rest = divmod(len(matrix), rows)
    totals = lax.fori_loop(
        0,
        blocks,
        lambda block, totals: jax.tree.map(jnp.add, totals, mix_rows(block * rows, rows)),
        (jnp.zeros((rows, matrix.shape[1]), jnp.uint32),) * 2,
    )
    parts = (totals, mix_rows(blocks * rows, rest)) if rest else (totals,)
    sums = sum(jnp.stack([lane.sum(dtype=jnp.uint32) for lane in part]) for part in parts)
    names = [name for names in axes if names for name in (names if isinstance(names, tuple) else (names,))]
    return lax.psum(sums, names) if names else sums


@partial(jax.jit, static_argnames="sharding")
def sum_on_devices(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Returns the digest of an array with this sharding as uint32 [2]."""
    x = x if x.ndim else x[None]
    part = partial(sum_part, spec=sharding.spec, shape=x.shape)
    return jax.shard_map(part, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=P(), check_vma=False)(x)


def sum_on_host(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the digest of an array as uint32 [2], given consecutive blocks of it in row-major order."""
    total, position = np.zeros(2, np.uint32), 0
    for block in blocks:
        flat = np.ascontiguousarray(block).reshape(-1)
        words = flat.view(f"uint{8 * min(flat.dtype.itemsize, 4)}")
        for start in range(0, len(words), HOST_WORDS):
            part = words[start : start + HOST_WORDS].astype(np.uint32, copy=False)
            offsets = OFFSETS[: len(part)] + np.uint32((position + start) * POSITION_FACTOR % 2**32)
            total += [lane.sum(dtype=np.uint32) for lane in mix_words(part, offsets)]
        position += len(words)
    return total


def digest_text(sums: np.ndarray) -> str:
    """Returns a digest as 16 hexadecimal digits."""
    return "".join(f"{int(value):08x}" for value in sums)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by the names that Orbax gives them, such as `layers.0.attention.k.kernel`."""
    return ocp.tree.to_flat_dict(tree, sep=".")


def digest_arrays(tree: Any) -> dict[str, str]:
    """Returns the digest of each array of a tree by name. Every process must call it if arrays span processes."""

    def sums_of(x) -> np.ndarray | jax.Array:
        if not isinstance(x, jax.Array) or (x.size <= SMALL and x.is_fully_addressable):
            return sum_on_host([np.asarray(x)])
        return sum_on_devices(x, x.sharding)

    sums = jax.device_get({name: sums_of(x) for name, x in named_leaves(tree).items()})
    return {name: digest_text(digest) for name, digest in sums.items()}
