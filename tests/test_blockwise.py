"""Attention block by block is `attend.plain`: values, gradients, what it skips and what it holds."""

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
    monkeypatch.setattr(blockwise, "BLOCK", 8)


def causal(length: int) -> Segments:
    """One prompt without completions, in one row."""
    ones = np.ones((1, length), np.int32)
    return Segments(np.arange(length, dtype=np.int32) * ones, ones, 0 * ones)


def packed(length: int, rows: int = 1, *, shuffled: bool = True) -> Segments:
    """Prompts of random lengths with their completions, padding in between; the columns in random order."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(rows):
        tokens, prompt, answer = [(0, 0, 0)] * rng.integers(2, 5), 0, 0
        while len(tokens) < length:
            prompt, start = prompt + 1, rng.integers(2, 9)
            tokens += [(position, prompt, 0) for position in range(start)]
            for _ in range(rng.integers(0, 4)):
                answer += 1
                tokens += [(start + position, prompt, answer) for position in range(rng.integers(1, 9))]
        tokens = np.asarray(tokens[:length])
        made.append(rng.permutation(tokens) if shuffled else tokens)
    return Segments(*np.asarray(made, np.int32).transpose(2, 0, 1))


def columns(segments: Segments, part: slice) -> Segments:
    return jax.tree.map(lambda x: x[:, part], segments)


def draw(queries: Segments, keys: Segments, heads=(2, 2), widths=(4, 4), dtype=jnp.float32):
    """q, keys, values and a cotangent of the output; scores differ enough for a softmax to matter."""
    (rows, length), count = queries.prompt.shape, keys.prompt.shape[1]
    shapes = (
        (rows, length, heads[0], widths[0]),
        (rows, heads[1], widths[0], count),
        (rows, heads[1], count, widths[1]),
        (rows, length, heads[0], widths[1]),
    )
    rng = np.random.default_rng(1)
    return [(scale * rng.standard_normal(shape)).astype(dtype) for scale, shape in zip((3, 1, 1, 1), shapes)]


def attend(q, keys, values, queries, key_segments, window, **options):
    plan = blockwise.plan_blocks(queries, key_segments, window)
    return blockwise.blockwise_attention(q, keys, values, queries, key_segments, window, plan, **options)


def defined(q, keys, values, queries, key_segments, window, **options):
    """`plain`, but zeros for queries that see nothing."""
    mask = attention_mask(queries, key_segments, window)
    return jnp.where(mask.any(-1)[..., None, None], plain_attention(q, keys, values, mask, **options), 0)


def value_and_gradients(function, **options):
    def both(q, keys, values, dout, *rest):
        out, back = jax.vjp(lambda *x: function(*x, *rest, divisor=1.7, **options), q, keys, values)
        return out, *back(dout)

    return both


def compare(queries, keys=None, window=NO_WINDOW, *, cap=0.0, tolerance=1e-5, traced=False, **shapes):
    keys = queries if keys is None else keys

    def results(q, k, v, dout, queries, keys, window):
        dout = jnp.where(attention_mask(queries, keys, window).any(-1)[..., None, None], dout, 0)
        return [
            value_and_gradients(function, cap=cap)(q, k, v, dout, queries, keys, window)
            for function in (attend, defined)
        ]

    compiled = jax.jit(results, static_argnums=() if traced else 6)
    ours, plains = compiled(*draw(queries, keys, **shapes), queries, keys, window)
    for name, got, want in zip(("out", "dq", "dkeys", "dvalues"), ours, plains):
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max(), name


def test_causal():
    compare(causal(32))


def test_packed_segments_in_any_order_with_shared_key_heads():
    compare(packed(45), heads=(6, 2))


def test_rows_that_need_different_blocks():
    compare(packed(40, rows=3, shuffled=False), heads=(3, 1))


def test_traced_window():
    compare(causal(37), window=11, traced=True)


def test_cap_and_constant_window():
    compare(packed(24), window=7, cap=2.0)


def test_values_of_another_width():
    compare(causal(20), widths=(4, 7))


def test_queries_are_a_part_of_the_tokens():
    tokens = packed(45)
    compare(columns(tokens, slice(9, 30)), tokens)


def test_bfloat16():
    compare(packed(45, rows=2), heads=(6, 2), dtype=jnp.bfloat16, tolerance=0.03)


def test_products_take_the_queries_dtype_and_give_float32():
    tokens, found = packed(16), []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(tuple(str(x.aval.dtype) for x in (*equation.invars, *equation.outvars)))
            for inner in jaxprs_in_params(equation.params):
                walk(inner)

    drawn = draw(tokens, tokens, dtype=jnp.bfloat16)
    walk(jax.make_jaxpr(value_and_gradients(attend))(*drawn, tokens, tokens, NO_WINDOW).jaxpr)
    assert found == [("bfloat16", "bfloat16", "float32")] * 7  # two forward, five backward


def test_queries_that_see_nothing_get_zeros_and_no_gradient():
    tokens = packed(45)
    padding = np.asarray(tokens.prompt == 0)
    drawn = draw(tokens, tokens)
    out, dq, dkeys, dvalues = jax.jit(value_and_gradients(attend))(*drawn, tokens, tokens, NO_WINDOW)
    assert padding.any() and all(np.isfinite(x).all() for x in (out, dq, dkeys, dvalues))
    assert not out[padding].any() and not dq[padding].any()
    assert not np.moveaxis(dkeys, -1, 1)[padding].any() and not np.moveaxis(dvalues, 2, 1)[padding].any()
    assert out[~padding].all()


@pytest.mark.parametrize("window", [NO_WINDOW, 6])
def test_plan_is_exact(window):
    keys = packed(61, rows=2, shuffled=False)
    queries = columns(keys, slice(13, 50))
    mask = np.pad(attention_mask(queries, keys, window), ((0, 0), (0, 3), (0, 3)))
    needs = mask.reshape(2, 5, 8, 8, 8).any(axis=(0, 2, 4))
    made = blockwise.plan_blocks(queries, keys, window)
    np.testing.assert_array_equal(made.count, needs.sum(1))
    for order, count, need in zip(np.asarray(made.order), np.asarray(made.count), needs):
        assert sorted(order) == list(range(8)) and set(order[:count]) == set(np.flatnonzero(need))
    assert needs.sum() < needs.size / 2


def test_unneeded_blocks_are_not_touched():
    """Two prompts of two blocks each. What the second one's keys hold, NaN even, cannot reach the first one."""
    tokens = causal(32)
    tokens = tokens._replace(prompt=1 + tokens.position // 16, position=tokens.position % 16)
    assert int(blockwise.plan_blocks(tokens, tokens, NO_WINDOW).count.sum()) == 6  # of 16 pairs
    q, keys, values, dout = draw(tokens, tokens)
    spoilt = np.where(np.arange(32) < 16, keys, np.nan), np.where(np.arange(32)[:, None] < 16, values, np.nan)
    function = jax.jit(value_and_gradients(attend))
    clean = function(q, keys, values, dout, tokens, tokens, NO_WINDOW)
    found = function(q, *spoilt, dout, tokens, tokens, NO_WINDOW)
    first = lambda out, dq, dkeys, dvalues: (out[:, :16], dq[:, :16], dkeys[..., :16], dvalues[:, :, :16])
    for got, want in zip(first(*found), first(*clean)):
        np.testing.assert_array_equal(got, want)
    assert np.isnan(found[0][:, 16:]).all()


def test_in_a_scan_of_checkpointed_layers_on_shards():
    """Rows and heads on devices. The types of a loop's carry then tell along which of the mesh's axes they vary."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tokens = packed(20, rows=2)
    drawn = draw(tokens, tokens, heads=(4, 2))

    def layers(attend):
        def gradients(q, keys, values, dout, tokens, window):
            layer = jax.checkpoint(lambda q: q + attend(q, keys, values, tokens, tokens, window, divisor=2.0))
            total = lambda q: jnp.vdot(jax.lax.scan(lambda q, _: (layer(q), None), q, length=2)[0], dout)
            return jax.grad(total)(q)

        return gradients

    token, key = PartitionSpec("data", None, "tensor"), PartitionSpec("data", "tensor")
    specs = token, key, key, token, PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(layers(attend), mesh=mesh, in_specs=specs, out_specs=token)
    got, want = (jax.jit(f)(*drawn, tokens, jnp.int32(9)) for f in (sharded, layers(defined)))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_memory_is_linear_in_the_length(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 32)  # smaller, and of such short rows the plan would be the largest

    def temporaries(length):
        tokens = causal(length)
        drawn = *draw(tokens, tokens), tokens, tokens, NO_WINDOW
        compiled = jax.jit(value_and_gradients(attend)).lower(*drawn).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(1024) < 3 * temporaries(512)
