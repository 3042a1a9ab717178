"""`benchmarks/on_device.py` reports every measurement, whatever its parts do. Most tests replace the parts by fakes."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ["right", "learn", "flags", "rollout", "update", "step", "peer"]
FAKE = """
import json, os, signal, subprocess, sys, tempfile, time
from parts import NotHere

prepared = []
prepare = prepared.append

def device_name():
    return "fake"

def measure(small, seconds_left):
    {body}
"""
# Runs a command that Ctrl-C interrupts, even if the tests run in the background, where a shell makes it ignored.
WITH_INTERRUPTS = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)
# The body of a part that starts a process, makes a folder, reports both, and then hangs.
HANGS = """child = subprocess.Popen(["sleep", "120"])
    yield {"pids": [os.getpid(), child.pid], "folder": tempfile.mkdtemp()}
    time.sleep(120)"""


@pytest.fixture
def start(tmp_path):
    """Returns a function that starts the command with fake parts, given the body of `measure` for some of them."""

    def start_command(bodies: dict[str, str], *argv: str) -> subprocess.Popen:
        folder = tmp_path / "benchmarks"
        shutil.copytree(ROOT / "benchmarks", folder, ignore=shutil.ignore_patterns("__pycache__"))
        for name in NAMES:
            body = bodies.get(name, f'yield {{"number": {NAMES.index(name)}}}')
            (folder / "parts" / f"{name}.py").write_text(FAKE.format(body=body))
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        env = os.environ | {"PYTHONPATH": os.path.relpath(ROOT)}
        for name in ("PYTHONUNBUFFERED", "JAX_COMPILATION_CACHE_DIR"):  # hide unflushed lines, and caches of each part
            env.pop(name, None)
        command = [sys.executable, str(folder / "on_device.py"), *argv]
        return subprocess.Popen([sys.executable, "-c", WITH_INTERRUPTS, *command], **pipes, env=env)

    return start_command


def finish(command: subprocess.Popen) -> tuple[list[dict], str]:
    """Waits for a command, and returns its lines and its stderr."""
    out, err = command.communicate(timeout=60)
    return [json.loads(line) for line in out.splitlines()], err


def of_part(lines: list[dict], name: str) -> list[dict]:
    return [line for line in lines if line["part"] == name]


def is_running(pid: int) -> bool:
    """Returns whether a process exists that is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.02)


def test_every_part_reports_and_the_summary_comes_last(start):
    threads = "import threading; threading.Thread(target=time.sleep, args=(120,)).start(); yield {}"
    command = start({"learn": threads, "step": 'yield {"small": small, "prepared": prepared}'}, "--small")
    lines, err = finish(command)
    assert command.returncode == 0, err
    assert lines[0]["part"] == "versions" and lines[0]["python"] == sys.version.split()[0] and lines[0]["jax"]
    order = [line["part"] for line in lines[1:-1]]
    assert order == [name for name in NAMES for _ in range(2)]
    assert of_part(lines, "flags")[0] == {"part": "flags", "device": "fake", "number": 2}
    assert of_part(lines, "step")[0]["small"] is True and of_part(lines, "step")[0]["prepared"] == [True]
    assert lines[-1]["parts"] == dict.fromkeys(NAMES, "done") and lines[-1]["aims"] == []
    assert "right" not in lines[-1] and "mend" not in lines[-1]


FAILURES = {
    "right": 'yield {"x": 1}; raise ValueError("broken")',
    "learn": "yield {}; os.kill(os.getpid(), signal.SIGSEGV)",
    "flags": HANGS,
    "rollout": "import no_such_module; yield {}",
    "step": 'raise NotHere("no such device"); yield {}',
    "peer": 'print("noise"); os.write(1, b"noise"); yield {"nan": float("nan"), "pi": 3.14159265}',
}


