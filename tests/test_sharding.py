"""Checks what a compiled update gathers and keeps on each device of a mesh, and that a mesh changes no result."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax.learn.logprobs
import grpo_jax.model.blockwise
import grpo_jax.model.layers
import grpo_jax.parallel.mesh
from grpo_jax.config import check, default
from grpo_jax.learn.optimizer import init_train_state, make_optimizer
from grpo_jax.learn.update import make_update
from grpo_jax.model.architecture import LayerConfig
from grpo_jax.model.decoder import hidden_states
from grpo_jax.model.layers import embed_tokens, linear
from grpo_jax.model.parameters import matrix_spec, tree_shardings
from grpo_jax.parallel.mesh import ROW_AXES, constrain, make_mesh, num_data_shards, shard_rows
from tests.tiny import CONFIG, all_gather_shapes, experience, packed, params

# All dimensions differ, so that a shape identifies a parameter, and all are divisible by 8.
WIDE = replace(
    CONFIG,
    vocab_size=88,
    tokenizer_vocab_size=88,
    hidden_size=64,
    intermediate_size=96,
    layers=(LayerConfig(),) * 5,
    num_heads=8,
    num_kv_heads=8,
    head_dim=16,
    remat="layers",
)
VOCAB_BLOCK = 22


@lru_cache
def compiled_update(sizes):
    """Returns the shapes of the train state before an update, the compiled update's text and memory, and its result."""
    mesh, cfg, weights = make_mesh(*sizes), check(default()), params(WIDE)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(cfg.optim)
        state = init_train_state(mesh, jax.device_put(weights, tree_shardings(mesh, weights)), optimizer)
        shapes = jax.eval_shape(lambda state: state, state)
        update = make_update(WIDE, cfg, mesh, state.params, optimizer)
        batch = shard_rows(mesh, packed(experience(model_cfg=WIDE), 1, num_data_shards(mesh)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grpo_jax.learn.logprobs, "MAX_VOCAB_BLOCK", VOCAB_BLOCK)
            compiled = update.lower(state, batch).compile()
        return shapes, batch, compiled, compiled(state, batch)[0]


MESHES = pytest.mark.parametrize(
    "sizes", [(1, 4, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((1, 8, 1), (2, 2, 2)))]
)


@MESHES
def test_no_stack_table_or_head_is_gathered_whole(sizes):
    """Only single layers of the scan, vocabulary blocks of the head and token ids are gathered."""
    shapes, _, compiled, _ = compiled_update(sizes)
    gathered, tensor = all_gather_shapes(compiled.as_text()), sizes[2]
    assert [shape for shape in gathered if np.prod(shape) % (64 * 96 // tensor) == 0]  # a layer's MLP is seen here
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.params):
        name = jax.tree_util.keystr(path)
        if "layers" in name:
            stacks = [shape for shape in gathered if shape[0] == len(WIDE.layers)]
            assert not [shape for shape in stacks if np.prod(shape) >= leaf.size > 5 * 64], name
        elif leaf.ndim == 2:
            assert not [shape for shape in gathered if sorted(shape)[-2:] == sorted(leaf.shape)], name
    assert not [shape for shape in gathered if np.prod(shape) > 64 * 128]  # the largest matrix of a layer


@MESHES
def test_the_train_state_stays_split_through_an_update(sizes):
    """Each device holds its share of every split leaf before and after the update, and never a whole gradient."""
    _, batch, compiled, state = compiled_update(sizes)
    _, fsdp, tensor = sizes
    for tree in (state.params, state.opt_state):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if leaf.ndim > 2 or "embedding" in str(path) or "head" in str(path):
                assert not leaf.sharding.is_fully_replicated, path
                assert leaf.addressable_shards[0].data.size * fsdp * tensor == leaf.size
    param_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * memory.argument_size_in_bytes - batch.tokens.nbytes * 10
    assert memory.argument_size_in_bytes < 0.6 * 3 * param_bytes  # of policy and two moments, on one device


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 2, 4), (2, 2, 2)])
@pytest.mark.parametrize("rows", [8, pytest.param(3, marks=pytest.mark.slow)])
def test_a_sharded_table_has_the_embeddings_and_gradient_of_a_whole_one(sizes, rows):
    table = jax.random.normal(jax.random.key(0), (48, 32))
    tokens = jax.random.randint(jax.random.key(1), (rows, 5), 0, 48)
    d_out = jax.random.normal(jax.random.key(2), (rows, 5, 32))
    expected = jax.grad(lambda table: jnp.sum(d_out * table[tokens]))(table)
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(table, jax.NamedSharding(mesh, jax.P("tensor", "fsdp")))
        np.testing.assert_array_equal(jax.jit(embed_tokens)(sharded, tokens), table[tokens])
        grad = jax.jit(jax.grad(lambda table: jnp.sum(d_out * embed_tokens(table, tokens))))(sharded)
    np.testing.assert_allclose(grad, expected, atol=1e-6)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 2, 4), (2, 2, 1, 2)])
