"""Library kernels mean what attend.plain means, in values and gradients; those of accelerators compile for them."""

import importlib.util
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.model import kernels
from grpo_jax.model.kernels import cudnn_attention, cudnn_supports, make_splash_masks, splash_attention, splash_supports
from grpo_jax.model.mask import NO_WINDOW, attention_mask, plain_attention
from grpo_jax.types import Segments

ROOT = Path(__file__).parent.parent


def packed(rows: int, length: int, filled: int, seed: int = 0) -> Segments:
    """Rows of prompts, each with one to three completions behind it, all of random lengths, up to column `filled`."""
    draw = np.random.default_rng(seed)
    made = np.zeros((3, rows, length), np.int32)
    for position, prompt, answer in np.moveaxis(made, 1, 0):
        column, prompts, answers = 0, 0, 0
        while column < filled:
            prompts, start = prompts + 1, draw.integers(5, 40)
            spans = [(0, start, 0)]
            for _ in range(draw.integers(1, 4)):
                answers += 1
                spans.append((start, draw.integers(1, 70), answers))
            for first, count, whose in spans:
                here = slice(column, min(column + count, filled))
                count = here.stop - here.start
                position[here], prompt[here], answer[here] = first + np.arange(count), prompts, whose
                column = here.stop
    return Segments(*map(jnp.asarray, made))


def tensors(rows: int, length: int, heads: int, shared: int, width: int, value_width: int, seed: int = 0):
    """q, keys, values, and a cotangent of the output."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [
        (rows, length, heads, width),
        (rows, shared, width, length),
        (rows, shared, length, value_width),
        (rows, length, heads, value_width),
    ]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def with_gradients(attend, slope):
    """q, keys, values -> the output and the three gradients."""

    def run(*inputs):
        out, pull = jax.vjp(attend, *inputs)
        return out, *pull(slope)

    return jax.jit(run)


def same(ours, theirs, tolerance: float = 2e-5):
    """Equal relative to each array's largest entry."""
    for ours, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert ours.shape == theirs.shape and np.abs(theirs).max() > 0
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.fixture
def small_tiles(monkeypatch):
    """A row of 256 tokens has four tiles."""
    monkeypatch.setattr(kernels, "TILES", (128,))


def splash_against_plain(rows, length, filled, heads, shared, width, value_width, window, cap):
    segments = packed(rows, length, filled)
    mask = attention_mask(segments, segments, window)
    *inputs, slope = tensors(rows, length, heads, shared, width, value_width)
    seeing = jnp.any(mask, axis=-1)[..., None, None]
    slope = slope * seeing
    masks = make_splash_masks(mask)
    ours = with_gradients(lambda *x: splash_attention(*x, masks, divisor=3.0, cap=cap, interpret=True), slope)(*inputs)
    theirs = with_gradients(lambda *x: plain_attention(*x, mask, divisor=3.0, cap=cap), slope)(*inputs)
    assert all(np.isfinite(x).all() for x in ours)  # those of queries that see nothing, too
    same((ours[0] * seeing, *ours[1:]), (theirs[0] * seeing, *theirs[1:]))


@pytest.mark.parametrize(
    "case",
    [
        dict(rows=1, filled=256, heads=2, shared=2, width=16, value_width=16, window=NO_WINDOW, cap=0.0),
        dict(rows=2, filled=120, heads=3, shared=1, width=16, value_width=24, window=20, cap=2.0),
    ],
    ids=["every head its key", "three heads a key, window, cap, empty tiles"],
)
def test_splash_is_plain(case, small_tiles):
    splash_against_plain(length=256, **case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        dict(rows=1, length=1536, filled=1000, heads=2, shared=2, width=16, value_width=16, window=NO_WINDOW, cap=0.0),
        dict(rows=2, length=768, filled=768, heads=6, shared=2, width=192, value_width=128, window=100, cap=5.0),
        dict(rows=3, length=640, filled=600, heads=6, shared=2, width=64, value_width=64, window=NO_WINDOW, cap=0.0),
    ],
    ids=["tiles of 512", "tiles of 384", "tiles of 128"],
)
def test_splash_is_plain_in_tiles_of_all_sizes(case):
    splash_against_plain(**case)


def test_splash_does_not_compute_empty_tiles(small_tiles):
    """Values that no query of a tile sees may be anything; plain multiplies them by 0."""
    length = 256
    q, keys, values, _ = tensors(1, length, 1, 1, 16, 16)
    values = values.at[:, :, 128:].set(jnp.nan)
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    masks = make_splash_masks(mask)
    np.testing.assert_array_equal(masks.forward.block_mask[0, 0], [[1, 0], [2, 1]])  # 0: empty, 2: all True
    out = splash_attention(q, keys, values, masks, divisor=4.0, interpret=True)
    assert np.isfinite(out[:, :128]).all() and np.isnan(out[:, 128:]).all()
    assert np.isnan(plain_attention(q, keys, values, mask, divisor=4.0)[:, :128]).all()


