"""The part `right` of `benchmarks/on_device.py` accepts the results of this code and detects errors."""

import importlib
import threading
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.model import attention

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def right():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("parts.right")


@pytest.fixture(scope="module")
def base(right):
    return right.load_tiny_base()


@pytest.fixture(scope="module")
def computed(right, base):
    """Returns the values of the file, computed again from its prompts."""
    with jax.set_mesh(base.mesh), right.precision("float32"):
        compute_values = importlib.import_module("cpu_values").compute_values
        return compute_values(base.mesh, base.model_cfg, base.params, base.values)


@pytest.fixture
def check(right, base, monkeypatch):
    """Returns a function that runs the checks as if the device had computed the file's values, with some replaced."""

    def check_with(dtype="float32", **changes):
        got = base.values | changes

        def decode(model_cfg, params, values, temperature):
            kind = "sampled" if temperature else "greedy"
            return type("Rollout", (), {name: got.get(f"{kind}_{name}") for name in ("tokens", "lengths", "logps")})

        monkeypatch.setattr(right, "decode", decode)
        monkeypatch.setattr(right, "first_logits", lambda *_: got["logits"])
        monkeypatch.setattr(right, "update", lambda *_: got)
        results = [*right.check_logits(base, dtype), *right.check_tokens(base, dtype), *right.check_update(base, dtype)]
        return {result["check"]: result for result in results}

    return check_with


@pytest.mark.slow
def test_the_values_are_those_that_this_code_computes(base, computed):
    assert computed.keys() | {"base"} == base.values.keys()
    for name, value in computed.items():
        expected = base.values[name]
        assert value.shape == expected.shape and value.dtype.kind == expected.dtype.kind
        if name == "steps":  # the sign is undefined where the gradient is a rounding error
            value, expected = (np.where(np.abs(computed["gradients"]) > 1e-5, x, 0) for x in (value, expected))
        if value.dtype.kind == "f":
            assert np.abs(value - expected).max() < 2e-5 * np.abs(expected).max(), name
        else:
            np.testing.assert_array_equal(value, expected, name)


def test_logits_and_greedy_tokens_of_this_code_are_right(right, base):
    with jax.set_mesh(base.mesh):
        results = [*right.check_logits(base, "float32"), next(right.check_tokens(base, "float32"))]
    assert [result["check"] for result in results] == ["logits", "greedy tokens"]
    assert all(result["ok"] for result in results) and results[1]["same"] == 1


@pytest.mark.slow
def test_all_results_of_this_code_are_right(right, base, computed, monkeypatch):
    monkeypatch.setattr(right, "update", lambda *_: computed)
    with jax.set_mesh(base.mesh):
        checks = right.check_logits, right.check_tokens, right.check_update
        results = {result["check"]: result for check in checks for result in check(base, "float32")}
    assert list(results) == [
        *("logits", "greedy tokens", "sampled tokens", "log-probs"),
        *("update metrics", "update gradient", "update step"),
    ]
    assert all(result["ok"] for result in results.values()) and results["update step"]["entries"] > 2000
    assert results["greedy tokens"]["same"] == results["sampled tokens"]["same"] == 1


def test_the_values_are_sensitive_to_errors_but_not_to_rounding(right, base):
    """Rounding in float32 changes no token, and every term of the loss contributes to the update."""
    values = base.values
    margins = np.concatenate([values[f"{kind}_margins"].ravel() for kind in ("greedy", "sampled")])
    assert margins[margins > 0].min() > 4 * right.BOUNDS["float32"] * base.largest_logit
    metrics = dict(zip(values["metric_names"].tolist(), values["metrics"], strict=True))
    assert metrics["optim/grad_norm"] > 1.1 and metrics["policy/kl_ref"] > 0.05 and metrics["optim/skipped"] == 0
    assert 0.1 < metrics["policy/clip_frac"] < 0.4
    assert len(set(values["prompt_lengths"])) == 4 and len(set(values["sampled_lengths"].ravel())) > 5
    assert importlib.import_module("cpu_values").FILE.stat().st_size < 150_000


def altered(values, index, change):
    """Returns a copy of an array with `change` added at `index`."""
    values = values.copy()
    values[index] += change
    return values


ALTERATIONS = [
    ("logits", "logits", (3, 2, 100), 0.002),
    ("greedy tokens", "greedy_tokens", (5, 0, 4), 1),
    ("sampled tokens", "sampled_tokens", (1, 1, 5), 1),
    ("log-probs", "sampled_logps", (1, 1, 5), 0.002),
    ("update metrics", "metrics", 1, 0.01),
    ("update gradient", "gradients", (4, 17), 2e-5),
    ("update gradient", "gradient_sizes", (4, 17), 2e-5),
    ("update step", "steps", (0, np.s_[:]), 0.001),
]