@pytest.mark.parametrize(
    "path, inputs, outputs", [("attention/q/kernel", (16,), (4, 6)), ("mlp/down/kernel", (24,), (16,))]
)
def test_gradients_scattered_as_on_tpus_are_those_of_one_device(path, inputs, outputs, sizes, monkeypatch):
    """On (1, 8, 1), where fsdp spans the slice, groups of 4 and then of 2 devices scatter the sum."""
    shape = np.prod(inputs), np.prod(outputs)
    x, d_out = (jax.random.normal(jax.random.key(n), (40, size)) for n, size in enumerate(shape))
    expected, mesh = x.T @ d_out, make_mesh(*sizes)
    for module in (grpo_jax.model.layers, grpo_jax.parallel.mesh):
        monkeypatch.setattr(module, "mesh_platform", lambda: "tpu")
    with jax.set_mesh(mesh):
        spec = matrix_spec(path, inputs, outputs)
        gradient = jax.jit(lambda x, d: jax.vjp(lambda k: linear(x, k, spec), jnp.zeros(shape))[1](d)[0])
        compiled = gradient.lower(*shard_rows(mesh, (x, d_out))).compile()
        result = compiled(*shard_rows(mesh, (x, d_out)))
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert result.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 2)
    assert compiled.as_text().count(" reduce-scatter(") == (2 if sizes == (1, 8, 1) else 1)


def test_an_embedding_lookup_gathers_ids_over_fsdp_but_no_embeddings():
    """XLA's own partitioning of `table[tokens]` gathers the embeddings of all rows on this mesh."""
    mesh = make_mesh(2, 2, 2)

    def shaped(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))

    def total(table, tokens):
        return jnp.sum(jnp.sin(constrain(embed_tokens(table, tokens), ROW_AXES)))

    with jax.set_mesh(mesh):
        table, tokens = shaped((48, 32), jnp.float32, "tensor", "fsdp"), shaped((8, 5), jnp.int32, ROW_AXES)
        compiled = jax.jit(jax.grad(total)).lower(table, tokens).compile()
    assert all_gather_shapes(compiled.as_text()) == [(4, 5)]


