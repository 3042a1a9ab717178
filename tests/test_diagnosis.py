"""Diagnosis: runs that are made sick say so once, and the guide states the table."""

import json
import re
from pathlib import Path

import pytest

import grpo_jax
from grpo_jax.config import default
from grpo_jax.main import main
from grpo_jax.run.diagnosis import SYMPTOMS
from tests.test_recipe_runs import PROBLEMS, SHAPES, constant

REPO = Path(__file__).parent.parent
SMALL = {"rollout.prompts": 4, "rollout.samples": 4, "eval.questions": 0, "log.every_steps": 1}


def read_warnings(workdir) -> dict[str, dict]:
    """Returns the lines of warnings.jsonl by name; each name occurs once."""
    path = workdir / "warnings.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    assert len({line["name"] for line in lines}) == len(lines)
    return {line["name"]: line for line in lines}


def run_main(workdir, keys, config="configs/r1zero.py") -> dict[str, dict]:
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    main([f"--config={REPO / config}", f"--workdir={workdir}", *flags])
    return read_warnings(workdir)


def test_a_run_without_differences_in_reward_says_so_once_also_when_it_is_resumed(tmp_path, capsys):
    """The run ends at update 5 and is resumed; a warning of a step that the checkpoint lacks is cut off."""

    def train(steps):
        cfg = default()
        cfg.update_from_flattened_dict(
            SHAPES | {"total_steps": steps, "eval.questions": 0, "train.minibatches": 1, "train.epochs": 1}
        )
        parts = {"format": constant(0.0)}
        grpo_jax.train(cfg, workdir=tmp_path, problems=PROBLEMS, rewards=parts)

    train(5)
    first, console = read_warnings(tmp_path), capsys.readouterr()
    steps = {name: line["step"] for name, line in first.items()}
    assert steps["equal_groups"] == steps["format_never_met"] == 3 and steps["zero_gradient"] == 5
    assert "unchanged_parameters" not in steps  # nothing was to change
    assert all((console.out + console.err).count(line["text"]) == 1 for line in first.values())
    with open(tmp_path / "warnings.jsonl", "a") as file:
        file.write(json.dumps({"step": 6, "name": "slower", "text": "after the checkpoint"}) + "\n")
    train(6)
    assert read_warnings(tmp_path) == first
    assert not any(line["text"] in capsys.readouterr().out for line in first.values())


def test_the_guide_states_the_names_and_thresholds_of_the_table():
    guide = (REPO / "docs" / "reading-a-run.md").read_text(encoding="utf-8")
    cells = [re.findall(r"`([^`]*)`", line) for line in guide.splitlines() if line.startswith("| `")]
    stated = {name: (float(threshold), int(span)) for name, threshold, span, *_ in cells}
    assert stated == {row.name: (row.threshold, row.span) for row in SYMPTOMS}
    assert all(f"### {row.name}" in guide for row in SYMPTOMS)


SICK_RUNS = {
    "truncated": {"rollout.max_tokens": 8, "total_steps": 1},
    "improbable_samples": {"rollout.temperature": 3.0, "total_steps": 1},
    "unchanged_parameters": {"model.param_dtype": "bfloat16", "optim.lr": 1e-7, "total_steps": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SICK_RUNS)
def test_a_sick_run_is_warned_of(tmp_path, name):
    assert name in run_main(tmp_path / "run", SMALL | SICK_RUNS[name])
