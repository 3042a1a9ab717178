"""The KV cache that decoding attends to, writing a token into it, and copying a prompt into it.

Column c of a row's cache holds the token at position c. Rows are at different positions, so a token is written into a
different column of each row. XLA does that in place on CPUs and GPUs. On TPUs it would copy the whole cache into
another layout and back, so a kernel writes there: of every row it reads and writes only the tiles that hold the column.
Every kernel that changes the cache keeps it in HBM; otherwise XLA would move parts of it to VMEM and back.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from grpo_jax.parallel.mesh import ROW_AXES, drop_indivisible_axes, mesh_platform, shard_map_on_mesh

LANES, SUBLANES = 128, 8  # of a tile of a TPU's memory, to which arrays are padded
BATCH_BYTES = 2**22  # tiles that are copied at the same time
BATCH_ROWS = 256  # most rows at the same time; each needs a semaphore, of which a chip has fewer than 512


class KV(NamedTuple):
    """Cached keys and values of one layer, or of several layers stacked.

    Keys are stored after RoPE, with the columns last, which is the layout that their product with the queries needs.
    With latent attention K is 1: `v` holds the compressed vectors and `k` the rotary part of the key.
    """

    k: Float[Array, "*layers N K E C"]
    v: Float[Array, "*layers N K C _"]


def write_cache(cache: KV, new: KV, columns: Int[Array, "N L"]) -> KV:
    """Returns the cache with L new tokens per row written into `columns`."""
    if mesh_platform() == "tpu" and columns.shape[1] == 1:
        return write_token(cache, new, columns[:, 0])

    def write_row(cache, new, columns):
        return KV(cache.k.at[:, :, columns].set(new.k), cache.v.at[:, columns].set(new.v))

    return jax.vmap(write_row)(cache, new, columns)  # vmap shows the partitioner that rows are independent


def copy_prompt(cache: KV, prompts: KV, slot: Int[Array, ""], prompt: Int[Array, ""]) -> KV:
    """Copies the columns of one of the `prompts` [1, P, ...] to the beginning of a slot of the cache [1, M, ...].

    On a mesh, call it for the rows of one shard.
    """
    if mesh_platform() == "tpu":
        return copy_prompt_in_place(cache, prompts, slot, prompt)

    def copy(cache, prompts):
        one = jax.lax.dynamic_slice_in_dim(prompts, prompt, 1, axis=1)
        return jax.lax.dynamic_update_slice(cache, one, (0, slot, 0, 0, 0))

    return jax.tree.map(copy, cache, prompts)


def copy_prompt_in_place(cache: KV, prompts: KV, slot, prompt, *, interpret: bool = False) -> KV:
    """Computes `copy_prompt` with a kernel, so that the cache keeps the place and layout that `write_token` needs."""

    def copy(cache, prompts, indices):
        keys = copy_tiles(cache.k[0], prompts.k[0], indices, axis=3, interpret=interpret)[None]
        if cache.v.shape[-1] % LANES == 0:
            return KV(keys, copy_tiles(cache.v[0], prompts.v[0], indices, axis=2, interpret=interpret)[None])
        return KV(keys, copy_tiles(cache.v[0].mT, prompts.v[0].mT, indices, axis=3, interpret=interpret).mT[None])

    args, mesh = (cache, prompts, jnp.stack([slot, prompt])), jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return copy(*args)
    spec = drop_indivisible_axes(P(None, None, "tensor"), cache.k.shape, mesh)
    specs = dict(in_specs=(spec, spec, P()), out_specs=spec)
    return jax.shard_map(copy, **specs, axis_names={"tensor"}, check_vma=False)(*args)


def write_token(cache: KV, new: KV, columns: Int[Array, " N"], *, interpret: bool = False) -> KV:
    """Computes `write_cache` for one token per row, in place on a TPU.

    Args:
        cache: The cache.
        new: Keys and values of the tokens, with one column.
        columns: The column of each row, at least 0. Nothing is written into columns that do not exist.
        interpret: Whether to interpret the kernel operation by operation, which works on any device if whole tiles make
            up the cache.
    """

    def write(cache, new, columns):
        keys = write_tiles(cache.k, new.k[..., 0], columns, axis=3, interpret=interpret)
        if cache.v.shape[-1] % LANES == 0:
            return KV(keys, write_tiles(cache.v, new.v[:, :, 0], columns, axis=2, interpret=interpret))
        # Narrow values are stored with the columns last, where they fill whole lanes; transposing them costs nothing.
        return KV(keys, write_tiles(cache.v.mT, new.v[:, :, 0], columns, axis=3, interpret=interpret).mT)

    mesh = jax.sharding.get_abstract_mesh()
    spec = P() if mesh.empty else drop_indivisible_axes(P(ROW_AXES, "tensor"), cache.k.shape, mesh)
    return shard_map_on_mesh(write, (spec, spec, P(*spec[:1])), spec)(cache, new, columns)


def write_tiles(
    cache: Float[Array, "N K _ _"],
    new: Float[Array, "N K E"],
    columns: Int[Array, " N"],
    *,
    axis: int,
    interpret: bool,
) -> Float[Array, "N K _ _"]:
    """Writes one vector per row and head into a cache whose columns are along `axis`, which is 2 or 3."""
    rows, heads, width = new.shape
    size = min(LANES if axis == 3 else SUBLANES, cache.shape[axis])
    tile = (heads, width, size) if axis == 3 else (heads, size, width)
    batch = min(rows, BATCH_ROWS, max(1, BATCH_BYTES // (math.prod(tile) * cache.dtype.itemsize)))

    def write(columns, new, old, out, tiles, semaphores):
        first = pl.program_id(0) * batch

        def tile_start(row):
            return jnp.minimum(columns[row], cache.shape[axis] - 1) // size * size

        def copy(i, reverse):
            row = first + i
            # A cache of a single tile may be narrower than what offsets must be multiples of.
            span = slice(None) if size == cache.shape[axis] else pl.ds(pl.multiple_of(tile_start(row), size), size)
            there = out.at[(row, slice(None), slice(None), span) if axis == 3 else (row, slice(None), span)]
            ends = (tiles.at[i], there) if reverse else (there, tiles.at[i])
            return pltpu.make_async_copy(*ends, semaphores.at[i])

        def change(i, _):
            copy(i, False).wait()
            row = first + i
            value = new[row].astype(jnp.float32)[:, None]
            if axis == 3:  # turn the vectors, which lie along the lanes, into columns
                index = [jax.lax.broadcasted_iota(jnp.int32, (1, width, width), side) for side in (1, 2)]
                value = jnp.sum(jnp.where(index[0] == index[1], value, 0), axis=-1, keepdims=True)
            written = tile_start(row) + jax.lax.broadcasted_iota(jnp.int32, tile, axis - 1) == columns[row]
            tiles[i] = jnp.where(written, value, tiles[i].astype(jnp.float32)).astype(tiles.dtype)
            copy(i, True).start()

        count = jnp.minimum(batch, rows - first)
        for each in (lambda i, _: copy(i, False).start(), change, lambda i, _: copy(i, True).wait()):
            jax.lax.fori_loop(0, count, each, None)

    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(-(-rows // batch),),
        in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM), hbm],
        out_specs=hbm,
        scratch_shapes=[pltpu.VMEM((batch, *tile), cache.dtype), pltpu.SemaphoreType.DMA((batch,))],
    )
    moved = 2 * rows * math.prod(tile) * cache.dtype.itemsize + new.size * new.dtype.itemsize
    return pl.pallas_call(
        write,
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
        out_shape=pltpu.HBM(cache.shape, cache.dtype),
        grid_spec=grid,
        input_output_aliases={2: 0},
        # The last tile may reach into the padding of the cache.
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        interpret=interpret,
    )(columns, new, cache)


def copy_tiles(
    cache: Float[Array, "M K _ _"],
    prompts: Float[Array, "P K _ _"],
    indices: Int[Array, "2"],
    *,
    axis: int,
    interpret: bool,
) -> Float[Array, "M K _ _"]:
    """Copies row indices[1] of `prompts` into row indices[0] of a cache whose columns are along `axis`, 2 or 3."""
    tile = (1, *prompts.shape[1:axis], LANES, *prompts.shape[axis + 1 :])

    def copy(indices, prompts_tile, old, out):
        column = pl.program_id(0) * LANES + jax.lax.broadcasted_iota(jnp.int32, tile, axis)
        # What lies past the prompt's end may be NaN, which stays NaN when attention multiplies it by 0.
        out[...] = jnp.where(column < prompts.shape[axis], prompts_tile[...], 0).astype(out.dtype)

    def tile_at(position):
        return lambda step, indices: (indices[position], 0, *((step, 0) if axis == 2 else (0, step)))

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(-(-prompts.shape[axis] // LANES),),
        in_specs=[pl.BlockSpec(tile, tile_at(1)), pl.BlockSpec(memory_space=pltpu.HBM)],
        out_specs=pl.BlockSpec(tile, tile_at(0)),
    )
    moved = 2 * math.prod(prompts.shape[1:]) * cache.dtype.itemsize
    return pl.pallas_call(
        copy,
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
        out_shape=pltpu.HBM(cache.shape, cache.dtype),
        grid_spec=grid,
        input_output_aliases={2: 0},
        interpret=interpret,
    )(indices, prompts, cache)
