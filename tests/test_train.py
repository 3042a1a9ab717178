"""The training loop: resuming, the files of a workdir, non-finite gradients, and learning from rewards alone."""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

import grpo_jax.evaluate
import grpo_jax.run.stages
import grpo_jax.run.train
from grpo_jax.config import check, default, write_config
from grpo_jax.config.flags import run_entry_point
from grpo_jax.config.schema import Config
from grpo_jax.errors import RunStopped, UserError
from grpo_jax.main import main
from grpo_jax.run.checkpoint import saved_steps
from grpo_jax.run.context import refit_mesh
from grpo_jax.run.lock import WorkdirLock
from grpo_jax.run.preemption import SafePoints
from grpo_jax.run.state import RunState, UpdateInFlight
from grpo_jax.run.train import finish_update
from grpo_jax.text.problem import Problem
from grpo_jax.weights.reading import load
from grpo_jax.weights.source import find_model
from tests.torture.damage import flip_bit
from tests.torture.runs import WITH_BORDERS

REPO = Path(__file__).parent.parent
# All runs of this module share these shapes, so that the sampler compiles once.
SMALL_RUN = [
    "--config.rollout.prompts=4",
    "--config.rollout.samples=4",
    "--config.rollout.max_tokens=14",
    "--config.rollout.slots=6",
    "--config.eval.questions=8",
    "--config.log.every_steps=1",
    "--config.log.samples=3",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=2",
    "--config.mesh.tensor=2",
]
# Each rollout feeds 4 updates.
FINISHED_RUN = [
    *SMALL_RUN,
    "--config.loss.kl_coef=0.1",
    "--config.train.minibatches=2",
    "--config.train.epochs=2",
    "--config.total_steps=5",
    "--config.eval.every_steps=4",
    "--config.checkpoint.every_steps=3",
]
METRICS_PAGE = (REPO / "docs" / "metrics.md").read_text(encoding="utf-8")


def train(workdir, flags):
    main([f"--config={REPO}/configs/r1zero.py", f"--workdir={workdir}", *flags])


def read_rows(workdir):
    """Returns the lines of metrics.jsonl without the metrics that a clock measures."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: row[name] for name in row if not name.startswith("time/") and not name.endswith("_per_s")}
        for row in rows
    ]


def restore(workdir, *path):
    """Restores one item of a checkpoint as numpy arrays."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((workdir / "checkpoints").joinpath(*path).absolute())


def assert_trees_equal(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def largest_difference(tree, other):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), tree, other)))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Returns the workdir of a run of 5 updates, with checkpoints after 3 and 5. Tests must not change it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(workdir, FINISHED_RUN)
    return workdir


def test_a_resumed_run_equals_an_uninterrupted_one(finished_run, tmp_path):
    """The run is killed in step 5, after a checkpoint in step 3: in the middle of the first rollout.

    The line of step 3 is cut. The run resumes with its own config; total_steps may be raised.
    """
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "5")
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    cut = [*lines[:3], lines[3][:90], '\n{"step": 4, "reward/mean": 9}\n{"step": 5, "rew']
    (workdir / "metrics.jsonl").write_text("".join(cut))
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"total_steps": 3}))
    main([f"--workdir={workdir}", "--config.total_steps=5"])

    for item in ("policy", "optimizer"):
        assert_trees_equal(restore(finished_run, "5", item), restore(workdir, "5", item))
    assert largest_difference(restore(workdir, "5", "policy"), restore(workdir, "3", "policy")) > 1e-5
    assert read_rows(workdir) == read_rows(finished_run)
    samples = {path.name: path.read_text() for path in (workdir / "samples").iterdir()}
    assert samples == {path.name: path.read_text() for path in (finished_run / "samples").iterdir()}


