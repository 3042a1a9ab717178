"""The commands of README and docs/scaling.md that need the compilers for accelerators run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PAGES = [(REPO / page).read_text(encoding="utf-8").replace("\\\n", " ") for page in ("README.md", "docs/scaling.md")]
COMMANDS = sorted({command for page in PAGES for command in re.findall(r"^\.venv-plan/bin/python (.*)$", page, re.M)})


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_plan_can_be_made(command, tmp_path):
    """Up to its first program, with a small model: tests/plan/test_plans.py makes whole plans."""
    assert len(COMMANDS) > 3
    (tmp_path / "plan.json").write_text('{"programs": {}}')  # of an earlier command
    (tmp_path / "configs").symlink_to(REPO / "configs")
    words = [*shlex.split(command.partition(" > ")[0]), "--config.model.path=tiny", "--program=placement"]
    environ = os.environ | {"PYTHONPATH": str(REPO)}
    planned = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr[-2000:]
    assert json.loads(planned.stdout)["temp_bytes"] >= 0
