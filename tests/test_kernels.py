"""Vendor kernels equal `plain_attention` in values and gradients, and compile for their accelerators."""

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.model import kernels
from grpo_jax.model.decoder import hidden_states
from grpo_jax.model.kernels import (
    CausalMask,
    causal_splash_attention,
    cudnn_attention,
    cudnn_supports,
    make_splash_masks,
    splash_attention,
    splash_supports,
)
from grpo_jax.model.mask import NO_WINDOW, attention_mask, plain_attention, single_sequence
from grpo_jax.types import Segments
from tests.tiny import CONFIG, params

ROOT = Path(__file__).parent.parent


def packed_segments(rows: int, length: int, filled: int) -> Segments:
    """Returns rows of random prompts with one to three completions each, and padding from column `filled` on."""
    rng = np.random.default_rng(0)
    segments = np.zeros((3, rows, length), np.int32)
    for row in np.moveaxis(segments, 1, 0):
        column, prompt, completion = 0, 0, 0
        while column < filled:
            prompt, prompt_length = prompt + 1, rng.integers(5, 40)
            spans = [(0, prompt_length, 0)]
            for _ in range(rng.integers(1, 4)):
                completion += 1
                spans.append((prompt_length, rng.integers(1, 70), completion))
            for first_position, count, completion_id in spans:
                end = min(column + count, filled)
                row[0, column:end] = first_position + np.arange(end - column)
                row[1, column:end], row[2, column:end] = prompt, completion_id
                column = end
    return Segments(*map(jnp.asarray, segments))


def random_inputs(rows: int, length: int, num_heads: int, num_kv_heads: int, key_width: int, value_width: int):
    """Returns q, keys, values, and a cotangent of the output."""
    shapes = [
        (rows, length, num_heads, key_width),
        (rows, num_kv_heads, key_width, length),
        (rows, num_kv_heads, length, value_width),
        (rows, length, num_heads, value_width),
    ]
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def with_gradients(attend, cotangent):
    """Returns a jitted function of q, keys and values that returns the output and the three gradients."""

    def run(*inputs):
        out, vjp = jax.vjp(attend, *inputs)
        return out, *vjp(cotangent)

    return jax.jit(run)


