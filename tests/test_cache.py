"""The kernel that writes a token into the KV cache equals XLA's scatter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.model import cache as cache_module
from grpo_jax.model.cache import KV, write_cache, write_token
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
