"""Diagnosis: runs that are made sick say so once, and the guide states the table."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import grpo_jax
from grpo_jax.config import check, default
from grpo_jax.main import main
from grpo_jax.model.decoder import init_params
from grpo_jax.run.diagnosis import SYMPTOMS, History
from grpo_jax.weights.reading import load
from grpo_jax.weights.source import find_model, read_model_config
from grpo_jax.weights.tensor_names import parameter_tensors
from grpo_jax.weights.writing import save, tensors_from_params, write_safetensors
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


def measured(name, lines, keys=()) -> bool:
    """Returns whether a run whose last updates have these metrics is warned of a symptom."""
    cfg = default()
    cfg.update_from_flattened_dict(dict(keys))
    (row,) = (row for row in SYMPTOMS if row.name == name)
    value = row.measure(History(check(cfg), False, {}, lines, [line for line in lines if line["time/rollout_s"]]), row)
    return value is not None and row.comparison(value, row.threshold)


def updates(name, values, **others) -> list[dict]:
    return [{"time/rollout_s": 1.0, "optim/no_signal": 0.0} | others | {name: value} for value in values]


def test_a_lasting_loss_of_speed_is_noticed_and_a_passing_one_is_not():
    """The first rollout compiles; another program slows down the rollouts by turns."""
    name, fast = "rollout/tokens_per_s", [40.0] + [5000.0, 900.0, 7000.0] * 8
    assert not measured("slower", updates(name, fast + [500.0] * 19))
    assert not measured("slower", updates(name, fast + [500.0, 4000.0, 300.0, 400.0] * 10))
    assert not measured("slower", updates(name, fast + [3000.0] * 20))
    assert measured("slower", updates(name, fast + [2400.0, 500.0] * 10))


def test_what_is_normal_for_a_policy_is_not_noticed():
    """A learned task has a low entropy, a rare token a KL divergence without a bound."""
    name = "policy/entropy"
    assert measured("low_entropy", updates(name, [0.01] * 3, **{"reward/mean": 0.9}))
    assert not measured("low_entropy", updates(name, [0.01] * 3, **{"reward/mean": 1.1}))
    for name, metric, values in (
        ("equal_groups", "groups/zero_variance_frac", [1.0] * 3),
        ("zero_gradient", "optim/grad_norm", [0.0] * 5),
    ):
        assert measured(name, updates(metric, values, **{"reward/mean": 1.9}))
        assert not measured(name, updates(metric, values, **{"reward/mean": 2.0}))
    assert measured("high_kl", updates("policy/kl_ref", [0.1, 30.0, 1.1, 1.1, 0.1]))
    assert not measured("high_kl", updates("policy/kl_ref", [0.1, 30.0, 30.0, 0.1, 0.1]))


@pytest.mark.parametrize("others", [{"time/rollout_s": 1.0}, {"optim/no_signal": 1.0}])
def test_only_later_updates_with_a_signal_are_clipped(others):
    for name, value in (("never_clipped", 0.0), ("clipped", 0.9)):
        first = updates("policy/clip_frac", [value] * 3)
        later = {"time/rollout_s": 0.0}
        assert measured(name, first + updates("policy/clip_frac", [value] * 3, **later))
        assert not measured(name, first + updates("policy/clip_frac", [value] * 3, **later | others))


def test_skipped_updates_change_nothing_for_another_reason_than_rounding():
    name, unchanged = "unchanged_parameters", {"optim/grad_norm": 1.0, "optim/skipped": 0.0}
    assert measured(name, updates("optim/changed_frac", [0.0] * 3, **unchanged))
    skipped = {"optim/grad_norm": float("nan"), "optim/skipped": 1.0}
    assert not measured(name, updates("optim/changed_frac", [0.0] * 3, **skipped))


def test_bounds_that_clip_nothing_or_whole_completions_are_left_out():
    later = {"time/rollout_s": 0.0}
    never, often = ([*updates("x", [0.0] * 3), *updates("policy/clip_frac", [x] * 3, **later)] for x in (0.0, 0.9))
    assert not measured("never_clipped", never, {"loss.clip_high": 4.0})
    assert not measured("clipped", often, {"loss.ratio": "sequence"})


def test_the_guide_states_the_names_and_thresholds_of_the_table_and_has_an_example_of_each():
    guide = (REPO / "docs" / "reading-a-run.md").read_text(encoding="utf-8")
    cells = [re.findall(r"`([^`]*)`", line) for line in guide.splitlines() if line.startswith("| `")]
    stated = {name: (float(threshold), int(span)) for name, threshold, span, *_ in cells}
    assert stated == {row.name: (row.threshold, row.span) for row in SYMPTOMS}
    for row in SYMPTOMS:
        (section,) = re.findall(rf"^### {row.name}$(.*?)(?=^### |\Z)", guide, re.MULTILINE | re.DOTALL)
        printed = re.sub(r"\\{.*?\\}", ".+", re.escape(row.text))
        assert re.search(f"^warning: step [0-9]+: {printed}$", section, re.MULTILINE), row.name


DRIFTING = {"model.compute_dtype": "bfloat16", "rollout.max_tokens": 32, "total_steps": 1}
# Each run with the warnings that it must give; `{inputs}` is the folder of the fixture `inputs`.
SICK_RUNS = {
    "cut_off": (
        {"rollout.max_tokens": 8, "total_steps": 5},
        {"truncated", "equal_groups", "format_never_met", "zero_gradient"},
    ),
    "shuffled_weights": (
        {"model.path": "{inputs}/shuffled", "total_steps": 3},
        {"greedy_perplexity", "improbable_samples", "high_entropy"},
    ),
    "two_answers": ({"task.name": "{inputs}/own.py:two_answers", "total_steps": 1}, {"refused_answers"}),
    "tiny_rate": ({"train.minibatches": 2, "optim.lr": 1e-8, "total_steps": 6}, {"never_clipped"}),
    "many_epochs": ({"train.epochs": 6, "optim.lr": 1e-3, "total_steps": 6}, {"clipped", "high_kl"}),
    "bfloat16_weights": (
        {"model.param_dtype": "bfloat16", "optim.lr": 1e-7, "total_steps": 3},
        {"unchanged_parameters"},
    ),
    "large_logits": (DRIFTING | {"model.path": "{inputs}/dense"}, {"sampler_drift"}),
    "near_ties_of_experts": (DRIFTING | {"model.path": "{inputs}/mixture"}, {"sampler_drift_mixture"}),
    "low_temperature": (
        {"rollout.temperature": 0.01, "task.digits": 4, "reward.parts": ("accuracy",), "reward.weights": (1.0,)}
        | {"total_steps": 3},
        {"low_entropy"},
    ),
    "length_pays": (
        {
            "task.digits": 6,
            "reward.parts": ("accuracy", "{inputs}/own.py:longer"),
            "reward.weights": (1.0, 0.01),
            "optim.lr": 5e-4,
            "total_steps": 50,
        },
        {"longer_not_better"},
    ),
    "a_few_long_completions": (
        {
            "rollout.prompts": 16,
            "rollout.samples": 2,
            "rollout.max_prompt_tokens": 128,
            "task.name": "{inputs}/own.py:nearly_solved",
            "prompt.template": "{inputs}/template.txt",
            "optim.lr": 1e-8,
            "total_steps": 40,
        },
        {"slower"},
    ),
}
SMALL_MODEL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "tie_word_embeddings": False}
MIXTURE = {"model_type": "mixtral", "num_local_experts": 16, "num_experts_per_tok": 1}
HEAD_SCALE = 16
OWN = '''
from grpo_jax.tasks.addition import addition_task
from grpo_jax.text.problem import Problem
from grpo_jax.text.prompt import format_prompt

add = addition_task(3)


def two_answers(index, *, seed, split):
    problem = add(index, seed=seed, split=split)
    return Problem(problem.question, f"{problem.answer} (or {problem.answer}.0)", {})


def nearly_solved(index, *, seed, split):
    """Starts a long completion, but only once in 16 problems after the 20th rollout; the others only lack a tag."""
    problem = add(index, seed=seed, split=split)
    prompt = format_prompt(problem.question)
    if index < 320 or index % 16 == 0:
        prompt += " <think> {a}+{b}+0=".format(**{name: value % 10 for name, value in problem.metadata.items()})
    else:
        prompt += f" <think> {problem.answer} </think> <answer> {problem.answer}"
    return Problem(prompt, problem.answer, {})


def longer(problems, texts, lengths):
    return lengths / 100
'''


def shuffle_layers(folder):
    """Writes the tiny base with each of its layers' matrices shuffled."""
    model_cfg, params = load(find_model("tiny"))
    draw = np.random.default_rng(0)

    def shuffle(x):
        rows = np.asarray(x).reshape(len(x), -1)
        return jnp.asarray(np.stack([draw.permutation(row) for row in rows]).reshape(x.shape))

    save(folder, model_cfg, params | {"layers": jax.tree.map(shuffle, params["layers"])})


