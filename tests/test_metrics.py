"""The logs of a run: valid JSON, each step once, and samples that can be read back."""

import json
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from grpo_jax.run.metrics import (
    before_and_after,
    console_line,
    evaluation_line,
    finite_or_none,
    read_metrics,
    read_samples,
    truncate_logs,
    write_samples,
)
from grpo_jax.run.sinks import JsonLines, TensorBoard


def write_log(workdir, lines, resume_after=-1) -> None:
    """Writes (step, metrics) pairs as a run would that resumes after a step, or starts (-1)."""
    truncate_logs(workdir, resume_after)
    for sink in (JsonLines(workdir), TensorBoard(workdir, resume_after)):
        for step, metrics in lines:
            sink.write(step, finite_or_none(metrics))
        sink.close()


def logged_steps(workdir) -> list[int]:
    return [line["step"] for line in read_metrics(workdir)]


def test_non_finite_numbers_are_written_as_null(tmp_path):
    """NaN and Infinity are not JSON: most readers refuse the whole line."""
    write_log(tmp_path, [(1, {"a/b": float("nan"), "a/c": float("inf"), "a/d": -float("inf"), "a/e": 0.5})])

    def refuse(constant):
        raise AssertionError(constant)

    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "a/b": None, "a/c": None, "a/d": None, "a/e": 0.5}


def test_numbers_of_numpy_and_jax_are_written_as_floats(tmp_path):
    write_log(tmp_path, [(1, {"a/numpy": np.float32(0.5), "a/jax": jnp.float32(0.25), "a/int": 3})])
    assert read_metrics(tmp_path) == [{"step": 1, "a/numpy": 0.5, "a/jax": 0.25, "a/int": 3.0}]


def test_metrics_are_in_their_files_before_the_log_is_closed(tmp_path):
    """So a run that is killed leaves all of them."""
    logs = JsonLines(tmp_path), TensorBoard(tmp_path, -1)
    for log in logs:
        log.write(1, {"a/b": 1.0})
    assert logged_steps(tmp_path) == [1]
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert [event.step for event in read_events(path)] == [0, 0, 1]
    for log in logs:
        log.close()


def test_a_resumed_run_logs_each_step_once(tmp_path):
    """The run is killed after step 5, and its last checkpoint is of step 3."""
    write_log(tmp_path, [(step, {"a/b": 1.0}) for step in range(6)])
    write_log(tmp_path, [(step, {"a/b": 2.0}) for step in (4, 5, 6)], resume_after=3)
    assert logged_steps(tmp_path) == [0, 1, 2, 3, 4, 5, 6]
    assert [line["a/b"] for line in read_metrics(tmp_path)] == [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0]


def test_a_run_that_starts_over_removes_the_lines_of_the_first_try(tmp_path):
    """The run is killed before its first checkpoint, so it writes step 0 again."""
    write_log(tmp_path, [(0, {"a/b": 1.0}), (1, {"a/b": 1.0})])
    write_log(tmp_path, [(0, {"a/b": 2.0})])
    assert read_metrics(tmp_path) == [{"step": 0, "a/b": 2.0}]


def read_events(path) -> list[Event]:
    """Reads a file of TensorBoard events, each stored as its length, a checksum, the event and another checksum."""
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


@pytest.mark.parametrize(("resume_after", "next_step"), [(-1, 0), (3, 4)])
def test_tensorboard_drops_the_steps_that_a_resumed_run_logs_again(tmp_path, resume_after, next_step):
    """When a session starts at a step, TensorBoard drops the events of earlier sessions from that step on."""
    write_log(tmp_path, [(next_step, {"a/b": 0.5})], resume_after)
    (path,) = (tmp_path / "tensorboard").iterdir()
    events = read_events(path)
    assert [event.step for event in events if event.session_log.status == SessionLog.START] == [next_step]
    assert [(event.step, x.tag, x.simple_value) for event in events for x in event.summary.value] == [
        (next_step, "a/b", 0.5)
    ]


@pytest.mark.parametrize("fragment", ['{"step": 2, "a/', '{"step": 2', "{"])
def test_a_last_line_that_a_crash_cut_off_is_dropped(tmp_path, fragment):
    write_log(tmp_path, [(0, {"a/b": 1.0}), (1, {"a/b": 1.0})])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(fragment)
    assert logged_steps(tmp_path) == [0, 1]
    write_log(tmp_path, [(2, {"a/b": 2.0})], resume_after=1)  # the new line must not be glued to the fragment
    assert logged_steps(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize(
    "broken",
    [b'{"step": 2, "a/', b"\xff\xfe", b"[2]", b"null", b'{"a/b": 9}', b'{"step": "2"}', b"[" * 9999, b"", b"\x00" * 99],
    ids=repr,
)
def test_a_broken_line_costs_that_line_and_none_after_it(tmp_path, broken):
    write_log(tmp_path, [(step, {"a/b": 1.0}) for step in range(5)])
    for name in ("metrics.jsonl", "warnings.jsonl"):
        lines = [b'{"step": %d, "a/b": 1.0}' % step for step in range(5)]
        (tmp_path / name).write_bytes(b"\n".join([*lines[:2], broken, *lines[3:]]) + b"\n")
    assert logged_steps(tmp_path) == [0, 1, 3, 4]
    truncate_logs(tmp_path, 3)
    for name in ("metrics.jsonl", "warnings.jsonl"):
        lines = (tmp_path / name).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1, 3]