def test_a_run_that_is_killed_and_then_damaged_equals_an_uninterrupted_one(finished_run, tmp_path):
    """A short form of `make torture`: the newest checkpoint that a SIGKILL has left behind gets a bit flipped."""
    workdir, flags = tmp_path / "run", [*FINISHED_RUN, "--config.checkpoint.every_steps=1"]
    command = [sys.executable, "-c", WITH_BORDERS, f"--config={REPO}/configs/r1zero.py", f"--workdir={workdir}", *flags]
    environ = {"TORTURE_BORDERS": os.devnull, "TORTURE_KILL_AT": "Training | Sampling | step 5/5"}
    done = subprocess.run(command, env=os.environ | environ, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    flip_bit(workdir, Random(0))
    train(workdir, FINISHED_RUN)

    for item in ("policy", "optimizer"):
        assert_trees_equal(restore(finished_run, "5", item), restore(workdir, "5", item))
    assert read_rows(workdir) == read_rows(finished_run)
    samples = {path.name: path.read_text() for path in (workdir / "samples").iterdir()}
    assert samples == {path.name: path.read_text() for path in (finished_run / "samples").iterdir()}


def test_the_stages_of_a_step_do_not_overlap(finished_run):
    """The times of the stages therefore never exceed the time of the step."""
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()][1:]
    stages = ("placement", "rollout", "reward", "score", "pack", "record", "update")
    for row in rows:
        times = [row[f"time/{stage}_s"] for stage in stages]
        assert min(times) >= 0 and sum(times) <= row["time/step_s"] + 1e-6
        starts_rollout = row["step"] in (1, 5)
        assert [row[f"time/{stage}_s"] > 0 for stage in stages] == [starts_rollout] * 4 + [
            row["time/pack_s"] > 0,
            starts_rollout,
            True,
        ]
        assert (row["time/save_s"] > 0) == (row["step"] == 4)  # a checkpoint is saved after step 3


def test_drift_from_the_sampler_is_measured_before_the_first_update_of_a_rollout(finished_run):
    """Later updates of the rollout repeat it, while the ratio shows that the policy has moved."""
    rows = read_rows(finished_run)
    assert len({row["policy/kl_sampler"] for row in rows[1:5]}) == 1
    assert abs(rows[1]["policy/kl_sampler"]) < 1e-6 and abs(rows[1]["policy/ratio_max"] - 1) < 1e-4
    assert 0 < rows[1]["policy/logp_gap/mean"] < rows[1]["policy/logp_gap/max"] < 1e-3
    assert rows[4]["policy/ratio_max"] > 1.0001


def test_running_a_finished_run_again_changes_nothing(finished_run, capsys):
    metrics, steps = (finished_run / "metrics.jsonl").read_text(), sorted(os.listdir(finished_run / "checkpoints"))
    main([f"--workdir={finished_run}"])
    assert (finished_run / "metrics.jsonl").read_text() == metrics
    assert sorted(os.listdir(finished_run / "checkpoints")) == steps == ["3", "5", "reference"]
    shown = capsys.readouterr().out
    assert "before     after" in shown and "--config.total_steps=N with an N of more than 5" in shown
    assert "is finished: it has done all 5 updates" in shown and f"grpo_jax.report --workdir={finished_run}" in shown


def test_a_finished_run_makes_a_cut_last_line_again(finished_run, tmp_path):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    metrics = (workdir / "metrics.jsonl").read_text()
    (workdir / "metrics.jsonl").write_text(metrics[:-9])
    main([f"--workdir={workdir}"])
    assert (workdir / "metrics.jsonl").read_text() == metrics


def test_a_workdir_that_another_job_uses_is_left_as_it_is(finished_run, tmp_path):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    with contextlib.closing(WorkdirLock(workdir)) as lock:
        lock.take()
        before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
        with pytest.raises(
            UserError, match=rf"the workdir {workdir}, but process {os.getpid()} on .* Wait until it ends"
        ):
            main([f"--workdir={workdir}", "--config.total_steps=6"])
        assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def edit_config(workdir, section, key, value):
    values = json.loads((workdir / "config.json").read_text())
    values[section][key] = value
    (workdir / "config.json").write_text(json.dumps(values))