@pytest.mark.slow
def test_a_part_that_fails_crashes_or_takes_too_long_does_not_stop_the_others(start):
    command = start(FAILURES, "--budget=30")
    lines, err = finish(command)
    assert command.returncode == 3, err
    statuses = dict.fromkeys(NAMES, "failed") | {"flags": "late", "update": "done", "step": "absent", "peer": "done"}
    assert lines[-1]["parts"] == statuses
    endings = {line["part"]: line for line in lines if "status" in line}
    assert endings["right"]["reason"] == "ValueError: broken" and of_part(lines, "right")[0]["x"] == 1
    assert "SIGSEGV" in endings["learn"]["reason"] and "no_such_module" in endings["rollout"]["reason"]
    assert endings["step"]["reason"] == "no such device"
    assert of_part(lines, "peer")[0] == {"part": "peer", "device": "fake", "nan": None, "pi": 3.142}
    assert "ValueError: broken" in err and "noise" in err
    wait_until_gone(of_part(lines, "flags")[0]["pids"])
    assert not Path(of_part(lines, "flags")[0]["folder"]).exists()


def test_a_part_that_cannot_be_imported_fails_alone(start):
    command = start({"right": "yield {}\nsyntax error"}, "--only=right", "learn")
    lines, _ = finish(command)
    assert command.returncode == 3 and lines[-1]["parts"] == {"right": "failed", "learn": "done"}
    assert "SyntaxError" in of_part(lines, "right")[0]["reason"]


def test_wrong_results_fail_the_command(start):
    command = start({"right": 'yield {"ok": True}; yield {"ok": False}'}, "--only=right")
    lines, _ = finish(command)
    assert command.returncode == 3 and lines[-1]["right"] is False and lines[-1]["parts"] == {"right": "done"}


def test_a_part_that_takes_too_long_fails_the_command(start):
    command = start({"right": HANGS}, "--only=right", "--budget=1")
    lines, _ = finish(command)
    assert command.returncode == 3 and lines[-1]["parts"] == {"right": "late"}


def test_a_line_that_is_cut_off_is_dropped(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    code = """input(); print('{"x": 1}'); print('{"x": '); print('{"x": 2}'); print('{"x": 3', end="")"""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    worker = subprocess.Popen([sys.executable, "-S", "-c", code], **pipes, start_new_session=True)
    lines = importlib.import_module("on_device").run_part(worker, "right", 60.0)
    assert [line.get("x", line.get("status")) for line in lines] == [1, 2, "failed"]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines


def test_a_process_that_ends_while_it_waits_is_a_failed_part(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    worker = subprocess.Popen([sys.executable, "-S", "-c", ""], **pipes, start_new_session=True)
    worker.wait()
    (line,) = importlib.import_module("on_device").run_part(worker, "right", 60.0)
    assert (line["status"], line["reason"]) == ("failed", "the process ended before it measured anything")


def test_parts_share_compiled_programs_and_find_packages_in_wheels(start, tmp_path):
    (tmp_path / ".wheels").mkdir()
    with zipfile.ZipFile(tmp_path / ".wheels" / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "NUMBER = 7")
    body = 'import carried; yield {"number": carried.NUMBER, "cache": os.environ["JAX_COMPILATION_CACHE_DIR"]}'
    lines, err = finish(start({"right": body, "peer": body}, "--only", "right", "peer"))
    right, peer = (of_part(lines, name)[0] for name in ("right", "peer"))
    assert right["number"] == peer["number"] == 7 and right["cache"] == peer["cache"], err


def test_later_parts_get_the_time_that_earlier_ones_leave(start):
    body = 'yield {"left": seconds_left()}'
    lines, _ = finish(start({"right": body, "peer": body}, "--only", "peer", "right", "--budget=130"))
    right, peer = (of_part(lines, name)[0]["left"] for name in ("right", "peer"))
    assert right == pytest.approx(130 * 35 / 55, abs=10) and peer == pytest.approx(130, abs=20)


def test_parts_find_the_packages_from_any_folder(start):
    command = start({"flags": 'yield {"paths": os.environ["PYTHONPATH"].split(os.pathsep)}'}, "--only=flags")
    lines, _ = finish(command)
    (paths,) = (line["paths"] for line in lines if "paths" in line)
    assert paths[0] == str(ROOT) and all(map(os.path.isabs, paths))  # the command was given a relative path


@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_run_has_printed_its_measurements_and_leaves_no_process(start, sent, code):
    command = start({"learn": HANGS}, "--only=right", "--only=learn", "--only=peer")
    known = [json.loads(command.stdout.readline()) for _ in range(4)]
    command.send_signal(sent)
    lines, _ = finish(command)
    assert command.returncode == code and not lines
    assert [line["part"] for line in known] == ["versions", "right", "right", "learn"]
    wait_until_gone(known[-1]["pids"])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--only=speed"], "--only"),
        (["--only"], "--only"),
        (["--budget=0"], "--budget must be a positive number of seconds; found 0.0"),
        (["--budget=nan"], "--budget must be a positive number"),
        (["--smal"], "--smal"),
        (["right"], "right"),
    ],
)
def test_a_wrong_flag_is_a_one_line_error(argv, message, monkeypatch, capsys):
    from grpo_jax.config.flags import run_entry_point

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(sys, "argv", ["on_device", *argv])
    with pytest.raises(SystemExit) as exit:
        run_entry_point(importlib.import_module("on_device").main)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and not out
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and message in err