@pytest.mark.parametrize("name, array, index, change", ALTERATIONS)
def test_only_the_check_of_a_small_error_fails(check, base, name, array, index, change):
    results = check(**{array: altered(base.values[array], index, change)})
    assert [check for check, result in results.items() if not result["ok"]] == [name]
    if base.values[array].dtype.kind == "f":
        assert not check(**{array: altered(base.values[array], index, np.nan)})[name]["ok"]


def test_another_token_is_right_in_bfloat16_where_two_nearly_tie(check, base):
    margins = np.where(base.values["sampled_margins"] > 0, base.values["sampled_margins"], np.inf)
    n = np.unravel_index(margins.argmin(), margins.shape)
    tokens = base.values["sampled_tokens"].copy()
    tokens[n[0], n[1], n[2] :] += 1
    logps = altered(base.values["sampled_logps"], (n[0], n[1], np.s_[n[2] :]), 1.0)  # of other tokens
    results = check("bfloat16", sampled_tokens=tokens, sampled_logps=logps)
    result = results["sampled tokens"]
    assert result["ok"] and result["error"] == pytest.approx(margins.min()) and result["differing"] == 1
    counted = base.values["sampled_lengths"]
    assert result["same"] == pytest.approx(1 - (counted[n[:2]] - n[2]) / counted.sum())
    assert results["log-probs"]["ok"] and results["log-probs"]["error"] == 0
    assert not check("float32", sampled_tokens=tokens)["sampled tokens"]["ok"]


@pytest.mark.parametrize("change", [-1, 1])
def test_a_completion_of_another_length_is_wrong(check, base, change):
    lengths = altered(base.values["sampled_lengths"], (0, 1), change)
    result = check("bfloat16", sampled_lengths=lengths)["sampled tokens"]
    assert not result["ok"] and result["differing"] == 1


def test_a_perturbed_parameter_is_detected(right, base):
    params = jax.tree.map(jnp.copy, base.params)
    norm = params["layers"][0]["mlp_norm"]
    norm["scale"] = norm["scale"].at[2].mul(1.001)
    with jax.set_mesh(base.mesh):
        (result,) = right.check_logits(base._replace(params=params), "float32")
    assert not result["ok"] and result["error"] < 0.01


def test_values_of_another_base_model_are_an_error(right, monkeypatch):
    monkeypatch.setattr(importlib.import_module("cpu_values"), "base_digest", lambda: "another")
    with pytest.raises(ValueError, match=r"another base model. Run `python benchmarks/cpu_values.py`"):
        next(right.measure(True, lambda: 1.0))


@pytest.fixture
def check_attention(right, monkeypatch):
    """Returns a function that compares the kernel `blocks` in a dtype after compiling it again."""
    kernels = importlib.import_module("parts.kernels")
    model_cfg = replace(right.SMOLLM2_135M, num_heads=4, num_kv_heads=2, head_dim=8)

    def check(dtype="float32"):
        monkeypatch.setattr(kernels, "DTYPES", (dtype,))
        kernels.kernel_errors.clear_cache()
        return next(kernels.check_attention(model_cfg, 256))

    yield check
    kernels.kernel_errors.clear_cache()


def test_attention_is_right(check_attention):
    result = check_attention()
    assert result["ok"] and 0 < result["error"] < 1e-5 and (result["kernel"], result["dtype"]) == ("blocks", "float32")


def test_a_wrong_mask_is_detected(check_attention, monkeypatch):
    plan_and_mask = importlib.import_module("grpo_jax.model.blockwise")
    right_mask = plan_and_mask.attention_mask

    def without_completions(queries, keys, window):
        return right_mask(*(x._replace(completion=0 * x.completion) for x in (queries, keys)), window)

    monkeypatch.setattr(plan_and_mask, "attention_mask", without_completions)
    assert not check_attention()["ok"]


@pytest.mark.slow
def test_a_wrong_gradient_of_a_kernel_is_detected(check_attention, monkeypatch):
    kernel = attention.blockwise_attention

    def stop_values(q, keys, values, *args, **options):
        values = values.at[0, 0, 5].set(jax.lax.stop_gradient(values[0, 0, 5]))
        return kernel(q, keys, values, *args, **options)

    monkeypatch.setattr(attention, "blockwise_attention", stop_values)
    result = check_attention()
    assert not result["ok"] and result["worst"] == "values"


