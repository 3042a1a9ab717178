"""launch/tpu_pod.sh with a stub for gcloud: the commands that it runs, and that it leaves no slice behind."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "launch" / "tpu_pod.sh"
FLAGS = [
    "--name=pod-1",
    "--project=my-project",
    "--zone=us-west4-a",
    "--accelerator=v5litepod-16",
    "--runtime=v2-alpha-tpuv5-lite",
    "--workdir=/runs/a b",
]
DIFFICULT = ['--config.task.path=it\'s "mine" $HOME `id`\\n.jsonl', "--config.seed=7", "* ; & | > ~ !#"]

# The stub appends its arguments to calls.jsonl. `describe` prints $STATE, `create` exits with $CREATE and the job with
# $JOB; if that is "sleep", the job runs on.
STUB = """#!{python} -IS
import json, os, sys, time
from pathlib import Path
here, words = Path(__file__).parent, sys.argv[1:]
with open(here / "calls.jsonl", "a") as file:
    file.write(json.dumps(words) + chr(10))
if "describe" in words:
    print(os.environ.get("STATE", "ACTIVE"))
elif "scp" in words:
    (here / "copied.tar").write_bytes(Path(words[words.index("scp") + 1]).read_bytes())
elif "create" in words:
    sys.exit(int(os.environ.get("CREATE", "0")))
elif "grpo_jax.main" in words[-1]:
    if os.environ.get("JOB") == "sleep":
        time.sleep(60)
    sys.exit(int(os.environ.get("JOB", "0")))
"""


@pytest.fixture
def stub(tmp_path):
    """Makes a folder with the stub, which comes first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "gcloud").write_text(STUB.format(python=sys.executable))
    (folder / "gcloud").chmod(0o755)
    return folder


@pytest.fixture
def repository(tmp_path):
    """Makes a git repository with the script, a file with uncommitted changes, and an untracked file."""
    root = tmp_path / "the repository"
    for name in ("launch", "configs"):
        (root / name).mkdir(parents=True)
    shutil.copy(SCRIPT, root / "launch")
    (root / "configs" / "r1zero.py").write_text("as committed")
    (root / ".gitignore").write_text("/build/\n")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run(git + words, check=True)
    (root / "configs" / "r1zero.py").write_text("as it is now")
    (root / "untracked").write_text("")
    return root


def environment(stub: Path, **variables: str) -> dict[str, str]:
    return os.environ | {"PATH": f"{stub}:{os.environ['PATH']}"} | variables


def run(stub: Path, *flags: str, script: Path = SCRIPT, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(script), *flags], env=environment(stub, **variables), capture_output=True, text=True, timeout=60
    )


def calls(stub: Path) -> list[list[str]]:
    """Returns the arguments of each call of gcloud."""
    path = stub / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def verbs(commands: list[list[str]]) -> list[str]:
    """Returns what each command does: create, describe, scp, ssh or delete."""
    return [words[3] for words in commands]


