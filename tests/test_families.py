"""Every model family gives what `transformers` gives, for the random models in tests/golden (made by make.py there)."""

from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax import forward, load, sample
from grpo_jax.parallel.mesh import make_mesh

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json") if (path.parent / "reference.npz").is_file())
WITH_EXPERTS = [case for case in CASES if case.startswith(("mixtral", "qwen3_moe", "deepseek"))]
SLOW = pytest.mark.slow
MESHES = [pytest.param(dict(fsdp=8), marks=SLOW), dict(fsdp=2, tensor=4)]
EXPERT_MESHES = [dict(expert=2, fsdp=2, tensor=2), pytest.param(dict(expert=8), marks=SLOW)]

by_name = lambda sizes: "-".join(f"{axis}{size}" for axis, size in sizes.items())

run = jax.jit(forward, static_argnums=0)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Of module scope, so that the tests of a case follow one another and share what is compiled."""
    return request.param


@lru_cache
def model(case):
    return load(GOLDEN / case)


@lru_cache
def reference(case):
    with np.load(GOLDEN / case / "reference.npz") as arrays:
        return dict(arrays)


@lru_cache
def greedy(case):
    tokens = reference(case)["tokens"].tolist()
    return sample(*model(case), tokens, jax.random.key(0), samples=1, max_tokens=32, temperature=0)


@lru_cache
def long_logits(case):
    """Of the reference's greedy rows."""
    return np.asarray(run(*model(case), reference(case)["greedy"]))


@lru_cache
def eight_rows(case):
    """Rows that all meshes divide, and their logits on one device."""
    rows = reference(case)["greedy"][:, :44].reshape(8, 11)
    return rows, np.asarray(run(*model(case), rows))


def assert_close(ours, theirs, real=...):
    """To 1e-5 of the largest logit; rounding alone makes about 2e-6."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs)[real].max() <= 1e-5 * np.abs(theirs[real]).max()


def test_all_families_are_here():
    assert len(CASES) == 14 and len(WITH_EXPERTS) == 5


def test_forward(case):
    """Of the rows with their greedy tokens, which those before cannot see."""
    golden = reference(case)
    assert_close(long_logits(case)[:, : golden["tokens"].shape[1]], golden["logits"])


def test_forward_of_rows_padded_in_front(case):
    golden = reference(case)
    ours = run(*model(case), golden["tokens"], mask=golden["mask"])
    assert np.isfinite(ours).all()
    assert_close(ours, golden["padded_logits"], golden["mask"] == 1)


def test_greedy_tokens(case):
    golden = reference(case)
    np.testing.assert_array_equal(greedy(case).tokens[:, 0], golden["greedy"][:, golden["tokens"].shape[1] :])


def test_decoding_from_the_cache_is_the_forward_pass(case):
    """Log-probs of tokens drawn one at a time, and those of one pass over the whole rows."""
    made, rows = greedy(case), reference(case)["greedy"]
    first = rows.shape[1] - made.tokens.shape[-1]
    logps = np.asarray(jax.nn.log_softmax(long_logits(case)[:, first - 1 : -1]))
    expected = np.take_along_axis(logps, rows[:, first:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(made.logps[:, 0], expected, atol=3e-5)


def test_forward_matches_live_transformers(case):
    """The same, computed now, where torch is installed."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        GOLDEN / case, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(reference(case)["greedy"], dtype=torch.long)).logits.numpy()
    assert_close(long_logits(case), expected)


def same_on_a_mesh(case, sizes):
    rows, expected = eight_rows(case)
    mesh = make_mesh(**sizes)
    model_cfg, params = load(GOLDEN / case, mesh=mesh)
    used = {axis for leaf in jax.tree.leaves(params) for axis in leaf.sharding.spec}
    assert used >= {axis for axis in sizes if axis != "expert" or model_cfg.experts.num_experts % sizes["expert"] == 0}
    with jax.set_mesh(mesh):
        assert_close(run(model_cfg, params, rows), expected)


@pytest.mark.parametrize("sizes", MESHES, ids=by_name)
def test_a_mesh_changes_nothing(case, sizes):
    same_on_a_mesh(case, sizes)


@pytest.mark.parametrize("case", WITH_EXPERTS, indirect=True, scope="module")
@pytest.mark.parametrize("sizes", EXPERT_MESHES, ids=by_name)
def test_an_axis_of_experts_changes_nothing(case, sizes):
    """8 experts are split, 5 are not."""
    same_on_a_mesh(case, sizes)
