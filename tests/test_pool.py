"""Workers grade completions: whatever a function does there, no completion is lost."""

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax import config
from grpo_jax.errors import UserError
from grpo_jax.main import main
from grpo_jax.parallel.mesh import num_data_shards
from grpo_jax.rewards import accuracy_part, pool
from grpo_jax.rewards.parts import resolve_parts
from grpo_jax.rewards.pool import Grader
from grpo_jax.run import rollout_progress
from grpo_jax.run.context import build_context, read_base_model
from grpo_jax.run.metrics import read_metrics, read_samples
from grpo_jax.run.stages import draw_completions, grade_completions
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import encode_prompts
from grpo_jax.weights.reading import load
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent

# `act` grades a completion with the number in its problem, after doing what the problem says. `log` counts its calls.
VERIFIER = """
import os, signal, subprocess, sys, time

def act(problems, texts, lengths):
    (problem,), (text,), (length,) = problems, texts, lengths
    with open(problem.metadata["log"], "a") as log:
        log.write(f"{problem.answer}\\n")
    with open(problem.metadata["log"] + "-groups", "a") as groups:
        groups.write(f"{os.getpgrp()}\\n")
    exec(problem.metadata["code"], dict(globals(), problem=problem))
    value = int(problem.answer)
    return {"nan": [float("nan")], "shape": [1, 2], "none": None}.get(problem.metadata["code"][1:], [value])

def twice(problems, texts, lengths):
    assert problems[0].metadata["log"]
    return [2 * int(problems[0].answer)]

def environment(problems, texts, lengths):
    assert not {"jax", "jaxlib", "grain", "transformers", "flax"} & set(sys.modules), sorted(sys.modules)
    (problem,) = problems
    assert isinstance(problem.metadata["code"], tuple) and texts == ["<answer>2"]
    assert lengths.tolist() == [problem.metadata["length"]]
    return [len([name for name in os.environ if "SECRET" in name or "TOKEN" in name.split("_")])]
"""

# Code that a function runs, with the kind of failure that is counted and a part of its description.
BEHAVIORS = {
    "time.sleep(1e6)": ("timeout", "timeout in act."),
    "while True: pass": ("timeout", ""),
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1e6)": ("timeout", ""),
    "os.kill(os.getpid(), signal.SIGSTOP)": ("timeout", ""),
    "raise ValueError('bad')": ("error", "ValueError: bad (<string>:1)"),
    "sys.exit(3)": ("error", "SystemExit: 3"),
    "raise KeyboardInterrupt": ("error", "KeyboardInterrupt"),
    "f = lambda: f(); f()": ("error", "error in act: "),
    "os._exit(0)": ("error", "error in act: Its process ended with exit code 0."),
    "os.kill(os.getpid(), signal.SIGSEGV)": ("error", "exit code -11"),
    "os.fork() or time.sleep(1e6); os._exit(1)": ("error", "exit code 1"),  # the child keeps the socket open
    "os.closerange(0, 1000)": ("error", ""),
    "os.write(int(sys.argv[1]), bytes([0, 0, 0, 2]) + b'{}')": ("error", ""),  # a reply that is not the worker's
    "x = [bytes(2**31) for _ in range(9)]": ("error", "error in act: Its process ran out of memory."),
    "#nan": ("error", "found nan at index 0"),
    "#shape": ("error", "found an array of shape (2,)"),
    "#none": ("error", "found None"),
    "signal.setitimer(signal.ITIMER_REAL, 0.1)": ("", ""),  # would end the next one
    "time.sleep(0.2)": ("", ""),
    "os.fork()": ("", ""),  # the child returns too
    "os.fork() or time.sleep(1e6)": ("", ""),
    "subprocess.Popen(['sleep', '1000'])": ("", ""),
    "problem.metadata['log'] = None": ("", ""),
    "print('chatter')": ("", ""),
    "os.write(1, b'chatter')": ("", ""),
    "assert not sys.stdin.read()": ("", ""),
}


def make_grader(tmp_path, *parts, deadline=0.5, **parts_from_python):
    """Returns a grader with the given parts, in which `file:` stands for a file with the functions above."""
    (tmp_path / "verifier.py").write_text(VERIFIER)
    names = tuple(part.replace("file:", f"{tmp_path}/verifier.py:") for part in parts)
    raw = config.default()
    raw.reward.parts = names or tuple(parts_from_python)
    raw.reward.weights = (1.0,) * len(raw.reward.parts)
    if any(":" in name for name in names):
        raw.reward.deadline = deadline
    cfg = config.check(raw)
    return Grader(cfg, parts_from_python or resolve_parts(cfg), load_tokenizer(find_model("tiny")), (0,))