def remote(words: list[str]) -> list[str]:
    """Returns the words of the command that runs on the hosts."""
    (command,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    return shlex.split(command)


def dry_run(stub: Path, *flags: str) -> list[list[str]]:
    """Returns the arguments of each command that --dry-run prints, and checks that none was run."""
    done = run(stub, *FLAGS, "--dry-run", *flags)
    assert (done.returncode, done.stderr, calls(stub)) == (0, "", [])
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(words[:3] == ["gcloud", "compute", "tpus"] for words in commands)
    return [words[1:] for words in commands]


def test_the_script_is_valid_bash():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


def test_dry_run_prints_the_commands_in_order_and_runs_nothing(stub):
    commands = dry_run(stub, "--spot", "--setup=sudo mount '10.0.0.2:/a b' /runs", "--", *DIFFICULT)
    create, describe, copy, mount, install, job, delete = commands
    assert verbs(commands) == ["create", "describe", "scp", "ssh", "ssh", "ssh", "delete"]
    assert all({"--zone=us-west4-a", "--project=my-project"} <= set(words) for words in commands)
    assert [words[4] for words in (create, describe, mount, install, job, delete)] == ["pod-1"] * 6
    assert {
        "--node-id=pod-1",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
    } <= set(create)
    assert copy[5].startswith("pod-1:") and Path(copy[4]).name == "pod-1.tar"
    assert all("--worker=all" in words for words in (copy, mount, install, job))
    assert {"--force", "--quiet"} <= set(delete)
    assert remote(mount) == ["sudo", "mount", "10.0.0.2:/a b", "/runs"]
    assert {"constraints.txt", ".[tpu]"} <= set(remote(install))


def test_flags_reach_the_job_unchanged(stub):
    job = remote(dry_run(stub, "--", *DIFFICULT)[-2])
    assert "GRPO_JAX_DISTRIBUTED=1" in job
    assert job[job.index("grpo_jax.main") + 1 :] == ["--config=configs/r1zero.py", "--workdir=/runs/a b", *DIFFICULT]


def test_spot_setup_and_deletion_are_optional(stub):
    commands = dry_run(stub, "--keep")
    assert verbs(commands) == ["create", "describe", "scp", "ssh", "ssh"]
    assert "--spot" not in commands[0]


def test_a_value_may_follow_its_flag_as_a_separate_word(stub):
    split = [word for flag in FLAGS for word in flag.split("=", 1)]
    assert run(stub, *split, "--dry-run").stdout == run(stub, *FLAGS, "--dry-run").stdout != ""


@pytest.mark.parametrize(
    "flags, message",
    [
        *[([flag for flag in FLAGS if flag != left_out], left_out.split("=")[0]) for left_out in FLAGS],
        ([*FLAGS, "--accelerater=v6e-8"], "--accelerater"),
        ([*FLAGS, "--config.seed=1"], "after --"),
        ([*FLAGS, "--zone"], "--zone needs a value"),
        ([*FLAGS, "--wait=soon"], "minutes"),
        ([*FLAGS, "--workdir=gs://bucket/run"], "gs://bucket/run"),
        ([*FLAGS, "--workdir=runs/r1zero"], "all hosts mount"),
        ([*FLAGS, "--config=configs/none.py:tiny"], "configs/none.py"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_prints_one_line_and_exits_with_2(stub, flags, message):
    done = run(stub, *flags)
    assert (done.returncode, done.stdout, calls(stub)) == (2, "", [])
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr and "; found " in done.stderr


def test_a_missing_gcloud_is_reported(stub):
    (stub / "gcloud").unlink()
    for name in ("bash", "dirname"):
        (stub / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [str(stub / "bash"), str(SCRIPT), *FLAGS], env={"PATH": str(stub)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: gcloud must be in PATH")


def test_help_prints_the_comment_at_the_top(stub):
    text = run(stub, "--help").stdout
    comment = SCRIPT.read_text().split("\n\n")[0].splitlines()[1:]
    assert text.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in comment]
    assert all(flag.split("=")[0] in text for flag in [*FLAGS, "--setup", "--config", "--spot", "--wait", "--keep"])


@pytest.mark.parametrize("status", [0, 3])
def test_the_slice_is_deleted_whether_the_job_succeeds_or_fails(stub, repository, status):
    done = run(stub, *FLAGS, "--", *DIFFICULT, script=repository / "launch" / "tpu_pod.sh", JOB=str(status))
    assert done.returncode == status
    made = calls(stub)
    assert verbs(made) == ["create", "describe", "scp", "ssh", "ssh", "delete"]
    assert remote(made[-2])[-len(DIFFICULT) :] == DIFFICULT
    with tarfile.open(stub / "copied.tar") as copied:
        assert "launch/tpu_pod.sh" in copied.getnames() and "untracked" not in copied.getnames()
        assert copied.extractfile("configs/r1zero.py").read() == b"as it is now"
    assert not list((repository / "build").iterdir())


def test_keep_leaves_the_slice_and_prints_how_to_delete_it(stub, repository):
    done = run(stub, *FLAGS, "--keep", script=repository / "launch" / "tpu_pod.sh", JOB="3")
    assert done.returncode == 3 and "delete" not in verbs(calls(stub))
    assert "queued-resources delete pod-1 --zone=us-west4-a" in done.stderr


def test_a_failed_slice_is_deleted_and_runs_no_job(stub, repository):
    done = run(stub, *FLAGS, script=repository / "launch" / "tpu_pod.sh", STATE="FAILED")
    assert done.returncode == 1 and verbs(calls(stub)) == ["create", "describe", "delete"]
    assert "error: pod-1 should become ACTIVE; found FAILED" in done.stderr


def test_a_slice_that_is_not_ready_in_time_is_deleted(stub, repository):
    done = run(stub, *FLAGS, "--wait=0", script=repository / "launch" / "tpu_pod.sh", STATE="WAITING_FOR_RESOURCES")
    assert done.returncode == 1 and verbs(calls(stub)) == ["create", "describe", "delete"]
    assert "found WAITING_FOR_RESOURCES" in done.stderr


def test_a_slice_that_was_not_created_is_not_deleted(stub, repository):
    done = run(stub, *FLAGS, script=repository / "launch" / "tpu_pod.sh", CREATE="1")
    assert done.returncode == 1 and verbs(calls(stub)) == ["create"]


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_an_interrupt_or_a_closed_terminal_deletes_the_slice(stub, repository, sent, status):
    command = ["bash", str(repository / "launch" / "tpu_pod.sh"), *FLAGS]
    # A test suite in the background ignores these signals, and a shell cannot trap one that it inherits ignored.
    process = subprocess.Popen(
        command,
        env=environment(stub, JOB="sleep"),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL),
    )
    try:
        end = time.monotonic() + 30
        while verbs(calls(stub)).count("ssh") < 2 and time.monotonic() < end:
            time.sleep(0.05)
        process.stdout.close()  # as if the terminal were gone
        os.killpg(process.pid, sent)  # the terminal signals both the script and its gcloud
        assert process.wait(30) == status
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert verbs(calls(stub))[-1] == "delete"
