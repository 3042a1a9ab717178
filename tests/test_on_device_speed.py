"""The parts `rollout`, `flags` and `update` of `benchmarks/on_device.py` count correctly and run what training runs."""

import importlib
import os
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jaxtyping
import numpy as np
import pytest

from grpo_jax.config import check
from grpo_jax.config.flags import load_config
from grpo_jax.model.architecture import LayerConfig, ModelConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.parallel.mesh import make_mesh
from grpo_jax.rollout.draws import NO_FILTER
from grpo_jax.rollout.sampler import place_for_rollout, start_rollout
from grpo_jax.rollout.slots import decode_tokens
from grpo_jax.text.stops import build_stop_table
from grpo_jax.types import TrainState
from tests import tiny

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
UNTIED = ModelConfig(
    vocab_size=10,
    hidden_size=4,
    intermediate_size=6,
    layers=(LayerConfig(),) * 2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    max_positions=64,
)
KERNELS = 2 * (16 + 8 + 8 + 16 + 3 * 24)  # q, k, v, o and the MLP of both layers


@pytest.fixture
def part(monkeypatch):
    """Returns a function that imports a module of `parts` by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return lambda name: importlib.import_module(f"parts.{name}")


@pytest.fixture
def work_for(monkeypatch):
    """Returns a function that gives a fake device some seconds of work, which pass when JAX waits for it."""
    clock, pending = [0.0], []

    def wait(result):
        clock[0] += sum(pending)
        pending.clear()
        return result

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(jax, "block_until_ready", wait)
    return pending.append


def shapes_and_dtypes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.slow
def test_decoding_without_prefill_starts_and_continues_like_a_rollout(part, monkeypatch):
    decoding, model_cfg = part("decoding"), replace(tiny.CONFIG, compute_dtype="bfloat16")
    sizes = decoding.RolloutSizes(slots=4, samples=2, prompt_tokens=32, columns=36)
    prompts, key = decoding.random_prompts(model_cfg, sizes), jax.random.key(5)
    params, limits = decoding.place_random_params(model_cfg, None), np.full((2, 2), 4)
    start = dict(slots=4, columns=36, max_tokens=4)
    state, queue = start_rollout(model_cfg, params, prompts, key, limits, **start)
    made_state, made_queue = decoding.start_decoding(sizes, prompts, queue.prompt_kv, key)
    for real, made in ((state, made_state), (queue, made_queue)):
        assert jax.tree.structure(real) == jax.tree.structure(made)
        for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(real), jax.tree.leaves(made), strict=True):
            assert x.aval == y.aval and (x == y).all(), path
    random_kv = tuple(decoding.random_prompt_kv(model_cfg, sizes, key) for _ in queue.prompt_kv)
    assert shapes_and_dtypes(random_kv) == shapes_and_dtypes(queue.prompt_kv)

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # so that shapes can stand for arrays
    program = decoding.lower_decode(model_cfg, sizes).compile()
    scalars = np.float32(1), np.int32(0), np.int32(3)
    stop_table = build_stop_table(model_cfg.vocab_size, ())
    real = decode_tokens(model_cfg, params, state, queue, stop_table, *scalars, greedy=False, filter=NO_FILTER)
    made = program(params, made_state, made_queue, stop_table, *scalars)
    assert (real.tokens == made.tokens).all() and (real.tokens[:, :3] > 0).any() and (real.lengths == 3).all()


def test_live_columns_are_the_mean_over_the_timed_steps(part):
    decoding = part("decoding")
    sizes, steps = decoding.RolloutSizes(slots=4, samples=2, prompt_tokens=10, columns=64), 5
    # Step 0 decodes the last token of the prompt again, which attends to itself and the 9 before it.
    attended = [10 + step for step in range(decoding.WARM_UP_STEPS + decoding.REPEATS * steps)]
    assert decoding.live_columns(sizes, steps) == np.mean(attended[decoding.WARM_UP_STEPS :])


def test_idle_slots_are_an_error_instead_of_a_time(part):
    decoding = part("decoding")
    sizes = decoding.RolloutSizes(slots=4, samples=2, prompt_tokens=8, columns=64)

    def idle(params, state, queue, stop_table, temperature, shrink_at, steps):
        return state.replace(num_sampled=state.num_sampled + steps - 1)

    with pytest.raises(RuntimeError, match="a token per step"):
        decoding.decode_ms(idle, tiny.CONFIG, sizes, None, 2)


def test_the_time_of_a_step_is_the_median_of_the_runs_after_the_warm_up(part, work_for):
    decoding = part("decoding")
    sizes, step_ms = decoding.RolloutSizes(slots=4, samples=2, prompt_tokens=8, columns=64), iter([50.0, 2.0, 9.0, 4.0])

    def program(params, state, queue, stop_table, temperature, shrink_at, steps):
        work_for(steps * next(step_ms) / 1e3)
        return state.replace(num_sampled=state.num_sampled + steps)

    assert decoding.decode_ms(program, tiny.CONFIG, sizes, None, 5) == pytest.approx(4.0)


@pytest.fixture
def limits(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("limits")


def test_calls_are_timed_until_the_device_is_done_and_without_the_first(limits, work_for):
    seconds = iter([30.0, 2.0, 3.0])
    assert limits.time_calls(lambda: work_for(next(seconds)), 2) == [2.0, 3.0]


def test_the_rates_of_a_copy_and_of_a_matmul_count_all_bytes_and_operations(limits, monkeypatch):
    monkeypatch.setattr(limits, "time_calls", lambda call, repeats: [4.0, 1.0, 2.0])
    monkeypatch.setattr(jax.random, "bits", lambda key, shape: np.empty(shape, np.uint32))  # takes no memory
    assert limits.copy_gb_s(3) == 2 * 2**28 / 1.0 / 1e9
    assert limits.square_gflop_s("float32", 3) == 2 * 2048**3 / 2.0 / 1e9


@pytest.mark.parametrize(
    "name, parameters, in_norms, kv_bytes",
    [
        ("Qwen2.5-1.5B", 1_543_714_304, 57 * 1536, 28 * 2 * 2 * 128 * 2),
        ("SmolLM2-135M", 134_515_008, 61 * 576, 30 * 2 * 3 * 64 * 2),
    ],
)
def test_the_least_bytes_of_a_step_are_those_counted_by_hand(part, monkeypatch, name, parameters, in_norms, kv_bytes):
    rollout = part("rollout")
    model_cfg, sizes = rollout.MODELS[name], rollout.RolloutSizes(128)
    monkeypatch.setattr(rollout, "decode_ms", lambda *args: 4.0)
    monkeypatch.setattr(rollout, "temp_gib", lambda program: 0.0)
    shapes = jax.eval_shape(lambda params: place_for_rollout(model_cfg, params), param_shapes(model_cfg))
    params = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)  # takes no memory
    line = rollout.measure_shape(name, model_cfg, sizes, (None, 1.0), params, 10, 1000.0)
    assert line["parameters"] == parameters and line["columns"] == 512 + 8 + 14.5
    least = 2 * (parameters + in_norms) + 128 * line["columns"] * kv_bytes  # norms stay in float32
    assert line["least_gb"] == least / 1e9 and line["limit_ms"] == pytest.approx(least / 1e9)  # at 1,000 GB/s
    assert line["limit_fraction"] == line["limit_ms"] / 4 and line["tok_s"] == 128 / 0.004
    assert line.get("aim", {}).get("measured") == (line["limit_fraction"] if name == "Qwen2.5-1.5B" else None)


@pytest.fixture
def measure_rollout(part, monkeypatch):
    """Returns a function that runs the part `rollout` with a fake `measure_shape`."""
    rollout = part("rollout")
    fakes = dict(copy_gb_s=lambda repeats: 1.0, lower_decode=lambda *args: None)
    for name, fake in fakes.items():
        monkeypatch.setattr(rollout, name, fake)
    monkeypatch.setattr(rollout, "place_random_params", lambda *args: None)

    def compile_nothing(lowered):
        futures = [Future() for _ in lowered]
        for future in futures:
            future.set_result((None, 0.0))
        return futures

    monkeypatch.setattr(rollout, "start_compiling", compile_nothing)
    monkeypatch.setattr(jax, "set_mesh", lambda mesh: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def run(measure_shape, seconds_left):
        monkeypatch.setattr(rollout, "measure_shape", measure_shape)
        return list(rollout.measure(False, seconds_left))

    return run


def test_a_rollout_that_would_take_too_long_is_left_out(measure_rollout):
    clock = iter([100, 0.0, 100, 0.0])  # the time left before each batch
    lines = measure_rollout(lambda name, model_cfg, sizes, *rest: {"slots": sizes.slots}, lambda: next(clock))
    assert lines == [
        {"slots": 128},
        {"left_out": "Qwen2.5-1.5B with 512 slots", "reason": "no time"},
        {"slots": 32},
        {"slots": 32},
        {"left_out": "SmolLM2-135M with 128 slots, SmolLM2-135M with 512 slots", "reason": "no time"},
    ]


def test_a_rollout_that_runs_out_of_memory_does_not_stop_the_others(measure_rollout):
    def measure_shape(name, model_cfg, sizes, *rest):
        if sizes.slots == 512:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return {"slots": sizes.slots}

    lines = measure_rollout(measure_shape, lambda: 100)
    expected = [128, "out of memory", 32, 32, 128, "out of memory"]
    assert [line.get("slots", line.get("reason")) for line in lines] == expected
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measure_rollout(lambda *args: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INTERNAL")), lambda: 100)


def test_random_parameters_have_the_shapes_of_the_model_and_scales_near_one(part):
    made = part("shapes").random_params(tiny.CONFIG, "bfloat16")
    assert shapes_and_dtypes(made) == shapes_and_dtypes(param_shapes(tiny.CONFIG, "bfloat16"))
    for path, leaf in jax.tree_util.tree_leaves_with_path(made):
        offset = np.asarray(leaf, np.float32) - ("scale" in str(path))
        assert 0.005 < offset.std() < 0.035 and abs(offset).max() < 0.05, path


def test_the_config_is_that_of_the_preset_on_one_device(part):
    preset = check(load_config(f"{ROOT / 'configs' / 'r1zero.py'}:qwen2.5-1.5b"))
    made = part("shapes").training_config(prompts=32, samples=16, max_prompt_tokens=512, max_tokens=1024)
    differing = [name for name, value in vars(preset).items() if value != getattr(made, name)]
    assert differing == ["mesh"]  # the preset uses all devices


@pytest.fixture
def packed(part):
    """Returns a learner without parameters, and the packed batch of two small groups."""
    update = part("update")
    sizes = update.UpdateSizes(prompts=2, rollout_prompts=2, samples=4, max_prompt_tokens=8, max_tokens=12)
    cfg, mesh = update.make_config(sizes, 56), make_mesh(devices=jax.devices()[:1])
    state = SimpleNamespace(params=param_shapes(UNTIED))
    learner = update.Learner(cfg, UNTIED, mesh, state, None, None)
    return learner, update.make_batch(cfg, learner, sizes.prompts)


def test_the_rows_of_an_update_hold_groups_of_random_completions(packed):
    batch = packed[1]
    assert batch.tokens.shape == (4, 56) and batch.num_micro_batches == 2 and batch.num_sequences == 8
    lengths = np.bincount(batch.sequence[batch.sequence >= 0])
    assert len(lengths) == 8 and lengths.max() <= 12 and len(set(lengths)) > 3
    sampled = batch.flat_index >= 0
    assert (batch.advantages[sampled] != 0).all() and (batch.weights[sampled] > 0).all()
    assert np.allclose(batch.sampler_logps[sampled], -np.log(10)) and np.allclose(batch.ref_logps[sampled], -np.log(10))


def test_the_flops_of_an_update_are_those_counted_by_hand(part, packed):
    learner, batch = packed
    tokens = keys = 0
    for prompt, completion in zip(batch.segments.prompt, batch.segments.completion, strict=True):
        for group in set(prompt[prompt > 0].tolist()):
            length, *lengths = np.unique(completion[prompt == group], return_counts=True)[1].tolist()
            tokens += length + sum(lengths)
            keys += sum(range(1, length + 1)) + sum(length * n + sum(range(1, n + 1)) for n in lengths)
    sampled = (batch.flat_index >= 0).sum()
    # A key costs 2 multiplications and 2 additions per number in a query, in each of the 2 layers.
    forward = 2 * KERNELS * tokens + 2 * 4 * 10 * sampled + 2 * 4 * (2 * 2) * keys
    assert part("update").needed_tflop(learner, batch) == pytest.approx(3 * forward / 1e12, rel=1e-12)


@pytest.fixture
def measure_update(part, packed, monkeypatch, work_for):
    """Returns a function that runs the part `update` with a fake program.

    The program takes 1.5 s per micro-batch, and 30 s more when it is called for the first time.
    """
    update, (learner, _) = part("update"), packed
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), learner.state.params)

    def program(state, batch):
        work_for(1.5 * int(batch.num_micro_batches) + 30 * (state.step == 0))
        return state.replace(step=state.step + 1), {}

    def measure(skipped=0, small=False):
        state = TrainState(np.int32(0), params, (), np.int32(skipped), is_reference=np.bool_(True))
        compiled = SimpleNamespace(compile=lambda: program)
        fake = learner._replace(
            model_cfg=replace(UNTIED, compute_dtype="bfloat16"),
            state=state,
            update=SimpleNamespace(lower=lambda *args: compiled),
        )
        monkeypatch.setattr(update, "random_learner", lambda *args: fake)
        monkeypatch.setattr(update, "square_gflop_s", lambda dtype, repeats: {"bfloat16": 500.0}[dtype])
        monkeypatch.setattr(update, "temp_gib", lambda program: 0.0)
        monkeypatch.setattr(jax, "set_mesh", lambda mesh: None)
        sizes = update.UpdateSizes(2, 2, samples=4, max_prompt_tokens=8, max_tokens=12, row_tokens=(56,))
        return list(update.measure_rows(sizes, small, lambda: 1000.0))

    return measure


def test_the_mfu_of_an_update_is_that_of_needed_operations_after_the_warm_up(part, packed, measure_update):
    (line,), (small_line,) = measure_update(), measure_update(small=True)
    needed, tokens = part("update").needed_tflop(*packed), int((packed[1].segments.prompt > 0).sum())
    assert (line["rows"], line["row_tokens"], line["tokens"]) == (2, 56, tokens)
    assert line["padding_fraction"] == pytest.approx(1 - tokens / 112)
    assert line["update_s"] == 3.0 and line["product_tflop_s"] == 0.5
    assert line["mfu"] == line["aim"]["measured"] == pytest.approx(needed / 3.0 / 0.5)
    assert small_line["mfu"] == line["mfu"] and "aim" not in small_line


def test_a_skipped_update_is_an_error(measure_update):
    with pytest.raises(RuntimeError, match="not finite"):
        measure_update(skipped=1)


# Replaces the process of a variant: on this GPU, the flags determine how long a step takes and whether it crashes.
FAKE_VARIANT = """
import json, os, sys, time
flags = os.environ["XLA_FLAGS"]
sys.stdin.readline()
answer = lambda **fields: print(json.dumps(fields), flush=True)
answer(platform=PLATFORM, device="fake " + flags.split()[0])
if "+WHILE" in flags:
    sys.exit("F0101 00:00:00 Unknown flag in XLA_FLAGS: +WHILE" + chr(10) + "    @ 0x1  main")
