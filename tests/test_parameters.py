"""The table of parameters: it covers every family, all code follows it, and a parameter without a row is an error."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from grpo_jax.config.schema import OptimSection
from grpo_jax.learn.optimizer import decay_mask, make_optimizer
from grpo_jax.model.architecture import ExpertsConfig, LatentConfig, LayerConfig, ModelConfig
from grpo_jax.model.decoder import forward, init_params, param_shapes, unstack_layers
from grpo_jax.model.layers import Projection, make_norm
from grpo_jax.model.parameters import (
    AXES,
    PARAMETERS,
    ROWS,
    log_indivisible_axes,
    param_spec,
    row_for,
    tree_shardings,
)
from grpo_jax.parallel.mesh import make_mesh, path_name
from grpo_jax.rollout.sampler import place_for_rollout
from grpo_jax.weights import tensor_names
from grpo_jax.weights.source import read_model_config
from tests.tiny import CONFIG

GOLDEN = Path(__file__).parent / "golden"
# Together these models have every parameter. The sizes within each are distinct.
DENSE = replace(
    CONFIG,
    family="gemma3",
    unit_offset=True,
    post_norms=True,
    qk_norm=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
WITHOUT_PRE_NORMS = replace(DENSE, family="olmo2", qk_norm_all_heads=True, pre_norms=False)
MIXTURE = replace(
    CONFIG,
    family="mixtral",
    layers=(LayerConfig(), LayerConfig(use_experts=True)),
    intermediate_size=40,
    num_kv_heads=1,
    qkv_bias=True,
    experts=ExpertsConfig(16, 2, 24, shared_intermediate_size=20, sigmoid_gate=True),
    latent=LatentConfig(28, 18, 6, 2, 10),
)
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


@cache
def shapes(model_cfg: ModelConfig) -> dict:
    return param_shapes(model_cfg)


def by_path(tree) -> dict:
    """Returns {path: leaf}."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def sizes_by_axis(c: ModelConfig) -> dict[str, set[int]]:
    """Returns the sizes of a model's axes by name."""
    sizes = {
        "vocab": {c.vocab_size},
        "embed": {c.hidden_size},
        "heads": {c.num_heads, c.num_kv_heads},
        "head_dim": {c.head_dim},
        "all_heads": {c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim},
        "mlp": {c.intermediate_size},
    }
    if z := c.latent:
        rope_and_nope = z.qk_nope_head_dim + z.qk_rope_head_dim
        sizes["head_dim"] |= {rope_and_nope, z.qk_nope_head_dim + z.v_head_dim, z.v_head_dim}
        sizes["latent"] = {z.q_lora_rank, z.kv_lora_rank, z.kv_lora_rank + z.qk_rope_head_dim}
    if x := c.experts:
        sizes["mlp"] |= {x.intermediate_size, x.shared_intermediate_size}
        sizes["experts"] = sizes["routes"] = {x.num_experts}
    return sizes


MODELS = {"dense": DENSE, "without pre-norms": WITHOUT_PRE_NORMS, "mixture": MIXTURE}


@pytest.mark.parametrize("case", [*MODELS, *(pytest.param(case, marks=pytest.mark.slow) for case in CASES)])
def test_every_parameter_has_a_row_with_its_axes(case):
    model_cfg = MODELS.get(case) or read_model_config(GOLDEN / case)
    sizes = sizes_by_axis(model_cfg)
    for path, leaf in by_path(shapes(model_cfg)).items():
        row, in_layer = row_for(path), path.startswith("layers/")
        assert len(leaf.shape) == in_layer + len(row.axes), path
        for axis, size in zip(row.axes, leaf.shape[in_layer:], strict=True):
            assert size in sizes[axis], (path, axis)
        assert ("{i}" in row.tensor, "{x}" in row.tensor) == (in_layer, "experts" in row.axes), path


@cache
def placed_shapes(model_cfg: ModelConfig) -> dict:
    return jax.eval_shape(partial(place_for_rollout, model_cfg), shapes(model_cfg))


def test_every_row_and_axis_is_used():
    trees = [make(model_cfg) for model_cfg in MODELS.values() for make in (shapes, placed_shapes)]
    assert {row_for(path).path for tree in trees for path in by_path(tree)} == ROWS.keys()
    assert len(ROWS) == len(PARAMETERS)
    assert AXES.keys() == {axis for row in PARAMETERS for axis in row.axes}


def unknown_leaf() -> dict:
    """Returns the parameters of a model, and one more that has no row."""
    params, kernel = shapes(DENSE), jax.ShapeDtypeStruct((2, 4, 4), "float32")
    return params | {"layers": (params["layers"][0] | {"conv": {"kernel": kernel}},)}


def init_unknown_leaf(params):
    Projection((4,), (4,), name="conv").init(jax.random.key(0), np.zeros((1, 4)))


