"""Precision is configuration: what is kept, computed and put out in which dtype."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from grpo_jax import forward, main, sample
from grpo_jax.config import check, default, read_config
from grpo_jax.errors import UserError
from grpo_jax.learn.logprobs import packed_logprobs
from grpo_jax.learn.packing import unpack_completions
from grpo_jax.learn.update import make_experience
from grpo_jax.model.architecture import ExpertsConfig, LayerConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.rollout.sampler import pad_prompts, place_for_rollout
from grpo_jax.run import checkpoint
from tests.tiny import CONFIG, packed, params

LOW = replace(CONFIG, compute_dtype="bfloat16")
MIXTURE = replace(LOW, layers=(LayerConfig(use_experts=True),) * 2, experts=ExpertsConfig(4, 2, 24))


def dots(cfg, weights, tokens) -> set[str]:
    """The dtypes of the operands of all matrix products of a forward pass."""
    found = set()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "ragged_dot_general", "ragged_dot"):
                found.add("x".join(str(operand.aval.dtype) for operand in equation.invars[:2]))
            for inner in jaxprs_in_params(equation.params):
                walk(inner)

    walk(jax.make_jaxpr(lambda w, t: forward(cfg, w, t))(weights, tokens).jaxpr)
    return found


def test_compute_dtype_is_that_of_every_product_but_the_routers():
    tokens = jnp.arange(1, 7)[None]
    assert dots(CONFIG, params(), tokens) == {"float32xfloat32"}
    assert dots(LOW, params(), tokens) == {"bfloat16xbfloat16"}
    assert dots(MIXTURE, params(MIXTURE), tokens) == {"bfloat16xbfloat16", "float32xfloat32"}


def test_low_precision_is_near_and_not_equal():
    weights, tokens = params(), jnp.arange(1, 13)[None]
    exact, low = forward(CONFIG, weights, tokens), forward(LOW, weights, tokens)
    assert low.dtype == jnp.float32
    assert 1e-4 < np.abs(exact - low).max() < 0.05 * np.abs(exact).max()
    rounded = forward(replace(LOW, logit_dtype="bfloat16"), weights, tokens)
    np.testing.assert_array_equal(rounded, rounded.astype(jnp.bfloat16).astype(jnp.float32))
    assert (low != low.astype(jnp.bfloat16).astype(jnp.float32)).any()


@pytest.mark.parametrize("model_cfg", [LOW, MIXTURE], ids=["dense", "experts"])
def test_sampler_and_trainer_agree_in_low_precision(model_cfg):
    """The rollout's copy is rounded once to bfloat16; the trainer rounds the same master weights where it uses them."""
    weights = params(model_cfg)
    placed = place_for_rollout(model_cfg, weights)
    kept = {str(leaf.dtype) for leaf in jax.tree.leaves(placed)}
    assert kept == {"bfloat16", "float32"}
    assert placed["layers"][0]["attention"]["q"]["kernel"].dtype == jnp.bfloat16
    assert placed["layers"][0]["attention_norm"]["scale"].dtype == jnp.float32
    rollout = sample(model_cfg, weights, [[5, 6, 7]] * 4, jax.random.key(0), samples=4, max_tokens=12)
    rows = rollout.rows()
    batch = packed(make_experience(pad_prompts([[5, 6, 7]] * 4), rollout, np.zeros((4, 4)), None))

    def logps(model_cfg):
        return unpack_completions(
            np.asarray(packed_logprobs(model_cfg, weights, batch, 1.0)[0]), np.asarray(batch.flat_index), (16, 12)
        )

    gap = np.abs(logps(model_cfg) - rows["logps"])
    if model_cfg.experts:  # a token near a tie between experts may be sent elsewhere by a rounding
        assert np.median(gap) < 0.01 and np.mean(gap > 0.15) < 0.02
    else:
        assert gap.mean() < 0.01 and gap.max() < 0.15
    full = logps(replace(model_cfg, compute_dtype="float32"))
    assert np.abs(full - rows["logps"]).mean() > gap.mean()  # the rounding that both share is larger


def test_parameters_are_kept_in_their_dtype(tmp_path):
    """A run with bfloat16 master weights and reference."""
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
    from grpo_jax.parallel.mesh import make_mesh, tree_shardings
    from grpo_jax.weights.source import find_model, read_model_config

    assert read_config(tmp_path).model.param_dtype == "bfloat16"
    shapes = param_shapes(read_model_config(find_model("tiny")), "bfloat16")
    places = tree_shardings(make_mesh(8), shapes)
    reference = checkpoint.restore_reference(tmp_path, shapes, places)
    _, policy = checkpoint.restore_policy(tmp_path, shapes, places)
    assert {str(leaf.dtype) for tree in (reference, policy) for leaf in jax.tree.leaves(tree)} == {"bfloat16"}
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(policy), jax.tree.leaves(reference)))


@pytest.mark.parametrize("key", ["param_dtype", "compute_dtype", "logit_dtype"])
def test_an_unknown_dtype_is_refused(key):
    cfg = default()
    cfg.model[key] = "float16"
    with pytest.raises(UserError, match=f"model.{key} to be 'float32' or 'bfloat16'; found 'float16'"):
        check(cfg)