if flags.endswith("command_buffer="):
    time.sleep(SLEEP)
answer(decode_ms=4.0 if "command_buffer=" in flags else 2.0)
"""


@pytest.fixture
def run_flags(part, monkeypatch):
    """Returns a function that runs the part `flags` with fake variants."""
    flags = part("flags")
    monkeypatch.setenv("XLA_FLAGS", "--of_the_user=1")

    def run(platform="gpu", sleep=0, seconds_left=lambda: 60.0, prepare=False):
        code = FAKE_VARIANT.replace("PLATFORM", repr(platform)).replace("SLEEP", str(sleep))
        monkeypatch.setattr(flags, "COMMAND", [sys.executable, "-S", "-c", code])
        monkeypatch.setattr(flags.Variant, "prepared", None)
        if prepare:
            flags.prepare(False)
        return flags, list(flags.measure(False, seconds_left))

    return run


def test_memory_that_the_compiler_does_not_report_is_unknown(part):
    assert part("rollout").temp_gib(SimpleNamespace(memory_analysis=lambda: None)) is None


def test_a_variant_that_crashes_does_not_stop_the_others(run_flags, capfd):
    flags, (default, crashed, without) = run_flags()
    assert flags.device_name() == "fake --of_the_user=1"
    assert default == {"flags": "default", "added_flags": "", "decode_ms": 2.0, "speedup": 1.0}
    assert crashed["flags"] == "whole loop" and crashed["error"].startswith("F0101")
    assert "@ 0x1  main" in capfd.readouterr().err
    assert without["flags"] == "without graphs" and without["speedup"] == 0.5


def test_a_process_that_was_prepared_measures_the_default_variant(run_flags):
    flags, lines = run_flags(prepare=True)
    assert len(lines) == 3 and lines[0]["decode_ms"] == 2.0
    assert flags.Variant.prepared.process.poll() is not None  # otherwise it still waits


def test_other_platforms_measure_the_default_variant_only(run_flags):
    _, lines = run_flags(platform="tpu")
    assert len(lines) == 2 and lines[0]["decode_ms"] == 2.0
    assert lines[1] == {"left_out": "whole loop, without graphs", "reason": "these flags are for GPUs; found a tpu"}


def test_a_variant_that_takes_too_long_is_killed_and_left_out(run_flags):
    deadline = time.monotonic() + 1.5
    _, lines = run_flags(sleep=60, seconds_left=lambda: deadline - time.monotonic())
    assert lines[2] == {"left_out": "without graphs", "reason": "no time"}
    assert time.monotonic() < deadline + 5


@pytest.mark.slow
def test_the_part_does_not_occupy_the_device_that_its_variants_need(run_flags, part):
    code = FAKE_VARIANT.replace("PLATFORM", "'gpu'").replace("SLEEP", "0")
    program = f"""
from parts import flags
flags.COMMAND = {[sys.executable, "-S", "-c", code]!r}
print(len(list(flags.measure(False, lambda: 60.0))), flags.device_name())
"""
    env = os.environ | {"JAX_PLATFORMS": "none_such", "XLA_FLAGS": "--x", "PYTHONPATH": str(ROOT)}  # JAX cannot start
    done = subprocess.run([sys.executable, "-c", program], cwd=BENCHMARKS, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "3 fake --x\n", done.stderr
