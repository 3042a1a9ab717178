"""The dtypes of parameters, computation and logits are those of the config."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from grpo_jax import forward, main, sample
from grpo_jax.config import check, default
from grpo_jax.config.workdir import read_config
from grpo_jax.errors import UserError
from grpo_jax.learn.logprobs import packed_logprobs
from grpo_jax.learn.packing import unpack_completions
from grpo_jax.learn.update import make_experience
from grpo_jax.model.architecture import ExpertsConfig, LayerConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.model.parameters import tree_shardings
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.rollout.sampler import pad_prompts, place_for_rollout
from grpo_jax.run.arrays import restore_arrays
from grpo_jax.run.checkpoint import read_meta
from grpo_jax.run.policy import restore_policy
from grpo_jax.weights.source import find_model, read_model_config
from tests.tiny import CONFIG, packed, params

LOW = replace(CONFIG, compute_dtype="bfloat16")
MIXTURE = replace(LOW, layers=(LayerConfig(use_experts=True),), experts=ExpertsConfig(4, 2, 24))


def matmul_dtypes(model_cfg) -> set[str]:
    """Returns the dtypes of the operands of all matrix products in a forward pass."""
    dtypes = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "ragged_dot_general", "ragged_dot"):
                dtypes.add("x".join(str(operand.aval.dtype) for operand in equation.invars[:2]))
            for inner in jaxprs_in_params(equation.params):
                walk(inner)

    walk(jax.make_jaxpr(partial(forward, model_cfg))(param_shapes(model_cfg), jnp.arange(1, 7)[None]).jaxpr)
    return dtypes


def test_every_matrix_product_but_the_routers_uses_the_compute_dtype():
    assert matmul_dtypes(CONFIG) == {"float32xfloat32"}
    assert matmul_dtypes(LOW) == {"bfloat16xbfloat16"}
    assert matmul_dtypes(MIXTURE) == {"bfloat16xbfloat16", "float32xfloat32"}


def test_bfloat16_logits_are_near_the_float32_ones():
    def logits(model_cfg):
        return jax.jit(partial(forward, model_cfg))(params(), jnp.arange(1, 13)[None])

    exact, low = logits(CONFIG), logits(LOW)
    assert low.dtype == jnp.float32
    assert 1e-4 < np.abs(exact - low).max() < 0.05 * np.abs(exact).max()
    rounded = logits(replace(LOW, logit_dtype="bfloat16"))
    np.testing.assert_array_equal(rounded, rounded.astype(jnp.bfloat16).astype(jnp.float32))
    assert (low != low.astype(jnp.bfloat16).astype(jnp.float32)).any()


@pytest.mark.parametrize("model_cfg", [LOW, MIXTURE], ids=["dense", "experts"])
def test_sampler_and_trainer_agree_in_bfloat16(model_cfg):
    """The rollout rounds the weights to bfloat16 once; training rounds the same float32 weights where it uses them."""
    weights, prompts = params(model_cfg), [[5, 6, 7]] * 4
    placed = place_for_rollout(model_cfg, weights)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(placed)} == {"bfloat16", "float32"}
    assert placed["layers"][0]["attention"]["qkv"]["kernel"].dtype == jnp.bfloat16
    assert placed["layers"][0]["attention_norm"]["scale"].dtype == jnp.float32
    rollout = sample(model_cfg, weights, prompts, jax.random.key(0), samples=4, max_tokens=12)
    experience = make_experience(pad_prompts(prompts), rollout)
    batch = packed(experience)

    def gap_to_sampler(model_cfg):
        score = jax.jit(lambda params: packed_logprobs(model_cfg, params, batch, 1.0, entropy=False)[0])
        logps = unpack_completions(np.asarray(score(weights)), np.asarray(batch.flat_index), experience.mask.shape)
        return np.abs(logps - experience.sampler_logps)

    gap = gap_to_sampler(model_cfg)
    if model_cfg.experts:  # rounding may send a token that is near a tie between experts to another one
        assert np.median(gap) < 0.01 and np.mean(gap > 0.15) < 0.02
    else:
        assert gap.mean() < 0.01 and gap.max() < 0.15
        # Both round alike: a trainer that computes in float32 is farther away.
        assert gap_to_sampler(CONFIG).mean() > gap.mean()


@pytest.mark.slow
def test_parameters_and_reference_keep_their_dtypes(tmp_path):
    """Runs one update with bfloat16 master weights and reference, and reads the checkpoint."""
    main.main(
        [
            f"--config={Path(__file__).parent.parent}/configs/r1zero.py",
            f"--workdir={tmp_path}",
            "--config.model.param_dtype=bfloat16",
            "--config.model.compute_dtype=bfloat16",
            "--config.model.reference_dtype=bfloat16",
            "--config.total_steps=1",
            "--config.rollout.prompts=4",
            "--config.rollout.samples=2",
            "--config.eval.questions=8",
        ]
    )
    assert read_config(tmp_path).model.param_dtype == "bfloat16"
    shapes = param_shapes(read_model_config(find_model("tiny")), "bfloat16")
    shardings = tree_shardings(make_mesh(8), shapes)
    digests = read_meta(tmp_path, 1)["digests"]["reference"]
    reference = restore_arrays(tmp_path / "checkpoints" / "reference", digests, shapes, shardings)
    _, policy = restore_policy(tmp_path, shapes, shardings)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((policy, reference))} == {"bfloat16"}
    changed = jax.tree.map(lambda new, old: (new != old).any(), policy, reference)
    assert any(jax.tree.leaves(changed))


@pytest.mark.parametrize("key", ["param_dtype", "compute_dtype", "logit_dtype"])
def test_unknown_dtype_is_an_error(key):
    cfg = default()
    cfg.model[key] = "float16"
    with pytest.raises(UserError, match=f"model.{key} must be 'float32' or 'bfloat16'; found 'float16'"):
        check(cfg)