def write_random_model(folder, config):
    """Writes a random model with large logits and the tokenizer of the tiny base."""
    tiny = find_model("tiny")
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    hf_config = json.loads((tiny / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(hf_config))
    model_cfg = read_model_config(folder)
    params = init_params(model_cfg, jax.random.key(0))
    params["head"] = jax.tree.map(lambda x: HEAD_SCALE * x, params["head"])
    tensors = parameter_tensors(model_cfg, "model.")
    write_safetensors(folder, tensors_from_params(tensors, params, {}, "float32"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "own.py").write_text(OWN)
    (folder / "template.txt").write_text("{question}")
    shuffle_layers(folder / "shuffled")
    write_random_model(folder / "dense", SMALL_MODEL)
    write_random_model(folder / "mixture", SMALL_MODEL | MIXTURE)
    return folder


def run_on_one_device(workdir, keys) -> str:
    """Runs `main` with the flags of XLA that a user has, and returns what it prints.

    On several devices, or without optimizations, sampler and trainer round bfloat16 in the same way.
    """
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    command = [sys.executable, "-m", "grpo_jax.main", "--config=r1zero", f"--workdir={workdir}", *flags]
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=REPO, env=environ, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", SICK_RUNS)
def test_a_sick_run_is_warned_of(tmp_path, capsys, inputs, name):
    """The console shows each warning of warnings.jsonl once."""
    keys, expected = SICK_RUNS[name]
    keys = SMALL | {key: str(value).replace("{inputs}", str(inputs)) for key, value in keys.items()}
    if DRIFTING.items() <= SICK_RUNS[name][0].items():
        console = run_on_one_device(tmp_path / "run", keys)
    else:
        run_main(tmp_path / "run", keys)
        console = "".join(capsys.readouterr())
    found = read_warnings(tmp_path / "run")
    assert expected <= found.keys()
    assert all(console.count(line["text"]) == 1 for line in found.values())


def test_a_sick_run_provokes_each_symptom():
    assert set().union(*(expected for _, expected in SICK_RUNS.values())) == {row.name for row in SYMPTOMS}


@pytest.mark.slow
@pytest.mark.parametrize(("config", "seed"), [("r1zero", 0), ("r1zero", 1), ("r1zero", 2), ("dapo", 0)])
def test_healthy_runs_are_not_warned_of(tmp_path, config, seed):
    """Other programs may slow down a run at any time."""
    assert run_main(tmp_path / "run", {"seed": seed}, f"configs/{config}.py").keys() <= {"slower"}
