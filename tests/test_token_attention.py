"""The kernel of a GPU's decode step equals writing into the cache and plain attention."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.model import attention
from grpo_jax.model import token_attention as module
from grpo_jax.model.cache import KV, write_cache
from grpo_jax.model.decoder import hidden_states
from grpo_jax.model.mask import NO_WINDOW, attention_mask, plain_attention, single_sequence
from grpo_jax.model.token_attention import token_attention, token_attention_supports
from grpo_jax.parallel.mesh import make_mesh
from tests.tiny import CONFIG, params

COLUMNS = 200  # of two blocks of 128 columns, of which the second is not full
POSITIONS = [0, 1, 127, 128, 129, COLUMNS - 1, 60, 190]


def random_token(num_heads: int, num_kv_heads: int, width: int, dtype):
    """Returns queries, a new token and a cache for each of `POSITIONS`, and those positions."""
    rows = len(POSITIONS)
    shapes = [(rows, 1, num_heads, width)]
    shapes += [(rows, num_kv_heads, width, size) for size in (1, COLUMNS)]
    shapes += [(rows, num_kv_heads, size, width) for size in (1, COLUMNS)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    q, new_k, k, new_v, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    return 2 * q, KV(new_k, new_v), KV(k, v), jnp.asarray(POSITIONS)[:, None]


def expected_output(q, new, cache, position, window, divisor, softcap):
    """Returns what `token_attention` computes, in float32."""
    q, new, cache = jax.tree.map(lambda x: x.astype(jnp.float32), (q, new, cache))
    written = write_cache(cache, new, position)
    columns = single_sequence(jnp.broadcast_to(jnp.arange(COLUMNS), (len(POSITIONS), COLUMNS)))
    mask = attention_mask(single_sequence(position), columns, window)
    return plain_attention(q, *written, mask, divisor=divisor, softcap=softcap), written


def assert_same(got: KV, want: KV):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.float32(x), np.float32(y)), got, want)


run_kernel = jax.jit(partial(token_attention, interpret=True), static_argnames=("divisor", "softcap"))


@pytest.mark.parametrize(
    "num_heads, num_kv_heads, width, dtype, window, softcap, tolerance",
    [
        (9, 3, 64, jnp.bfloat16, NO_WINDOW, 0.0, 0.01),
        (4, 4, 16, jnp.float32, 50, 2.0, 1e-5),  # a window that begins in the first block or in the second
        (17, 1, 32, jnp.float32, 130, 0.0, 1e-5),  # more queries a key head than the smallest product has rows
    ],
)
def test_the_kernel_equals_plain_attention(num_heads, num_kv_heads, width, dtype, window, softcap, tolerance):
    q, new, cache, position = random_token(num_heads, num_kv_heads, width, dtype)
    want, written = expected_output(q, new, cache, position, window, 3.0, softcap)
    # What a slot's last sequence left in later columns must not matter, not even NaN.
    later = jnp.arange(COLUMNS) > position
    stale = KV(jnp.where(later[:, None, None], jnp.nan, cache.k), jnp.where(later[:, None, :, None], jnp.nan, cache.v))
    got, changed = run_kernel(q, new, stale, position, jnp.int32(window), divisor=3.0, softcap=softcap)
    assert got.dtype == dtype and np.abs(np.float32(got) - want).max() <= tolerance * np.abs(want).max()
    assert_same(changed, write_cache(stale, new, position))
    assert (np.float32(written.k) != np.float32(cache.k)).any()


def test_nothing_is_written_or_read_past_the_last_column():
    q, new, cache, position = random_token(4, 2, 16, jnp.float32)
    got, changed = run_kernel(q, new, cache, position + COLUMNS, jnp.int32(NO_WINDOW), divisor=1.0)
    assert_same(changed, cache)
    assert np.isfinite(got).all()


def test_each_shard_attends_to_its_own_rows_and_heads():
    q, new, cache, position = random_token(4, 2, 16, jnp.float32)
    want, written = expected_output(q, new, cache, position, NO_WINDOW, 1.0, 0.0)
    with jax.set_mesh(make_mesh(1, 4, 2)):
        got, changed = run_kernel(q, new, cache, position, jnp.int32(NO_WINDOW), divisor=1.0)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert_same(changed, written)
    assert "tensor" in got.sharding.spec and "tensor" in changed.k.sharding.spec


def test_layers_attend_with_the_kernel(monkeypatch):
    """One layer with a sliding window and one without, at the positions of a cache that a prompt has filled."""
    layers = CONFIG.layers[0], replace(CONFIG.layers[1], window=5)
    model_cfg, rows, columns = replace(CONFIG, layers=layers, score_softcap=3.0), 3, 16
    weights, tokens = params(), jax.random.randint(jax.random.key(1), (rows, columns), 0, 40)
    position = jnp.broadcast_to(jnp.arange(columns), tokens.shape)
    run = jax.jit(partial(hidden_states, model_cfg))
    want, cache = run(weights, tokens, single_sequence(position))
    last = jnp.asarray([[4], [15], [9]])
    calls = []

    def interpreted(*args, **options):
        calls.append(options)
        return token_attention(*args, **options, interpret=True)

    monkeypatch.setattr(attention, "token_attention", interpreted)
    monkeypatch.setattr(attention, "token_attention_supports", lambda *shapes: True)
    token = jnp.take_along_axis(tokens, last, axis=1)
    got, _ = run(weights, token, single_sequence(last), cache)
    assert calls
    np.testing.assert_allclose(got, jnp.take_along_axis(want, last[..., None], axis=1), atol=2e-5)


@pytest.mark.parametrize(
    "platform, changed, shape, tensor, supported",
    [
        ("gpu", {}, (32, 1, 1536), 1, True),
        ("gpu", dict(attention="plain"), (32, 1, 1536), 1, False),
        ("gpu", dict(compute_dtype="float32"), (32, 1, 1536), 1, False),
        ("gpu", dict(head_dim=96), (32, 1, 1536), 1, False),
        ("gpu", {}, (32, 2, 1536), 1, False),
        ("gpu", {}, (32, 1, 1532), 1, False),
        ("gpu", {}, (16, 1, 1536), 1, False),  # too few programs
        ("gpu", {}, (256, 1, 1536), 2, False),  # three key heads on two devices
        ("tpu", {}, (32, 1, 1536), 1, False),
        ("cpu", {}, (32, 1, 1536), 1, False),
    ],
)
def test_shapes_that_the_kernel_is_used_for(monkeypatch, platform, changed, shape, tensor, supported):
    monkeypatch.setattr(module, "mesh_platform", lambda: platform)
    model_cfg = replace(CONFIG, **dict(num_kv_heads=3, head_dim=64, compute_dtype="bfloat16") | changed)
    with jax.set_mesh(make_mesh(1, 1, tensor, devices=jax.devices()[:tensor])):
        assert token_attention_supports(model_cfg, *shape) is supported
