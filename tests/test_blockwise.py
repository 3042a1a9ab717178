"""Blockwise attention equals `plain_attention` in values and gradients, skips blocks, and needs linear memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec

from grpo_jax.model import blockwise
from grpo_jax.model.mask import NO_WINDOW, attention_mask, plain_attention
from grpo_jax.types import Segments


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK_SIZE", 8)


def causal_segments(length: int) -> Segments:
    """Returns a single row that holds one prompt without completions."""
    ones = np.ones((1, length), np.int32)
    return Segments(np.arange(length, dtype=np.int32) * ones, ones, 0 * ones)


def packed_segments(length: int, rows: int = 1, *, shuffled: bool = True) -> Segments:
    """Returns rows of padding, then prompts of random lengths with up to three completions each.

    With `shuffled`, the columns are in random order.
    """
    rng = np.random.default_rng(0)
    packed = []
    for _ in range(rows):
        tokens, prompt, completion = [(0, 0, 0)] * rng.integers(2, 5), 0, 0
        while len(tokens) < length:
            prompt, prompt_length = prompt + 1, rng.integers(2, 9)
            tokens += [(position, prompt, 0) for position in range(prompt_length)]
            for _ in range(rng.integers(0, 4)):
                completion += 1
                tokens += [(prompt_length + i, prompt, completion) for i in range(rng.integers(1, 9))]
        tokens = np.asarray(tokens[:length])
        packed.append(rng.permutation(tokens) if shuffled else tokens)
    return Segments(*np.asarray(packed, np.int32).transpose(2, 0, 1))


def take_columns(segments: Segments, columns: slice) -> Segments:
    return jax.tree.map(lambda x: x[:, columns], segments)


def random_inputs(queries: Segments, keys: Segments, heads=(2, 2), widths=(4, 4), dtype=jnp.float32):
    """Returns q, keys, values and a cotangent of the output; q is scaled up so that the softmax is far from uniform."""
    (rows, length), num_keys = queries.prompt.shape, keys.prompt.shape[1]
    (num_heads, num_kv_heads), (key_width, value_width) = heads, widths
    shapes = (
        (rows, length, num_heads, key_width),
        (rows, num_kv_heads, key_width, num_keys),
        (rows, num_kv_heads, num_keys, value_width),
        (rows, length, num_heads, value_width),
    )
    rng = np.random.default_rng(1)
    return [
        (scale * rng.standard_normal(shape)).astype(dtype) for scale, shape in zip((3, 1, 1, 1), shapes, strict=True)
    ]


def blockwise_with_plan(q, keys, values, queries, key_segments, window, **options):
    plan = blockwise.plan_blocks(queries, key_segments, window)
    return blockwise.blockwise_attention(q, keys, values, queries, key_segments, window, plan, **options)


def reference(q, keys, values, queries, key_segments, window, **options):
    """`plain_attention`, except that the output of queries that attend to no key is zero."""
    mask = attention_mask(queries, key_segments, window)
    return jnp.where(mask.any(-1)[..., None, None], plain_attention(q, keys, values, mask, **options), 0)


def with_gradients(attend, **options):
    def out_and_gradients(q, keys, values, dout, *rest):
        out, vjp = jax.vjp(lambda *x: attend(*x, *rest, divisor=1.7, **options), q, keys, values)
        return out, *vjp(dout)

    return out_and_gradients


jitted_with_gradients = jax.jit(with_gradients(blockwise_with_plan))  # shared, so that equal shapes compile once


def check_against_reference(
    queries, keys=None, window=NO_WINDOW, *, softcap=0.0, tolerance=1e-5, traced_window=False, **shapes
):
    keys = queries if keys is None else keys

    def both(q, k, v, dout, queries, keys, window):
        dout = jnp.where(attention_mask(queries, keys, window).any(-1)[..., None, None], dout, 0)
        return [
            with_gradients(attend, softcap=softcap)(q, k, v, dout, queries, keys, window)
            for attend in (blockwise_with_plan, reference)
        ]

    compiled = jax.jit(both, static_argnums=() if traced_window else 6)
    got, want = compiled(*random_inputs(queries, keys, **shapes), queries, keys, window)
    for name, x, y in zip(("out", "dq", "dkeys", "dvalues"), got, want, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max(), name


def test_a_shuffled_packed_row_with_grouped_heads_matches_the_reference():
    check_against_reference(packed_segments(45), heads=(6, 2))


def test_rows_that_need_different_blocks_match_the_reference():
    check_against_reference(packed_segments(40, rows=3, shuffled=False), heads=(3, 1))


def test_a_causal_row_with_traced_window_and_wider_values_matches_the_reference():
    check_against_reference(causal_segments(37), window=11, traced_window=True, widths=(4, 7))


def test_fewer_queries_than_keys_with_softcap_and_constant_window_match_the_reference():
    tokens = packed_segments(45)
    check_against_reference(take_columns(tokens, slice(9, 30)), tokens, window=7, softcap=2.0)


def test_bfloat16_matches_the_reference():
    check_against_reference(packed_segments(45, rows=2), heads=(6, 2), dtype=jnp.bfloat16, tolerance=0.03)


def test_matmuls_take_bfloat16_and_accumulate_in_float32():
    tokens, dtypes = packed_segments(16), []

    def collect(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                dtypes.append(tuple(str(x.aval.dtype) for x in (*equation.invars, *equation.outvars)))
            for inner in jaxprs_in_params(equation.params):
                collect(inner)

    inputs = random_inputs(tokens, tokens, dtype=jnp.bfloat16)
    collect(jax.make_jaxpr(with_gradients(blockwise_with_plan))(*inputs, tokens, tokens, NO_WINDOW).jaxpr)
    assert dtypes == [("bfloat16", "bfloat16", "float32")] * 7  # two forward, five backward


def test_queries_without_keys_have_zero_output_and_no_gradient():
    tokens = packed_segments(32)
    padding = np.asarray(tokens.prompt == 0)
    inputs = random_inputs(tokens, tokens)
    out, dq, dkeys, dvalues = jitted_with_gradients(*inputs, tokens, tokens, NO_WINDOW)
    assert padding.any() and all(np.isfinite(x).all() for x in (out, dq, dkeys, dvalues))
    assert not out[padding].any() and not dq[padding].any()
    assert not np.moveaxis(dkeys, -1, 1)[padding].any() and not np.moveaxis(dvalues, 2, 1)[padding].any()
    assert out[~padding].all()


def test_nan_in_skipped_blocks_does_not_spread():
    """Two prompts of two blocks each: NaN in the keys and values of the second does not reach the first."""
    tokens = causal_segments(32)
    tokens = tokens._replace(prompt=1 + tokens.position // 16, position=tokens.position % 16)
    assert int(blockwise.plan_blocks(tokens, tokens, NO_WINDOW).num_needed.sum()) == 6  # of 16 pairs of blocks
    q, keys, values, dout = random_inputs(tokens, tokens)
    first = np.arange(32) < 16
    nan_keys, nan_values = np.where(first, keys, np.nan), np.where(first[:, None], values, np.nan)
    clean = jitted_with_gradients(q, keys, values, dout, tokens, tokens, NO_WINDOW)
    with_nan = jitted_with_gradients(q, nan_keys, nan_values, dout, tokens, tokens, NO_WINDOW)
    for got, want, axis in zip(with_nan, clean, (1, 1, 3, 2), strict=True):
        np.testing.assert_array_equal(np.compress(first, got, axis), np.compress(first, want, axis))
    assert np.isnan(with_nan[0][:, ~first]).all()


@pytest.mark.parametrize("window", [NO_WINDOW, 6])
def test_plan_holds_exactly_the_blocks_with_a_visible_key(window):
    keys = jax.tree.map(jnp.asarray, packed_segments(61, rows=2, shuffled=False))
    queries = take_columns(keys, slice(13, 50))
    mask = np.pad(attention_mask(queries, keys, window), ((0, 0), (0, 3), (0, 3)))
    needed = mask.reshape(2, 5, 8, 8, 8).any(axis=(0, 2, 4))
    plan = jax.device_get(blockwise.plan_blocks(queries, keys, window))
    np.testing.assert_array_equal(plan.num_needed, needed.sum(1))
    for order, num_needed, row in zip(plan.order, plan.num_needed, needed, strict=True):
        assert sorted(order) == list(range(8)) and set(order[:num_needed]) == set(np.flatnonzero(row))
    assert needed.sum() < needed.size / 2


@pytest.mark.slow
def test_scanned_rematerialized_layers_in_shard_map_match_the_reference():
    """Rows and heads are sharded. shard_map checks along which mesh axes the carry of each loop varies."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tokens = packed_segments(20, rows=2)
    inputs = random_inputs(tokens, tokens, heads=(4, 2))

    def gradient_of_layers(attend):
        def gradient(q, keys, values, dout, tokens, window):
            @jax.checkpoint
            def layer(q):
                return q + attend(q, keys, values, tokens, tokens, window, divisor=2.0)

            def loss(q):
                return jnp.vdot(jax.lax.scan(lambda q, _: (layer(q), None), q, length=2)[0], dout)

            return jax.grad(loss)(q)

        return gradient

    token, key = PartitionSpec("data", None, "tensor"), PartitionSpec("data", "tensor")
    specs = token, key, key, token, PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(gradient_of_layers(blockwise_with_plan), mesh=mesh, in_specs=specs, out_specs=token)
    got, want = (jax.jit(f)(*inputs, tokens, jnp.int32(9)) for f in (sharded, gradient_of_layers(reference)))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_memory_stays_below_that_of_a_mask(monkeypatch):
    """No temporary has size [L, L], not even as booleans."""
    monkeypatch.setattr(blockwise, "BLOCK_SIZE", 32)
    length = 1024
    tokens = causal_segments(length)
    inputs = *random_inputs(tokens, tokens), tokens, tokens, NO_WINDOW
    compiled = jax.jit(with_gradients(blockwise_with_plan)).lower(*inputs).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length**2