def stop_at(workdir, flags, safe_point, number=signal.SIGTERM, save_at=None):
    """Trains, sends signals to the run, and returns what it raises.

    A signal that stops the run is sent at one of its safe points (counted from 0), and SIGUSR1 at another one.
    """
    must_stop, count = SafePoints.must_stop, itertools.count()

    def send(safe_points):
        now = next(count)
        if now == save_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        if now == safe_point:
            os.kill(os.getpid(), number)
        return must_stop(safe_points)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafePoints, "must_stop", send)
        with pytest.raises(RunStopped) as stopped:
            train(workdir, flags)
    return stopped.value


def assert_same_run(workdir, other):
    """Compares everything that two runs have written, except for times."""
    assert read_rows(workdir) == read_rows(other)
    for item in (("5", "policy"), ("5", "optimizer"), ("reference",)):
        assert_trees_equal(restore(workdir, *item), restore(other, *item))
    samples = [{path.name: path.read_bytes() for path in (run / "samples").iterdir()} for run in (workdir, other)]
    assert samples[0] == samples[1]
    assert not (workdir / "checkpoints" / "rollout").exists()


def test_a_run_that_stops_at_safe_points_equals_an_undisturbed_one(finished_run, tmp_path, capsys):
    workdir = tmp_path / "a run"
    stopped = stop_at(workdir, FINISHED_RUN, 4)  # in the first rollout
    assert stopped.exit_code == 75
    assert re.fullmatch(
        r"Stopped by SIGTERM: there is no checkpoint yet, and [1-9]\d* completions? of the next rollout (are|is) kept"
        rf"\. To start again: python -m grpo_jax\.main --workdir='{workdir}'",
        str(stopped),
    )
    assert "SIGTERM: the run stops at its next safe point (now: step 1/5  Sampling" in capsys.readouterr().err
    keep = "--config.checkpoint.keep=3"
    stopped = stop_at(workdir, [*FINISHED_RUN, keep], 10, signal.SIGINT, save_at=7)  # in the evaluation after update 4
    assert stopped.exit_code == 130
    assert str(stopped).startswith("Stopped by SIGINT: the newest checkpoint is from step 4. To resume: python")
    assert [row["step"] for row in read_rows(workdir)] == [0, 1, 2, 3]
    assert saved_steps(workdir) == [2, 3, 4]  # after SIGUSR1, regularly, and to stop
    train(workdir, FINISHED_RUN)
    assert " of 16 completions had been sampled before" in capsys.readouterr().out
    assert_same_run(workdir, finished_run)


@pytest.mark.slow
@pytest.mark.parametrize("distance", [1, 2, 3])
def test_a_run_may_stop_again_and_again(finished_run, tmp_path, distance):
    """It stops at every safe point, every second one or every third one after its start, if that makes progress."""
    for _ in range(20):
        must_stop = 4 + distance if not list((tmp_path / "run").glob("checkpoints/[1-9]*")) else distance
        try:
            stop_at(tmp_path / "run", FINISHED_RUN, must_stop)
        except pytest.fail.Exception:
            break
    assert_same_run(tmp_path / "run", finished_run)


def test_a_run_is_not_resumed_with_a_config_that_was_edited(finished_run, tmp_path):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    edit_config(workdir, "log", "every_steps", 2)  # which may change
    edit_config(workdir, "optim", "lr", 0.5)
    says = r"must hold the config of .* step 5, which was trained with optim.lr=0.00015; found optim.lr=0.5. Undo"
    with pytest.raises(UserError, match=says):
        main([f"--workdir={workdir}", "--config.total_steps=6"])


