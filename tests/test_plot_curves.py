"""Tests that docs/plot_curves.py plots the values in metrics.jsonl, with mocks in place of matplotlib."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

SCRIPT = Path(__file__).parent.parent / "docs" / "plot_curves.py"


def draw(monkeypatch, *runs: str):
    """Plots runs and returns the figure's two axes and its legend, as mocks."""
    palettes = {
        name: SimpleNamespace(colors=[f"{name}-{n}" for n in range(int(name[3:]))]) for name in ("tab10", "tab20")
    }
    accuracy_axes, length_axes, figure_module = MagicMock(), MagicMock(), MagicMock()
    figure = figure_module.Figure.return_value
    figure.subplots.return_value = accuracy_axes, length_axes
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(colormaps=palettes))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", figure_module)
    monkeypatch.setitem(sys.modules, "matplotlib.lines", SimpleNamespace(Line2D=lambda x, y, color: color))
    spec = importlib.util.spec_from_file_location("plot_curves", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.plot("curves.png", *runs)
    figure.savefig.assert_called_once_with("curves.png", dpi=110)
    return accuracy_axes, length_axes, figure.legend.call_args.args


def write_run(workdir: Path, seed: int) -> str:
    """Writes the metrics of two updates with an evaluation before and after them; values contain the seed."""
    workdir.mkdir()
    lines = [
        {"step": 0, "eval/accuracy": 0.1 + seed, "eval/length_mean": 10.0},
        {"step": 1, "reward/accuracy": 0.2 + seed, "rollout/length_mean": 20.0},
        {"step": 2, "reward/accuracy": 0.3 + seed, "rollout/length_mean": 30.0, "eval/accuracy": 0.4 + seed}
        | {"eval/length_mean": 40.0},
    ]
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (workdir / "config.json").write_text(json.dumps({"seed": seed}))
    return str(workdir)


def test_the_curves_of_a_run_are_named_after_its_seed(tmp_path, monkeypatch):
    accuracy_axes, length_axes, legend = draw(monkeypatch, *(write_run(tmp_path / f"run{n}", seed=n) for n in (3, 5)))
    assert legend == (["tab10-0", "tab10-1"], ["seed 3", "seed 5"])
    drawn = [(call.args, call.kwargs["color"]) for call in accuracy_axes.plot.call_args_list]
    assert drawn == [
        (((1, 2), (3.2, 3.3), "-"), "tab10-0"),
        (((0, 2), (3.1, 3.4), "o"), "tab10-0"),
        (((1, 2), (5.2, 5.3), "-"), "tab10-1"),
        (((0, 2), (5.1, 5.4), "o"), "tab10-1"),
    ]
    assert [call.args for call in length_axes.plot.call_args_list][:2] == [
        ((1, 2), (20.0, 30.0), "-"),
        ((0, 2), (10.0, 40.0), "o"),
    ]


def test_runs_with_the_same_label_share_a_color_and_many_labels_get_more_colors(tmp_path, monkeypatch):
    workdir = write_run(tmp_path / "run", seed=0)
    accuracy_axes, _, legend = draw(monkeypatch, *(f"{label}={workdir}" for label in ("dapo", "gspo", "dapo")))
    assert legend == (["tab10-0", "tab10-1"], ["dapo", "gspo"])
    colors = [call.kwargs["color"] for call in accuracy_axes.plot.call_args_list]
    assert colors == ["tab10-0", "tab10-0", "tab10-1", "tab10-1", "tab10-0", "tab10-0"]
    _, _, (colors, labels) = draw(monkeypatch, *(f"recipe{n}={workdir}" for n in range(11)))
    assert len(set(colors)) == len(labels) == 11 and colors[0] == "tab20-0"