def test_a_cut_last_line_is_made_again_from_the_checkpoint_of_its_step(tmp_path):
    write_log(tmp_path, [(0, {"a/b": 1.0}), (1, {"a/b": 1.0})])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "a/b')
    line = {"step": 2, "a/b": 0.5}
    truncate_logs(tmp_path, 2, line)
    truncate_logs(tmp_path, 2, {"step": 2, "a/b": 9.0})  # which is not needed any more
    assert read_metrics(tmp_path) == [{"step": 0, "a/b": 1.0}, {"step": 1, "a/b": 1.0}, line]


def test_a_lost_log_starts_again_with_the_line_of_the_checkpoint(tmp_path):
    truncate_logs(tmp_path, 2, {"step": 2, "a/b": 0.5})
    assert read_metrics(tmp_path) == [{"step": 2, "a/b": 0.5}]


def test_a_folder_named_like_a_log_and_a_file_named_like_a_folder_are_renamed(tmp_path, capsys):
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").mkdir()
        (tmp_path / "metrics.jsonl" / "mine").touch()
        (tmp_path / "warnings.jsonl").mkdir()
        (tmp_path / "samples").touch()
        (tmp_path / "tensorboard").touch()
        truncate_logs(tmp_path, -1)
        assert (tmp_path / f"damaged-metrics.jsonl-{number}" / "mine").is_file()
        assert (tmp_path / f"damaged-warnings.jsonl-{number}").is_dir()
        assert (tmp_path / f"damaged-samples-{number}").is_file()
        assert (tmp_path / f"damaged-tensorboard-{number}").is_file()
        assert not (tmp_path / "metrics.jsonl").exists()
    write_log(tmp_path, [(1, {"a/b": 1.0})])
    write_samples(tmp_path, "eval", 1, [{"completion": "x"}])
    assert logged_steps(tmp_path) == [1] and read_samples(tmp_path, "eval", 1)
    assert "metrics.jsonl must be a file, so it was renamed to damaged-metrics.jsonl-1." in capsys.readouterr().out


def test_truncating_removes_only_the_samples_after_the_step(tmp_path):
    for kind in ("train", "eval"):
        for step in (0, 19, 20, 21, 100, 1_000_000):
            write_samples(tmp_path, kind, step, [{"completion": f"{kind} {step}"}])
    truncate_logs(tmp_path, 20)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"{kind}-{step:06d}.jsonl" for kind in ("eval", "train") for step in (0, 19, 20)]
    assert read_samples(tmp_path, "eval", 19) == [{"step": 19, "completion": "eval 19"}]


