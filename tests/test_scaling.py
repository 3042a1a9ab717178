"""docs/scaling.md agrees with the plans, the code and the presets, and its keys, files and links exist."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from grpo_jax.config import default
from grpo_jax.config.keys import flatten
from grpo_jax.planning.estimate import (
    COLLECTIVE_SECONDS,
    LAUNCH_SECONDS,
    LINK_FRACTION,
    MEMORY_FRACTION,
    PRODUCT_FRACTION,
)
from grpo_jax.planning.topology import CHIPS, GIB

REPO = Path(__file__).parent.parent
PAGE = (REPO / "docs" / "scaling.md").read_text(encoding="utf-8")
spec = importlib.util.spec_from_file_location("make_plans", REPO / "docs" / "make_plans.py")
make_plans = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_plans)


def marked(name: str) -> str:
    """Returns the table after the comment with this name."""
    (table,) = re.findall(rf"<!-- {name} -->\n(.*?)<!-- end -->", PAGE, flags=re.S)
    return table


def test_the_table_of_plans_is_that_of_the_files():
    assert marked("plans") == make_plans.plans_table()


def test_a_plan_is_a_row_of_the_table(tmp_path, monkeypatch):
    file, preset, topology = make_plans.named_plans()[0]
    monkeypatch.setattr(make_plans, "PLANS", tmp_path)
    phase = dict(total=1234.5, limit="memory")
    estimate = dict(rollout=phase, scoring=phase | {"total": 0.25}, update=phase, step_seconds=99.6)
    report = dict(
        topology=topology,
        mesh=dict(data=1, fsdp=8, expert=1, tensor=4),
        rollout_mesh=dict(data=1, fsdp=1, expert=1, tensor=1),
        slots=1024,
        peaks=dict(rollout=3 * GIB, update=4 * GIB),
        memory_bytes=16 * GIB,
        fits=True,
        estimate=estimate | {"tokens_per_second_per_chip": 5678.9, "update_mfu": 0.456},
    )
    for fits, cells in (
        (True, "1,234 | 0.2 | 1,234 | 100 | 5,679 | 46% | memory, memory |"),
        (False, "does not fit |  |  |  |  |  |  |"),
    ):
        make_plans.plan_file(file, preset, topology).write_text(json.dumps(report | {"fits": fits}))
        _, _, row = make_plans.plans_table().splitlines()
        name = f"[{file.stem}](../configs/{file.name}):{preset}"
        assert row == f"| {name} | {topology} | fsdp 8, tensor 4 | one device | 1,024 | 3.0, 4.0 | 16.0 | {cells}"


def test_every_plan_that_a_docstring_names_is_found_and_its_line_is_replaced():
    plans = make_plans.named_plans()
    assert len({file for file, _, _ in plans}) > 5
    for file, preset, topology in plans:
        text = file.read_text(encoding="utf-8")
        changed = make_plans.replace_line(text, preset, topology, "    A PLAN")
        pairs = zip(text.splitlines(), changed.splitlines(), strict=True)
        [(old, new)] = [(old, new) for old, new in pairs if old != new]
        assert old.startswith(f"    On {topology}:") and new == "    A PLAN"
        function = re.search(rf'"{re.escape(preset)}": (\w+)', text)[1]
        assert "    A PLAN" in changed.split(f"def {function}(")[1].split("\ndef ")[0]


def test_the_lines_of_the_docstrings_are_those_of_the_plans():
    for file, preset, report in make_plans.kept_plans():
        text = file.read_text(encoding="utf-8")
        assert make_plans.replace_line(text, preset, report["topology"], make_plans.plan_line(report)) == text


def test_a_plan_is_a_line_of_a_docstring():
    report = dict(topology="h100:8", held=dict(state=10 * GIB, reference=2 * GIB), peaks=dict(rollout=42 * GIB))
    report |= dict(memory_bytes=79 * GIB, fits=True, estimate=dict(step_seconds=1234))
    report["peaks"]["update"] = 23 * GIB
    line = "    On h100:8: rollouts take 42.0 and updates 23.0 of 79.0 GiB, including 12.0 of state; "
    assert make_plans.plan_line(report) == f"{line}about 1,234 s a step"
    assert make_plans.plan_line(report | {"fits": False}) == f"{line}does not fit"
    assert make_plans.PLAN_LINE.match(line)


def test_every_kept_plan_is_named_by_a_docstring():
    named = {make_plans.plan_file(*plan) for plan in make_plans.named_plans()}
    assert set(make_plans.PLANS.glob("*")) <= named


@pytest.mark.slow
def test_the_table_of_what_grows_is_that_of_the_formulas():
    assert marked("growth") == make_plans.growth_table()


def test_the_figures_of_the_devices_are_those_that_plans_assume():
    rows = re.findall(r"^\| (v5e|v6e|v5p|h100|rtx4090|l4) \| (.*) \|$", PAGE, flags=re.M)
    expected = {
        name: [
            f"{chip.memory_bytes / GIB:.4g}",
            f"{chip.bandwidth / 1e9:,.0f}",
            f"{chip.flops / 1e12:.0f}",
            f"{chip.link_bandwidth / 1e9:.0f}",
            f"{chip.network_bandwidth / 1e9:.0f}",
            # As many bytes per parameter are exchanged for a micro-batch as FLOPs per parameter and token are computed.
            ", ".join(
                f"{PRODUCT_FRACTION * chip.flops / (LINK_FRACTION * speed):,.0f}"
                for speed in (chip.link_bandwidth, chip.network_bandwidth)
            ),
        ]
        for name, chip in CHIPS.items()
    }
    assert {name: cells.split(" | ") for name, cells in rows} == expected
    text = " ".join(PAGE.split())
    assert f"{PRODUCT_FRACTION:.0%} of the products, {MEMORY_FRACTION:.0%} of the memory bandwidth" in text
    assert f"{LINK_FRACTION:.0%} of the links" in text
    assert f"at least {COLLECTIVE_SECONDS * 1e6:.0f} µs, and a kernel of a GPU {LAUNCH_SECONDS * 1e6:.1f} µs" in text


def test_every_key_file_and_link_of_the_page_exists():
    keys, sections = flatten(default().to_dict()), "|".join(default().to_dict())
    named = set(re.findall(rf"[`* ]((?:{sections})\.[a-z_]+(?:\.[a-z_]+)?)[=`* ]", PAGE))
    named |= set(re.findall(r"--config\.([a-z_.]+[a-z])", PAGE))
    assert len(named) > 10 and named - set(keys) <= {"rollout.mesh"}
    files = re.findall(r"\]\(([\w./]+)\)", PAGE) + re.findall(r"`((?:configs|benchmarks|docs)/[\w./]+)", PAGE)
    missing = {file for file in files if not ((REPO / "docs" / file).exists() or (REPO / file).exists())}
    assert missing <= {"docs/plans/"}  # which `make plans` makes
    headings = re.findall(r"^#+ (.*)$", PAGE, flags=re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= anchors