def grade(grader, codes, log, text="<think>1</think> <answer>2</answer>"):
    """Grades the same text once for each piece of code in `codes`; the expected answer is its number."""
    ids = grader.tokenizer(text)["input_ids"]
    problems = [
        Problem("?", str(n), {"code": code, "log": str(log), "length": len(ids)}) for n, code in enumerate(codes)
    ]
    return grader.grade(problems, np.array([ids] * len(codes), np.int32), np.full(len(codes), len(ids)))


def children():
    """Returns the ids of the workers that this process has started."""
    listed = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "rewards.worker" in line]


def test_no_completion_is_lost_or_graded_twice_whatever_functions_do(tmp_path, capfd):
    codes = [*BEHAVIORS, *["pass"] * 30]
    grader = make_grader(tmp_path, "accuracy", "file:act", "file:twice")
    grades = grade(grader, codes, tmp_path / "log")
    grader.close()
    calls = sorted(map(int, (tmp_path / "log").read_text().split()))
    assert calls == list(range(len(codes)))  # each of them once
    for n, (code, (kind, reason)) in enumerate(BEHAVIORS.items()):
        failed = bool(kind)
        assert grades.scores["act"][n] == (0 if failed else n), code
        assert (grades.scores["timeout"][n], grades.scores["error"][n]) == (kind == "timeout", kind == "error"), code
        assert len(grades.failures[n]) == failed and all(reason in text for text in grades.failures[n]), code
    assert grades.scores["act"][len(BEHAVIORS) :].tolist() == list(range(len(BEHAVIORS), len(codes)))
    assert grades.scores["twice"].tolist() == [2 * n for n in range(len(codes))]  # whatever `act` did
    assert grades.scores["accuracy"].tolist() == [n == 2 for n in range(len(codes))]
    assert set(grades.texts) == {"<think>1</think> <answer>2</answer>"}
    assert [verdict.parsed for verdict in grades.verdicts] == ["2"] * len(codes)
    assert "chatter" not in capfd.readouterr().out
    assert not children()
    end = time.monotonic() + 5  # those of processes that have ended stay until they are reaped
    for group in set((tmp_path / "log-groups").read_text().split()):  # nor any process that functions have started
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < end:
                os.killpg(int(group), 0)
                time.sleep(0.02)


def test_functions_in_workers_see_neither_jax_nor_the_users_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "1")
    monkeypatch.setenv("HF_TOKEN", "1")
    grader = make_grader(tmp_path, "file:environment")
    grades = grade(grader, [(1, 2)] * 2, tmp_path / "log", text="<answer>2")  # a tuple stays one
    grader.close()
    assert grades.scores["environment"].tolist() == [0, 0] and grades.failures == [[], []]


@pytest.mark.parametrize(
    "codes, message",
    [
        (
            ["raise ValueError('bad')"] * 3 + ["pass"] * 2,
            "3 of 5 failed. Correct the function, or raise reward.deadline=0.3 if it needs more seconds. The first "
            "failure: error in act: The reward part 'act' must return 1 finite number, one for each text, but it "
            "raised ValueError: bad (<string>:1). Correct that function.",
        ),
        (
            ["time.sleep(1e6)"] * 2,
            "or raise reward.deadline=0.3 if it needs more seconds. The first failure: timeout in act.",
        ),
    ],
)
def test_a_run_stops_with_the_first_error_if_more_than_half_of_a_batch_fails(tmp_path, codes, message):
    grader = make_grader(tmp_path, "file:act", deadline=0.3)
    with pytest.raises(UserError) as raised:
        grade(grader, codes, tmp_path / "log")
    grader.close()
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_continues_if_half_of_a_batch_fails(tmp_path):
    grader = make_grader(tmp_path, "file:act")
    assert grade(grader, ["#nan", "#nan", "#", "#"], tmp_path / "log").scores["error"].tolist() == [1, 1, 0, 0]
    assert grade(grader, ["#", "#"], tmp_path / "log").scores["act"].tolist() == [0, 1]  # the next batch starts over
    grader.close()


def test_a_function_that_never_returns_stops_the_run_before_half_of_a_large_batch_has_hung(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "HOPELESS", 2)
    grader = make_grader(tmp_path, "file:act", deadline=0.2)
    with pytest.raises(UserError, match=r"; \d of 500 failed\. .*The first failure: timeout in act"):
        grade(grader, ["time.sleep(1e6)"] * 500, tmp_path / "log")
    grader.close()