def assert_close(got, want, tolerance: float = 2e-5):
    """Asserts that arrays are equal up to a fraction of the largest entry of each."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert x.shape == y.shape and np.abs(y).max() > 0
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


@pytest.fixture
def small_tiles(monkeypatch):
    """The mask of a row of 256 tokens has four tiles."""
    monkeypatch.setattr(kernels, "TILE_SIZES", (128,))


def check_splash(length, rows, filled, num_heads, num_kv_heads, key_width, value_width, window, softcap):
    segments = packed_segments(rows, length, filled)
    mask = attention_mask(segments, segments, window)
    *inputs, cotangent = random_inputs(rows, length, num_heads, num_kv_heads, key_width, value_width)
    has_keys = jnp.any(mask, axis=-1)[..., None, None]
    options = dict(divisor=3.0, softcap=softcap)
    splash = partial(splash_attention, masks=make_splash_masks(mask), interpret=True, **options)
    plain = partial(plain_attention, mask=mask, **options)
    got, want = (with_gradients(attend, cotangent * has_keys)(*inputs) for attend in (splash, plain))
    assert all(np.isfinite(x).all() for x in got)  # also where a query has no keys
    assert_close((got[0] * has_keys, *got[1:]), (want[0] * has_keys, *want[1:]))


def test_splash_equals_plain_attention(small_tiles):
    """Two rows with empty tiles, three heads per key head, a sliding window and a softcap."""
    check_splash(256, 2, 120, num_heads=3, num_kv_heads=1, key_width=16, value_width=24, window=20, softcap=2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "length, rows, filled, num_heads, num_kv_heads, key_width, value_width, window, softcap",
    [
        (1536, 1, 1000, 2, 2, 16, 16, NO_WINDOW, 0.0),
        (768, 2, 768, 6, 2, 192, 128, 100, 5.0),
        (640, 3, 600, 6, 2, 64, 64, NO_WINDOW, 0.0),
        (256, 1, 256, 2, 2, 16, 16, NO_WINDOW, 0.0),
    ],
    ids=["tiles of 512", "tiles of 384", "tiles of 128", "tiles of 256"],
)
def test_splash_equals_plain_attention_in_tiles_of_all_sizes(
    length, rows, filled, num_heads, num_kv_heads, key_width, value_width, window, softcap
):
    check_splash(length, rows, filled, num_heads, num_kv_heads, key_width, value_width, window, softcap)


@pytest.mark.parametrize("window, softcap", [(0, 0.0), (20, 2.0)])
def test_causal_splash_equals_plain_attention(small_tiles, window, softcap):
    """Two rows of one sequence, three heads per key head."""
    rows, length = 2, 256
    *inputs, _ = random_inputs(rows, length, 3, 1, 16, 24)
    segments = single_sequence(jnp.broadcast_to(jnp.arange(length), (rows, length)))
    options = dict(divisor=3.0, softcap=softcap)
    got = jax.jit(partial(causal_splash_attention, mask=CausalMask(window), interpret=True, **options))(*inputs)
    assert_close(got, plain_attention(*inputs, attention_mask(segments, segments, window or NO_WINDOW), **options))


def test_splash_skips_empty_tiles(small_tiles):
    """NaN in the values of a tile that no query attends to does not spread; plain attention multiplies it by 0."""
    length = 256
    q, keys, values, _ = random_inputs(1, length, 1, 1, 16, 16)
    values = values.at[:, :, 128:].set(jnp.nan)
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    masks = make_splash_masks(mask)
    np.testing.assert_array_equal(masks.forward.block_mask[0, 0], [[1, 0], [2, 1]])  # 0: empty, 1: mixed, 2: all True
    out = splash_attention(q, keys, values, masks, divisor=4.0, interpret=True)
    assert np.isfinite(out[:, :128]).all() and np.isnan(out[:, 128:]).all()
    assert np.isnan(plain_attention(q, keys, values, mask, divisor=4.0)[:, :128]).all()


@pytest.mark.slow
def test_splash_in_rematerialized_layers_on_two_devices_equals_plain_attention(small_tiles):
    """A scan of layers that share the masks, under jax.checkpoint, in shard_map."""
    rows, length, width = 2, 256, 8
    segments = packed_segments(rows, length, 250)
    mask = attention_mask(segments, segments)
    x, _, _, cotangent = random_inputs(rows, length, 2, 1, width, width)
    cotangent = cotangent * jnp.any(mask, axis=-1)[..., None, None]
    weights = jax.random.normal(jax.random.key(1), (2, 3, width, width)) / 3  # two layers' projections to q, k, v

    def loss(attend, x, weights, masks, cotangent):
        @jax.checkpoint
        def layer(x, weights):
            q, k, v = jnp.einsum("nlhe,pef->pnlhf", x, weights)
            keys, values = jnp.moveaxis(k[:, :, :1], 1, -1), jnp.swapaxes(v[:, :, :1], 1, 2)
            return x + attend(q, keys, values, masks, divisor=2.0), None

        return jnp.sum(cotangent * jax.lax.scan(layer, x, weights)[0])

    def loss_and_gradients(x, weights, mask, cotangent):  # of one device's row
        attend = partial(splash_attention, interpret=True)
        grad = jax.value_and_grad(partial(loss, attend), argnums=(0, 1))
        total, (dx, dweights) = grad(x, weights, make_splash_masks(mask), cotangent)
        return jax.lax.psum(total, "row"), (dx, jax.lax.psum(dweights, "row"))

    mesh = Mesh(jax.devices()[:2], ("row",))
    by_row, replicated = PartitionSpec("row"), PartitionSpec()
    in_specs, out_specs = (by_row, replicated, by_row, by_row), (replicated, (by_row, replicated))
    sharded = jax.shard_map(loss_and_gradients, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    plain = jax.value_and_grad(partial(loss, plain_attention), argnums=(0, 1))
    assert_close(*(jax.jit(f)(x, weights, mask, cotangent) for f in (sharded, plain)))


def test_splash_tile_sizes_and_supported_lengths():
    sizes = {128: 128, 256: 256, 384: 384, 512: 512, 640: 128, 768: 384, 4608: 512}
    assert {length: kernels.tile_size(length) for length in sizes} == sizes
    assert [length for length in range(1, 700) if splash_supports(length)] == [128, 256, 384, 512, 640]


def check_cudnn(implementation: str, dtype, tolerance: float):
    rows, length, width = 2, 64, 16
    segments = packed_segments(rows, length, 50)
    mask = attention_mask(segments, segments, 20)
    *inputs, cotangent = (x.astype(dtype) for x in random_inputs(rows, length, 6, 2, width, width))
    cudnn = partial(cudnn_attention, mask=mask, divisor=3.0, implementation=implementation)
    plain = partial(plain_attention, mask=mask, divisor=3.0)
    got, want = (with_gradients(attend, cotangent)(*inputs) for attend in (cudnn, plain))
    assert_close(got, want, tolerance)  # also where a query has no keys: the mean of all values


def test_cudnn_call_by_xla_equals_plain_attention():
    """The same call, computed by XLA instead of cuDNN: layouts, scale and mask are right."""
    check_cudnn("xla", jnp.float32, 2e-5)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no NVIDIA GPU")
def test_cudnn_equals_plain_attention_on_a_gpu():
    run_in_subprocess("check_cudnn('cudnn', jnp.bfloat16, 3e-2)", JAX_PLATFORMS="cuda")


def lower_for_cuda(monkeypatch, function, *args) -> str:
    """Lowers for a GPU, which needs none."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_cudnn_is_called_in_both_passes(monkeypatch):
    *inputs, cotangent = (x.astype(jnp.bfloat16) for x in random_inputs(2, 64, 6, 2, 128, 128))
    run = with_gradients(partial(cudnn_attention, mask=jnp.ones((2, 64, 64), bool), divisor=3.0), cotangent)
    text = lower_for_cuda(monkeypatch, run, *inputs)
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert '"fmha_scale": 0.333' in text.replace("\\22", '"')