def test_a_run_that_moves_to_other_devices_gets_a_mesh_that_fits_them(tmp_path, capsys):
    """There are 8 devices here. A mesh that the user chooses is left as it is, and so is one that fits."""

    def refitted(mesh, own):
        raw = default()
        raw.mesh.update(mesh)
        raw.rollout.mesh.tensor = 4
        write_config(tmp_path, check(raw))
        raw.mesh.update(own)
        cfg = refit_mesh(check(raw), tmp_path)
        return cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.expert, cfg.mesh.tensor, cfg.rollout.mesh.tensor

    assert refitted({"data": 4, "fsdp": 2, "tensor": 2}, {}) == (1, -1, 1, 1, 0)
    assert refitted({"data": -1, "tensor": 3}, {}) == (1, -1, 1, 1, 0)
    assert "The run's mesh does not fit 8 device(s)" in capsys.readouterr().out
    assert refitted({"data": 4, "fsdp": 2}, {}) == (4, 2, 1, 1, 4)
    assert refitted({"data": -1, "tensor": 2}, {}) == (-1, 1, 1, 2, 4)
    assert refitted({"data": 4, "fsdp": 4}, {"data": 3}) == (3, 4, 1, 1, 4)


@pytest.mark.slow
@pytest.mark.parametrize("step, drawn_at", [([], 5), (["--step=3"], 3), (["--base"], 0)])
def test_the_policy_of_a_step_is_evaluated(finished_run, capsys, step, drawn_at):
    """The run itself has evaluated its policies after 0, 4 and 5 updates."""
    grpo_jax.evaluate.main([f"--workdir={finished_run}", "--json", *step])
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["step"] == drawn_at
    own = {row["step"]: row for row in read_rows(finished_run)}
    if drawn_at in own and "eval/accuracy" in own[drawn_at]:
        assert all(metrics[name] == own[drawn_at][name] for name in metrics if name.startswith("eval/"))


@pytest.mark.slow
def test_a_terminal_that_is_not_utf8_stops_no_command(tmp_path):
    """The questions, the prompt and the name of the file hold characters that ASCII lacks, and an escape sequence."""
    path, question = tmp_path / "\u6f22.jsonl", "\u00bfCu\u00e1nto es \x1b[31m{0} + {0}?"
    rows = [{"question": question.format(number), "answer": 2 * number} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    environ = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "XLA_FLAGS": ""}
    sizes = ["--config.rollout.prompts=2", "--config.rollout.samples=2", "--config.eval.questions=4"]
    file = ["--config.total_steps=1", "--config.task.name=file", f"--config.task.path={path}"]
    for module, argv, says in (
        ("main", ["--config=r1zero", *sizes, *file], r"question  \xbfCu\xe1nto es \x1b[31m"),
        ("evaluate", [f"--questions={path}"], r"\u6f22.jsonl"),
        ("generate", [f"--prompt={question}"], ""),
    ):
        command = [sys.executable, "-m", f"grpo_jax.{module}", f"--workdir={tmp_path / 'run'}", *argv]
        done = subprocess.run(command, cwd=REPO, env=environ, capture_output=True, timeout=600)
        shown = (done.stdout + done.stderr).decode("ascii")
        assert done.returncode == 0 and says in shown and "\x1b" not in shown, shown


def on_ascii_terminal(monkeypatch, entry, *argv):
    """Runs an entry point on a terminal that can show ASCII only, and returns what it shows."""
    for name in ("stdout", "stderr"):
        terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
        monkeypatch.setattr(sys, name, terminal)
    monkeypatch.setattr(sys, "argv", ["program", *argv])
    with contextlib.suppress(SystemExit):
        run_entry_point(entry)
    return (sys.stdout.buffer.getvalue() + sys.stderr.buffer.getvalue()).decode("ascii")


def test_what_a_model_or_a_file_says_shows_its_escape_sequences_on_any_terminal(finished_run, tmp_path, monkeypatch):
    workdir, sequence = shutil.copytree(finished_run, tmp_path / "run"), "\x1b[2J \u6f22 \ud800"
    path = workdir / "samples" / "eval-000000.jsonl"
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    first |= {"question": f"Q {sequence}", "completion": f"A {sequence}"}
    for name in ("eval-000000.jsonl", "eval-000005.jsonl"):
        (workdir / "samples" / name).write_text("".join(json.dumps(record) + "\n" for record in (first, *others)))
    with monkeypatch.context() as patch:
        shown = on_ascii_terminal(patch, main, f"--workdir={workdir}")
    visible = r"\x1b[2J \u6f22 \ud800"
    assert f"question  Q {visible}" in shown and f"before    A {visible}" in shown and "\x1b" not in shown
    with monkeypatch.context() as patch:
        shown = on_ascii_terminal(patch, main, "--config=\x1b[2J\u6f22")
    assert r"found no file '\x1b[2J\u6f22'" in shown and "\x1b" not in shown