def test_a_function_that_a_worker_cannot_import_is_an_error_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "1")
    (tmp_path / "mine.py").write_text("import os\nkey = os.environ['MY_KEY']\ndef f(problems, texts, lengths): ...")
    grader = make_grader(tmp_path, f"{tmp_path}/mine.py:f")
    with pytest.raises(
        UserError, match=r"importing it raised KeyError: 'MY_KEY' \(.*mine.py:2\).*of your environment variables"
    ):
        grader.start()
    grader.close()


def test_functions_from_python_see_the_whole_batch_in_the_trainer(tmp_path):
    seen = []

    def closure(problems, texts, lengths):
        seen.append((os.getpid(), texts, lengths.tolist()))
        return np.arange(len(texts))

    before, grader = children(), make_grader(tmp_path, correct=accuracy_part, closure=closure)
    grades = grade(grader, ["", "", ""], tmp_path / "log", text="<answer>2</answer>!")
    assert seen == [
        (os.getpid(), ["<answer>2</answer>!"] * 3, [len(grader.tokenizer("<answer>2</answer>!")["input_ids"])] * 3)
    ]
    assert list(grades.scores) == ["correct", "closure", "timeout", "error"]
    assert grades.scores["correct"].tolist() == [0, 0, 1] and grades.scores["closure"].tolist() == [0, 1, 2]
    assert not grader.workers and children() == before
    grader.parts["closure"] = lambda *_: 1 / 0
    with pytest.raises(UserError, match=r"'closure' must return 3 finite numbers.*ZeroDivisionError"):
        grade(grader, ["", "", ""], tmp_path / "log")


@pytest.mark.parametrize("backend", [True, False], ids=["tokens", "text"])
def test_a_long_batch_gets_the_same_grades_from_workers_as_in_the_trainer(tmp_path, monkeypatch, backend):
    parts = "format", "accuracy", "language"
    here, there = make_grader(tmp_path, *parts), make_grader(tmp_path, *parts)
    expected = grade(here, [""] * 9, tmp_path / "log", text="a <answer>2</answer>")
    assert not here.workers
    if not backend:  # a tokenizer that only `transformers` can run
        monkeypatch.setattr(pool, "tokenizer_backend", lambda tokenizer: None)
    monkeypatch.setattr(pool, "SECONDS_IN_TRAINER", 0)
    grades = grade(there, [""] * 9, tmp_path / "log", text="a <answer>2</answer>")
    again = grade(there, [""] * 9, tmp_path / "log", text="a <answer>2</answer>")
    assert there.workers
    there.close()
    for other in (grades, again):
        assert other.texts == expected.texts and other.verdicts == expected.verdicts
        assert {name: values.tolist() for name, values in other.scores.items()} == {
            name: values.tolist() for name, values in expected.scores.items()
        }


KILLED = """
import sys, numpy
from grpo_jax import config
from grpo_jax.rewards.pool import Grader
from grpo_jax.text.problem import Problem
from grpo_jax.weights.source import find_model
from grpo_jax.weights.tokenizer import load_tokenizer

raw = config.default()
raw.reward.parts, raw.reward.weights, raw.reward.deadline = (sys.argv[1],), (1.0,), 1000.0
cfg = config.check(raw)
grader = Grader(cfg, {"act": max}, load_tokenizer(find_model("tiny")), ())
code = "print(os.getpid(), subprocess.Popen(['sleep', '1000'], stderr=-3).pid, file=sys.stderr); time.sleep(1e6)"
grader.grade([Problem("?", "1", {"code": code, "log": "log"})], numpy.zeros((1, 1), int), numpy.ones(1, int))
"""