@pytest.mark.parametrize("remat", ["matmuls", "layers"])
def test_cudnn_attends_once_to_a_row_of_a_rematerialized_layer(monkeypatch, remat):
    """The layers are scanned. cuDNN returns three gradients and a workspace, but none of the mask [1, 1, L, L]."""
    model_cfg = replace(CONFIG, attention="cudnn", compute_dtype="bfloat16", remat=remat)
    tokens = jnp.ones((1, 64), jnp.int32)

    def loss(params):
        return jnp.sum(hidden_states(model_cfg, params, tokens, single_sequence(jnp.arange(64)[None]))[0])

    text = lower_for_cuda(monkeypatch, jax.grad(loss), params())
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == 1
    (backward,) = (line for line in text.splitlines() if "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in line)
    assert backward.split("->")[1].count("tensor<") == 4 and "1x1x64x64" not in backward.split("->")[1]


@pytest.mark.parametrize(
    "dtype, key_width, value_width, softcap, supported",
    [
        (jnp.bfloat16, 128, 128, 0.0, True),
        (jnp.float16, 64, 64, 0.0, True),
        (jnp.dtype("bfloat16"), 8, 8, 0.0, True),
        (jnp.float32, 128, 128, 0.0, False),
        (jnp.bfloat16, 128, 64, 0.0, False),
        (jnp.bfloat16, 60, 60, 0.0, False),
        (jnp.bfloat16, 256, 256, 0.0, False),
        (jnp.bfloat16, 128, 128, 30.0, False),
    ],
)
def test_heads_supported_by_cudnn(dtype, key_width, value_width, softcap, supported):
    assert cudnn_supports(dtype, key_width, value_width, softcap) == supported


def compile_for_tpu(length: int, num_heads: int, num_kv_heads: int, width: int, softcap: float):
    """Compiles splash attention and its gradients in bfloat16 for a v5e-16 with a row per chip.

    Prints the MiB of temporaries per chip.
    """
    from jax.experimental import topologies

    mesh = Mesh(np.array(topologies.get_topology_desc("v5e:4x4", platform="tpu").devices), ("row",))

    def run(q, keys, values, cotangent, mask):
        masks = make_splash_masks(mask)
        splash = partial(splash_attention, masks=masks, divisor=width**0.5, softcap=softcap)
        return with_gradients(splash, cotangent)(q, keys, values)

    by_row = PartitionSpec("row")
    inputs = jax.eval_shape(lambda: random_inputs(16, length, num_heads, num_kv_heads, width, width))
    shapes = [(x.shape, jnp.bfloat16) for x in inputs] + [((16, length, length), jnp.bool_)]
    inputs = [jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, by_row)) for shape in shapes]
    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=by_row, out_specs=by_row, check_vma=False))
    compiled = run.lower(*inputs).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3  # output, gradient of q, gradients of keys and values
    print("temporaries:", compiled.memory_analysis().temp_size_in_bytes // 2**20)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="no libtpu to compile with")
@pytest.mark.parametrize("num_heads, num_kv_heads, width, softcap", [(28, 4, 128, 0.0), (9, 3, 64, 30.0)])
def test_splash_compiles_for_tpu_without_room_for_scores(num_heads, num_kv_heads, width, softcap):
    """In float32, the scores would take 2268 and 729 MiB."""
    output = run_in_subprocess(
        f"compile_for_tpu(4608, {num_heads}, {num_kv_heads}, {width}, {softcap})", JAX_PLATFORMS="cpu"
    )
    assert 0 < int(output.split("temporaries:")[1]) < 400


def run_in_subprocess(call: str, **environment: str) -> str:
    """Runs a call of this module in a process with its own JAX backend, and returns what it prints."""
    process = subprocess.run(
        [sys.executable, "-c", f"from tests.test_kernels import *; {call}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
