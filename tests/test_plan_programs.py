"""What is compiled for a plan, what a compiler's end becomes, and how often the loops of a program run."""

import dataclasses
import json
from subprocess import CompletedProcess

import jax
import pytest

import grpo_jax.planning.report
from grpo_jax.config import check, default
from grpo_jax.errors import UserError
from grpo_jax.model.blockwise import BLOCK_SIZE
from grpo_jax.planning import compiling, needs, planner
from grpo_jax.planning.report import DOES_NOT_FIT, describe_program, exit_code
from grpo_jax.planning.topology import GIB
from tests.test_needs import COMPLETION, PROMPT, run_of
from tests.test_plan_report import compiled


def with_train(run, **keys):
    return run._replace(cfg=dataclasses.replace(run.cfg, train=dataclasses.replace(run.cfg.train, **keys)))


def test_the_loops_of_a_program_run_as_often_as_training_runs_them(monkeypatch):
    """Rows of a prompt and its 2 completions: 2 of them on each of 2 shards, of which an update takes half."""
    monkeypatch.setattr(compiling, "count_program", lambda text, mesh, trips, least, inside="": (dict(mesh), trips))
    monkeypatch.setattr(compiling, "prefill_batch_size", lambda model_cfg, width: 3 if width == PROMPT else 1)
    run = with_train(run_of(fsdp=2, rollout_sizes=dict(tensor=2)), minibatches=2, chunk_tokens=48)
    width = needs.updated_batch(run).width
    assert width >= PROMPT + 2 * COMPLETION
    (_, update), (_, scoring) = (compiling.program_counts(run, name, "") for name in ("update", "scoring"))
    (rollout_mesh, prefill) = compiling.program_counts(run, "prefill", "")
    assert (update["micro_batches"], scoring["micro_batches"]) == (1, 2)
    assert update["token_blocks"] == scoring["token_blocks"] == 3  # of 128 tokens
    assert update["key_blocks"] == (width / BLOCK_SIZE + 1) / 2
    assert prefill["key_blocks"] == (PROMPT / BLOCK_SIZE + 1) / 2
    assert (prefill["prompt_batches"], prefill["refill"], rollout_mesh["tensor"]) == (2, 1, 2)


def test_a_report_shows_what_each_program_needs():
    run = with_train(run_of(), minibatches=2)
    expected = {
        "prefill": needs.prefill_work(run),
        "decode 96": needs.decode_work(run, 96),
        "scoring": needs.forward_work(run, needs.scored_batch(run)),
        "update": needs.update_work(run),
    }
    for name, work in expected.items():
        found = describe_program(run, compiled(name), needs.run_memory(run))
        assert (found["needed_product_flops"], found["needed_attention_flops"]) == work
    assert "needed_product_flops" not in describe_program(run, compiled("placement"), needs.run_memory(run))


@pytest.mark.parametrize(
    "code, lines, message",
    [
        (-6, ["F0000 Check failed: size == 3", "*** stack ***"], "signal 6: F0000 Check failed: size == 3"),
        (1, ["Traceback", "ValueError: no such slice", "see the manual"], "exit code 1: ValueError: no such slice"),
        (2, ["error: --topology must be"], "exit code 2: error: --topology must be"),
        (1, ["", "killed"], "exit code 1: killed"),
        (-9, [], "signal 9: no message"),
    ],
)
def test_a_compiler_that_ends_says_why_in_one_line(code, lines, message, monkeypatch):
    done = CompletedProcess([], code, "", "\n".join(lines))
    monkeypatch.setattr(compiling.subprocess, "run", lambda command, **_: done)
    expected = {"name": "update", "error": f"the compiler ended with {message}"}
    assert compiling.run_compiler(["--topology=cpu:1"], "update", {}) == expected


def test_programs_are_compiled_one_by_one_and_reported_in_order(monkeypatch):
    def run(command, env, **_):
        assert command[1:4] == ["-m", "grpo_jax.plan", "--topology=cpu:1"] and env == {"A": "1"}
        return CompletedProcess(command, 0, f'a warning\n{{"name": "{command[-1].removeprefix("--program=")}"}}\n', "")

    monkeypatch.setattr(compiling.subprocess, "run", run)
    names, seen = ["update", "decode 96", "prefill"], []
    results = compiling.compile_programs(["--topology=cpu:1"], names, {"A": "1"}, seen.append)
    assert list(results) == names and sorted(each["name"] for each in seen) == sorted(names)
    assert all(result == {"name": name} for name, result in results.items())


def test_only_a_plan_can_be_an_earlier_plan(tmp_path):
    file = tmp_path / "plan.json"
    for text in ("no JSON", "[]", '{"programs": 3}', "{}"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"--earlier must name a plan that --json printed; found .*plan\.json"):
            compiling.read_earlier(str(file))
    file.write_text(json.dumps({"programs": {"update": {"digest": "a", "seconds": 3}, "prefill": {"error": "x"}}}))
    assert compiling.read_earlier(str(file)) == {"a": {"digest": "a", "seconds": 3}}
    assert compiling.read_earlier(None) == {}


@pytest.mark.parametrize("memory_bytes, names", [(GIB, ["decode 136", "update"]), (2**20, [])])
def test_a_run_that_training_would_refuse_is_not_compiled(memory_bytes, names, monkeypatch, capsys):
    raw, asked = default(), []
    raw.rollout.max_prompt_tokens = 80
    monkeypatch.setattr(planner, "compile_programs", lambda argv, names, *_: asked.extend(names) or {})
    monkeypatch.setattr(grpo_jax.planning.report, "find_remedies", lambda *_: [])  # which takes seconds
    devices = jax.devices()[:1]
    target = planner.Target("cpu:1", "cpu", devices, memory_bytes, ("decode", "update"), None, [], {})
    report = planner.plan_config(check(raw), target)
    assert asked == names and bool(report["refusal"]) == (not names) and report["flags"] == []
    assert exit_code(report) == (0 if names else DOES_NOT_FIT)
    assert ("Compiling decode 136" in capsys.readouterr().err) == bool(names)
