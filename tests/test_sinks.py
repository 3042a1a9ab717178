"""Sinks: what a tracker gets, that it continues its run, and that its failures stop nothing."""

import dataclasses
import importlib
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_jax import config
from grpo_jax.errors import UserError
from grpo_jax.main import main
from grpo_jax.run.console import RunLog
from grpo_jax.run.sinks import TABLE_FIELDS, TABLE_NUMBERS, check_sinks, completion_table

REPO = Path(__file__).parent.parent

# Has the functions of wandb and trackio that the package calls, and keeps their arguments.
STAND_IN = """
calls, fail_at = [], ""

def record(name, /, *args, **kwargs):
    calls.append((name, args, kwargs))
    if name == fail_at:
        raise ConnectionError(f"no route\\nto \\x1b[31mhost in {name}")

class Table:
    def __init__(self, columns, data):
        self.columns, self.data = columns, data

class Run:
    def define_metric(self, *args, **kwargs): record("define_metric", *args, **kwargs)
    def log(self, *args, **kwargs): record("log", *args, **kwargs)
    def finish(self): record("finish")

def init(**kwargs):
    record("init", **kwargs)
    return Run()
"""

RECORD = {
    "prompt_id": 3,
    "sample_id": 0,
    "question": [{"role": "user", "content": "1 + 1?"}],
    "completion": "half a pair \ud800",
    "tokens": [1, 2],
    "expected": "2",
    "parsed": None,
    "why": "no answer",
    "rewards": {"accuracy": 0.0, "short": float("nan")},
    "reward": 0.0,
    "advantage": -1.5,
    "length": 2,
}


@pytest.fixture
def tracker(tmp_path, monkeypatch):
    """Returns a function that puts the stand-in in the place of a package and returns it."""
    (tmp_path / "packages").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "packages")

    def install(name):
        (tmp_path / "packages" / f"{name}.py").write_text(STAND_IN)
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        module = importlib.import_module(name)
        del sys.modules[name]
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


def config_with(*sinks):
    cfg = config.check(config.default())
    return dataclasses.replace(cfg, log=dataclasses.replace(cfg.log, sinks=("jsonl", *sinks)))


def log_step(workdir, cfg, step):
    """Logs a step as a run does that resumes before it, with a completion of the next rollout."""
    context = SimpleNamespace(model_cfg=SimpleNamespace(experts=None))
    log = RunLog(cfg, context, workdir, step - 1)
    log.write_samples("train", step + 1, [RECORD])
    log.write(step, {"reward/mean": 0.5, "loss/total": float("inf"), "rollout/length_mean": 2.0} | REPORTED)
    log.close()


REPORTED = {"rollout/tokens_per_s": 1.0, "time/step_s": 1.0, "optim/no_signal": 0.0, "rollout/truncated_frac": 0.0}
REPORTED |= {"groups/zero_variance_frac": 0.0}


def test_wandb_gets_metrics_and_tables_in_one_run_over_resumes(tracker, tmp_path, capsys):
    wandb, cfg = tracker("wandb"), config_with("wandb")
    for step in (1, 2):
        log_step(tmp_path / "run", cfg, step)
    names = [name for name, _, _ in wandb.calls]
    assert names == ["init", "define_metric", "log", "log", "finish"] * 2
    first, second = (kwargs for name, _, kwargs in wandb.calls if name == "init")
    assert first == second and first["resume"] == "allow" and first["dir"] == tmp_path / "run"
    assert first["id"] == (tmp_path / "run" / "wandb_id").read_text() and first["name"] == "run"
    assert first["config"]["rollout.samples"] == cfg.rollout.samples
    (table, metrics, *_) = (args[0] for name, args, _ in wandb.calls if name == "log")
    assert metrics == {"step": 1, "reward/mean": 0.5, "rollout/length_mean": 2.0} | REPORTED  # infinity is no value
    assert table["step"] == 2 and dict(zip(table["samples/train"].columns, table["samples/train"].data[0], strict=True))
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert "failed" not in capsys.readouterr().out


def test_a_table_has_texts_and_numbers_only():
    columns, (row,) = completion_table(7, [RECORD])
    values = dict(zip(columns, row, strict=True))
    assert columns == [*TABLE_FIELDS, "reward/accuracy", "reward/short", *TABLE_NUMBERS]
    assert values["step"] == 7 and values["advantage"] == -1.5 and values["reward/short"] is values["parsed"] is None
    assert values["completion"] == "half a pair \\ud800"
    assert json.loads(values["question"]) == RECORD["question"]


