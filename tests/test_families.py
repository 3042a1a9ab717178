"""Checks every model family against `transformers`, with random models and references made by tests/golden/make.py."""

import json
import re
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax import forward, load, sample
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.weights.families import FAMILIES

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
WITH_EXPERTS = [
    case for case in CASES if case.startswith(("mixtral", "qwen3_moe", "deepseek", "glm4_moe_lite", "kimi_k2"))
]
# These differ from another case in their config only, so only `make test-all` runs the decoder with them.
ROWS_ONLY = ["cwm", "glm4_moe_lite", "kimi_k2", "mistral3", "qwen3_vl", "seed_oss"]
# Decoding and sharding depend on the kinds of layers and parameters rather than on the family: a few cases that cover
# these are compared by default, and all of them by `make test-all`.
DECODED = ["deepseek_v3", "gemma2", "gemma3", "llama", "qwen2", "qwen3_moe"]
SHARDED = ["deepseek_v3", "gemma3", "llama"]
SHARDED_EXPERTS = ["deepseek_v3", "mixtral"]

jit_forward = jax.jit(forward, static_argnums=0)


def slow_unless(quick, cases):
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.fixture(scope="module", params=slow_unless([case for case in CASES if case not in ROWS_ONLY], CASES))
def case(request):
    """The name of a golden model. Module scope runs the tests of a case in a row, so they share compiled programs."""
    return request.param


@lru_cache
def golden_model(case):
    return load(GOLDEN / case)


@lru_cache
def reference(case):
    with np.load(GOLDEN / case / "reference.npz") as arrays:
        return dict(arrays)


def batch(case):
    """Returns eight rows, which every mesh divides: the greedy rows and the rows padded in front, each twice."""
    golden = reference(case)
    padding = ((0, 0), (0, golden["greedy"].shape[1] - golden["tokens"].shape[1]))
    tokens = np.concatenate([golden["greedy"], np.pad(golden["tokens"], padding)] * 2)
    mask = np.concatenate([np.ones_like(golden["greedy"]), np.pad(golden["mask"], padding)] * 2)
    return tokens, mask


@lru_cache
def batch_logits(case):
    tokens, mask = batch(case)
    return np.asarray(jit_forward(*golden_model(case), tokens, mask=mask))


@lru_cache
def greedy_rollout(case):
    tokens = reference(case)["tokens"].tolist()
    return sample(*golden_model(case), tokens, jax.random.key(0), samples=1, max_tokens=32, temperature=0)


def assert_close(actual, expected, real=...):
    """Compares within 1e-5 of the largest logit, where rounding alone causes differences of about 2e-6."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected)[real].max() <= 1e-5 * np.abs(expected[real]).max()


def test_every_family_has_a_golden_model():
    assert {json.loads((GOLDEN / case / "config.json").read_text())["model_type"] for case in CASES} == {*FAMILIES}


def test_the_readme_lists_every_family():
    readme = (GOLDEN.parent.parent / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in readme.split("| `model_type` |")[1].split("\n\n")[0].splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(FAMILIES)


def test_logits_match_transformers(case):
    golden, logits = reference(case), batch_logits(case)[:2]
    assert_close(logits[:, : golden["tokens"].shape[1]], golden["logits"])
    assert_close(logits[..., ::4], golden["greedy_logits"])


def test_logits_of_rows_padded_in_front_match_transformers(case):
    golden, logits = reference(case), batch_logits(case)[2:4]
    assert np.isfinite(logits).all()
    assert_close(logits[:, : golden["tokens"].shape[1]], golden["padded_logits"], golden["mask"] == 1)


@pytest.mark.parametrize("case", slow_unless(DECODED, CASES), indirect=True, scope="module")
def test_greedy_tokens_match_transformers(case):
    golden = reference(case)
    np.testing.assert_array_equal(greedy_rollout(case).tokens[:, 0], golden["greedy"][:, golden["tokens"].shape[1] :])


@pytest.mark.parametrize("case", slow_unless(DECODED, CASES), indirect=True, scope="module")
def test_logps_of_decoding_with_a_cache_match_one_forward_pass(case):
    rollout, rows = greedy_rollout(case), reference(case)["greedy"]
    first = rows.shape[1] - rollout.tokens.shape[-1]
    logps = np.asarray(jax.nn.log_softmax(batch_logits(case)[:2, first - 1 : -1]))
    expected = np.take_along_axis(logps, rows[:, first:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(rollout.logps[:, 0], expected, atol=3e-5)


def assert_same_on_mesh(case, **sizes):
    tokens, mask = batch(case)
    mesh = make_mesh(**sizes)
    model_cfg, params = load(GOLDEN / case, mesh=mesh)
    used = {axis for leaf in jax.tree.leaves(params) for axis in leaf.sharding.spec}
    assert used >= {axis for axis in sizes if axis != "expert" or model_cfg.experts.num_experts % sizes["expert"] == 0}
    with jax.set_mesh(mesh):
        logits = np.asarray(jit_forward(model_cfg, params, tokens, mask=mask))
    assert_close(logits, batch_logits(case), mask == 1)


@pytest.mark.parametrize("case", slow_unless(SHARDED, CASES), indirect=True, scope="module")
def test_sharding_over_fsdp_and_tensor_does_not_change_the_logits(case):
    assert_same_on_mesh(case, fsdp=2, tensor=4)


@pytest.mark.slow
def test_sharding_over_fsdp_does_not_change_the_logits(case):
    assert_same_on_mesh(case, fsdp=8)


# The experts of a model are split if the axis divides them: 8 experts are, 5 are not.
@pytest.mark.parametrize("case", slow_unless(SHARDED_EXPERTS, WITH_EXPERTS), indirect=True, scope="module")
def test_sharding_over_all_axes_does_not_change_the_logits(case):
    assert_same_on_mesh(case, expert=2, fsdp=2, tensor=2)


@pytest.mark.slow
@pytest.mark.parametrize("case", WITH_EXPERTS, indirect=True, scope="module")
def test_sharding_over_experts_does_not_change_the_logits(case):
    assert_same_on_mesh(case, expert=8)