def test_the_reference_is_the_base_model(finished_run):
    reference = restore(finished_run, "reference")
    assert_trees_equal(jax.tree.leaves(reference), jax.tree.leaves(load(find_model("tiny"))[1]))
    assert largest_difference(reference, restore(finished_run, "5", "policy")) > 1e-5


def table_rows(section: str) -> list[list[str]]:
    """Returns the rows of the table in a section of docs/metrics.md as lists of cells, without the header."""
    lines = METRICS_PAGE.split(f"## {section}\n")[1].split("\n## ")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]


def test_a_workdir_holds_exactly_what_is_documented(finished_run):
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    by_line = {"update": set(), "evaluation": set()}
    for cells in table_rows("Metrics"):
        names = [cells[0].replace("PART", part) for part in ("accuracy", "format")]
        names = [name for text in names for name in re.findall(r"`([\w/]+)`", text)]
        by_line["evaluation" if cells[3] == "evaluated steps" else "update"] |= set(names)
    assert all(by_line.values())
    for row in rows:
        expected = by_line["update"] if row["step"] else set()
        assert row.keys() - {"step"} == expected | (by_line["evaluation"] if row["step"] in (0, 4, 5) else set())
        assert all(isinstance(value, float) for name, value in row.items() if name != "step")

    fields = {name: cells[1] for cells in table_rows("Samples") for name in re.findall(r"`(\w+)`", cells[0])}
    samples = [json.loads(line) for line in (finished_run / "samples" / "train-000001.jsonl").read_text().splitlines()]
    assert len(samples) == 3 and samples[0].keys() == fields.keys()
    evaluated = [json.loads(line) for line in (finished_run / "samples" / "eval-000004.jsonl").read_text().splitlines()]
    assert len(evaluated) == 8 and evaluated[0].keys() == {name for name in fields if fields[name] == "both"}
    assert json.loads((finished_run / "config.json").read_text())["rollout"]["prompts"] == 4
    assert any((finished_run / "tensorboard").iterdir())


def test_a_run_stops_after_too_many_non_finite_gradients_in_a_row(tmp_path, monkeypatch):
    """Steps 1, 3 and 4 have NaN gradients. Step 2 is finite, so the count starts again at step 3."""
    take_rows, generate_rollout = grpo_jax.run.train.take_rows, grpo_jax.run.stages.generate_rollout
    minibatches, slots = [], []

    def take_rows_with_nan(*args):
        minibatches.append(take_rows(*args))
        scale = 1 if len(minibatches) == 2 else np.nan
        return minibatches[-1].replace(advantages=minibatches[-1].advantages * scale)

    def record_slots(*args, **kwargs):
        slots.append(kwargs["slots"])
        return generate_rollout(*args, **kwargs)

    monkeypatch.setattr(grpo_jax.run.train, "take_rows", take_rows_with_nan)
    monkeypatch.setattr(grpo_jax.run.stages, "generate_rollout", record_slots)
    workdir = tmp_path / "run"
    flags = [*FINISHED_RUN, "--config.optim.max_skips=2", "--config.checkpoint.every_steps=1"]
    message = r"2 times in a row \(steps 3 to 4\), so they did not change the policy of step 2\. .* lower optim\.lr"
    with pytest.raises(UserError, match=message):
        train(workdir, flags)
    assert slots == [8]  # rollout.slots=6 is rounded up to 2 for each of the 4 shards
    assert [row["optim/skipped"] for row in read_rows(workdir)[1:]] == [1, 0, 1, 1]
    assert_trees_equal(restore(workdir, "3", "policy"), restore(workdir, "4", "policy"))
    meta = json.loads((workdir / "checkpoints" / "4" / "meta" / "metadata").read_text())
    assert meta["skipped"] == 3 and meta["skipped_in_a_row"] == 2
    with pytest.raises(UserError, match=message):
        train(workdir, [*flags, "--config.total_steps=4"])


