"""Draws R1-Zero's two curves, accuracy and response length, from the metrics.jsonl of one or several runs.

pip install matplotlib
python docs/plot_curves.py docs/curves.png runs/seed0 runs/seed1 runs/seed2
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main(out: str, *runs: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for run in runs:
        rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if "reward/accuracy" in row]
        label = f"seed {json.loads((Path(run) / 'config.json').read_text())['seed']}"
        x = [row["step"] for row in steps]
        color = left.plot(x, [row["reward/accuracy"] for row in steps], lw=1.2, label=label)[0].get_color()
        right.plot(x, [row["rollout/length_mean"] for row in steps], lw=1.2, color=color)
        for row in rows:
            if "eval/accuracy" in row:
                left.plot(row["step"], row["eval/accuracy"], "o", color=color, ms=5)
                right.plot(row["step"], row["eval/length_mean"], "o", color=color, ms=5)
    left.set(xlabel="update", ylabel="accuracy", ylim=(0, 1.02), title="accuracy (dots: held-out questions)")
    right.set(xlabel="update", ylabel="tokens", ylim=(0, None), title="response length")
    left.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(*sys.argv[1:])
