"""Plots R1-Zero's two curves, accuracy and response length, from the metrics.jsonl of one or more runs.

pip install matplotlib
python docs/plot_curves.py docs/curves.png runs/seed0 runs/seed1 runs/seed2
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def plot(out: str, *workdirs: str) -> None:
    """Plots both curves against the update, one color per run, and saves the figure to `out`."""
    figure = Figure(figsize=(9, 3.2))
    accuracy_axes, length_axes = figure.subplots(1, 2)
    for workdir in workdirs:
        lines = [json.loads(text) for text in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
        updates = [line for line in lines if "reward/accuracy" in line]
        steps = [line["step"] for line in updates]
        label = f"seed {json.loads((Path(workdir) / 'config.json').read_text())['seed']}"
        (curve,) = accuracy_axes.plot(steps, [line["reward/accuracy"] for line in updates], lw=1.2, label=label)
        color = curve.get_color()
        length_axes.plot(steps, [line["rollout/length_mean"] for line in updates], lw=1.2, color=color)
        for line in lines:
            if "eval/accuracy" in line:
                accuracy_axes.plot(line["step"], line["eval/accuracy"], "o", color=color, ms=5)
                length_axes.plot(line["step"], line["eval/length_mean"], "o", color=color, ms=5)
    accuracy_axes.set(xlabel="update", ylabel="accuracy", ylim=(0, 1.02), title="accuracy (dots: held-out questions)")
    length_axes.set(xlabel="update", ylabel="tokens", ylim=(0, None), title="response length")
    accuracy_axes.legend(frameon=False, loc="lower right")
    for axes in (accuracy_axes, length_axes):
        axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    plot(*sys.argv[1:])