def parameter_tensors_of(model_cfg, params):
    """Returns the checkpoint tensors of a model whose parameters are `params`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_names, "param_shapes", lambda _: params)
        return tensor_names.parameter_tensors(model_cfg, "model.")


USERS = {
    "init": init_unknown_leaf,
    "placement": lambda params: tree_shardings(make_mesh(8), params),
    "warnings": lambda params: log_indivisible_axes(make_mesh(8), params),
    "tensor_names": lambda params: parameter_tensors_of(DENSE, params),
    "decay": lambda params: jax.eval_shape(make_optimizer(OptimSection()).init, params),
    "muon": lambda params: jax.eval_shape(make_optimizer(OptimSection(name="muon")).init, params),
    "rollout": lambda params: jax.eval_shape(partial(place_for_rollout, DENSE), params),
}


@pytest.mark.parametrize("user", USERS)
def test_a_parameter_without_a_row_is_an_error_for_every_user(user):
    with pytest.raises(ValueError, match=r"PARAMETERS in grpo_jax.model.parameters needs .* none for .*conv/kernel"):
        USERS[user](unknown_leaf())


@pytest.mark.parametrize("path", ["layers/0/q/kernel", "layers/0/new/attention/q/kernel", "attention/q", "layers/0"])
def test_part_of_a_path_has_no_row(path):
    with pytest.raises(ValueError, match=path):
        row_for(path)


# Initial values


def test_initial_values_have_the_variances_and_constants_of_the_table():
    """The variance of a kernel is 1 / its fan-in, which includes neither layers nor experts."""
    fans = {"q_a/kernel": 32, "q_b/kernel": 28, "kv_a/kernel": 32, "kv_b": 18, "o/kernel": 40, "router/kernel": 32}
    fans |= {"shared/gate/kernel": 32, "shared/up/kernel": 32, "shared/down/kernel": 20}
    fans |= {"experts_gate": 32, "experts_up": 32, "experts_down": 24, "embed/embedding": 32, "head/kernel": 32}
    model_cfg = replace(MIXTURE, layers=MIXTURE.layers[1:])
    for path, leaf in by_path(jax.jit(init_params, static_argnums=0)(model_cfg, jax.random.key(0))).items():
        assert leaf.dtype == np.float32 and not leaf.weak_type
        if leaf.size > 100:
            (fan,) = (fan for end, fan in fans.items() if path.endswith(f"/{end}") or path == end)
            assert 0.8 < np.var(leaf) * fan < 1.25, path
        else:
            assert (leaf == float(path.endswith("scale"))).all(), path


def test_a_norm_that_multiplies_by_one_plus_its_scale_starts_at_zero():
    scale = make_norm(DENSE, "final_norm").init(jax.random.key(0), jnp.ones((1, 8)))["params"]["scale"]
    np.testing.assert_array_equal(scale, np.zeros(8))


# Placement


@pytest.mark.parametrize(
    "path, training, rollout",
    [
        ("embed/embedding", P("tensor", "fsdp"), P("tensor", None)),
        ("head/kernel", P("fsdp", "tensor"), P(None, "tensor")),
        ("final_norm/scale", P(None), P(None)),
        ("layers/0/attention/k/kernel", P("fsdp", "tensor", None), P(None, "tensor", None)),
        ("layers/0/attention/o/kernel", P("tensor", None, "fsdp"), P("tensor", None, None)),
        ("layers/0/attention/k/bias", P("tensor", None), P("tensor", None)),
        ("layers/0/attention/o/bias", P(None), P(None)),
        ("layers/0/attention/q_a/kernel", P("fsdp", None), P(None, None)),
        ("layers/0/attention/q_b/kernel", P("fsdp", "tensor", None), P(None, "tensor", None)),
        ("layers/0/attention/kv_b", P("fsdp", "tensor", None), P(None, "tensor", None)),
        ("layers/0/mlp/up/kernel", P("fsdp", "tensor"), P(None, "tensor")),
        ("layers/0/mlp/up/bias", P(None), P(None)),
        ("layers/0/attention/qkv/kernel", P("fsdp", "tensor", None), P(None, "tensor", None)),
        ("layers/0/attention/qkv/bias", P("tensor", None), P("tensor", None)),
        ("layers/1/moe/experts_gate", P("expert", "fsdp", "tensor"), P("expert", None, "tensor")),
        ("layers/1/moe/experts_down", P("expert", "tensor", "fsdp"), P("expert", "tensor", None)),
        ("layers/1/moe/router/kernel", P("fsdp", None), P(None, None)),
        ("layers/1/moe/router/correction", P(None), P(None)),
    ],
)
def test_named_axes_become_partition_specs(path, training, rollout):
    assert (param_spec(path), param_spec(path, "rollout")) == (training, rollout)


def test_layers_are_stacked_in_front_and_are_not_split():
    mesh, params = make_mesh(1, 4, 2), shapes(DENSE)
    layers = tree_shardings(mesh, params)["layers"], tree_shardings(mesh, params, layout="rollout")["layers"]
    training, rollout = (stacks[0]["attention"]["o"]["kernel"].spec for stacks in layers)
    assert (training, rollout) == (P(None, "tensor", None, "fsdp"), P(None, "tensor", None, None))


def test_an_axis_that_does_not_divide_a_dimension_is_dropped_and_logged_once(caplog):
    """2 KV heads cannot be split over a tensor axis of 4. Keys and values of both layers share one warning."""
    mesh, params = make_mesh(1, 2, 4), jax.eval_shape(unstack_layers, shapes(DENSE))
    layers = tree_shardings(mesh, params)["layers"]
    assert layers[1]["attention"]["k"]["kernel"].spec == P(None, "fsdp", None, None)
    assert layers[1]["attention"]["q"]["kernel"].spec == P(None, "fsdp", "tensor", None)
    assert not caplog.messages
    log_indivisible_axes(mesh, params)
    assert caplog.messages == ["Axis heads of size 2 (as in attention/k/bias) is not split over mesh.tensor=4"]


# Checkpoints, weight decay and rollouts. For Muon see test_optimizer.py; test_families.py loads every family.


def test_tensors_have_the_names_of_their_family_and_merged_axes():
    dense, mixture = (parameter_tensors_of(model_cfg, shapes(model_cfg)) for model_cfg in (DENSE, MIXTURE))
    for tensors, path, name, stored_shape in (
        (dense, "embed/embedding", "model.embed_tokens.weight", (48, 32)),
        (dense, "head/kernel", "lm_head.weight", (48, 32)),
        (dense, "layers/0/attention/q/kernel", "model.layers.1.self_attn.q_proj.weight", (32, 32)),
        (dense, "layers/0/attention/k/kernel", "model.layers.1.self_attn.k_proj.weight", (16, 32)),
        (dense, "layers/0/attention/o/kernel", "model.layers.1.self_attn.o_proj.weight", (32, 32)),
        (dense, "layers/0/attention/k/bias", "model.layers.1.self_attn.k_proj.bias", (16,)),
        (dense, "layers/0/attention_post_norm/scale", "model.layers.1.post_attention_layernorm.weight", (32,)),
        (dense, "layers/0/mlp_norm/scale", "model.layers.1.pre_feedforward_layernorm.weight", (32,)),
        (mixture, "layers/0/mlp_norm/scale", "model.layers.0.post_attention_layernorm.weight", (32,)),
        (mixture, "layers/1/attention/kv_b", "model.layers.1.self_attn.kv_b_proj.weight", (4 * 16, 18)),
        (mixture, "layers/1/moe/experts_up", "model.layers.1.block_sparse_moe.experts.15.w3.weight", (24, 32)),
    ):
        assert (tensors[path].names.flat[-1], tensors[path].stored_shape) == (name, stored_shape)


def test_matrices_decay_and_norms_biases_and_router_corrections_do_not():
    for path, decays in by_path(decay_mask(shapes(MIXTURE))).items():
        assert decays == (path.split("/")[-1] not in ("scale", "bias", "correction")), path


@pytest.mark.parametrize("tensor, apart", [(1, False), (2, False), (4, True), (8, True)])
def test_projections_are_merged_unless_the_kv_heads_cannot_be_split(tensor, apart):
    """With 2 KV heads over 4 devices, the merged kernel would have to be whole on every device; q alone does not."""
    mesh = make_mesh(data=-1, tensor=tensor)
    placed = jax.eval_shape(lambda params: place_for_rollout(DENSE, params, mesh), shapes(DENSE))
    kernels = {
        path.removeprefix("layers/1/").removesuffix("/kernel"): leaf.shape for path, leaf in by_path(placed).items()
    }
    assert ("attention/q" in kernels, "attention/qkv" in kernels) == (apart, not apart)
    assert apart or kernels["attention/qkv"] == (1, 32, tensor, 64 // tensor)
    assert kernels["mlp/gate_up"] == (1, 32, tensor, 2 * 48 // tensor) and "mlp/gate" not in kernels


@pytest.mark.parametrize("model_cfg", MODELS.values(), ids=MODELS)
def test_merged_projections_compute_what_the_parts_compute(model_cfg):
    weights = jax.tree.map(lambda x: x + 0.1, jax.jit(init_params, static_argnums=0)(model_cfg, jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, model_cfg.vocab_size)
    placed = place_for_rollout(model_cfg, weights)
    logits = jax.jit(forward, static_argnums=0)
    np.testing.assert_allclose(logits(model_cfg, placed, tokens), logits(model_cfg, weights, tokens), atol=1e-4)


def test_rollouts_keep_the_dtype_of_norms_and_routers_only():
    model_cfg = replace(MIXTURE, compute_dtype="bfloat16")
    placed = jax.eval_shape(partial(place_for_rollout, model_cfg), shapes(MIXTURE))
    for path, leaf in by_path(placed).items():
        kept = path.endswith("scale") or "/router/" in path
        assert leaf.dtype == ("float32" if kept else "bfloat16"), path