def test_workers_and_what_they_have_started_end_when_the_trainer_is_killed(tmp_path):
    (tmp_path / "verifier.py").write_text(VERIFIER)
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, f"{tmp_path}/verifier.py:act"]
    trainer = subprocess.Popen(command, env=environ, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    processes = [int(word) for word in trainer.stderr.readline().split()]
    for process in processes:
        os.kill(process, 0)
    trainer.kill()
    trainer.wait()
    end = time.monotonic() + 30
    for process in processes:
        with pytest.raises(ProcessLookupError):
            while time.monotonic() < end:
                os.kill(process, 0)
                time.sleep(0.02)


@pytest.mark.slow
def test_completions_that_end_early_are_graded_while_others_are_sampled(tmp_path, monkeypatch):
    """Tokens and grades equal those of a run that grades after sampling, even with several shards and refills.

    The rollout has fewer shards than the mesh of the updates.
    """
    monkeypatch.setattr(rollout_progress, "MAX_STEPS", 5)
    (tmp_path / "verifier.py").write_text(VERIFIER)
    raw = config.default()
    raw.reward.parts, raw.reward.weights = ("accuracy", f"{tmp_path}/verifier.py:act"), (1.0, 1.0)
    raw.rollout.prompts, raw.rollout.samples, raw.rollout.max_tokens, raw.rollout.slots = 6, 5, 40, 16
    raw.rollout.max_prompt_tokens, raw.rollout.mesh.tensor = 80, 2
    cfg = config.check(raw)
    base = read_base_model(cfg)
    problems = [Problem(f"What is {n} + 1?", str(n + 1), {"code": "#", "log": str(tmp_path / "log")}) for n in range(6)]
    results, early = [], 0
    for overlaps in (False, True):
        context = build_context(cfg, base, reward_parts=resolve_parts(cfg))
        with jax.set_mesh(context.mesh), closing(context.grader):
            context.grader.start()
            params = load(context.source, mesh=context.mesh)[1]
            prompts = encode_prompts(context.prompt_format, problems, range(6), 80)
            rollout = draw_completions(cfg, context, params, prompts, jax.random.key(0), problems if overlaps else ())
            early, lengths = len(context.grader.payloads), rollout.lengths.ravel()
            for n, (problem, tokens, length) in context.grader.payloads.items():
                assert (problem, length) == (problems[n // 5], lengths[n])
                assert tokens.tolist() == rollout.tokens.reshape(30, -1)[n, :length].tolist()
            results.append((rollout, *grade_completions(cfg, context, problems, rollout)))
            assert early == 0 or overlaps
    assert 15 < early < 30 and 1 < num_data_shards(context.rollout_mesh) < num_data_shards(context.mesh)
    jax.tree.map(np.testing.assert_array_equal, *results)


MOODY = """
import time

def moody(problems, texts, lengths):
    if len(texts[0]) % 7 == 0:
        time.sleep(1e6)
    if len(texts[0]) % 7 == 1:
        raise ValueError("not today")
    return [len(texts[0]) % 2]
"""


@pytest.mark.slow
def test_a_run_continues_and_counts_the_completions_that_a_function_cannot_grade(tmp_path, capsys, monkeypatch):
    """Two runs have the same rewards. The records say why a reward is 0, and the console says it once per rollout."""
    monkeypatch.setattr(rollout_progress, "MAX_STEPS", 5)
    grade_all, early = Grader.grade, []
    monkeypatch.setattr(Grader, "grade", lambda self, *args: early.append(len(self.payloads)) or grade_all(self, *args))
    (tmp_path / "mine.py").write_text(MOODY)
    parts = json.dumps(["accuracy", "format", f"{tmp_path}/mine.py:moody"])
    flags = ["--config.rollout.prompts=4", "--config.rollout.samples=8", "--config.eval.questions=16"]
    flags += [f"--config.reward.parts={parts}", "--config.reward.weights=[1, 1, 1]", "--config.reward.deadline=1"]
    flags += ["--config.total_steps=2", "--config.log.every_steps=1", "--config.log.samples=-1"]
    flags += ["--config.rollout.slots=8"]  # two batches of questions in an evaluation
    runs = []
    for name in ("a", "b"):
        main([f"--config={ROOT}/configs/r1zero.py", f"--workdir={tmp_path / name}", *flags])
        runs.append([read_samples(tmp_path / name, *file) for file in (("train", 1), ("train", 2), ("eval", 2))])
    lines = read_metrics(tmp_path / "a")
    for line, records in zip((*lines[1:], lines[-1]), runs[0], strict=True):
        group = "eval" if len(records) == 16 else "reward"
        kinds = [len(record["completion"]) % 7 for record in records]
        assert (line[f"{group}/timeout"], line[f"{group}/error"]) == (kinds.count(0), kinds.count(1))
        for record, kind in zip(records, kinds, strict=True):
            assert record["rewards"]["moody"] == (0 if kind < 2 else len(record["completion"]) % 2)
            assert record["parsed"] is None or record["parsed"] in record["completion"]
            verdict, _, failure = record["why"].partition("; ")
            assert verdict and failure.startswith({0: "timeout in moody.", 1: "error in moody: "}.get(kind, ""))
            assert bool(failure) == (kind < 2)
    assert not children()
    # Some completions of the two rollouts are graded while others are sampled, none of the three evaluations' batches.
    assert sum(map(bool, early)) == 2 * len(runs)
    assert sum(line["reward/timeout"] for line in lines[1:]) and sum(line["reward/error"] for line in lines[1:])
    assert [[record["rewards"] for record in records] for records in runs[0]] == [
        [record["rewards"] for record in records] for records in runs[1]
    ]
    printed = capsys.readouterr()
    assert "reward part failed. The first failure: " in printed.err
    assert "timeout" not in printed.out
