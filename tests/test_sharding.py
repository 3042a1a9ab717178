"""What the compiled update moves between devices: parts of layers, and nothing whole."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax.learn.logprobs
from grpo_jax.config import check, default
from grpo_jax.learn.optimizer import init_train_state, make_optimizer
from grpo_jax.learn.update import make_update, minibatch_gradients
from grpo_jax.model.architecture import LayerConfig
from grpo_jax.model.layers import embed_tokens
from grpo_jax.parallel.mesh import make_mesh, num_row_shards, shard_rows, tree_shardings
from tests.tiny import CONFIG, experience, packed, params

# No two dimensions alike, so that a shape names a parameter; all divide by 8.
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


def gathered(text: str) -> list[tuple[int, ...]]:
    """The shapes that all-gathers of a compiled program make."""
    made = re.findall(r"= \(?(.*?)\)? all-gather(?:-start)?\(", text)
    return [tuple(map(int, shape.split(","))) for kinds in made for shape in re.findall(r"\[([\d,]+)\]", kinds)]


def compiled_update(mesh, cfg=WIDE):
    weights = params(cfg)
    train = check(default())
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(train.optim)
        state = init_train_state(mesh, jax.device_put(weights, tree_shardings(mesh, weights)), optimizer)
        update = make_update(cfg, train, mesh, state.params, optimizer)
        batch = shard_rows(mesh, packed(experience(cfg=cfg), 1, num_row_shards(mesh)))
        return state, batch, update, update.lower(state, batch).compile()


@pytest.mark.parametrize("sizes", [(1, 4, 2), pytest.param((1, 8, 1), marks=pytest.mark.slow)])
def test_nothing_is_gathered_whole(sizes, monkeypatch):
    """Gathered are single layers in the scan, a block of ids of the head, and token ids; no stack, table or head."""
    monkeypatch.setattr(grpo_jax.learn.logprobs, "MAX_VOCAB_BLOCK", 22)
    mesh = make_mesh(*sizes)
    state, _, _, compiled = compiled_update(mesh)
    made = gathered(compiled.as_text())
    layers = len(WIDE.layers)
    assert [shape for shape in made if np.prod(shape) % (64 * 96 // mesh.shape["tensor"]) == 0]  # the MLP's: it looks
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        name = jax.tree_util.keystr(path)
        if "layers" in name:
            assert not [shape for shape in made if shape[0] == layers and np.prod(shape) >= leaf.size > 5 * 64], name
        elif leaf.ndim == 2:
            assert not [shape for shape in made if sorted(shape)[-2:] == sorted(leaf.shape)], name
    assert not [shape for shape in made if np.prod(shape) > 64 * 128]  # the largest matrix of a layer


@pytest.mark.parametrize(
    "sizes", [(1, 4, 2), *(pytest.param(x, marks=pytest.mark.slow) for x in ((1, 8, 1), (2, 2, 2)))]
)
def test_state_stays_split(sizes):
    """Every leaf that the table splits is split before and after, gradients among them, whole ones nowhere."""
    mesh = make_mesh(*sizes)
    state, batch, update, compiled = compiled_update(mesh)
    with jax.set_mesh(mesh):
        after, _ = update(state, batch)
    for tree in (after.params, after.opt_state):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if leaf.ndim > 2 or "embedding" in str(path) or "head" in str(path):
                assert not leaf.sharding.is_fully_replicated, path
                assert leaf.addressable_shards[0].data.size * mesh.shape["fsdp"] * mesh.shape["tensor"] == leaf.size
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(after.params))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * memory.argument_size_in_bytes - batch.tokens.nbytes * 10
    assert memory.argument_size_in_bytes < 0.6 * 3 * whole  # of policy and two moments, on one device


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 2, 4), (2, 2, 2)])
@pytest.mark.parametrize("rows", [8, pytest.param(3, marks=pytest.mark.slow)])
def test_tokens_are_looked_up_where_the_table_lies(sizes, rows):
    table = jax.random.normal(jax.random.key(0), (48, 32))
    tokens = jax.random.randint(jax.random.key(1), (rows, 5), 0, 48)
    weigh = jax.random.normal(jax.random.key(2), (rows, 5, 32))
    expected = jax.grad(lambda table: jnp.sum(weigh * table[tokens]))(table)
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(table, jax.NamedSharding(mesh, jax.P("tensor", "fsdp")))
        np.testing.assert_array_equal(jax.jit(embed_tokens)(placed, tokens), table[tokens])
        made = jax.jit(jax.grad(lambda table: jnp.sum(weigh * embed_tokens(table, tokens))))(placed)
    np.testing.assert_allclose(made, expected, atol=1e-6)


@pytest.mark.parametrize("attention", ["blocks", pytest.param("splash", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "sizes", [(1, 2, 4), *(pytest.param(x, marks=pytest.mark.slow) for x in ((1, 8, 1), (1, 1, 8)))]
)
def test_ways_of_attention_agree_on_every_mesh(attention, sizes, monkeypatch):
    """4 heads, 2 KV heads: on four devices each KV head stands twice, on eight the heads are not split."""
    import grpo_jax.model.blockwise

    monkeypatch.setattr(grpo_jax.model.blockwise, "BLOCK_SIZE", 8)
    model_cfg = replace(
        CONFIG, layers=(LayerConfig(window=3), LayerConfig()), attention=attention, remat="layers", max_positions=256
    )
    loss = check(default()).loss
    run = lambda model_cfg, params, batch: jax.jit(
        lambda params, batch: minibatch_gradients(model_cfg, params, batch, temperature=1.0, loss=loss)[0]
    )(params, batch)
    whole = packed(experience(), 128 if attention == "splash" else 30)
    expected = run(replace(model_cfg, attention="plain"), params(), whole)
    mesh = make_mesh(*sizes)
    with jax.set_mesh(mesh):
        batch = packed(experience(), 128 if attention == "splash" else 30, num_row_shards(mesh))
        if attention == "splash":  # rows of 128 tokens, as the kernel wants them
            wide = lambda x: jnp.pad(
                x, ((0, 0), (0, -x.shape[1] % 128)), constant_values=-1 if x is batch.flat_index else 0
            )
            batch = jax.tree.map(lambda x: wide(x) if x.ndim else x, batch)
        made = run(model_cfg, jax.device_put(params(), tree_shardings(mesh, params())), shard_rows(mesh, batch))
    for (path, want), have in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(made)):
        assert np.abs(np.asarray(have) - want).max() <= 1e-5 * np.abs(want).max(), path


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which compiles for a TPU anywhere"
)
def test_7b_update_compiles_for_a_pod_and_fits():
    """Qwen2.5-7B's shapes, 4,608 tokens a chip, ahead of time for 64 chips of TPU v5e with 16 GiB each."""
    made = subprocess.run([sys.executable, "-c", POD], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert made.returncode == 0, made.stderr[-3000:]
    print(made.stdout)


POD = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from grpo_jax.model.architecture import Layer, ModelConfig
from grpo_jax.config import check
from grpo_jax.config.flags import load_config
from grpo_jax.parallel.mesh import ROWS, fit, make_mesh, row_shards
from grpo_jax.model.decoder import param_shapes
from grpo_jax.learn.optimizer import make_optimizer, state_shapes, state_shardings
from grpo_jax.learn.packing import packed_shape
from grpo_jax.learn.update import make_update
from grpo_jax.types import Packed, Segments
from tests.test_sharding import gathered
mesh = make_mesh(fsdp=-1, devices=topologies.get_topology_desc("v5e:8x8", platform="tpu").devices)
config = check(load_config("configs/r1zero.py:qwen2.5-7b"))
model = ModelConfig(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, layers=(Layer(),) * 28, num_heads=28, num_kv_heads=4,
    head_dim=128, max_positions=32768, qkv_bias=True, tokenizer_vocab_size=151665, compute_dtype="bfloat16",
    remat="layers")
shape = packed_shape(512, 16, 512, 4096, config.train.micro_tokens, row_shards(mesh))
shapes, optimizer = param_shapes(model), make_optimizer(config.optim)
placed = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
state = jax.tree.map(placed, state_shapes(shapes, optimizer), state_shardings(mesh, shapes, optimizer))
rows = jax.NamedSharding(mesh, fit(jax.P(ROWS), shape, mesh))
whole = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)
ids, values = whole(jnp.int32), whole(jnp.float32)
batch = Packed(ids, Segments(ids, ids, ids), ids, ids, values, values, values, values,
               jax.ShapeDtypeStruct((), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P())))
with jax.set_mesh(mesh):
    compiled = make_update(model, config, mesh, shapes, optimizer).lower(state, batch).compile()
memory = compiled.memory_analysis()
total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
print(f"{total / 2**30:.2f} GiB a chip, of which {memory.temp_size_in_bytes / 2**30:.2f} are temporaries")
assert total < 15.75 * 2**30, total
most = max(np.prod(shape) for shape in gathered(compiled.as_text()))
assert most <= 3584 * 18944, most  # one matrix of one layer
"""