@pytest.mark.slow
def test_attention_scores_rounded_to_bfloat16_are_detected(check_attention, monkeypatch):
    blockwise = importlib.import_module("grpo_jax.model.blockwise")
    exact = blockwise.block_scores
    assert check_attention("bfloat16")["ok"]
    monkeypatch.setattr(blockwise, "block_scores", lambda *args: jax.lax.reduce_precision(exact(*args), 8, 7))
    assert not check_attention("bfloat16")["ok"]


def test_all_kernels_of_a_gpu_are_compared_and_unsupported_ones_are_left_out(right, monkeypatch):
    kernels = importlib.import_module("parts.kernels")
    for module in (kernels, attention):
        monkeypatch.setattr(module, "mesh_platform", lambda: "gpu")
    monkeypatch.setattr(kernels, "define", lambda *_: None)
    monkeypatch.setattr(kernels, "kernel_errors", lambda *_: jnp.array([0.0, 0.1, 0.0, 0.0]))
    lines = list(kernels.check_attention(replace(right.QWEN_1_5B, num_heads=2), 2048))
    assert lines[0] == {"left_out": "cudnn in float32", "reason": "not supported; training uses blocks"}
    compared = [(line["kernel"], line["dtype"], line["worst"], line["ok"]) for line in lines[1:]]
    assert compared == [
        (*pair, "q", False) for pair in (("blocks", "float32"), ("cudnn", "bfloat16"), ("blocks", "bfloat16"))
    ]


@pytest.mark.parametrize("error, ok", [(0.0, True), (0.05, False)])
def test_a_wrong_kernel_for_tokens_is_detected(right, monkeypatch, error, ok):
    kernels = importlib.import_module("parts.kernels")
    assert list(kernels.check_token_attention(right.SMOLLM2_135M)) == [
        {"left_out": "token_attention", "reason": "only used on GPUs"}
    ]
    kernel = kernels.token_attention

    def wrong(q, new, cache, *args, **options):
        return kernel(q, new._replace(v=(1 + error) * new.v), cache, *args, **options, interpret=True)

    monkeypatch.setattr(kernels, "SLOTS", 4)
    monkeypatch.setattr(kernels, "COLUMNS", 256)
    monkeypatch.setattr(kernels, "token_attention", wrong)
    monkeypatch.setattr(kernels, "token_attention_supports", lambda *_: True)
    (result,) = kernels.check_token_attention(right.SMOLLM2_135M)
    assert result["ok"] == ok and (result["kernel"], result["head_dim"]) == ("token_attention", 64)


def test_packed_rows_have_prompts_completions_and_padding(right):
    kernels = importlib.import_module("parts.kernels")
    for length in (256, 2048, 8192):
        row = kernels.packed_row(length)
        assert row.prompt.max() >= 2 and row.completion.max() >= 4 and (row.prompt == 0).sum() == length // 16
        assert row.position.max() > length // 5


def test_drift_between_sampler_and_trainer_is_detected(base, monkeypatch):
    depths = importlib.import_module("parts.depths")
    trainer = -np.ones((4, 128), np.float32) * 8
    for gap, ok in ((0.0004, True), (0.002, False), (np.nan, False)):
        monkeypatch.setattr(depths, "logps_at", lambda *_, gap=gap: (altered(trainer, (1, 1), gap), trainer))
        (result,) = depths.check_depth(base.model_cfg, base.params, 512)
        assert result["ok"] == ok and (result["depth"], result["dtype"]) == (512, "float32")


def test_checks_run_in_parallel_and_report_in_order(right, base, capsys):
    first, second, end = (threading.Event() for _ in range(3))

    def waiting():
        first.set()
        assert second.wait(60)  # for a check that comes later
        yield {"check": "waiting", "ok": True}

    def broken():
        second.set()
        assert first.wait(60)
        yield {"check": "broken", "ok": True}
        raise RuntimeError("no such kernel")

    def endless():
        end.wait(60)
        yield {}

    checks = {"waiting": waiting, "broken": broken, "endless": endless, "last": lambda: [{"last": 1}]}
    seconds_left = iter([60.0, 60.0, 1.0, 60.0])
    lines = list(right.run_side_by_side(checks, base.mesh, lambda: next(seconds_left)))
    end.set()
    assert lines == [
        {"check": "waiting", "ok": True},
        {"check": "broken", "ok": False, "reason": "RuntimeError: no such kernel"},
        {"left_out": "endless", "reason": "no time"},
        {"last": 1},
    ]
    assert "no such kernel" in capsys.readouterr().err


def test_small_runs_some_of_the_checks(right, base):
    small, all_checks = (list(right.list_checks(base, small)) for small in (True, False))
    assert all_checks[:2] == ["logits float32", "logits bfloat16"] and len(all_checks) == 18
    assert set(small) - set(all_checks) == {"depth 1024 bfloat16"} and len(small) == 8