def test_the_next_update_is_dispatched_before_the_metrics_of_the_last_one_are_fetched(tmp_path, monkeypatch):
    """The metrics of a step are fetched earlier only before a checkpoint, an evaluation or a rollout, which need them.

    The minibatches of a rollout are planned once, because the devices draw their order.
    """
    make_update, finish_update, events = grpo_jax.run.train.make_update, grpo_jax.run.train.finish_update, []
    plan_minibatches = grpo_jax.run.train.plan_minibatches

    def record_plans(*args):
        events.append("plan")
        return plan_minibatches(*args)

    def record_updates(*args):
        update = make_update(*args)

        def recorded(state, batch):
            events.append(f"update {int(state.step) + 1}")
            return update(state, batch)

        return recorded

    def record_metrics(cfg, log, run, *args):
        if run.flight or run.unlogged:
            events.append(f"metrics {run.step}")
        return finish_update(cfg, log, run, *args)

    monkeypatch.setattr(grpo_jax.run.train, "make_update", record_updates)
    monkeypatch.setattr(grpo_jax.run.train, "finish_update", record_metrics)
    monkeypatch.setattr(grpo_jax.run.train, "plan_minibatches", record_plans)
    train(tmp_path / "run", [*FINISHED_RUN, "--config.eval.every_steps=0"])
    assert events == [
        *("plan", "update 1", "update 2", "metrics 1", "update 3", "metrics 2", "metrics 3"),
        *("update 4", "metrics 4", "plan", "update 5", "metrics 5"),
    ]


def test_the_metrics_of_an_update_are_fetched_without_a_collective(monkeypatch):
    """In a run of several processes, the devices would run a collective only after the next update."""

    def refuse(*args, **kwargs):
        raise AssertionError("collective")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", refuse)
    written = []
    log = SimpleNamespace(step_end=1.0, save_seconds=0.25, write=lambda step, metrics: written.append((step, metrics)))
    flight = UpdateInFlight(
        {"optim/skipped": jax.numpy.zeros(())}, None, {"time/record_s": 0.5}, start=0.5, packed=2.0, end=5.0
    )
    run = finish_update(Config(), log, RunState(7, None, None, None, {"reward/mean": 0.5}, 0, "", flight))
    times = {"time/pack_s": 1.0, "time/record_s": 0.5, "time/update_s": 2.5, "time/step_s": 4.0, "time/save_s": 0.25}
    assert written == [(7, {"optim/skipped": 0.0, "reward/mean": 0.5} | times)] and run.flight is None
    assert log.save_seconds == 0.0


@pytest.mark.parametrize("updates, flags", [(3, []), (2, ["--config.train.minibatches=1", "--config.train.epochs=1"])])
def test_a_run_that_must_stop_has_dispatched_one_more_update_of_the_rollout(tmp_path, monkeypatch, updates, flags):
    """The metrics that show the second skipped update arrive after the third has been dispatched, unless it samples."""
    take_rows = grpo_jax.run.train.take_rows

    def take_rows_with_nan(*args):
        minibatch = take_rows(*args)
        return minibatch.replace(advantages=minibatch.advantages * np.nan)

    monkeypatch.setattr(grpo_jax.run.train, "take_rows", take_rows_with_nan)
    keys = [*FINISHED_RUN, "--config.optim.max_skips=2", "--config.checkpoint.every_steps=5", *flags]
    with pytest.raises(
        UserError, match=r"2 times in a row \(steps 1 to 2\), so they did not change the policy of step 0"
    ):
        train(tmp_path / "run", keys)
    assert [row["optim/skipped"] for row in read_rows(tmp_path / "run")[1:]] == [1] * updates
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == [str(updates), "reference"]