@pytest.mark.slow
def test_splash_in_layers_that_are_recomputed_on_two_devices(small_tiles):
    """One set of masks for a scan of layers, under jax.checkpoint, in shard_map."""
    rows, length, width = 2, 256, 8
    segments = packed(rows, length, 250)
    mask = attention_mask(segments, segments)
    x, _, _, slope = tensors(rows, length, 2, 1, width, width)
    slope = slope * jnp.any(mask, axis=-1)[..., None, None]
    weights = jax.random.normal(jax.random.key(1), (2, 3, width, width)) / 3  # of two layers

    def model(masks, attend, x, weights):
        def layer(x, weights):
            q, k, v = jnp.einsum("nlhe,pef->pnlhf", x, weights)
            keys, values = jnp.moveaxis(k[:, :, :1], 1, -1), jnp.swapaxes(v[:, :, :1], 1, 2)
            return x + attend(q, keys, values, masks, divisor=2.0), None

        return jax.lax.scan(jax.checkpoint(layer), x, weights)[0]

    def loss(masks_of, attend, x, weights, mask, slope):
        return jnp.sum(slope * model(masks_of(mask), attend, x, weights))

    def summed(x, weights, mask, slope):  # what one device does with its row
        ours = jax.value_and_grad(
            partial(loss, make_splash_masks, partial(splash_attention, interpret=True)), argnums=(0, 1)
        )
        total, (by_x, by_weights) = ours(x, weights, mask, slope)
        return jax.lax.psum(total, "row"), (by_x, jax.lax.psum(by_weights, "row"))

    mesh = Mesh(jax.devices()[:2], ("row",))
    row, whole = PartitionSpec("row"), PartitionSpec()
    ours = jax.jit(
        jax.shard_map(
            summed, mesh=mesh, in_specs=(row, whole, row, row), out_specs=(whole, (row, whole)), check_vma=False
        )
    )
    theirs = jax.jit(jax.value_and_grad(partial(loss, lambda mask: mask, plain_attention), argnums=(0, 1)))
    same(ours(x, weights, mask, slope), theirs(x, weights, mask, slope))


def test_lengths_that_splash_takes():
    tiles = {128: 128, 256: 256, 384: 384, 512: 512, 640: 128, 768: 384, 4608: 512}
    assert {length: kernels.tile_size(length) for length in tiles} == tiles
    assert [length for length in range(1, 700) if splash_supports(length)] == [128, 256, 384, 512, 640]


def cudnn_against_plain(implementation: str, dtype, tolerance: float, heads: int, shared: int):
    rows, length, width = 2, 64, 16
    segments = packed(rows, length, 50)
    mask = attention_mask(segments, segments, 20)
    *inputs, slope = (x.astype(dtype) for x in tensors(rows, length, heads, shared, width, width))
    ours = with_gradients(lambda *x: cudnn_attention(*x, mask, divisor=3.0, implementation=implementation), slope)(
        *inputs
    )
    theirs = with_gradients(lambda *x: plain_attention(*x, mask, divisor=3.0), slope)(*inputs)
    same(ours, theirs, tolerance)  # queries that see nothing included: the mean of all values


@pytest.mark.parametrize("heads, shared", [(2, 2), (6, 2)])
def test_arguments_for_cudnn(heads, shared):
    cudnn_against_plain("xla", jnp.float32, 2e-5, heads, shared)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no NVIDIA GPU")
def test_cudnn_is_plain():
    elsewhere("cudnn_against_plain('cudnn', jnp.bfloat16, 3e-2, 6, 2)", JAX_PLATFORMS="cuda")


def test_cudnn_is_called_forward_and_backward(monkeypatch):
    """Lowered for a GPU that is not there."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    *inputs, slope = (x.astype(jnp.bfloat16) for x in tensors(2, 64, 6, 2, 128, 128))
    mask = jnp.ones((2, 64, 64), bool)
    run = with_gradients(lambda *x: cudnn_attention(*x, mask, divisor=3.0), slope)
    text = run.trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaScaleBiasSoftmax(") == text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward(") == 1
    assert '"fmha_scale": 0.333' in text.replace("\\22", '"')


@pytest.mark.parametrize(
    "dtype, width, value_width, cap, fits",
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
def test_heads_that_cudnn_takes(dtype, width, value_width, cap, fits):
    assert cudnn_supports(dtype, width, value_width, cap) == fits


def compile_for_tpu(length: int, heads: int, shared: int, width: int, cap: float):
    """splash and its gradients, in bfloat16, a row on each chip of a v5e-16: says the MiB of temporaries a chip."""
    from jax.experimental import topologies

    mesh = Mesh(np.array(topologies.get_topology_desc("v5e:4x4", platform="tpu").devices), ("row",))

    def run(q, keys, values, slope, mask):
        masks = make_splash_masks(mask)
        return with_gradients(lambda *x: splash_attention(*x, masks, divisor=width**0.5, cap=cap), slope)(
            q, keys, values
        )

    row = PartitionSpec("row")
    shapes = [x.shape for x in jax.eval_shape(lambda: tensors(16, length, heads, shared, width, width))]
    described = [(shape, jnp.bfloat16) for shape in shapes] + [((16, length, length), jnp.bool_)]
    inputs = [jax.ShapeDtypeStruct(*each, sharding=NamedSharding(mesh, row)) for each in described]
    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=row, out_specs=row, check_vma=False))
    compiled = run.lower(*inputs).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3  # the output, the queries' gradient, keys' and values'
    print("temporaries:", compiled.memory_analysis().temp_size_in_bytes // 2**20)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="no libtpu to compile with")
@pytest.mark.parametrize("heads, shared, width, cap", [(28, 4, 128, 0.0), (9, 3, 64, 30.0)])
def test_splash_compiles_for_a_tpu(heads, shared, width, cap):
    """In less memory than the scores would take in float32: 2268 and 729 MiB."""
    said = elsewhere(f"compile_for_tpu(4608, {heads}, {shared}, {width}, {cap})", JAX_PLATFORMS="cpu")
    assert 0 < int(said.split("temporaries:")[1]) < 400


def elsewhere(call: str, **environment: str) -> str:
    """What a call of this module prints in a process of its own: the backend of this one is the CPU's."""
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.test_kernels import *; {call}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
