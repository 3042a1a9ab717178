"""The kernel that writes a token into the KV cache equals XLA's scatter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.model import cache as cache_module
from grpo_jax.model.cache import KV, copy_prompt, copy_prompt_in_place, write_cache, write_token
from grpo_jax.parallel.mesh import make_mesh

COLUMNS = 256


def random_cache(rows: int, heads: int, key_width: int, value_width: int, dtype=jnp.float32):
    """Returns a cache, the keys and values of a token for each row, and a column for each row."""
    shapes = [(rows, heads, key_width, size) for size in (COLUMNS, 1)]
    shapes += [(rows, heads, size, value_width) for size in (COLUMNS, 1)]
    keys = jax.random.split(jax.random.key(0), 4)
    k, new_k, v, new_v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    edges = jnp.asarray([0, COLUMNS - 1, 127, 128, 7, 8, COLUMNS])
    return KV(k, v), KV(new_k, new_v), jnp.resize(edges, rows)


@pytest.mark.parametrize(
    "heads, key_width, value_width, dtype",
    [(2, 16, 128, jnp.float32), (1, 16, 24, jnp.bfloat16), (2, 128, 128, jnp.bfloat16)],
    ids=["wide values", "narrow values", "bfloat16"],
)
def test_the_kernel_writes_what_xla_writes(monkeypatch, heads, key_width, value_width, dtype):
    """Seven rows, of which two are written at a time: in the first and last columns of tiles, and past the end."""
    monkeypatch.setattr(cache_module, "BATCH_BYTES", 2 * 128 * heads * key_width * jnp.dtype(dtype).itemsize)
    cache, new, columns = random_cache(7, heads, key_width, value_width, dtype)
    got = jax.jit(write_token, static_argnames="interpret")(cache, new, columns, interpret=True)
    want = jax.jit(write_cache)(cache, new, columns[:, None])
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert (got.k != cache.k).any() and (got.v != cache.v).any()


@pytest.mark.parametrize("heads", [2, 1])
def test_the_kernel_writes_the_rows_and_heads_of_each_shard(heads):
    """Two heads are split over tensor; one is not."""
    cache, new, columns = random_cache(4, heads, 16, 16)
    want = write_cache(cache, new, columns[:, None])
    with jax.set_mesh(make_mesh(1, 4, 2)):
        got = jax.jit(write_token, static_argnames="interpret")(cache, new, columns, interpret=True)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert ("tensor" in got.k.sharding.spec) == (heads == 2)


@pytest.mark.parametrize("heads, value_width, sizes", [(2, 24, (1, 1)), (2, 128, (4, 2)), (1, 24, (4, 2))])
@pytest.mark.parametrize("width", [160, 32])
def test_the_kernel_copies_a_prompt(heads, value_width, sizes, width):
    """Past the prompt's last column, the slot's columns are zeros to the end of a tile."""
    shards = sizes[0]
    cache, _, _ = random_cache(3 * shards, heads, 16, value_width)
    prompts = KV(cache.k[::-1, :, :, :width] + 1, cache.v[::-1, :, :width] + 1)
    cache, prompts = jax.tree.map(lambda x: x[None], (cache, prompts))
    mesh = make_mesh(1, *sizes, devices=jax.devices()[: shards * sizes[1]])

    def on_each_shard(copy, **options):
        by_row = jax.sharding.PartitionSpec(None, "fsdp")
        call = lambda cache, prompts: copy(cache, prompts, jnp.int32(1), jnp.int32(2), **options)  # noqa: E731
        rows = dict(in_specs=by_row, out_specs=by_row, axis_names={"data", "fsdp", "expert"}, check_vma=False)
        with jax.set_mesh(mesh):
            return jax.jit(jax.shard_map(call, **rows))(cache, prompts)

    got, want = on_each_shard(copy_prompt_in_place, interpret=True), on_each_shard(copy_prompt)
    end = -(-width // 128) * 128
    for x, y, axis in ((got.k, want.k, 4), (got.v, want.v, 3)):
        past = (jnp.arange(COLUMNS) >= width) & (jnp.arange(COLUMNS) < end)
        filled = jnp.expand_dims(past, tuple(i for i in range(5) if i != axis))
        in_slot = (jnp.arange(3 * shards) % 3 == 1)[:, None, None, None]
        np.testing.assert_array_equal(x, jnp.where(filled & in_slot, 0, y))
        assert (x != (cache.k if axis == 4 else cache.v)).any()
