"""launch/tpu_pod.sh: what it asks gcloud to do, and that no slice outlives it. A stub stands in for gcloud."""

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

# Writes its arguments down; `describe` prints STATE, the job ends with JOB, creating with CREATE; a job "sleep" lasts.
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
    """A folder with a gcloud that is found first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "gcloud").write_text(STUB.format(python=sys.executable))
    (folder / "gcloud").chmod(0o755)
    return folder


@pytest.fixture
def repository(tmp_path):
    """A git repository with the script, a tracked file that has changed since, and a file that git does not track."""
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
    """What gcloud was called with."""
    path = stub / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def verbs(commands: list[list[str]]) -> list[str]:
    """create, describe, scp, ssh, delete: the fourth word behind gcloud, or of gcloud's own arguments."""
    return [words[3] for words in commands]


def remote(words: list[str]) -> list[str]:
    """The words of the command that a host's shell is given."""
    (command,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    return shlex.split(command)


def dry_run(stub: Path, *flags: str) -> list[list[str]]:
    """The printed commands, as a shell reads them, without `gcloud`; none of them was run."""
    done = run(stub, *FLAGS, "--dry-run", *flags)
    assert (done.returncode, done.stderr, calls(stub)) == (0, "", [])
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(words[:3] == ["gcloud", "compute", "tpus"] for words in commands)
    return [words[1:] for words in commands]


def test_is_valid_bash():
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


def test_flags_for_the_job_arrive_as_they_were_given(stub):
    job = remote(dry_run(stub, "--", *DIFFICULT)[-2])
    assert "GRPO_JAX_DISTRIBUTED=1" in job
    assert job[job.index("grpo_jax.main") + 1 :] == ["--config=configs/r1zero.py", "--workdir=/runs/a b", *DIFFICULT]


def test_no_spot_no_setup_and_keep(stub):
    commands = dry_run(stub, "--keep")
    assert verbs(commands) == ["create", "describe", "scp", "ssh", "ssh"]
    assert "--spot" not in commands[0]


def test_a_value_may_follow_its_flag_as_a_word(stub):
    split = [word for flag in FLAGS for word in flag.split("=", 1)]
    assert run(stub, *split, "--dry-run").stdout == run(stub, *FLAGS, "--dry-run").stdout != ""


@pytest.mark.parametrize(
    "flags, says",
    [
        *[([flag for flag in FLAGS if flag != left_out], left_out.split("=")[0]) for left_out in FLAGS],
        ([*FLAGS, "--accelerater=v6e-8"], "--accelerater"),
        ([*FLAGS, "--config.seed=1"], "behind --"),
        ([*FLAGS, "--zone"], "a value for --zone"),
        ([*FLAGS, "--wait=soon"], "minutes"),
        ([*FLAGS, "--workdir=gs://bucket/run"], "gs://bucket/run"),
        ([*FLAGS, "--workdir=runs/r1zero"], "all hosts mount"),
        ([*FLAGS, "--config=configs/none.py:tiny"], "configs/none.py"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_ends_with_one_line(stub, flags, says):
    done = run(stub, *flags)
    assert (done.returncode, done.stdout, calls(stub)) == (2, "", [])
    assert done.stderr.startswith("error: expected ") and done.stderr.count("\n") == 1
    assert says in done.stderr and "; found " in done.stderr


def test_without_gcloud_it_says_so(stub):
    (stub / "gcloud").unlink()
    for name in ("bash", "dirname"):
        (stub / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        [str(stub / "bash"), str(SCRIPT), *FLAGS], env={"PATH": str(stub)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: expected gcloud in PATH")


def test_help_is_the_comment_at_the_top(stub):
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


def test_keep_leaves_the_slice_and_says_how_to_delete_it(stub, repository):
    done = run(stub, *FLAGS, "--keep", script=repository / "launch" / "tpu_pod.sh", JOB="3")
    assert done.returncode == 3 and "delete" not in verbs(calls(stub))
    assert "queued-resources delete pod-1 --zone=us-west4-a" in done.stderr


def test_a_slice_that_fails_is_deleted_without_a_job(stub, repository):
    done = run(stub, *FLAGS, script=repository / "launch" / "tpu_pod.sh", STATE="FAILED")
    assert done.returncode == 1 and verbs(calls(stub)) == ["create", "describe", "delete"]
    assert "error: expected pod-1 to become ACTIVE; found FAILED" in done.stderr


def test_waiting_has_an_end(stub, repository):
    done = run(stub, *FLAGS, "--wait=0", script=repository / "launch" / "tpu_pod.sh", STATE="WAITING_FOR_RESOURCES")
    assert done.returncode == 1 and verbs(calls(stub)) == ["create", "describe", "delete"]
    assert "found WAITING_FOR_RESOURCES" in done.stderr


def test_what_it_did_not_create_it_does_not_delete(stub, repository):
    done = run(stub, *FLAGS, script=repository / "launch" / "tpu_pod.sh", CREATE="1")
    assert done.returncode == 1 and verbs(calls(stub)) == ["create"]


@pytest.mark.parametrize("sent, status", [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_an_interrupt_or_a_closed_terminal_deletes_the_slice(stub, repository, sent, status):
    command = ["bash", str(repository / "launch" / "tpu_pod.sh"), *FLAGS]
    # A suite started in the background ignores these signals, and a shell that ignores one at its start cannot trap it.
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
        process.stdout.close()  # nobody reads what it still has to say
        os.killpg(process.pid, sent)  # to the script and its gcloud, as the terminal does
        assert process.wait(30) == status
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert verbs(calls(stub))[-1] == "delete"