def test_truncating_keeps_files_of_the_user_among_the_samples(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in ("notes.jsonl", "train-000009.jsonl", "eval-000003.jsonl.partial"):
        (tmp_path / "samples" / name).write_text("{}\n")
    truncate_logs(tmp_path, 5)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["notes.jsonl"]


def test_truncating_a_new_workdir_does_nothing(tmp_path):
    truncate_logs(tmp_path, 5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [
        'two\nlines and "quotes"',
        "Größe 数学 🙂",
        "\x00\x1c\x7f",
        "a\N{LINE SEPARATOR}b\N{PARAGRAPH SEPARATOR}c\N{NEXT LINE}d",
    ],
)
def test_samples_are_read_back_as_they_were_written(tmp_path, text):
    """A completion may hold any character; str.splitlines would cut a record at some of them."""
    records = [{"completion": text, "accuracy": 1.0}, {"completion": "x", "accuracy": 0.0}]
    write_samples(tmp_path, "eval", 7, records)
    assert read_samples(tmp_path, "eval", 7) == [{"step": 7} | record for record in records]


def test_samples_are_valid_json_whatever_metadata_holds(tmp_path):
    """NaN and infinity are not JSON, and a lone surrogate is not UTF-8. Metadata may hold any object, with any keys."""
    metadata = {
        "nan": float("nan"),
        "deep": [(1, -float("inf")), {"x": np.float64("inf")}],
        "path": Path("a"),
        (1, 2): 3,
        "surrogate": "\ud800",
    }
    write_samples(tmp_path, "train", 1, [{"metadata": metadata, "reward": np.float32(0.5), "n": 3, "ok": True}])

    def refuse(constant):
        raise AssertionError(constant)

    (line,) = (tmp_path / "samples" / "train-000001.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    expected = {"nan": None, "deep": [[1, None], {"x": None}], "path": "a", "(1, 2)": 3, "surrogate": "\ud800"}
    assert record["metadata"] == expected
    assert record["n"] == 3 and record["ok"] is True


def test_no_file_is_written_without_samples(tmp_path):
    write_samples(tmp_path, "train", 7, [])
    assert not list(tmp_path.iterdir())


def test_console_line_shows_what_to_watch():
    metrics = {
        "reward/mean": 1.2345,
        "reward/accuracy": 0.25,
        "reward/format": 0.98,
        "rollout/length_mean": 41.26,
        "rollout/truncated_frac": 0.03125,
        "groups/zero_variance_frac": 0.125,
        "policy/kl_ref": 0.01239,
        "rollout/tokens_per_s": 12345.6,
        "time/step_s": 3.21,
        "optim/no_signal": 0.0,
        "loss/total": 5.5,  # not shown: it is about 0 by design
    }
    assert console_line(7, 60, metrics) == (
        "step  7/60  reward 1.23  accuracy 0.25  format 0.98  tokens  41.3  cut off  3%  equal groups 12%  KL 0.0124  "
        "12,346 tokens/s  3.2 s"
    )
    del metrics["policy/kl_ref"], metrics["reward/format"]  # as in a run without a reference and with other parts
    assert console_line(7, 60, metrics | {"reward/short": -0.5}) == (
        "step  7/60  reward 1.23  accuracy 0.25  short -0.50  tokens  41.3  cut off  3%  equal groups 12%  "
        "12,346 tokens/s  3.2 s"
    )
    assert console_line(7, 60, metrics | {"optim/no_signal": 1.0}).endswith("  3.2 s  no signal")
    assert console_line(7, 60, metrics | {"reward/kl": 2.0}) == console_line(7, 60, metrics)  # not to mistake for KL


def test_evaluation_line_shows_every_part():
    metrics = {"eval/length_mean": 41.26, "eval/short": -0.5, "eval/accuracy": 0.25, "time/eval_s": 3.0}
    assert evaluation_line(metrics) == "short -0.500  accuracy 0.250  tokens 41.3"


def test_a_run_ends_with_a_comparison_of_its_first_and_last_evaluation(tmp_path):
    def scores(value):
        return {"eval/accuracy": value, "eval/short": value / 2, "eval/length_mean": 100 * value}

    write_log(tmp_path, [(0, scores(0.125)), (1, {"reward/mean": 1.0}), (2, scores(0.5)), (3, scores(0.75))])
    for step, completion in ((0, " first guess "), (2, "middle"), (3, " last answer ")):
        write_samples(tmp_path, "eval", step, [{"question": "What is 1 + 1?", "completion": completion}])
    text = before_and_after(tmp_path)
    rows = [line.split() for line in text.splitlines()]
    assert ["step", "0", "3"] in rows
    start = rows.index(["accuracy", "0.125", "0.750"])
    assert rows[start + 1 : start + 3] == [["short", "0.062", "0.375"], ["length", "(tokens)", "12.500", "75.000"]]
    assert "What is 1 + 1?" in text and "first guess" in text and "last answer" in text and "middle" not in text
    assert "not comparable" not in text


def test_a_comparison_leaves_out_what_is_broken(tmp_path):
    """A record whose completion is gone, one that is not UTF-8, and a score that was not finite."""
    write_log(tmp_path, [(0, {"eval/short": 0.5, "eval/length_mean": 9.0}), (1, {"eval/length_mean": 8.0})])
    for step in (0, 1):
        write_samples(tmp_path, "eval", step, [{"question": "Q?"}, {"question": "W?", "completion": f"at {step}"}])
    with open(tmp_path / "samples" / "eval-000001.jsonl", "ab") as file:
        file.write(b'{"question": "\xff", "completion": "x"}\n5\n')
    text = before_and_after(tmp_path)
    assert [line.split() for line in text.splitlines() if "short" in line] == [["short", "0.500", "-"]]
    assert "question  W?" in text and "at 0" in text and "at 1" in text


@pytest.mark.parametrize("change", ["temperature", "questions", "other questions"])
def test_a_comparison_of_evaluations_says_in_what_they_differ(tmp_path, change):
    temperatures = {0: 1.0, 3: 0.0 if change == "temperature" else 1.0}
    later = {"questions": ["c", "b"], "other questions": ["d"]}.get(change, ["a", "b", "c"])
    questions = {0: ["a", "b", "c"], 3: later}
    metrics = {"eval/accuracy": 0.5, "eval/length_mean": 9.0, "eval/sampling/top_k": 0.0}
    write_log(tmp_path, [(s, metrics | {"eval/sampling/temperature": temperatures[s]}) for s in (0, 3)])
    for step in (0, 3):
        records = [{"question": name, "completion": f"{name} at {step}"} for name in questions[step]]
        write_samples(tmp_path, "eval", step, records)
    text = before_and_after(tmp_path)
    differs = {
        "temperature": "not comparable: they differ in eval.temperature (1 and 0). Evaluate both",
        "questions": "not comparable: they differ in questions (3 and 2 different ones, 2 in both). Evaluate both",
        "other questions": "questions (3 and 1 different ones, 0 in both)",
    }
    assert differs[change] in text and "top_k" not in text and "sampling" not in text
    shared = {"temperature": "a", "questions": "b"}.get(change)
    assert ("question  " in text) == bool(shared)
    assert all(not shared or f"{shared} at {step}" in text for step in (0, 3))