def test_a_missing_package_is_a_one_line_error(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    on_device = importlib.import_module("on_device")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(on_device.REQUIRED, "no_such_module", "no-such-package")
    with pytest.raises(SystemExit) as exit:
        on_device.find_packages()
    err = capsys.readouterr().err
    assert exit.value.code == 2 and len(err.splitlines()) == 1
    assert err.startswith("error: ") and "found no no-such-package." in err and "make wheels" in err


def test_help_names_every_part(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    with pytest.raises(SystemExit) as exit:
        importlib.import_module("on_device").main(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and all(f"\n{name} " in text for name in NAMES) and "example:" in text


def test_the_summary_names_the_figure_farthest_below_its_aim(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    summarize = importlib.import_module("on_device").summarize
    low, high = ({"name": name, "measured": x, "aim": 0.5} for name, x in (("low", 0.2), ("high", 0.6)))
    lines = [{"part": "rollout", "aim": high}, {"part": "update", "aim": low}, {"part": "update", "status": "done"}]
    summary = summarize(lines)
    assert summary["aims"] == [low, high] and summary["mend"] == "low" and summary["parts"] == {"update": "done"}
    assert "mend" not in summarize(lines[:1]) and "right" not in summary
    assert summarize([{"part": "update", "aim": low | {"measured": None}}])["aims"] == []  # not finite
    speeds = [{"part": "step", "step_tok_s": speed} for speed in (900.0, 200.0)]  # the first is an estimate
    speeds += [{"part": "peer", "step_tok_s": 100.0}]
    ratio = summarize(lines + speeds)
    assert [aim["measured"] for aim in ratio["aims"]] == [0.2, 2.0, 0.6] and ratio["mend"] == "low"
    assert summarize(speeds[:1])["aims"] == []
    assert summarize([{"part": "right", "ok": True}, {"part": "right", "ok": False}])["right"] is False


@pytest.mark.slow
def test_small_runs_every_part_on_a_cpu():
    command = [sys.executable, str(ROOT / "benchmarks" / "on_device.py"), "--small", "--budget=1200"]
    made = subprocess.run(command, capture_output=True, text=True)
    lines = [json.loads(line) for line in made.stdout.splitlines()]
    assert made.returncode == 0, made.stdout + made.stderr
    assert lines[-1]["right"] is True
    assert lines[-1]["parts"] in (dict.fromkeys(NAMES, "done") | {"peer": peer} for peer in ("done", "absent"))
    measured = {line["part"] for line in lines if "device" in line}
    assert measured >= set(NAMES) - {"peer"}  # torch may not be installed
