"""Plans lower the programs that training runs, and refuse what they cannot plan."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parent.parent
# Several micro-batches, slots that are refilled, a cache that grows, and a rollout mesh that differs from the mesh.
KEYS = """
    rollout.prompts=4 rollout.samples=4 rollout.max_tokens=60 rollout.max_prompt_tokens=96 rollout.slots=8
    rollout.temperature=3 rollout.mesh.tensor=2 train.micro_tokens=128 mesh.data=2 mesh.fsdp=4
    model.reference_dtype=bfloat16 total_steps=1 eval.questions=0 log.samples=0
""".split()


def test_a_plan_lowers_the_programs_of_a_run(tmp_path):
    """The arguments that a run passes to its jitted functions lower to the same text as those of the plan."""
    command = [sys.executable, "-m", "tests.lowered", str(tmp_path / "run"), *KEYS]
    done = subprocess.run(command, cwd=REPO, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    digests = json.loads(done.stdout.splitlines()[-1])
    planned, run = digests["planned"], digests["run"]
    assert set(planned) == {"placement", "prefill", "decode 128", "decode 156", "scoring", "update"}
    assert [name for name in planned if run[name] != planned[name]] == []