@pytest.mark.parametrize("attention", ["blocks", pytest.param("splash", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "sizes", [(1, 2, 4), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((1, 8, 1), (1, 1, 8)))]
)
def test_attention_kernels_on_a_mesh_have_the_gradient_of_plain_attention(attention, sizes, monkeypatch):
    """With 4 heads and 2 KV heads: 4 devices hold two copies of each KV head, and 8 devices do not split the heads."""
    monkeypatch.setattr(grpo_jax.model.blockwise, "BLOCK_SIZE", 8)
    layers = (LayerConfig(window=3), LayerConfig())
    model_cfg = replace(CONFIG, layers=layers, remat="layers", max_positions=256)
    weights, mesh = params(model_cfg), make_mesh(*sizes)
    batch = packed(experience(), 30, num_data_shards(mesh))
    tokens, segments = batch.tokens, batch.segments
    if attention == "splash":  # the kernel needs rows of 128 tokens
        widen = [(0, 0), (0, -tokens.shape[1] % 128)]
        tokens, segments = jax.tree.map(lambda x: jnp.pad(x, widen), (tokens, segments))
    d_hidden = jax.random.normal(jax.random.key(0), (*tokens.shape, CONFIG.hidden_size))
    d_hidden *= segments.prompt[..., None] > 0  # hidden states of padding are undefined

    def gradient(model_cfg, weights, inputs):
        run = jax.jit(jax.grad(lambda weights, d, *inputs: jnp.sum(d * hidden_states(model_cfg, weights, *inputs)[0])))
        return run(weights, *inputs)

    expected = gradient(replace(model_cfg, attention="plain"), weights, (d_hidden, tokens, segments))
    with jax.set_mesh(mesh):
        inputs = shard_rows(mesh, (d_hidden, tokens, segments))
        placed = jax.device_put(weights, tree_shardings(mesh, weights))
        grads = gradient(replace(model_cfg, attention=attention), placed, inputs)
    for (path, want), grad in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(grads), strict=True):
        assert np.abs(np.asarray(grad) - want).max() <= 1e-5 * np.abs(want).max(), path


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for a TPU on any machine")
def test_a_7b_update_fits_on_a_pod():
    """Compiles an update of Qwen2.5-7B ahead of time for 64 chips of TPU v5e, 16 GiB and 4,608 tokens each."""
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", POD_PROGRAM], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr[-3000:]
    print(result.stdout)


POD_PROGRAM = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from grpo_jax.config import check
from grpo_jax.config.flags import load_config
from grpo_jax.learn.optimizer import make_optimizer, train_state_shapes, train_state_shardings
from grpo_jax.learn.packing import packed_shape
from grpo_jax.learn.update import make_update
from grpo_jax.model.architecture import LayerConfig, ModelConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import ROW_AXES, drop_indivisible_axes, make_mesh, num_data_shards
from grpo_jax.types import PackedBatch, Segments
from tests.tiny import all_gather_shapes
mesh = make_mesh(fsdp=-1, devices=topologies.get_topology_desc("v5e:8x8", platform="tpu").devices)
cfg = check(load_config("configs/r1zero.py:qwen2.5-7b"))
model_cfg = ModelConfig(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, layers=(LayerConfig(),) * 28, num_heads=28,
    num_kv_heads=4, head_dim=128, max_positions=32768, qkv_bias=True, tokenizer_vocab_size=151665,
    compute_dtype="bfloat16", remat="layers")
shape = packed_shape(512, 16, 512, 4096, cfg.train.micro_tokens, num_data_shards(mesh))
shapes, optimizer = param_shapes(model_cfg), make_optimizer(cfg.optim)
with_sharding = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
state = jax.tree.map(
    with_sharding, train_state_shapes(shapes, optimizer), train_state_shardings(mesh, shapes, optimizer))
rows = jax.NamedSharding(mesh, drop_indivisible_axes(jax.P(ROW_AXES), shape, mesh))
ids, values = (jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in (jnp.int32, jnp.float32))
scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P()))
batch = PackedBatch(ids, Segments(ids, ids, ids), *(ids,) * 4, *(values,) * 4, scalar, num_sequences=512)
with jax.set_mesh(mesh):
    compiled = make_update(model_cfg, cfg, mesh, shapes, optimizer).lower(state, batch).compile()
memory = compiled.memory_analysis()
total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
total += memory.temp_size_in_bytes
print(f"{total / 2**30:.2f} GiB per chip, of which {memory.temp_size_in_bytes / 2**30:.2f} are temporaries")
assert total < 15.75 * 2**30, total
largest = max(np.prod(shape) for shape in all_gather_shapes(compiled.as_text()))
assert largest <= 3584 * 18944, largest  # one matrix of one layer
"""