PROBLEMS = [Problem(f"What is {a} + 1?", str(a + 1), {"a": a}) for a in range(4)]


def small_config():
    """Returns the config of a run of 2 updates with the shapes of SMALL_RUN."""
    cfg = default()
    for flag in SMALL_RUN:
        section, key, value = re.fullmatch(r"--config\.(\w+)\.(\w+)=(\d+)", flag).groups()
        cfg[section][key] = int(value)
    cfg.total_steps = 2
    return cfg


def test_the_loop_runs_from_python_with_a_list_of_problems_and_a_closure(tmp_path, capsys):
    seen = []

    def brevity(problems, texts, lengths):
        seen.append((problems[0], texts[0], int(lengths[0])))
        return -np.asarray(lengths, np.float32)

    cfg, template, given = (
        small_config(),
        tmp_path / "template.txt",
        dict(problems=PROBLEMS, rewards={"brevity": brevity}),
    )
    template.write_text("Question: {question} Answer:")
    cfg.prompt.template = str(template)
    metrics = grpo_jax.train(cfg, workdir=tmp_path / "run", **given)
    rows = read_rows(tmp_path / "run")
    assert metrics["step"] == 2 and all(metrics[name] == value for name, value in rows[-1].items())
    assert metrics["reward/mean"] == metrics["reward/brevity"] == -metrics["rollout/length_mean"]
    assert "reward/accuracy" not in metrics and metrics["eval/brevity"] == -metrics["eval/length_mean"]
    assert "brevity" in capsys.readouterr().out
    problem, text, length = seen[-1]
    assert problem in PROBLEMS and isinstance(text, str) and 1 <= length <= 14
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["reward"] == {
        "parts": ["brevity"],
        "weights": [1.0],
        "language": "en",
        "format_empty": False,
        "deadline": 10.0,
    }
    assert config["task"]["name"] == "python"

    cfg.total_steps = 3
    metrics = grpo_jax.train(cfg, workdir=tmp_path / "run", **given)
    assert metrics["step"] == 3 and [row["step"] for row in read_rows(tmp_path / "run")] == [0, 1, 2, 3]
    template.write_text("Q: {question} A:")
    with pytest.raises(UserError, match=r"template.txt has changed since the run in .* was started"):
        grpo_jax.train(cfg, workdir=tmp_path / "run", **given)
    again = grpo_jax.train(cfg, workdir=tmp_path / "run", **given, accept_changed_files=True)
    assert again == metrics  # nothing is left to do
    with pytest.raises(
        UserError, match=r"reward\.parts=\('brevity',\), .* and cannot .*, or the same problems and rewards if"
    ):
        grpo_jax.train(cfg, workdir=tmp_path / "run", problems=PROBLEMS)
    with pytest.raises(
        UserError, match=r"To resume a run of grpo_jax\.train with rewards=\.\.\., call it again with the same rewards"
    ):
        grpo_jax.evaluate.main([f"--workdir={tmp_path / 'run'}"])


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"rewards": [len]}, r"rewards must be a dict of functions by name; found \[<built-in function len>\]"),
        ({"rewards": {"short": 1}}, "rewards must be a dict of functions by name"),
        ({"rewards": {}}, "rewards must be a dict of functions by name; found {}"),
        ({"rewards": {"short": len, "length": len}}, "rewards must not have the names .*; found 'short', 'length'. Re"),
        ({"cfg": {"seed": 1}}, r"cfg must be a config like config.default\(\); found \{'seed': 1\}"),
        ({"rewards": {"mean": len}}, "reward.parts must have names that metrics can use"),
        ({"problems": 3}, "problems must be a list of Problem"),
        ({"problems": ["What is 1 + 1?"]}, r"problems\[0\] must be a grpo_jax.tasks.Problem; found 'What is 1 \+ 1\?'"),
        ({"problems": "no/such/file.jsonl"}, "could not be read from no/such/file.jsonl"),
    ],
)
def test_python_inputs_that_cannot_be_used_are_refused_before_a_workdir_is_made(tmp_path, inputs, message):
    with pytest.raises(UserError, match=message):
        grpo_jax.train(inputs.pop("cfg", small_config()), workdir=tmp_path / "run", **inputs)
    assert not (tmp_path / "run").exists()


