"""Plans every preset on the hardware that its docstring names: `make plans`.

    python docs/make_plans.py [RECIPE[:PRESET] ...]

Each plan is kept as docs/plans/RECIPE-PRESET-TOPOLOGY.json. Programs that have not changed since are not compiled
again. The lines `On TOPOLOGY: ...` of the docstrings and the table in docs/scaling.md are rewritten from the plans. The
exit code is 3 if a plan does not fit, or its programs gather or sum whole arrays, copy the cache or compute more than
they need to.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from jax.sharding import AbstractDevice, AbstractMesh

from grpo_jax.config import check
from grpo_jax.config.flags import load_config, override_key
from grpo_jax.parallel.mesh import rollout_axis_sizes
from grpo_jax.planning import needs
from grpo_jax.planning.checks import violations
from grpo_jax.planning.estimate import estimate_run
from grpo_jax.planning.models import plan_model
from grpo_jax.planning.programs import RunShapes
from grpo_jax.planning.topology import CHIPS, GIB
from grpo_jax.rollout.memory import plan_rollout

REPO = Path(__file__).parent.parent
PLANS = REPO / "docs" / "plans"
SCALING = REPO / "docs" / "scaling.md"
R1ZERO_KEYS = "rollout.prompts=512 rollout.max_tokens=32768 train.minibatches=16"
# Rows of the table of what grows: a preset of r1zero.py, a number of v5p chips, and keys.
GROWTH = [
    *(("qwen2.5-7b", chips, "") for chips in (8, 32, 128, 512)),
    *(("qwen2.5-7b", 64, f"rollout.max_tokens={tokens}") for tokens in (1024, 4096, 16384, 32768)),
    *(("qwen2.5-7b", 64, f"rollout.mesh.tensor={tensor}") for tensor in (2, 4)),
    *((preset, 64, "rollout.max_tokens=4096") for preset in ("qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-32b")),
    *((preset, 512, R1ZERO_KEYS) for preset in ("qwen2.5-7b", "qwen2.5-32b")),
    *(("deepseek-v3", chips, "") for chips in (512, 1024)),
]
PLAN_LINE = re.compile(r"^    On ((?:v5e|v6e|v5p|h100|rtx4090|l4):[\dx]+).*$", flags=re.M)


def named_plans() -> list[tuple[Path, str, str]]:
    """Returns the config file, the preset and the topology of every plan that a docstring names."""
    plans = []
    for file in sorted((REPO / "configs").glob("*.py")):
        for body in file.read_text(encoding="utf-8").split("\ndef ")[1:]:
            function = body.partition("(")[0]
            preset = re.search(rf'"([^"]+)": {function}\b', file.read_text(encoding="utf-8"))
            plans += [(file, preset[1], topology) for topology in PLAN_LINE.findall(body)]
    return plans


def plan_file(file: Path, preset: str, topology: str) -> Path:
    """Returns where a plan is kept."""
    return PLANS / f"{file.stem}-{preset}-{topology.replace(':', '-')}.json"


def kept_plans() -> list[tuple[Path, str, dict]]:
    """Returns the config file, the preset and the report of every plan that is kept, in the order of `named_plans`."""
    paths = [(file, preset, plan_file(file, preset, topology)) for file, preset, topology in named_plans()]
    return [(file, preset, json.loads(path.read_text("utf-8"))) for file, preset, path in paths if path.exists()]


def plan_line(report: dict) -> str:
    """Returns the line of a docstring that states a plan."""
    held, peaks = report["held"], report["peaks"]
    state, memory = (size / GIB for size in (held["state"] + held["reference"], report["memory_bytes"]))
    rollout, update = (peaks[phase] / GIB for phase in ("rollout", "update"))
    takes = f"rollouts take {rollout:.1f} and updates {update:.1f} of {memory:.1f} GiB, including {state:.1f} of state"
    seconds = f"about {report['estimate']['step_seconds']:,.0f} s a step" if report["fits"] else "does not fit"
    return f"    On {report['topology']}: {takes}; {seconds}"


def format_seconds(seconds: float) -> str:
    """Formats seconds with at least two digits."""
    return f"{seconds:,.{1 if seconds < 10 else 0}f}"


def plans_table() -> str:
    """Returns the Markdown table of all plans that are kept, in the order in which the docstrings name them."""
    rows = [
        "| preset | devices | mesh | rollout mesh | slots | peak GiB: rollout, update | of GiB | rollout s | scoring s "
        "| update s | step s | tokens/s per chip | MFU | bound by: rollout, update |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for file, preset, report in kept_plans():
        rows.append(table_row(f"[{file.stem}](../configs/{file.name}):{preset}", report))
    return "\n".join(rows) + "\n"


def table_row(name: str, report: dict) -> str:
    """Returns the row of one plan."""
    meshes = (
        ", ".join(f"{axis} {size}" for axis, size in report[mesh].items() if size > 1) or "one device"
        for mesh in ("mesh", "rollout_mesh")
    )
    peaks = ", ".join(f"{report['peaks'].get(phase, 0) / GIB:.1f}" for phase in ("rollout", "update"))
    cells = [name, report["topology"], *meshes, f"{report['slots']:,}", peaks, f"{report['memory_bytes'] / GIB:.1f}"]
    if report["fits"]:
        made = report["estimate"]
        phases = [made[phase] for phase in ("rollout", "scoring", "update")]
        cells += [format_seconds(value) for value in (*(phase["total"] for phase in phases), made["step_seconds"])]
        cells += [f"{made['tokens_per_second_per_chip']:,.0f}", f"{made['update_mfu']:.0%}"]
        cells.append(f"{phases[0]['limit']}, {phases[2]['limit']}")
    else:
        cells += ["does not fit", *[""] * 6]
    return f"| {' | '.join(cells)} |"


def growth_table() -> str:
    """Returns the Markdown table of what runs of several sizes should take, all of it by formula."""
    lines = [
        "| preset | chips | keys | state and reference | rollout weights | cache | temporaries of an update "
        "| rollout s | scoring s | update s | step s | tokens/s per chip |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for preset, chips, keys in GROWTH:
        run = formula_run(preset, chips, keys.split())
        memory, made = needs.run_memory(run), estimate_run(run, CHIPS["v5p"])
        held = memory.state + memory.reference
        sizes = held, memory.rollout_weights, memory.cache, needs.update_temporaries(run)
        seconds = made.rollout.total, made.scoring.total, made.update.total, made.step
        cells = [preset, f"{chips:,}", f"`{keys}`" if keys else "", *(f"{size / GIB:.1f}" for size in sizes)]
        cells += [*map(format_seconds, seconds), f"{made.tokens_per_second:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def formula_run(preset: str, chips: int, keys: list[str]) -> RunShapes:
    """Returns a run on v5p chips of which only the number is known."""
    raw = load_config(f"{REPO / 'configs' / 'r1zero.py'}:{preset}")
    for key in keys:
        override_key(raw, *key.split("="))
    cfg = check(raw)
    model_cfg, tensor, expert = plan_model(cfg), cfg.mesh.tensor, cfg.mesh.expert
    mesh = needs.abstract_mesh(fsdp=chips // (tensor * expert), expert=expert, tensor=tensor)
    device = AbstractDevice("TPU v5p", num_cores=None, platform="tpu")
    mesh = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=mesh.axis_types, abstract_device=device)
    held_bytes = sum(needs.training_memory(cfg, model_cfg, mesh)[:2])
    plan = plan_rollout(cfg, model_cfg, mesh, held_bytes, CHIPS["v5p"].memory_bytes)
    rollout_mesh = mesh.update(axis_sizes=rollout_axis_sizes(mesh, plan.tensor, plan.expert))
    return RunShapes(cfg, model_cfg, mesh, rollout_mesh, plan.slots)


def with_tables(page: str) -> str:
    """Returns a page with its tables written anew, each after a line `<!-- NAME -->`."""
    for name, table in (("plans", plans_table()), ("growth", growth_table())):
        before, _, rest = page.partition(f"<!-- {name} -->\n")
        page = f"{before}<!-- {name} -->\n{table}<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


def make_plan(file: Path, preset: str, topology: str) -> list[str]:
    """Makes a plan, keeps it, and returns what is wrong with it."""
    spec, path = f"{file.relative_to(REPO)}:{preset}", plan_file(file, preset, topology)
    print(f"{spec} on {topology}", flush=True)
    command = [sys.executable, "-m", "grpo_jax.plan", f"--config={spec}", f"--topology={topology}", "--json"]
    command.append("--programs=placement,prefill,decode,update")  # scoring is the update's forward pass
    command += [f"--earlier={path}"] if path.exists() else []
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 3):
        return [f"{spec} on {topology}: exit code {done.returncode}"]
    report = json.loads(done.stdout)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return [f"{spec} on {topology}: {line}" for line in violations(report, plan_model(check(load_config(spec))))]


def replace_line(text: str, preset: str, topology: str, line: str) -> str:
    """Returns a config file's text with the line of one plan replaced."""
    function = re.search(rf'"{re.escape(preset)}": (\w+)', text)[1]
    before, start, body = text.partition(f"\ndef {function}(")
    return before + start + re.sub(rf"^    On {re.escape(topology)}\b.*$", line, body, count=1, flags=re.M)


def main(wanted: list[str]) -> int:
    """Makes the plans, rewrites what is written from them, and returns the exit code."""
    PLANS.mkdir(exist_ok=True)
    found = []
    for file, preset, topology in named_plans():
        if not wanted or file.stem in wanted or f"{file.stem}:{preset}" in wanted:
            found += make_plan(file, preset, topology)
    for file, preset, report in kept_plans():
        text = file.read_text(encoding="utf-8")
        file.write_text(replace_line(text, preset, report["topology"], plan_line(report)), encoding="utf-8")
    SCALING.write_text(with_tables(SCALING.read_text(encoding="utf-8")), encoding="utf-8")
    print(*found, sep="\n")
    return 3 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