def test_trackio_gets_the_same_and_is_told_the_step(tracker, tmp_path):
    trackio, cfg = tracker("trackio"), config_with("trackio")
    for step in (1, 2):
        log_step(tmp_path / "run", cfg, step)
    assert [name for name, _, _ in trackio.calls] == ["init", "log", "log", "finish"] * 2
    assert {kwargs["name"] for name, _, kwargs in trackio.calls if name == "init"} == {
        f"run-{(tmp_path / 'run' / 'trackio_id').read_text()}"
    }
    logged = [(args[0].keys(), kwargs) for name, args, kwargs in trackio.calls if name == "log"]
    assert logged[0] == ({"samples/train"}, {"step": 2}) and logged[1][1] == {"step": 1}
    assert "step" not in logged[1][0]


@pytest.mark.parametrize("place", ["init", "define_metric", "log", "finish"])
def test_a_failed_tracker_is_reported_in_one_line_and_left_alone(tracker, tmp_path, capsys, place):
    wandb = tracker("wandb")
    wandb.fail_at = place
    log_step(tmp_path / "run", config_with("wandb"), 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "wandb failed" in line]
    assert len(lines) == 1 and lines[0].endswith(rf"ConnectionError: no route to \x1b[31mhost in {place}")
    assert wandb.calls[-1][0] == place
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["step"] == 1
    assert (tmp_path / "run" / "samples" / "train-000002.jsonl").exists()


def test_a_missing_package_is_refused_before_a_run_writes_anything(tmp_path, monkeypatch):
    (tmp_path / "packages" / "trackio").mkdir(parents=True)  # a folder of files, not a package
    monkeypatch.syspath_prepend(tmp_path / "packages")
    check_sinks(("jsonl", "tensorboard"))
    flags = [f"--config={REPO}/configs/r1zero.py", '--config.log.sinks=["jsonl", "trackio"]', "--config.total_steps=1"]
    with pytest.raises(UserError, match=r"needs the package trackio; it is not installed. Run `pip install trackio`"):
        main([*flags, f"--workdir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sinks", ["tensorboard", "jsonl,jsonl", "jsonl,mlflow", "jsonl,3"])
def test_sinks_are_known_names_with_jsonl_among_them(sinks):
    raw = config.default()
    raw.log.sinks = tuple(int(name) if name.isdigit() else name for name in sinks.split(","))
    with pytest.raises(UserError, match=r"log\.sinks must be `jsonl` and any of .* because resumed runs"):
        config.check(raw)


def read_offline_run(path, record_class) -> list:
    """Reads a .wandb file: 7 bytes, then records in blocks of 32 KiB, in the format of LevelDB's logs."""
    data, place, part, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:  # too small for a header
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(record_class.FromString(part))
            part = b""
    return records


@pytest.mark.slow
def test_wandb_keeps_the_metrics_of_an_offline_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")  # `make test-all` installs it
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = [f"--config={REPO}/configs/r1zero.py", f"--workdir={tmp_path / 'run'}", "--config.rollout.prompts=2"]
    flags += ['--config.log.sinks=["jsonl", "wandb"]', "--config.eval.questions=4"]
    for steps in (1, 2):
        main([*flags, f"--config.total_steps={steps}"])
    assert wandb.run is None
    rows, ids, tables = {}, set(), set()
    for path in (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"):
        ids.add(path.stem.removeprefix("run-"))
        for record in read_offline_run(path, Record):
            items = record.history.item
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            rows |= {(row["step"], name): row[name] for name in ("reward/mean", "eval/format") if name in row}
            tables |= {(row["step"], name.removesuffix("/nrows")) for name in row if name.endswith("/nrows")}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    names = ("reward/mean", "eval/format")
    assert rows == {(line["step"], name): line[name] for line in lines for name in names if name in line}
    assert ids == {(tmp_path / "run" / "wandb_id").read_text()}
    assert tables == {(0, "samples/eval"), (1, "samples/eval"), (2, "samples/eval")} | {
        (1, "samples/train"),
        (2, "samples/train"),
    }