def test_keys_that_python_inputs_replace_are_refused_where_they_are_set(tmp_path):
    cfg = small_config()
    cfg.reward.parts = ("format", "accuracy")
    with pytest.raises(UserError, match=r"reward\.parts has no effect with rewards"):
        grpo_jax.train(cfg, workdir=tmp_path / "run", rewards={"short": len})
    cfg = small_config()
    cfg.task.digits = 2
    with pytest.raises(UserError, match=r"task\.digits=2 has no effect while task\.name=.python."):
        grpo_jax.train(cfg, workdir=tmp_path / "run", problems=PROBLEMS)


def test_a_run_that_a_reward_part_stopped_can_be_resumed(tmp_path):
    calls = []

    def fragile(problems, texts, lengths):
        calls.append(len(texts))
        return [0.5] * (len(texts) - (len(calls) == 3))  # fails on the second rollout; call 1 is the evaluation

    def task(index, *, seed, split):
        asked.add((split, seed))
        return PROBLEMS[index % len(PROBLEMS)]

    cfg, asked = small_config(), set()
    cfg.seed, cfg.checkpoint.every_steps = 7, 1
    with pytest.raises(UserError, match="'fragile' must return 16 finite numbers"):
        grpo_jax.train(cfg, workdir=tmp_path / "run", problems=task, rewards={"fragile": fragile})
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [0, 1]
    metrics = grpo_jax.train(cfg, workdir=tmp_path / "run", problems=task, rewards={"fragile": fragile})
    assert asked == {("train", 7), ("eval", 0)}
    assert metrics["step"] == 2 and metrics["groups/zero_variance_frac"] == 1


def test_rewards_alone_teach(tmp_path):
    """12 updates of 64 completions, without a KL term, raise the mean reward by 0.4 (it starts at about 1.1 of 2)."""
    environ = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [
        sys.executable,
        "-m",
        "grpo_jax.main",
        "--config=configs/r1zero.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.loss.kl_coef=0",
        "--config.rollout.prompts=8",
        "--config.total_steps=12",
        "--config.eval.questions=8",
    ]
    subprocess.run(command, check=True, cwd=REPO, env=environ, timeout=600, capture_output=True)
    rows = read_rows(tmp_path / "run")[1:]
    rewards = [row["reward/mean"] for row in rows]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:3]) + 0.4
    assert "policy/kl_ref" not in rows[0]
    assert not (tmp_path / "run" / "checkpoints" / "reference").exists()


@pytest.mark.slow
def test_a_run_without_held_out_problems_trains_on_all_and_evaluates_nothing(tmp_path, capsys):
    questions = [{"question": f"What is {i} + 1?", "answer": i + 1} for i in range(4)]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    task = ["--config.task.name=file", f"--config.task.path={tmp_path / 'q.json'}", "--config.eval.questions=0"]
    flags = [flag for flag in SMALL_RUN if "eval.questions" not in flag and "log.samples" not in flag]
    train(
        tmp_path / "run",
        [*flags, *task, "--config.total_steps=2", "--config.log.samples=-1"],
    )
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2] and not any(name.startswith("eval/") for name in rows[1])
    assert [path.name[:5] for path in (tmp_path / "run" / "samples").iterdir()] == ["train"] * 2
    records = (tmp_path / "run" / "samples" / "train-000001.jsonl").read_text().splitlines()
    assert {json.loads(line)["question"] for line in records} == {row["question"] for row in questions}
    printed = capsys.readouterr().out
    assert (
        "q.json: question from `question`, answer from `answer`; 4 problems\n4 problems for training, 0 held out\n"
        in printed
    )
    assert "No evaluation, because no problems were held out" in printed
