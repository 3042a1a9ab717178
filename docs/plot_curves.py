"""Plots R1-Zero's two curves, accuracy and completion length, from the metrics.jsonl of one or more runs.

pip install matplotlib
python docs/plot_curves.py docs/curves.png runs/seed0 runs/seed1 runs/seed2
python docs/plot_curves.py recipes.png dapo=runs/dapo gspo=runs/gspo gspo=runs/gspo-seed1

Pass each run as WORKDIR or LABEL=WORKDIR. The default label is the seed of the run. Runs with the same label share a
color and an entry in the legend.
"""

import json
import sys
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

CURVES = {  # the metrics of training and of evaluations, by title
    "accuracy (dots: held-out questions)": ("reward/accuracy", "eval/accuracy"),
    "completion length in tokens": ("rollout/length_mean", "eval/length_mean"),
}


def label_and_workdir(run: str) -> tuple[str, Path]:
    """Splits LABEL=WORKDIR into its parts. The label of a plain WORKDIR is the seed of its run."""
    label, _, workdir = run.rpartition("=")
    return label or f"seed {json.loads((Path(workdir) / 'config.json').read_text())['seed']}", Path(workdir)


def plot(out: str, *runs: str) -> None:
    """Plots both curves against the update, one color per label, and saves the figure to `out`."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    labeled = [label_and_workdir(run) for run in runs]
    labels = list(dict.fromkeys(label for label, _ in labeled))
    colors = dict(zip(labels, colormaps["tab10" if len(labels) <= 10 else "tab20"].colors, strict=False))
    lines = [[json.loads(text) for text in (folder / "metrics.jsonl").open()] for _, folder in labeled]
    for axes, (title, names) in zip(figure.subplots(1, 2), CURVES.items(), strict=True):
        for (label, _), run_lines in zip(labeled, lines, strict=True):
            for name, style in zip(names, ("-", "o"), strict=True):
                points = [(line["step"], line[name]) for line in run_lines if name in line]
                axes.plot(*zip(*points, strict=True), style, color=colors[label], lw=1.2, ms=5)
        axes.set(xlabel="update", title=title, ylim=(0, 1.02 if "accuracy" in title else None))
        axes.grid(alpha=0.25)
    handles = [Line2D([], [], color=color) for color in colors.values()]
    figure.legend(handles, labels, frameon=False, loc="outside right")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    plot(*sys.argv[1:])
