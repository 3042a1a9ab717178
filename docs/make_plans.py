"""Plans every preset on the hardware that its docstring names: `make plans`.

    python docs/make_plans.py [RECIPE[:PRESET] ...]

Each plan is kept as docs/plans/RECIPE-PRESET-TOPOLOGY.json. Programs that have not changed since are not compiled
again. The lines `On TOPOLOGY: ...` of the docstrings are written anew from the plans. The exit code is 3 if a plan does
not fit, or its programs gather or sum whole arrays, copy the cache or compute more than they need to.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from grpo_jax.config import check
from grpo_jax.config.flags import load_config
from grpo_jax.planning.checks import violations
from grpo_jax.planning.models import plan_model
from grpo_jax.planning.topology import GIB

REPO = Path(__file__).parent.parent
PLANS = REPO / "docs" / "plans"
PLAN_LINE = re.compile(r"^    On ((?:v5e|v6e|v5p|h100|rtx4090|l4):[\dx]+).*$", flags=re.M)


def named_plans() -> list[tuple[Path, str, str]]:
    """Returns the config file, the preset and the topology of every plan that a docstring names."""
    plans = []
    for file in sorted((REPO / "configs").glob("*.py")):
        for body in file.read_text(encoding="utf-8").split("\ndef ")[1:]:
            function = body.partition("(")[0]
            preset = re.search(rf'"([^"]+)": {function},', file.read_text(encoding="utf-8"))
            plans += [(file, preset[1], topology) for topology in PLAN_LINE.findall(body)]
    return plans


def plan_file(file: Path, preset: str, topology: str) -> Path:
    """Returns where a plan is kept."""
    return PLANS / f"{file.stem}-{preset}-{topology.replace(':', '-')}.json"


def plan_line(report: dict) -> str:
    """Returns the line of a docstring that states a plan."""
    held, peaks = report["held"], report["peaks"]
    state, memory = (size / GIB for size in (held["state"] + held["reference"], report["memory_bytes"]))
    rollout, update = (peaks[phase] / GIB for phase in ("rollout", "update"))
    fit = f"rollouts take {rollout:.1f} and updates {update:.1f} of {memory:.1f} GiB, {state:.1f} of them state"
    return f"    On {report['topology']}: {fit}; about {report['estimate']['step_seconds']:,.0f} s a step"


def main(wanted: list[str]) -> int:
    """Makes the plans and returns the exit code."""
    PLANS.mkdir(exist_ok=True)
    found = []
    for file, preset, topology in named_plans():
        if wanted and file.stem not in wanted and f"{file.stem}:{preset}" not in wanted:
            continue
        spec, path = f"{file.relative_to(REPO)}:{preset}", plan_file(file, preset, topology)
        print(f"{spec} on {topology}", flush=True)
        command = [sys.executable, "-m", "grpo_jax.plan", f"--config={spec}", f"--topology={topology}", "--json"]
        command += [f"--earlier={path}"] if path.exists() else []
        done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
        if done.returncode not in (0, 3):
            found.append(f"{spec} on {topology}: exit code {done.returncode}")
            continue
        report = json.loads(done.stdout)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        found += [f"{spec} on {topology}: {line}" for line in violations(report, plan_model(check(load_config(spec))))]
        text = file.read_text(encoding="utf-8")
        file.write_text(replace_line(text, preset, topology, plan_line(report)), encoding="utf-8")
    print(*found, sep="\n")
    return 3 if found else 0


def replace_line(text: str, preset: str, topology: str, line: str) -> str:
    """Returns a config file's text with the line of one plan replaced."""
    function = re.search(rf'"{re.escape(preset)}": (\w+),', text)[1]
    before, start, body = text.partition(f"\ndef {function}(")
    return before + start + re.sub(rf"^    On {re.escape(topology)}\b.*$", line, body, count=1, flags=re.M)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
