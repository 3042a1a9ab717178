"""Puts the data of runs, page.html, page.css and the scripts into one file that loads nothing else.

The text of models and files is JSON in `<script type="application/json">`, which no browser executes, and the scripts
show it as text only. The content security policy admits only the page's own script and style, by their hashes. The
samples of each step are a separate element, so that a browser parses only those that are shown.

The curves are SVG, drawn by curves.js. An embedded charting library would not save code, because the shared cursor, its
keys and the readouts would still be ours, and a library that draws on a canvas neither prints sharply nor follows the
colors of the page.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_jax.reporting.curves import mean_curves, run_curves, seed_groups
from grpo_jax.reporting.runs import RunFiles
from grpo_jax.reporting.samples import MAX_BYTES, compare_evaluations, embed_samples
from grpo_jax.reporting.summary import config_table, describe_progress, key_numbers, redraw_command, time_shares

# What could end a script element or begin markup in it, and line ends that JavaScript knows and JSON does not.
ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}

SCRIPTS = ("basics.js", "curves.js", "samples.js", "page.js")  # joined in this order


def data_element(name: str, value: Any) -> str:
    """Returns a script element that holds a value as JSON."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(ESCAPES)
    return f'<script type="application/json" id="data-{name}">{text}</script>'


def content_hash(text: str) -> str:
    """Returns the source of a content security policy that admits an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def report_data(
    runs: Sequence[RunFiles], base: dict[str, Any], preset: str, topology: str | None = None
) -> dict[str, Any]:
    """Returns the data of a page by the name of its element.

    Args:
        runs: The runs.
        base: The config that those of the runs are compared with, by dotted name.
        preset: The preset of `base`, as in --config.
        topology: The devices of the runs, if the page should show the model FLOPs utilization.
    """
    data: dict[str, Any] = {}
    summaries = []
    for index, run in enumerate(runs):
        steps, lengths = embed_samples(run, MAX_BYTES / len(runs))
        data |= {f"samples-{index}-{step}": groups for step, groups in steps.items()}
        times = time_shares(run)
        if topology:
            from grpo_jax.reporting.utilization import utilization  # imported here, because it imports JAX

            times["mfu"] = utilization(run, times["seconds"], topology)
        comparison = compare_evaluations(run)
        if comparison:
            data[f"comparison-{index}"] = comparison.pop("questions")
        summaries.append(
            {
                "name": run.name,
                "about": describe_progress(run),
                "numbers": key_numbers(run),
                "curves": run_curves(run),
                "time": times,
                "warnings": run.warnings,
                "steps": list(steps),
                "recorded": len(run.train_samples),
                "lengths": lengths,
                "comparison": comparison,
                "redraw": redraw_command(run),
            }
        )
    means = [{"runs": group, "curves": mean_curves([runs[n] for n in group])} for group in seed_groups(runs)]
    config = {"base": preset, "rows": config_table(runs, base)}
    return {"report": {"runs": summaries, "means": means, "config": config}} | data


def make_page(data: dict[str, Any]) -> str:
    """Returns the page that shows the data, which `report_data` returns."""
    template, style, *scripts = (
        (Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS)
    )
    script = "\n".join(scripts)
    parts = {
        "style": style,
        "script": script,
        "style_hash": content_hash(style),
        "script_hash": content_hash(script),
        "data": "\n".join(data_element(name, value) for name, value in data.items()),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # in one pass: the data may hold braces


def write_page(path: Path, page: str) -> None:
    """Writes a page. A lone surrogate becomes a JSON escape; only the JSON can contain one."""
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
