"""The parts `step`, `peer` and `learn` of `benchmarks/on_device.py` count, extrapolate and stop correctly."""

import importlib
import json
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from grpo_jax import config
from grpo_jax.model.architecture import LayerConfig, ModelConfig
from grpo_jax.model.decoder import param_shapes
from grpo_jax.rollout.sampler import place_for_rollout

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def part(monkeypatch):
    """Returns a function that imports a part by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return lambda name: importlib.import_module(f"parts.{name}")


def test_the_flops_of_a_step_are_those_counted_by_hand(part):
    sizes = dict(
        vocab_size=10, hidden_size=4, intermediate_size=6, num_heads=2, num_kv_heads=1, head_dim=2, max_positions=8
    )
    model_cfg = ModelConfig(**sizes, layers=(LayerConfig(),), tie_embeddings=True)
    placed = jax.eval_shape(lambda params: place_for_rollout(model_cfg, params), param_shapes(model_cfg))
    kernels = 16 + 8 + 8 + 16 + 3 * 24  # q, k, v, o and the MLP; the head adds 40
    # One prompt of 2 tokens and two completions of 3. Each key costs 2 multiplications and 2 additions per number in q.
    prefill = 2 * kernels * 2 + 4 * 4 * (1 + 2)
    decode = 2 * ((2 * kernels + 2 * 40) * 3 + 4 * 4 * (2 + 3 + 4))
    forward = prefill + 2 * ((2 * kernels + 2 * 40) * 3 + 4 * 4 * (3 + 4 + 5))
    assert (prefill, decode, forward) == (528, 2208, 2832)
    assert part("step").needed_flops(model_cfg, placed, 1, 2, 2, 3) == prefill + decode + 4 * forward


def test_a_folded_tokenizer_decodes_every_id_of_a_large_vocabulary(part):
    class Letters:
        def __len__(self):
            return 3

        def decode(self, ids, **options):
            return "".join("abc"[token] for token in ids)

    assert part("step_programs").FoldedTokenizer(Letters()).decode([0, 1, 2, 3, 151935]) == "abcaa"


def test_decode_steps_are_timed_after_a_warm_up_with_the_same_cache(part, monkeypatch):
    step, calls = part("step"), []
    prompts = SimpleNamespace(tokens=np.zeros((1, 128)))
    work = SimpleNamespace(prompts=prompts, cfg=SimpleNamespace(rollout=SimpleNamespace(samples=1)))
    monkeypatch.setattr(step, "all_cache_sizes", lambda work: [192, 256])
    monkeypatch.setattr(step, "start", lambda work, placed: None)
    monkeypatch.setattr(step, "visit_cache_sizes", lambda work, visit, placed: [visit(n, *"psq") for n in (192, 256)])
    monkeypatch.setattr(step, "decode", lambda *arguments: None)
    monkeypatch.setattr(step, "seconds_of", lambda call, *arguments: (4.0, calls.append((call, arguments[-1]))))
    monkeypatch.setattr(step, "to_rollout", lambda *arguments: None)
    times, decode_ms = step.estimate_rollout(work, None)
    tokens = [count for call, count in calls if call is step.decode]  # each finishes before the next begins
    assert tokens[1::2] == [step.ESTIMATE_TOKENS] * 2 and min(tokens[::2]) > 1
    each = 4.0 / step.ESTIMATE_TOKENS
    assert decode_ms == {192: 1e3 * each, 256: 1e3 * each}
    assert times == {"prefill_s": 4.0, "decode_s": 128 * each}


@pytest.mark.parametrize("name", ["right", "learn", "step"])
def test_parts_that_load_a_tokenizer_import_transformers_before_they_are_timed(part, name):
    assert {"AutoTokenizer", "CONFIG_MAPPING"} <= vars(part(name)).keys()


@pytest.fixture
def work_for(monkeypatch):
    """Returns a function that gives a fake device some seconds of work, which pass when JAX waits for it."""
    clock, pending = [0.0], []

    def wait(result):
        clock[0] += sum(pending)
        pending.clear()
        return result

    for name in ("perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, lambda: clock[0])
    monkeypatch.setattr(jax, "block_until_ready", wait)
    return pending.append


@pytest.fixture
def work():
    """Returns the sizes of a step with 2 prompts of 64 tokens and 3 completions of 128."""
    return SimpleNamespace(
        cfg=SimpleNamespace(rollout=SimpleNamespace(samples=3, max_tokens=128)),
        context=SimpleNamespace(
            model_cfg=SimpleNamespace(compute_dtype="bfloat16"),
            mesh=None,
            rollout_mesh=None,
            rollout_plan=SimpleNamespace(slots=6),
        ),
        learner=SimpleNamespace(state=SimpleNamespace(params=None)),
        prompts=SimpleNamespace(tokens=np.zeros((2, 64), np.int32)),
    )


@pytest.fixture
def measure_step(part, monkeypatch, work_for, work):
    """Returns a function that measures a step of fake stages and returns its lines."""
    step = part("step")

    def run_learning(work, rollout, times, compiled):
        compiled.append("late")
        times["score_s"] = 16.0
        yield "scoring", {}
        times["update_s"] = 17.0
        yield "update", {"ok": True}

    def measure(seconds_left=lambda: 1000.0):
        placements, compiled = iter([90.0, 1.0]), ["early"]
        learning = dict(reward_s=4.0, pack_s=5.0, score_s=6.0, update_s=7.0)
        fakes = dict(
            count_compilations=lambda: compiled,
            place_for_rollout=lambda *args: work_for(next(placements)),
            compile_programs=lambda *args: True,
            square_gflop_s=lambda dtype, repeats: {"bfloat16": 2000.0}[dtype],
            estimate_rollout=lambda *args: (dict(prefill_s=2.0, decode_s=3.0), {192: 250.0}),
            needed_flops=lambda model_cfg, placed, *sizes: {(2, 64, 3, 128): 84e12}[sizes],
            estimate_learning=lambda work: (work, learning),
            draw_completions=lambda *args: work_for(16.0),  # placement and prefill included
            run_learning=partial(run_learning, compiled=compiled),
            peak_gib=lambda: 1.0,
        )
        for name, fake in fakes.items():
            monkeypatch.setattr(step, name, fake)
        return list(step.measure_step(work, seconds_left))

    return measure


def test_the_times_of_a_step_add_up_and_replace_the_estimates(part, measure_step):
    lines = measure_step()
    totals = [("estimate", 28.0), ("rollout", 38.0), ("scoring", 48.0), ("update", 58.0)]
    assert [(line["measured"], line["step_s"]) for line in lines] == totals
    last = lines[-1]
    assert [last[name] for name in part("step").PHASES] == [1.0, 2.0, 13.0, 4.0, 5.0, 16.0, 17.0]
    assert (last["tokens"], last["slots"], last["compile_s"], last["ok"]) == (2 * 3 * 128, 6, 90.0, True)
    assert last["step_tok_s"] == 768 / 58 and last["decode_tok_s"] == 768 / 13 and last["mfu"] == 84 / 58 / 2
    assert last["compilations"] == ["late"]


def test_a_step_leaves_out_stages_for_which_there_is_no_time(measure_step):
    seconds_left = iter([6.5, 21.5])  # the rollout is expected to take 6 s, and the rest 22 s
    lines = measure_step(lambda: next(seconds_left))
    assert [line.get("measured") for line in lines] == ["estimate", "rollout", None]
    assert lines[-1]["left_out"] == "scoring and the update"


@pytest.fixture
def learning_stages(part, monkeypatch, work_for):
    """Replaces all stages after a rollout, except the update, by fakes that take 1 to 6 s."""

    def host(seconds, result=None):
        work_for(seconds)
        return jax.block_until_ready(result)

    experience = SimpleNamespace(replace=lambda ref_logps: experience)
    packed = SimpleNamespace(num_micro_batches=11, replace=lambda num_micro_batches: int(num_micro_batches))
    fakes = dict(
        random_rollout=lambda work: None,
        make_experience=lambda *args: host(1.0, experience),
        start_scoring=lambda *args: host(2.0, lambda: host(3.0)),
        grade=lambda *args: host(4.0, experience),
        pack_update=lambda *args: host(5.0, packed),
        shard_rows=lambda mesh, batch: host(6.0, batch),
        score_options=lambda cfg: {},
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(part("step"), name, fake)


@pytest.mark.parametrize("skipped, no_signal, length", [(0, 0, 128), (1, 0, 128), (0, 1, 128), (0, 0, 127)])
def test_all_stages_after_a_rollout_are_timed(part, learning_stages, work_for, work, skipped, no_signal, length):
    def update(state, batch):
        work_for(7.0)
        return state, {"optim/skipped": skipped, "optim/no_signal": no_signal}

    work.learner.update, work.learner.reference, times = update, None, {}
    rollout = SimpleNamespace(lengths=np.array([[128, length]]))
    stages = list(part("step").run_learning(work, rollout, times))
    assert stages == [("scoring", {}), ("update", {"ok": (skipped, no_signal, length) == (0, 0, 128)})]
    assert times == {"reward_s": 4.0, "score_s": 3.0, "pack_s": 1.0 + 2.0 + 5.0 + 6.0, "update_s": 7.0}


def test_scoring_and_the_update_are_extrapolated_from_few_micro_batches(
    part, learning_stages, monkeypatch, work_for, work
):
    warm = set()

    def run(name, seconds):
        work_for(seconds + 50 * (name not in warm))
        warm.add(name)
        return name, None

    step, learner = part("step"), work.learner
    monkeypatch.setattr(step, "score_completions", lambda model_cfg, params, count: run("score", 2.0 + 3.0 * count))
    learner.update = lambda state, count: run("update", 1.0 + 2.0 * count)
    learner.model_cfg = learner.reference = None
    learner._replace = work._replace = SimpleNamespace
    _, times = step.estimate_learning(work)
    assert times == {
        "reward_s": 4.0,
        "pack_s": 1.0 + 2 * (5.0 + 6.0),  # once for scoring and once for the update
        "score_s": 2.0 + 3.0 * 11 - 4.0,  # grading hides a part of it
        "update_s": 1.0 + 2.0 * 11,
    }


def test_linear_costs_are_extrapolated_exactly(part):
    assert part("line").extrapolate((1, 4), (2 + 3 * 1, 2 + 3 * 4), 171) == 2 + 3 * 171


def test_generation_by_the_peer_is_extrapolated_exactly_if_the_time_per_token_grows_linearly(part):
    peer = part("peer")

    def token_s(index):
        return 0.25 + 0.5 * index

    def seconds(first, last, overhead):
        return overhead + sum(map(token_s, range(first, last + 1)))

    first_s = [seconds(2, count, overhead=100.0) for count in peer.FEW_TOKENS]  # prefill samples the first token
    start = 1024 - peer.FEW_TOKENS[1]
    last_s = [seconds(start + 1, start + count, overhead=7.0) for count in peer.FEW_TOKENS]
    assert peer.generation_s(1024, first_s, last_s) == seconds(2, 1024, overhead=100.0)


def test_the_peer_has_the_shape_of_the_model(part):
    model_cfg, shape = part("shapes").QWEN_1_5B, part("peer").QWEN_1_5B
    assert shape.model == dict(
        vocab_size=model_cfg.vocab_size,
        hidden_size=model_cfg.hidden_size,
        intermediate_size=model_cfg.intermediate_size,
        num_hidden_layers=model_cfg.num_layers,
        num_attention_heads=model_cfg.num_heads,
        num_key_value_heads=model_cfg.num_kv_heads,
    )


def test_the_peer_is_absent_without_torch(part, monkeypatch):
    peer = part("peer")
    monkeypatch.setattr(peer, "INSTALLED", False)
    with pytest.raises(part("step_programs").NotHere, match="torch is not installed"):
        list(peer.measure(True, lambda: 100.0))


@pytest.fixture
def run_fake(part, monkeypatch, tmp_path):
    """Returns a function that measures a run with these accuracies, which then calls `end`; and an event to end it."""
    learn, released = part("learn"), threading.Event()

    def measure(accuracies, end=lambda: None, seconds_left=lambda: 100.0, **settings):
        def train(cfg, *, workdir):
            workdir.mkdir()
            with open(workdir / "metrics.jsonl", "w", buffering=1) as file:
                for step, accuracy in enumerate(accuracies):
                    update = {"time/step_s": 0.5 * step**2, "rollout/length_mean": 10.0 * step} if step else {}
                    evaluation = {} if accuracy is None else {"eval/accuracy": accuracy}
                    file.write(json.dumps({"step": step} | update | evaluation) + "\n")
            end()

        cfg = config.default()
        cfg.update(settings)
        monkeypatch.setattr(learn, "train", train)
        return learn.measure_until(0.95, cfg, tmp_path / "run", seconds_left)

    yield measure, released
    released.set()


def test_the_run_that_learns_is_the_default_one_with_more_evaluations(part):
    learn = part("learn")
    made, default = learn.make_config(small=False), config.default()
    default.eval.every_steps = learn.EVAL_EVERY
    assert made.to_dict() == default.to_dict()


def test_learning_is_measured_until_an_evaluation_reaches_the_goal(run_fake):
    measure, released = run_fake
    lines = list(measure([0.2, None, 0.9, None, 0.95, None, 0.99], end=released.wait))
    assert [(line["updates"], line["accuracy"]) for line in lines] == [(0, 0.2), (2, 0.9), (4, 0.95)]
    assert ["ok" in line for line in lines] == [False, False, True]
    assert lines[-1]["ok"] is True
    # Of updates 1 to 4: 0.5, 2, 4.5 and 8 s; 10, 20, 30 and 40 tokens in each of 16 * 8 completions.
    assert (lines[-1]["steps_s"], lines[-1]["step_s"], lines[-1]["tok_s"]) == (15.0, 3.25, 128 * 25 / 3.25)


def test_a_run_whose_last_evaluation_misses_the_goal_is_not_ok(run_fake):
    measure, _ = run_fake
    lines = list(measure([0.2, None, 0.9], total_steps=2))
    assert [line.get("ok") for line in lines] == [None, False]


def test_an_error_in_training_is_an_error_of_the_part(run_fake):
    measure, _ = run_fake

    def fail():
        raise ValueError("no memory")

    lines = measure([0.2], end=fail)
    assert next(lines)["accuracy"] == 0.2
    with pytest.raises(ValueError, match="no memory"):
        next(lines)


def test_a_run_that_ends_without_its_last_evaluation_is_an_error(run_fake):
    measure, _ = run_fake
    with pytest.raises(RuntimeError, match="without its last evaluation"):
        list(measure([0.2, None], total_steps=2))


def test_a_run_that_is_out_of_time_says_what_is_left_out(run_fake):
    measure, released = run_fake
    budget = iter([1.0] * 3 + [0.3] * 100)  # too little to go on
    lines = list(measure([0.2], end=released.wait, seconds_left=lambda: next(budget)))
    assert [line.get("accuracy") for line in lines] == [0.2, None]
    assert "left_out" in lines[-1] and not any("ok" in line for line in lines)
